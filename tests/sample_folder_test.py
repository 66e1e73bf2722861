import dataclasses
import errno
import hashlib
import io
import json
import os
import pathlib
import time

import PIL.Image
import pytest

from tests import sampling_jobs as jobs
from vidgen import (
  clips,
  errors,
  ledger,
  progress,
  provenance,
  repro,
  sample,
  sharding,
)


@pytest.fixture
def pipeline(monkeypatch, tmp_path_factory):
  return jobs.fake_pipeline(monkeypatch, tmp_path_factory)


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
  one = jobs.config(tmp_path, prompt="A panda.")
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


def test_names_are_as_before_there_was_a_last_image():
  values = dict.fromkeys(field.name for field in dataclasses.fields(clips.Clip))
  values |= {"where": "", "index": 0, "clip": 0, "prompt": "a", "seed": 0}
  values |= {"negative_prompt": "", "strength": 0.8}
  digests = clips.Digests({"lora": None})
  assert digests.of(clips.Clip(**values)) == "17a553e774ca"


def test_loras_of_one_name_are_all_recorded(tmp_path, pipeline):
  paths = []
  for name in ("a", "b"):
    (tmp_path / name).mkdir()
    paths.append(tmp_path / name / "pytorch_lora_weights.safetensors")
    paths[-1].write_text(name)
  lora = {os.fspath(path): 1.0 for path in paths}
  sample.run(jobs.config(tmp_path, prompt="a", lora=lora))
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
    job = jobs.config(
      tmp_path / folder, prompt="A panda.", image=os.fspath(image)
    )
    names.add(os.path.basename(sample.run(job).files[0]))
  assert len(names) == 1


def test_a_folder_that_cannot_be_written(tmp_path, pipeline):
  (tmp_path / "out").write_text("a file")
  with pytest.raises(errors.StorageError, match="cannot write"):
    sample.run(jobs.config(tmp_path, prompt="a"))
  assert not hasattr(pipeline, "loaded")


def test_a_full_disk_leaves_no_half_line(tmp_path, pipeline, monkeypatch):
  sample.run(jobs.config(tmp_path, prompt="a"))
  before = (tmp_path / "out/clips.jsonl").read_bytes()
  monkeypatch.setattr(clips, "write", lambda *arguments: [])

  fsync = os.fsync

  def fail(descriptor):
    if os.readlink(f"/proc/self/fd/{descriptor}").endswith("clips.jsonl"):
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    fsync(descriptor)

  monkeypatch.setattr(os, "fsync", fail)
  with pytest.raises(errors.StorageError, match=r"clips.jsonl.*No space"):
    sample.run(jobs.config(tmp_path, prompt="b"))
  assert (tmp_path / "out/clips.jsonl").read_bytes() == before


def test_what_is_there_is_not_made_again(tmp_path, pipeline):
  job = jobs.many(tmp_path, 3)
  sample.run(job)
  out = tmp_path / "out"
  want, before = jobs.hashes(out), (out / "clips.jsonl").read_bytes()
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
  assert jobs.hashes(out) == want
  # Another format is another file.
  job = dataclasses.replace(job, formats=("mp4", "gif"))
  assert sample.run(job).clips == 3
  # At another rate the same frames are other files.
  for fps, made in ((8.0, 0), (16.0, 3), (16.0, 0), (None, 3)):
    job = dataclasses.replace(job, fps=fps)
    assert sample.run(job).clips == made
  assert jobs.hashes(out) == want


def test_a_torn_line_and_a_lost_ledger(tmp_path, pipeline):
  job = jobs.many(tmp_path, 3)
  sample.run(job)
  out = tmp_path / "out"
  path, want = out / "clips.jsonl", jobs.hashes(out)
  data = path.read_bytes()
  path.write_bytes(data[:-20])
  assert len(ledger.read(out)) == 2
  assert sample.run(job).clips == 1
  assert jobs.hashes(out) == want
  assert len(path.read_bytes().splitlines()) == 3
  path.unlink()
  assert sample.run(job).clips == 3
  assert jobs.hashes(out) == want


@pytest.mark.parametrize("count", [1, 2])
def test_damaged_lines_are_told_and_their_clips_made_anew(
  tmp_path, pipeline, count
):
  job = jobs.many(tmp_path, 4)
  sample.run(job)
  out = tmp_path / "out"
  path, want = out / "clips.jsonl", jobs.hashes(out)
  lines = path.read_bytes().splitlines(keepends=True)
  for number in range(1, 1 + count):
    lines[number] = lines[number].replace(b'"index"', b'"ind')
  path.write_bytes(b"".join(lines))
  said = io.StringIO()
  assert sample.run(job, progress.create(said)).clips == count
  told = [x for x in said.getvalue().splitlines() if x.startswith("WARNING")]
  more = " and 1 more" if count == 2 else ""
  assert told == [
    f"WARNING: {path}:2{more}: damaged; clips of which nothing else tells are "
    "made anew"
  ]
  assert jobs.hashes(out) == want
  assert sample.run(job).clips == 0


def test_what_a_killed_job_left_is_swept(tmp_path, pipeline):
  job = jobs.many(tmp_path, 2)
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


def test_what_other_jobs_left_is_swept_when_it_is_old(tmp_path, pipeline):
  job, out = jobs.many(tmp_path, 2), tmp_path / "out"
  sample.run(job)
  mark, clip = "0123456789abcdef", "000009_0123456789ab"
  stems = (clip, "report", "manifest-00001-of-00003")
  kinds = ("tmp.mp4", "tmp.gif", "tmp.npz", "tmp.html", "tmp.json")
  left = [out / f".{a}.{mark}.{b}" for a in stems for b in kinds]
  folders = [out / f".{clip}.{mark}.{kind}" for kind in ("tmp", "old")]
  others = [out / ".keep", out / f".{clip}.mp4", out / f".{mark}.tmp.mp4"]
  for folder in folders:
    folder.mkdir()
  for path in (*left, *others, *(folder / "000000.png" for folder in folders)):
    path.write_bytes(b"half")
  sample.run(job)
  assert all(path.exists() for path in (*left, *folders, *others))
  for path in (*left, *folders, *others):
    os.utime(path, (time.time() - 4000,) * 2)
  sample.run(job)
  assert not any(path.exists() for path in (*left, *folders))
  assert all(path.exists() for path in others)


def test_two_jobs_do_not_write_one_ledger(tmp_path, pipeline):
  job = jobs.many(tmp_path, 2)
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
  job, made = jobs.many(tmp_path, 3), pipeline.sample
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
  whole = jobs.many(tmp_path, 7, batch_size=2)
  sample.run(whole)
  want = jobs.hashes(tmp_path / "out")
  parts = dataclasses.replace(whole, out=os.fspath(tmp_path / "parts"))
  counts = [
    sample.run(dataclasses.replace(parts, shard=f"{i}/3")).clips
    for i in range(3)
  ]
  assert counts == [3, 2, 2]
  assert jobs.hashes(tmp_path / "parts") == want
  # However the work is split: it is done.
  pipeline.calls.clear()
  assert sample.run(parts).there == 7
  assert not pipeline.calls


@pytest.mark.parametrize("data", [b"a\n", b"a\n\xff\n"])
def test_a_part_without_clips_is_done(tmp_path, pipeline, data):
  path = tmp_path / "a.txt"
  path.write_bytes(data)
  job = jobs.config(tmp_path, prompts=os.fspath(path), shard="1/2")
  summary = sample.run(job)
  assert (summary.clips, summary.there) == (0, 0)
  assert len(summary.failures) == len(data.splitlines()) - 1
  assert not pipeline.calls


def test_the_number_of_shards_may_change(tmp_path, pipeline):
  job = jobs.many(tmp_path, 4)
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
  summary = sample.run(jobs.config(tmp_path, prompts=os.fspath(path)))
  assert summary.clips == 1 and not summary.failures
  (record,) = ledger.read(tmp_path / "out")
  assert record["where"] == f"{path}:1"
  held = json.loads((tmp_path / "out/manifest.json").read_text())
  assert held["config"]["prompts"] == os.fspath(path)


def test_the_manifest_is_of_the_jobs_own_clips(tmp_path, pipeline):
  path = tmp_path / "a.txt"
  path.write_bytes(b"a\n\xff\nb\n")
  job = jobs.config(tmp_path, prompts=os.fspath(path))
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


def test_a_job_that_is_killed_at_its_end_keeps_its_mesh(
  tmp_path, pipeline, monkeypatch
):
  job, path = jobs.many(tmp_path, 2), tmp_path / "out/manifest.json"
  pipeline.mesh = sharding.make_mesh({"cfg": 2, "context": 4})
  read = lambda: json.loads(path.read_text())
  want = {"axes": {"cfg": 2, "context": 4}, "devices": 8}
  with monkeypatch.context() as killed:
    end = lambda record, error: record._pool.shutdown()
    killed.setattr(provenance.Record, "finish", end)
    sample.run(job)
  assert read()["exit"]["reason"] == "running"
  assert read()["mesh"] == want
  pipeline.calls.clear()
  # Other clips say nothing of these.
  pipeline.mesh = sharding.make_mesh({"cfg": 2})
  sample.run(dataclasses.replace(job, seed=1))
  sample.run(job)
  assert len(pipeline.calls) == 2
  held = read()
  assert held["mesh"] == want and held["exit"]["code"] == 0
  meshes = [attempt["mesh"]["devices"] for attempt in held["attempts"]]
  assert meshes == [8, 2, 8]
  # Where nobody has told it, it is not known.
  for attempt in held["attempts"]:
    attempt["mesh"] = None
  path.write_text(json.dumps({**held, "outputs": None}))
  sample.run(job)
  assert read()["mesh"] is None


def test_the_manifest_has_what_lines_name_and_how_many(tmp_path, pipeline):
  for name, colour in (("one", "red"), ("two", "blue")):
    PIL.Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
  path = tmp_path / "a.jsonl"
  lines = [{"prompt": "a", "image": f"{n}.png"} for n in ("one", "two", "one")]
  lines.append({"prompt": "no", "steps": "x"})
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  job = jobs.config(tmp_path, prompts=os.fspath(path), shard="0/2")
  sample.run(job)
  held = json.loads((tmp_path / "out/manifest-00000-of-00002.json").read_text())
  # All of the job's, the other part's and the bad one; its own images alone.
  assert held["planned"] == 4
  mark = hashlib.sha256((tmp_path / "one.png").read_bytes()).hexdigest()
  assert held["inputs"]["lines"]["sha256"] == {"one.png": mark}
  assert held["inputs"]["prompts"]["sha256"].keys() == {"a.jsonl"}


def test_a_folder_of_another_kind_of_run_is_refused(tmp_path, pipeline):
  out = tmp_path / "out"
  out.mkdir()
  manifest = out / "manifest.json"
  for text in ('{"command": "train"}', "[]", "{}"):
    manifest.write_text(text)
    with pytest.raises(errors.InputError, match="choose another --out"):
      sample.run(jobs.many(tmp_path, 2))
    assert manifest.read_text() == text
  assert not pipeline.calls


def test_a_job_that_is_done_keeps_its_record(tmp_path, pipeline):
  job = jobs.many(tmp_path, 2)
  sample.run(job)
  before = (tmp_path / "out/manifest.json").read_bytes()
  sample.run(job)
  assert (tmp_path / "out/manifest.json").read_bytes() == before
  said = io.StringIO()
  sample.run(dataclasses.replace(job, seed=9), progress.create(said))
  assert f"2 clips are in {tmp_path / 'out'} already, of other prompts" in (
    said.getvalue()
  )
