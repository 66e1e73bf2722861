import dataclasses
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

import vidgen
from tests import sampling_jobs as jobs
from vidgen import (
  clips,
  errors,
  ledger,
  preemption,
  progress,
  sample,
  video,
)


@pytest.fixture
def pipeline(monkeypatch, tmp_path_factory):
  return jobs.fake_pipeline(monkeypatch, tmp_path_factory)


def test_one_prompt(tmp_path, pipeline):
  summary = sample.run(
    jobs.config(
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
    "batch_size": 1,
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
  (record,) = jobs.records(tmp_path / "out")
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
    jobs.config(
      tmp_path, prompts=os.fspath(path), videos_per_prompt=2, num_steps=9
    )
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
  got = jobs.records(tmp_path / "out")
  assert [r["index"] for r in got] == list(range(8))
  names = {name for r in got for name in r["files"]}
  beside = {"clips.jsonl", "manifest.json", "report.html", "posters"}
  assert names | beside == {*os.listdir(tmp_path / "out")}
  assert len({name.split("_")[1] for name in names}) == 8


def test_a_line_with_a_seed_is_the_same_clip_alone(tmp_path, pipeline):
  path = tmp_path / "a.csv"
  path.write_text("prompt,seed\nA cat.,\nA panda.,7\n")
  batch = sample.run(jobs.config(tmp_path, prompts=os.fspath(path)))
  alone = sample.run(jobs.config(tmp_path, prompt="A panda.", seed=7))
  assert pipeline.calls[1] == pipeline.calls[2]
  digest = lambda file: os.path.basename(file).split("_")[1]
  assert digest(batch.files[1]) == digest(alone.files[0])


def test_videos_per_prompt_of_a_line_never_repeats_a_clip(tmp_path, pipeline):
  path = tmp_path / "a.csv"
  path.write_text("prompt,videos_per_prompt\na,3\nb,\nc,2\n")
  sample.run(jobs.config(tmp_path, prompts=os.fspath(path)))
  assert [c["clips"] for c in pipeline.calls] == [[i] for i in range(6)]


def test_every_format_at_once(tmp_path, pipeline):
  summary = sample.run(
    jobs.config(
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
  (record,) = jobs.records(tmp_path / "out")
  assert record["fps"] == 12
  assert len(record["files"]) == 4
  assert "decode" in summary.seconds


def test_latents_alone_are_not_decoded(tmp_path, pipeline):
  pipeline.decode = None
  job = jobs.config(tmp_path, prompt="A panda.", formats=("npz",))
  assert len(sample.run(job).files) == 1


def test_a_clip_that_cannot_be_made_stops_no_other(tmp_path, pipeline):
  path = tmp_path / "a.txt"
  path.write_text("a\nb\nc\n")
  pipeline.fail_at = 2
  summary = sample.run(jobs.config(tmp_path, prompts=os.fspath(path)))
  assert summary.clips == 2
  message = r"1 of 3 clips .*a.txt:2: prompt: holds the number 13"
  with pytest.raises(errors.InputError, match=message):
    summary.check()
  found = {r["index"]: r["status"] for r in jobs.records(tmp_path / "out")}
  assert found == {0: "done", 1: "failed", 2: "done"}
  # It is tried again, and the others are there.
  pipeline.calls.clear()
  again = sample.run(jobs.config(tmp_path, prompts=os.fspath(path)))
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


def test_bad_lines_are_told_and_counted_first(tmp_path, pipeline):
  path = tmp_path / "a.csv"
  path.write_text(BAD)
  said = io.StringIO()
  job = jobs.config(tmp_path, prompts=os.fspath(path), videos_per_prompt=2)
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


def test_batches_have_one_shape_and_are_filled_up(tmp_path, pipeline):
  path = tmp_path / "a.csv"
  path.write_text("prompt,height,seed\na,,\nb,64,\nc,,5\nd,,\ne,64,\n")
  job = jobs.config(tmp_path, prompts=os.fspath(path), batch_size=2)
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
  assert (
    not jobs.hashes(tmp_path / "one").keys()
    & jobs.hashes(tmp_path / "out").keys()
  )


def test_of_a_batch_that_fails_the_others_are_made(tmp_path, pipeline):
  path = tmp_path / "a.txt"
  path.write_text("a\nunlucky\nb\nc\n")
  job = jobs.config(tmp_path, prompts=os.fspath(path), batch_size=3)
  summary = sample.run(job)
  assert summary.clips == 3
  (failure,) = summary.failures
  assert "a.txt:2: prompt: is unlucky" in failure
  # Alone they are filled up, too: the same program makes the same bits.
  assert all(len(call["clips"]) == 3 for call in pipeline.calls)


def test_many_bad_lines_are_told_in_part_and_noted_once(tmp_path, pipeline):
  path = tmp_path / "a.csv"
  path.write_text("prompt,seed\na,1\n" + "b,x\n" * 30)
  job = jobs.config(tmp_path, prompts=os.fspath(path))
  for _ in range(2):
    said = io.StringIO()
    assert len(sample.run(job, progress.create(said)).failures) == 30
    assert said.getvalue().count("a.csv:") == 20
    assert "more cannot be made" in said.getvalue()
  lines = (tmp_path / "out/clips.jsonl").read_text().splitlines()
  assert len(lines) == 31


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
  summary = sample.run(
    jobs.config(tmp_path, prompts=os.fspath(path), batch_size=2)
  )
  assert (summary.clips, len(summary.failures)) == (2, 3)
  assert all("more memory" in failure for failure in summary.failures)
  assert "a.csv:3: " in summary.failures[0]
  assert tried == [None, 640]

  def broken(*arguments, **others):
    raise jax.errors.JaxRuntimeError("INTERNAL: a device is lost.")

  monkeypatch.setattr(pipeline, "sample", broken)
  with pytest.raises(jax.errors.JaxRuntimeError, match="is lost"):
    sample.run(jobs.config(tmp_path, prompt="a", seed=1))


def test_a_long_video_that_does_not_fit_stops_no_short_one(
  tmp_path, pipeline, monkeypatch
):
  path = tmp_path / "a.csv"
  path.write_text("prompt,video\na,long.mp4\nb,short.mp4\nc,long.mp4\n")
  for name, count in (("long.mp4", 17), ("short.mp4", 9)):
    frames = np.zeros((count, 16, 16, 3), np.uint8)
    video.write_mp4(tmp_path / name, frames, 8)
  made, tried = pipeline.sample, []

  def sample_or_not(prompt, *, video, strength, **arguments):
    tried.append(os.path.basename(video))
    if tried[-1] == "long.mp4":
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory.")
    return made(prompt, **arguments)

  monkeypatch.setattr(pipeline, "sample", sample_or_not)
  summary = sample.run(jobs.config(tmp_path, prompts=os.fspath(path)))
  assert (summary.clips, len(summary.failures)) == (1, 2)
  assert sorted(tried) == ["long.mp4", "short.mp4"]


def test_the_same_failure_of_another_clip_is_noted_again(
  tmp_path, pipeline, monkeypatch
):
  def broken(*arguments, **others):
    raise errors.InputError("prompt: is unlucky.")

  monkeypatch.setattr(pipeline, "sample", broken)
  for steps in (25, 25, 30):
    sample.run(
      jobs.config(
        tmp_path, prompt="a", seed=1, num_steps=steps, videos_per_prompt=2
      )
    )
  lines = (tmp_path / "out/clips.jsonl").read_text().splitlines()
  failed = [json.loads(line) for line in lines]
  assert [one["num_steps"] for one in failed] == [25, 25, 30, 30]


def test_a_signal_stops_between_two_steps(tmp_path, pipeline, monkeypatch):
  job = jobs.many(tmp_path, 3)
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
    sample.run(jobs.many(tmp_path, 3))
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
  assert sample.run(jobs.many(tmp_path, 3)).clips == 3
  assert len(ledger.read(tmp_path / "out")) == 3


def test_a_disk_that_fills_up_ends_the_job(tmp_path, pipeline, monkeypatch):
  def full(*arguments):
    raise errors.StorageError("out: cannot write: No space left on device.")

  monkeypatch.setattr(clips, "write", full)
  with pytest.raises(errors.StorageError, match="No space"):
    sample.run(jobs.many(tmp_path, 40))
  # What waits to be written is bounded.
  assert len(pipeline.calls) < 10
