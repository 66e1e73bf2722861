import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import os
import pathlib
import re
import signal
import threading
import time

import jax
import numpy as np
import PIL.Image
import pytest
from array_record.python import array_record_module

import vidgen
from vidgen import (
  clips,
  diffusion,
  errors,
  ledger,
  preemption,
  prepare,
  progress,
  prompts,
  repro,
  sample,
  sharding,
  video,
)
from vidgen.models import base


class FakePipeline:
  """Stands in for a loaded model: its pixels say which clip was asked for."""

  fps = 8
  why_mesh = ""
  takes_text, takes_fps = True, False
  components = ()

  def __init__(self):
    self.calls = []
    self.fail_at = None
    self.model = self
    self.mesh = sharding.make_mesh(None)

  def plan(self, request):
    if request.num_frames == 999:
      raise errors.InputError("num_frames: 999 are too many; at most 49.")

  def sample(self, prompt, *, progress, output, **arguments):
    self.calls.append({"prompt": prompt, "output": output, **arguments})
    if self.fail_at == len(self.calls):
      raise errors.InputError("prompt: holds the number 13.")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if "unlucky" in prompts:
      raise errors.InputError("prompt: is unlucky.")
    with progress.stage("denoise"):
      for done in range(1, 4):
        progress.step(done, 3)
    ids = np.asarray(arguments["clips"])
    value = 10.0 * np.broadcast_to(arguments["seed"], ids.shape) + ids
    latents = np.zeros((len(ids), 2, 4, 4, 16), np.float32)
    latents += value[:, None, None, None, None]
    return latents if output == "latents" else self.decode(latents)

  def decode(self, latents, output="uint8", *, tiling=False, slicing=False):
    assert output == "uint8"
    value = latents[:, 0, 0, 0, 0].astype(np.uint8)
    frames = np.zeros((len(latents), 5, 32, 32, 3), np.uint8)
    return frames + value[:, None, None, None, None]


@pytest.fixture
def pipeline(monkeypatch, tmp_path_factory):
  fake = FakePipeline()

  def load(checkpoint, *, check, **arguments):
    # What tells checkpoints apart is what is in their folders.
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "scheduler").mkdir()
    config = folder / "scheduler/scheduler_config.json"
    config.write_text(json.dumps({"name": checkpoint}))
    check(fake, folder)
    fake.loaded = {"checkpoint": checkpoint, **arguments}
    return fake

  monkeypatch.setattr(vidgen, "load", load, raising=False)
  return fake


def records(out):
  text = (out / "clips.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def config(tmp_path, **fields):
  return sample.SampleConfig(out=os.fspath(tmp_path / "out"), **fields)


def test_one_prompt(tmp_path, pipeline):
  summary = sample.run(
    config(
      tmp_path,
      prompt="A panda.",
      checkpoint="some/model",
      num_steps=3,
      guidance_scale=6.0,
      options={"dynamic_guidance": True},
      mesh={"cfg": 2},
    )
  )
  assert pipeline.loaded == {
    "checkpoint": "some/model",
    "dtype": "bfloat16",
    "mesh": {"cfg": 2},
    "revision": None,
    "residency": "all",
    "lora": None,
    "lora_scale": 1.0,
    "executables": None,
  }
  assert pipeline.calls == [
    {
      "prompt": "A panda.",
      "negative_prompt": "",
      "output": "uint8",
      "clips": [0],
      "seed": 0,
      "image": None,
      "video": None,
      "num_frames": None,
      "height": None,
      "width": None,
      "num_steps": 3,
      "guidance_scale": 6.0,
      "sampler": None,
      "tiling": False,
      "dynamic_guidance": True,
    }
  ]
  (file,) = summary.files
  assert video.read_video(file).shape == (5, 32, 32, 3)
  assert list(summary.seconds) == ["load", "denoise", "write"]
  (record,) = records(tmp_path / "out")
  path = pathlib.Path(file)
  assert 0 <= record.pop("seconds") < 60
  assert 0 <= time.time() - record.pop("time") < 600
  assert record == {
    "index": 0,
    "name": path.stem,
    "status": "done",
    "num_steps": 3,
    "guidance_scale": 6.0,
    "bytes": {path.name: path.stat().st_size},
    "sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest()},
    "frames_sha256": hashlib.sha256(bytes(5 * 32 * 32 * 3)).hexdigest(),
    "prompt": "A panda.",
    "negative_prompt": "",
    "seed": 0,
    "clip": 0,
    "files": [os.path.basename(file)],
    "size": [32, 32],
    "frames": 5,
    "fps": 8,
  }
  # Never the prompt: it may hold anything.
  assert len(os.path.basename(file)) == 6 + 1 + 12 + len(".mp4")
  assert os.path.basename(file).startswith("000000_")


def test_a_file_of_prompts(tmp_path, pipeline):
  PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
  video.write_mp4(tmp_path / "a.mp4", np.zeros((2, 16, 16, 3), np.uint8), 8)
  lines = [
    {"prompt": "zero"},
    {"prompt": "one", "seed": 5, "num_steps": 2, "height": 64},
    {"prompt": "two", "image": "a.png", "negative_prompt": "blurry"},
    {"prompt": "three", "video": "a.mp4", "strength": 0.5},
  ]
  path = tmp_path / "a.jsonl"
  path.write_text("\n".join(map(json.dumps, lines)))
  sample.run(
    config(tmp_path, prompts=os.fspath(path), videos_per_prompt=2, num_steps=9)
  )
  seeds = [(c["seed"], *c["clips"]) for c in pipeline.calls]
  assert seeds == [
    *[(0, 0), (0, 1)],
    # A seed of the line's own: its clips count from 0.
    *[(5, 0), (5, 1)],
    *[(0, 4), (0, 5)],
    *[(0, 6), (0, 7)],
  ]
  steps = [c["num_steps"] for c in pipeline.calls]
  assert steps == [9, 9, 2, 2, 9, 9, 9, 9]
  assert pipeline.calls[2]["height"] == 64
  assert pipeline.calls[4]["image"] == os.fspath(tmp_path / "a.png")
  assert pipeline.calls[4]["negative_prompt"] == "blurry"
  assert "strength" not in pipeline.calls[4]
  assert pipeline.calls[6]["strength"] == 0.5
  got = records(tmp_path / "out")
  assert [r["index"] for r in got] == list(range(8))
  names = {name for r in got for name in r["files"]}
  beside = {"clips.jsonl", "manifest.json", "report.html", "posters"}
  assert names | beside == {*os.listdir(tmp_path / "out")}
  assert len({name.split("_")[1] for name in names}) == 8


def test_a_line_with_a_seed_is_the_same_clip_alone(tmp_path, pipeline):
  path = tmp_path / "a.csv"
  path.write_text("prompt,seed\nA cat.,\nA panda.,7\n")
  batch = sample.run(config(tmp_path, prompts=os.fspath(path)))
  alone = sample.run(config(tmp_path, prompt="A panda.", seed=7))
  assert pipeline.calls[1] == pipeline.calls[2]
  digest = lambda file: os.path.basename(file).split("_")[1]
  assert digest(batch.files[1]) == digest(alone.files[0])


def test_videos_per_prompt_of_a_line_never_repeats_a_clip(tmp_path, pipeline):
  path = tmp_path / "a.csv"
  path.write_text("prompt,videos_per_prompt\na,3\nb,\nc,2\n")
  sample.run(config(tmp_path, prompts=os.fspath(path)))
  assert [c["clips"] for c in pipeline.calls] == [[i] for i in range(6)]


def test_every_format_at_once(tmp_path, pipeline):
  summary = sample.run(
    config(
      tmp_path,
      prompt="A panda.",
      formats=("npz,mp4", "gif", "png", "gif"),
      fps=12.0,
      seed=3,
    )
  )
  assert [os.path.splitext(f)[1] for f in summary.files] == [
    ".npz",
    ".mp4",
    ".gif",
    "",
  ]
  assert pipeline.calls[0]["output"] == "latents"
  with np.load(summary.files[0]) as file:
    np.testing.assert_array_equal(
      file["latents"], np.full((2, 4, 4, 16), 30, np.float32)
    )
  png = video.read_image(os.path.join(summary.files[3], "000004.png"))
  assert (np.asarray(png) == 30).all()
  (record,) = records(tmp_path / "out")
  assert record["fps"] == 12
  assert len(record["files"]) == 4
  assert "decode" in summary.seconds


def test_latents_alone_are_not_decoded(tmp_path, pipeline):
  pipeline.decode = None
  job = config(tmp_path, prompt="A panda.", formats=("npz",))
  assert len(sample.run(job).files) == 1


@pytest.mark.parametrize(
  "change",
  [
    {"prompt": "A cat."},
    {"negative_prompt": "blurry"},
    {"seed": 1},
    {"num_steps": 3},
    {"checkpoint": "other"},
    {"options": {"dynamic_guidance": True}},
  ],
)
def test_names_tell_configs_apart(tmp_path, pipeline, change):
  one = config(tmp_path, prompt="A panda.")
  names = set()
  for job in (one, dataclasses.replace(one, **change)):
    names.add(os.path.basename(sample.run(job).files[0]))
  assert len(names) == 2


def test_names_do_not_depend_on_a_strength_without_a_video():
  values = dict.fromkeys(field.name for field in dataclasses.fields(clips.Clip))
  values |= {"where": "", "index": 0, "clip": 0, "prompt": "a", "seed": 0}
  values["negative_prompt"] = ""
  digests = clips.Digests({"lora": None})
  names = {
    digests.of(clips.Clip(**{**values, "strength": strength}))
    for strength in (0.8, 0.5)
  }
  assert len(names) == 1


def test_loras_of_one_name_are_all_recorded(tmp_path, pipeline):
  paths = []
  for name in ("a", "b"):
    (tmp_path / name).mkdir()
    paths.append(tmp_path / name / "pytorch_lora_weights.safetensors")
    paths[-1].write_text(name)
  lora = {os.fspath(path): 1.0 for path in paths}
  sample.run(config(tmp_path, prompt="a", lora=lora))
  held = json.loads((tmp_path / "out/manifest.json").read_text())["weights"]
  marks = [held[name]["sha256"] for name in held if name.startswith("lora")]
  assert [len(mark) for mark in marks] == [1, 1] and marks[0] != marks[1]


def test_names_depend_on_the_weights_of_loras(tmp_path):
  values = dict.fromkeys(field.name for field in dataclasses.fields(clips.Clip))
  values |= {"where": "", "index": 0, "clip": 0, "prompt": "a", "seed": 0}
  values |= {"negative_prompt": "", "strength": 0.8}
  zoom, pan = os.fspath(tmp_path / "zoom"), os.fspath(tmp_path / "pan")
  for path in (zoom, pan):
    pathlib.Path(path).write_text(path)
  name = lambda lora: clips.Digests({"lora": lora}).of(clips.Clip(**values))
  assert name({zoom: 1.0, pan: 2.0}) == name({pan: 2, zoom: 1})
  different = (None, zoom, {zoom: 1.0, pan: 2.0}, {zoom: 2.0, pan: 1.0})
  assert len(set(map(name, different))) == 4


def test_names_do_not_depend_on_where_files_lie(tmp_path, pipeline):
  names = set()
  for folder in ("a", "b"):
    (tmp_path / folder).mkdir()
    image = tmp_path / folder / "a.png"
    PIL.Image.new("RGB", (8, 8)).save(image)
    job = config(tmp_path / folder, prompt="A panda.", image=os.fspath(image))
    names.add(os.path.basename(sample.run(job).files[0]))
  assert len(names) == 1


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({}, "--prompt=TEXT or --prompts=FILE"),
    ({"prompt": "a", "prompts": "a.txt"}, "--prompt=TEXT or"),
    ({"prompts": "no.txt"}, "no.txt"),
    ({"prompt": "a", "height": 0}, "height must be at least 1"),
    ({"prompt": "a", "num_frames": 0}, "num_frames must be at least 1"),
    ({"prompt": "a", "dtype": "bfloat"}, "Did you mean bfloat16"),
    ({"prompt": "a", "residency": "al"}, "Did you mean all"),
    ({"prompt": "a", "formats": ("mp5",)}, "Did you mean mp4"),
    ({"prompt": "a", "formats": ()}, "formats is empty"),
    ({"prompt": "a", "fps": 0.0}, "fps must be from 0.001"),
    ({"prompt": "a", "fps": float("nan")}, "fps must be from 0.001"),
    ({"prompt": "a", "seed": 2**32}, "seed must be from 0"),
    ({"prompt": "a", "sampler": "euler"}, "sampler must be one of"),
    ({"prompt": "a", "image": "no.png"}, "no.png: there is no such image"),
    ({"prompt": "a", "video": "no.mp4"}, "no.mp4: there is no such video"),
    ({"prompt": "a", "strength": 0.5}, "strength needs a video"),
    ({"prompt": "a", "lora": "no.st"}, "no.st: there is no such LoRA"),
    ({"prompt": "a", "lora": {"no.st": 1.0}}, "no.st: there is no such LoRA"),
    ({"prompt": "a", "lora_scale": float("inf")}, "must be finite"),
    ({"prompt": "a", "options": {"seed": 1}}, "'seed' is no option"),
  ],
)
def test_mistakes_are_told_before_the_weights_are_read(
  tmp_path, pipeline, fields, message
):
  with pytest.raises(errors.InputError, match=message) as caught:
    sample.run(config(tmp_path, **fields))
  assert "\n" not in str(caught.value)
  assert not hasattr(pipeline, "loaded")
  assert not (tmp_path / "out").exists()


def test_image_and_video_exclude_each_other(tmp_path, pipeline):
  PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
  video.write_mp4(tmp_path / "a.mp4", np.zeros((2, 16, 16, 3), np.uint8), 8)
  path = tmp_path / "a.jsonl"
  path.write_text('{"prompt": "a", "image": "a.png", "video": "a.mp4"}')
  with pytest.raises(errors.InputError, match=r"a.jsonl:1: .*exclude"):
    sample.run(config(tmp_path, prompts=os.fspath(path)))
  path.write_text('{"prompt": "a", "strength": 0.5}')
  with pytest.raises(errors.InputError, match=r"a.jsonl:1: strength"):
    sample.run(config(tmp_path, prompts=os.fspath(path)))
  path.write_text('{"prompt": "a", "image": "b.png"}')
  with pytest.raises(errors.InputError, match=r"a.jsonl:1: .*b.png"):
    sample.run(config(tmp_path, prompts=os.fspath(path)))


def test_a_folder_that_cannot_be_written(tmp_path, pipeline):
  (tmp_path / "out").write_text("a file")
  with pytest.raises(errors.StorageError, match="cannot write"):
    sample.run(config(tmp_path, prompt="a"))
  assert not hasattr(pipeline, "loaded")


def test_a_clip_that_cannot_be_made_stops_no_other(tmp_path, pipeline):
  path = tmp_path / "a.txt"
  path.write_text("a\nb\nc\n")
  pipeline.fail_at = 2
  summary = sample.run(config(tmp_path, prompts=os.fspath(path)))
  assert summary.clips == 2
  message = r"1 of 3 clips .*a.txt:2: prompt: holds the number 13"
  with pytest.raises(errors.InputError, match=message):
    summary.check()
  found = {r["index"]: r["status"] for r in records(tmp_path / "out")}
  assert found == {0: "done", 1: "failed", 2: "done"}
  # It is tried again, and the others are there.
  pipeline.calls.clear()
  again = sample.run(config(tmp_path, prompts=os.fspath(path)))
  assert [call["prompt"] for call in pipeline.calls] == ["b"]
  assert (again.clips, again.there, again.failures) == (1, 2, [])
  assert [r["status"] for r in ledger.read(tmp_path / "out")] == ["done"] * 3


BAD = """prompt,num_frames,image
a,,
b,999,
c,x,
d,,no.png
"e",1,2,3
f,,
"""


def test_a_bad_line_takes_as_many_numbers_as_it_asks_for(tmp_path, pipeline):
  path = tmp_path / "a.jsonl"
  bad = (
    {"image": "b.png", "videos_per_prompt": 3},
    {"height": -1, "videos_per_prompt": 2},
    {"height": -1, "videos_per_prompt": 0},
  )
  lines = [{"prompt": "a", **fields} for fields in (*bad, {})]
  path.write_text("\n".join(map(json.dumps, lines)))
  job = config(tmp_path, prompts=os.fspath(path), videos_per_prompt=4)
  planned, failures = sample.sample_plan.sift(job)
  assert [failure.index for failure in failures] == [0, 3, 5]
  assert [clip.index for clip in planned] == [9, 10, 11, 12]


def test_what_is_no_image_may_be_a_video(tmp_path):
  frames = np.zeros((3, 32, 32, 3), np.uint8)
  video.write_mp4(tmp_path / "a.mp4", frames, 8)
  path = tmp_path / "a.jsonl"
  lines = [{"prompt": "a", name: "a.mp4"} for name in ("image", "video")]
  path.write_text("\n".join(map(json.dumps, lines)))
  job = config(tmp_path, prompts=os.fspath(path))
  planned, failures = sample.sample_plan.sift(job)
  assert ([f.index for f in failures], [c.index for c in planned]) == ([0], [1])


def test_bad_lines_are_told_and_counted_first(tmp_path, pipeline):
  path = tmp_path / "a.csv"
  path.write_text(BAD)
  said = io.StringIO()
  job = config(tmp_path, prompts=os.fspath(path), videos_per_prompt=2)
  summary = sample.run(job, progress.create(said))
  assert [call["prompt"] for call in pipeline.calls] == ["a", "a", "f", "f"]
  # A line that fails takes its numbers: mended, it changes no other's.
  assert [call["clips"] for call in pipeline.calls] == [[0], [1], [10], [11]]
  for line in ("3: num_frames: 999", "4: num_frames", "5: .*no.png", "6: has"):
    assert re.search(rf"a.csv:{line}", said.getvalue())
    assert any(re.search(rf"a.csv:{line}", x) for x in summary.failures)
  held = ledger.read(tmp_path / "out")
  assert sum(r["status"] == "failed" for r in held) == 5
  with pytest.raises(errors.InputError, match=r"5 of 9 clips.*a.csv:"):
    summary.check()


def test_a_negative_prompt_that_nothing_reads_is_told_first(
  tmp_path, pipeline, monkeypatch
):
  plan = lambda request: base.Plan(
    num_frames=5,
    height=32,
    width=32,
    latents=(2, 4, 4, 16),
    padding=0,
    schedule=diffusion.karras(0.1, 1.0, 2),
    sampler="ddim",
    guidance=request.guidance_scale and np.full(2, request.guidance_scale),
    options={},
    fps=8,
  )
  monkeypatch.setattr(pipeline, "plan", plan)
  job = config(tmp_path, prompt="a", negative_prompt="blurry")
  with pytest.raises(errors.InputError, match="negative_prompt"):
    sample.run(job)
  assert not pipeline.calls
  assert not (tmp_path / "out").exists()
  # A folder of the user's own stays, whatever fails in it.
  (tmp_path / "out").mkdir()
  with pytest.raises(errors.InputError, match="negative_prompt"):
    sample.run(job)
  assert (tmp_path / "out").exists()
  path = tmp_path / "a.csv"
  path.write_text("prompt,guidance_scale\na,6\nb,\n")
  job = dataclasses.replace(job, prompt=None, prompts=os.fspath(path))
  (failure,) = sample.run(job).failures
  assert "a.csv:3: negative_prompt" in failure


def test_a_full_disk_leaves_no_half_line(tmp_path, pipeline, monkeypatch):
  sample.run(config(tmp_path, prompt="a"))
  before = (tmp_path / "out/clips.jsonl").read_bytes()
  monkeypatch.setattr(clips, "write", lambda *arguments: [])

  fsync = os.fsync

  def fail(descriptor):
    if os.readlink(f"/proc/self/fd/{descriptor}").endswith("clips.jsonl"):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    fsync(descriptor)

  monkeypatch.setattr(os, "fsync", fail)
  with pytest.raises(errors.StorageError, match=r"clips.jsonl.*No space"):
    sample.run(config(tmp_path, prompt="b"))
  assert (tmp_path / "out/clips.jsonl").read_bytes() == before


def test_plain_progress_lines(tmp_path, pipeline):
  stream = io.StringIO()
  path = tmp_path / "a.txt"
  path.write_text("a\nb\n")
  told = progress.create(stream)
  sample.run(config(tmp_path, prompts=os.fspath(path)), told)
  lines = stream.getvalue().splitlines()
  assert lines[0] == "load ..."
  assert lines[1].startswith("load took ")
  assert lines[2] == "clip 1/2 denoise ..."
  assert lines[3] == "clip 1/2 step 1/3"
  assert lines[4].startswith("clip 1/2 step 2/3, ")
  assert " s/step, " in lines[4]
  # A stage, three steps and its end; files are told as they are written.
  assert sum(line.startswith("clip 2/2") for line in lines) == 5
  assert sum(line.endswith(".mp4") for line in lines) == 2
  assert "\x1b" not in stream.getvalue()


def test_a_line_every_tenth_of_the_steps():
  stream = io.StringIO()
  told = progress.Lines(stream)
  with told, told.stage("denoise"):
    for done in range(1, 51):
      told.step(done, 50)
  steps = [x for x in stream.getvalue().splitlines() if x.startswith("step")]
  assert len(steps) == 11
  assert steps[-1].startswith("step 50/50, ")


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_a_bar_on_a_terminal(monkeypatch):
  monkeypatch.setenv("TERM", "xterm-256color")
  monkeypatch.setenv("COLUMNS", "100")
  stream = Terminal()
  told = progress.create(stream)
  with told:
    told.clip(2, 5)
    with told.stage("denoise"):
      told.step(1, 4)
      told.step(2, 4)
      told._bar.refresh()
    told.say("out/[a].mp4")
  assert "clip 2/5 denoise" in stream.getvalue()
  assert "2/4, 0.00 s/step, 0 s left" in stream.getvalue()
  assert "out/[a].mp4" in stream.getvalue()


def many(tmp_path, count, **fields):
  path = tmp_path / "many.txt"
  path.write_text("".join(f"prompt {i}\n" for i in range(count)))
  return config(tmp_path, prompts=os.fspath(path), **fields)


def hashes(out):
  return {r["name"]: r["frames_sha256"] for r in ledger.read(out)}


def test_what_is_there_is_not_made_again(tmp_path, pipeline):
  job = many(tmp_path, 3)
  sample.run(job)
  out = tmp_path / "out"
  want, before = hashes(out), (out / "clips.jsonl").read_bytes()
  pipeline.calls.clear()
  del pipeline.loaded
  summary = sample.run(job)
  assert (summary.clips, summary.there) == (0, 3)
  assert not pipeline.calls and not hasattr(pipeline, "loaded")
  assert (out / "clips.jsonl").read_bytes() == before
  assert "3 clips were in" in str(summary)
  # A file that is gone, one that was cut short, and one that was changed.
  one, two, three = (out / f"{name}.mp4" for name in sorted(want))
  one.unlink()
  two.write_bytes(two.read_bytes()[:-1])
  data = bytearray(three.read_bytes())
  data[-1] ^= 1
  three.write_bytes(data)
  assert sample.run(job).clips == 2
  assert sample.run(job).clips == 0
  said = io.StringIO()
  assert sample.run(job, progress.create(said), verify=True).clips == 1
  assert f"{three}: is not as it was written" in said.getvalue()
  assert hashes(out) == want
  # Another format is another file.
  job = dataclasses.replace(job, formats=("mp4", "gif"))
  assert sample.run(job).clips == 3
  # At another rate the same frames are other files.
  for fps, made in ((8.0, 0), (16.0, 3), (16.0, 0), (None, 3)):
    job = dataclasses.replace(job, fps=fps)
    assert sample.run(job).clips == made
  assert hashes(out) == want


def test_a_torn_line_and_a_lost_ledger(tmp_path, pipeline):
  job = many(tmp_path, 3)
  sample.run(job)
  out = tmp_path / "out"
  path, want = out / "clips.jsonl", hashes(out)
  data = path.read_bytes()
  path.write_bytes(data[:-20])
  assert len(ledger.read(out)) == 2
  assert sample.run(job).clips == 1
  assert hashes(out) == want
  assert len(path.read_bytes().splitlines()) == 3
  path.unlink()
  assert sample.run(job).clips == 3
  assert hashes(out) == want


def test_what_a_killed_job_left_is_swept(tmp_path, pipeline):
  job = many(tmp_path, 2)
  sample.run(job)
  out = tmp_path / "out"
  mine = ledger.read(out)[0]["name"]
  leftover = out / f".{mine}.0123456789abcdef.tmp.mp4"
  leftover.write_bytes(b"half")
  folder = out / f".{mine}.0123456789abcdef.old"
  folder.mkdir()
  manifest = out / ".manifest.0123456789abcdef.tmp.json"
  manifest.write_bytes(b"half")
  # Another job's, which may be at work.
  other = out / ".000009_0123456789ab.0123456789abcdef.tmp.mp4"
  other.write_bytes(b"half")
  sample.run(job)
  assert not leftover.exists() and not folder.exists() and other.exists()
  assert not manifest.exists()


def test_two_jobs_do_not_write_one_ledger(tmp_path, pipeline):
  job = many(tmp_path, 2)
  (tmp_path / "out").mkdir()
  held = ledger.Ledger(tmp_path / "out", 0, 2)
  try:
    part = dataclasses.replace(job, shard="0/2")
    with pytest.raises(errors.InputError, match="another job is writing"):
      sample.run(part)
    # Parts of another split would make some clips twice.
    for shard in ("0/1", "1/3"):
      other = dataclasses.replace(job, shard=shard)
      with pytest.raises(errors.InputError, match="splits the work in another"):
        sample.run(other)
    # Another part has a ledger of its own.
    assert sample.run(dataclasses.replace(job, shard="1/2")).clips == 1
  finally:
    held.close()
  assert sample.run(job).clips == 1


def test_of_two_jobs_at_once_one_is_refused(tmp_path, pipeline, monkeypatch):
  job, made = many(tmp_path, 3), pipeline.sample
  said = []

  def sample_and_start_another(prompt, **arguments):
    monkeypatch.setattr(pipeline, "sample", made)
    with pytest.raises(errors.InputError) as caught:
      sample.run(job)
    said.append(str(caught.value))
    return made(prompt, **arguments)

  monkeypatch.setattr(pipeline, "sample", sample_and_start_another)
  assert sample.run(job).clips == 3
  assert "clips.jsonl: another job is writing it" in said[0]
  lines = (tmp_path / "out/clips.jsonl").read_text().splitlines()
  assert [json.loads(line)["index"] for line in lines] == [0, 1, 2]
  held = json.loads((tmp_path / "out/manifest.json").read_text())
  assert [a["exit"]["reason"] for a in held["attempts"]] == ["done"]


def test_shards_share_the_work(tmp_path, pipeline):
  whole = many(tmp_path, 7, batch_size=2)
  sample.run(whole)
  want = hashes(tmp_path / "out")
  parts = dataclasses.replace(whole, out=os.fspath(tmp_path / "parts"))
  counts = [
    sample.run(dataclasses.replace(parts, shard=f"{i}/3")).clips
    for i in range(3)
  ]
  assert counts == [3, 2, 2]
  assert hashes(tmp_path / "parts") == want
  # However the work is split: it is done.
  pipeline.calls.clear()
  assert sample.run(parts).there == 7
  assert not pipeline.calls


@pytest.mark.parametrize("data", [b"a\n", b"a\n\xff\n"])
def test_a_part_without_clips_is_done(tmp_path, pipeline, data):
  path = tmp_path / "a.txt"
  path.write_bytes(data)
  job = config(tmp_path, prompts=os.fspath(path), shard="1/2")
  summary = sample.run(job)
  assert (summary.clips, summary.there) == (0, 0)
  assert len(summary.failures) == len(data.splitlines()) - 1
  assert not pipeline.calls


def test_the_number_of_shards_may_change(tmp_path, pipeline):
  job = many(tmp_path, 4)
  pipeline.fail_at = 2
  assert len(sample.run(job).failures) == 1
  pipeline.fail_at = None
  job = dataclasses.replace(job, formats=("mp4", "gif"))
  halves = [dataclasses.replace(job, shard=f"{i}/2") for i in range(2)]
  assert [sample.run(half).clips for half in halves] == [2, 2]
  for again in (*halves, job):
    summary = sample.run(again)
    assert not summary.clips and not summary.failures
  told = ledger.read(tmp_path / "out")
  assert [r["status"] for r in told] == ["done"] * 4


def test_names_of_files_may_be_any_bytes(tmp_path, pipeline):
  path = tmp_path / os.fsdecode(b"\xff.txt")
  path.write_text("a\n")
  summary = sample.run(config(tmp_path, prompts=os.fspath(path)))
  assert summary.clips == 1 and not summary.failures
  (record,) = ledger.read(tmp_path / "out")
  assert record["where"] == f"{path}:1"
  held = json.loads((tmp_path / "out/manifest.json").read_text())
  assert held["config"]["prompts"] == os.fspath(path)


def test_the_manifest_is_of_the_jobs_own_clips(tmp_path, pipeline):
  path = tmp_path / "a.txt"
  path.write_bytes(b"a\n\xff\nb\n")
  job = config(tmp_path, prompts=os.fspath(path))
  for seed in (1, 2, 1):
    sample.run(dataclasses.replace(job, seed=seed))
  alone = []
  for seed in (1, 2):
    alone.append(tmp_path / f"alone{seed}")
    sample.run(dataclasses.replace(job, seed=seed, out=os.fspath(alone[-1])))
  held = json.loads((tmp_path / "out/manifest.json").read_text())["outputs"]
  assert [clip["index"] for clip in held["clips"]] == [0, 2]
  assert [clip["index"] for clip in held["failed"]] == [1]
  verdicts = [repro.check(tmp_path / "out", other).verdict for other in alone]
  assert verdicts == ["identical", "different"]
  # Split afterwards, it is more than its first manifest tells.
  path.write_text("a\nb\nc\nd\n")
  for out in (tmp_path / "out", tmp_path / "four"):
    for i in range(2):
      parts = {"shard": f"{i}/2", "out": os.fspath(out), "seed": 1}
      sample.run(dataclasses.replace(job, **parts))
  report = repro.check(tmp_path / "out", tmp_path / "four")
  assert report.outputs.lines[0] == "clips in both: 4, of them equal 4"


@pytest.mark.parametrize("shard", ["3/3", "1", "-1/2", "a/b", "0/0"])
def test_bad_shards(tmp_path, pipeline, shard):
  with pytest.raises(errors.InputError, match="shard must be i/n"):
    sample.run(many(tmp_path, 2, shard=shard))


def test_batches_have_one_shape_and_are_filled_up(tmp_path, pipeline):
  path = tmp_path / "a.csv"
  path.write_text("prompt,height,seed\na,,\nb,64,\nc,,5\nd,,\ne,64,\n")
  job = config(tmp_path, prompts=os.fspath(path), batch_size=2)
  sample.run(job)
  calls = [(c["prompt"], c["height"], c["seed"]) for c in pipeline.calls]
  assert calls == [
    (["a", "c"], None, [0, 5]),
    (["d", "d"], None, [0, 0]),
    (["b", "e"], 64, [0, 0]),
  ]
  assert [c["clips"] for c in pipeline.calls] == [[0, 0], [3, 3], [1, 4]]
  frames = lambda out: [r["frames_sha256"] for r in ledger.read(out)]
  batched = frames(tmp_path / "out")
  assert len(batched) == 5
  one = dataclasses.replace(job, batch_size=1, out=os.fspath(tmp_path / "one"))
  sample.run(one)
  assert frames(tmp_path / "one") == batched
  # Bits may depend on the size of a batch, so names do.
  assert not hashes(tmp_path / "one").keys() & hashes(tmp_path / "out").keys()


def test_of_a_batch_that_fails_the_others_are_made(tmp_path, pipeline):
  path = tmp_path / "a.txt"
  path.write_text("a\nunlucky\nb\nc\n")
  job = config(tmp_path, prompts=os.fspath(path), batch_size=3)
  summary = sample.run(job)
  assert summary.clips == 3
  (failure,) = summary.failures
  assert "a.txt:2: prompt: is unlucky" in failure
  # Alone they are filled up, too: the same program makes the same bits.
  assert all(len(call["clips"]) == 3 for call in pipeline.calls)


def test_a_folder_of_another_kind_of_run_is_refused(tmp_path, pipeline):
  out = tmp_path / "out"
  out.mkdir()
  manifest = out / "manifest.json"
  for text in ('{"command": "train"}', "[]", "{}"):
    manifest.write_text(text)
    with pytest.raises(errors.InputError, match="choose another --out"):
      sample.run(many(tmp_path, 2))
    assert manifest.read_text() == text
  assert not pipeline.calls


def test_many_bad_lines_are_told_in_part_and_noted_once(tmp_path, pipeline):
  path = tmp_path / "a.csv"
  path.write_text("prompt,seed\na,1\n" + "b,x\n" * 30)
  job = config(tmp_path, prompts=os.fspath(path))
  for _ in range(2):
    said = io.StringIO()
    assert len(sample.run(job, progress.create(said)).failures) == 30
    assert said.getvalue().count("a.csv:") == 20
    assert "more cannot be made" in said.getvalue()
  lines = (tmp_path / "out/clips.jsonl").read_text().splitlines()
  assert len(lines) == 31


def test_a_job_that_is_done_keeps_its_record(tmp_path, pipeline):
  job = many(tmp_path, 2)
  sample.run(job)
  before = (tmp_path / "out/manifest.json").read_bytes()
  sample.run(job)
  assert (tmp_path / "out/manifest.json").read_bytes() == before
  said = io.StringIO()
  sample.run(dataclasses.replace(job, seed=9), progress.create(said))
  assert "2 clips of other prompts, settings or weights are in" in (
    said.getvalue()
  )


def test_a_job_of_many_clips_has_few_lines(tmp_path, pipeline):
  said = io.StringIO()
  sample.run(many(tmp_path, 40), progress.create(said))
  lines = said.getvalue().splitlines()
  assert 10 < len(lines) < 60
  assert not any("clip 30/40" in line for line in lines)


def test_clips_that_do_not_fit_stop_no_others(tmp_path, pipeline, monkeypatch):
  path = tmp_path / "a.csv"
  path.write_text("prompt,height\na,\nb,640\nc,640\nd,\ne,640\n")
  made, tried = pipeline.sample, []

  def sample_or_not(prompt, *, height, **arguments):
    tried.append(height)
    if height == 640:
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.")
    return made(prompt, height=height, **arguments)

  monkeypatch.setattr(pipeline, "sample", sample_or_not)
  summary = sample.run(config(tmp_path, prompts=os.fspath(path), batch_size=2))
  assert (summary.clips, len(summary.failures)) == (2, 3)
  assert all("more memory" in failure for failure in summary.failures)
  assert "a.csv:3: " in summary.failures[0]
  assert tried == [None, 640]

  def broken(*arguments, **others):
    raise jax.errors.JaxRuntimeError("INTERNAL: a device is lost.")

  monkeypatch.setattr(pipeline, "sample", broken)
  with pytest.raises(jax.errors.JaxRuntimeError, match="is lost"):
    sample.run(config(tmp_path, prompt="a", seed=1))


def test_a_signal_stops_between_two_steps(tmp_path, pipeline, monkeypatch):
  job = many(tmp_path, 3)
  sampled = pipeline.sample

  def sample_and_signal(prompt, **arguments):
    if len(pipeline.calls) == 1:
      os.kill(os.getpid(), signal.SIGTERM)
      deadline = time.monotonic() + 10
      while not stop[0]._asked and time.monotonic() < deadline:
        time.sleep(0.01)
    return sampled(prompt, **arguments)

  stop, enter = [], preemption.Preemption.__enter__
  monkeypatch.setattr(
    preemption.Preemption,
    "__enter__",
    lambda self: stop.append(self) or enter(self),
  )
  monkeypatch.setattr(pipeline, "sample", sample_and_signal)
  with pytest.raises(errors.PreemptedError, match="the same command"):
    sample.run(job)
  assert [r["index"] for r in ledger.read(tmp_path / "out")] == [0]
  monkeypatch.undo()


def test_a_signal_while_the_model_loads_makes_no_clip(
  tmp_path, pipeline, monkeypatch
):
  load = vidgen.load

  def signalled(*arguments, **options):
    result = load(*arguments, **options)
    os.kill(os.getpid(), signal.SIGTERM)
    return result

  monkeypatch.setattr(vidgen, "load", signalled)
  with pytest.raises(errors.PreemptedError, match="3 of 3 clips left"):
    sample.run(many(tmp_path, 3))
  assert not pipeline.calls


def test_writing_goes_on_beside_sampling(tmp_path, pipeline, monkeypatch):
  written, sampled = threading.Event(), threading.Event()
  write, make = clips.write, pipeline.sample

  def slow(*arguments):
    # The second clip is made before the first is written.
    assert sampled.wait(20)
    written.set()
    return write(*arguments)

  def second(prompt, **arguments):
    result = make(prompt, **arguments)
    if len(pipeline.calls) == 2:
      assert not written.is_set()
      sampled.set()
    return result

  monkeypatch.setattr(clips, "write", slow)
  monkeypatch.setattr(pipeline, "sample", second)
  assert sample.run(many(tmp_path, 3)).clips == 3
  assert len(ledger.read(tmp_path / "out")) == 3


def test_a_disk_that_fills_up_ends_the_job(tmp_path, pipeline, monkeypatch):
  def full(*arguments):
    raise errors.StorageError("out: cannot write: No space left on device.")

  monkeypatch.setattr(clips, "write", full)
  with pytest.raises(errors.StorageError, match="No space"):
    sample.run(many(tmp_path, 40))
  # What waits to be written is bounded.
  assert len(pipeline.calls) < 10


def test_prompts_of_an_array_record_and_of_a_data_set(tmp_path, pipeline):
  path = tmp_path / "a.array_record"
  writer = array_record_module.ArrayRecordWriter(
    os.fspath(path), "group_size:1"
  )
  for record in ('{"prompt": "a", "seed": 4}', "b", '{"promt": "c"}'):
    writer.write(record.encode())
  writer.close()
  summary = sample.run(config(tmp_path, prompts=os.fspath(path)))
  assert [(c["prompt"], c["seed"]) for c in pipeline.calls] == [
    ("a", 4),
    ("b", 0),
  ]
  (failure,) = summary.failures
  assert "a.array_record:3: unknown field 'promt'" in failure
  prepare.run(
    prepare.PrepareConfig(
      "moving_shapes", os.fspath(tmp_path / "data"), num_clips=40
    )
  )
  (folder,) = (tmp_path / "data/moving_shapes").iterdir()
  lines = prompts.read(f"{folder}:train")
  assert len(lines) == 40 and all(" " in line.prompt for line in lines)
  with pytest.raises(errors.InputError, match=r"has the splits .*train"):
    prompts.read(f"{folder}:tran")


def test_compiling_is_counted_apart():
  told = progress.Progress()
  with told, told.stage("denoise"):
    jax.jit(lambda x: x * 3 + 0.123)(np.ones(7, np.float32))
  seconds = told.compile_seconds
  assert seconds > 0
  with told:
    jax.monitoring.record_event_duration_secs("/another/event", 9.0)
  jax.jit(lambda x: x * 5 + 0.321)(np.ones(7, np.float32))
  assert told.compile_seconds == seconds


def test_a_stage_that_fails_is_not_counted():
  told = progress.Lines(io.StringIO())
  with told, contextlib.suppress(ValueError), told.stage("text"):
    raise ValueError
  assert told.seconds == {}


def test_the_summary_is_a_table():
  summary = progress.Summary(
    out="samples",
    files=[f"samples/{i}.mp4" for i in range(30)],
    clips=2,
    seconds={"load": 3.0, "denoise": 100.0, "decode": 10.5},
    compile_seconds=20.25,
    peak_bytes=3 * 2**29,
    peak_of="this process",
  )
  assert str(summary).splitlines()[:9] == [
    "load             3.0 s",
    "denoise        100.0 s",
    "decode          10.5 s",
    "compile (XLA)   20.2 s",
    "per clip        55.2 s",
    "peak memory     1.50 GiB (this process)",
    "2 clips in samples:",
    "  samples/0.mp4",
    "  samples/1.mp4",
  ]
  summary.clips, summary.busy = 3, 0.987
  summary.there, summary.failures = 4, ["a.txt:1: is bad."]
  assert re.search(r"devices at work +99 % of the time", str(summary))
  assert "3 clips in samples, beside 4 there before, 1 failed:" in str(summary)
  assert str(summary).endswith("... and 10 more")


def test_peak_memory_is_what_this_process_took():
  peak, what = progress.peak_memory()
  assert what == "this process"
  assert 2**26 < peak < 2**40


def test_durations():
  seconds = (0.4, 59.0, 60.0, 200.0, 3900.0)
  got = [progress.duration(s) for s in seconds]
  assert got == ["0 s", "59 s", "1 min 0 s", "3 min 20 s", "1 h 5 min"]


def test_a_job_without_prompts_type_is_complete():
  # A new field of a line must be applied to its clips too.
  clip = {field.name for field in dataclasses.fields(clips.Clip)}
  assert prompts.TYPES.keys() - clip == {"videos_per_prompt"}
