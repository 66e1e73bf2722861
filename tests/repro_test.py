"""Two runs compared: verdicts, causes, exit codes."""

import dataclasses
import json
import os

import numpy as np
import pytest

from tests import tiny_training, toy_sampling, toy_training
from vidgen import errors, ledger, outputs, repro, rerun, train, video
from vidgen.cli import main

run = toy_sampling.run


def edit(folder, **fields):
  """Changes a manifest: "code.commit" is a field in a field."""
  path = folder / "manifest.json"
  held = json.loads(path.read_text())
  for name, value in fields.items():
    *heads, last = name.split("__")
    item = held
    for head in heads:
      item = item[head]
    item[last] = value
  path.write_text(json.dumps(held))


def causes(report):
  return [d.kind for d in report.differences if d.kind != repro.OTHER]


def brighter(by, at=(1,)):
  return lambda index, made: made + np.uint8(by) if index in at else made


def test_same_runs_are_identical(tmp_path):
  report = repro.check(run(tmp_path / "a"), run(tmp_path / "b"))
  assert report.verdict == "identical"
  assert report.why == "the frames of all 3 clips are equal"
  assert causes(report) == []
  others = {d.name for d in report.differences}
  assert {"out", "folder", "start"} <= others


def test_one_pixel_makes_runs_different(tmp_path):
  def change(index, made):
    made[0, 0, 0, 0] += index == 2
    return made

  one, other = run(tmp_path / "a"), run(tmp_path / "b", change=change)
  report = repro.check(one, other)
  assert report.verdict == "different"
  assert report.why == "1 of 3 clips differ; nothing that is recorded differs"
  assert "clips that differ: 2" in str(report)


@pytest.mark.parametrize(
  ("fields", "why"),
  [
    ({"config__num_steps": 9}, "config: num_steps: 2 in A, 9 in B"),
    ({"seeds__seed": 4}, "seed: seed: 0 in A, 4 in B"),
    (
      {"weights": {"m": {"path": "x", "sha256": {"vae": "ff"}}}},
      "weights: m/vae: - in A, ff in B",
    ),
    ({"data": {"stages.0": "ff"}}, "data: stages.0: - in A, ff in B"),
    ({"code__source": "ff"}, "code: source: "),
    ({"versions__jaxlib": "0.0"}, "versions: jaxlib: "),
    ({"devices__kind": "TPU v5e"}, "device: devices.kind: cpu in A, TPU"),
    ({"system__cpu": "another"}, "device: cpu: "),
    ({"mesh": {"axes": {"cfg": 2}, "devices": 2}}, "mesh: axes: {} in A, "),
    ({"flags__XLA_FLAGS": "--a"}, "flags: XLA_FLAGS: - in A, --a in B"),
    ({"command": "train"}, "command: command: sample in A, train in B"),
    ({"system__os": "another"}, "nothing that is recorded differs"),
    ({"devices__count": 99}, "nothing that is recorded differs"),
    ({"code__commit": "ff"}, "nothing that is recorded differs"),
    ({"config__out": "there"}, "nothing that is recorded differs"),
  ],
)  # fmt: skip
def test_the_cause_is_named(tmp_path, fields, why):
  one = run(tmp_path / "a", count=2)
  other = run(tmp_path / "b", count=2, change=brighter(3))
  edit(other, **fields)
  report = repro.check(one, other)
  assert report.why.startswith(f"1 of 2 clips differ; {why}")
  assert len(report.differences) > 1


def test_the_first_cause_is_the_one_of_the_line(tmp_path):
  one = run(tmp_path / "a", count=1)
  other = run(tmp_path / "b", count=1, change=brighter(3, (0,)))
  edit(other, versions__jax="0", seeds__seed=2, flags__XLA_FLAGS="x")
  report = repro.check(one, other)
  assert causes(report) == ["seed", "versions", "flags"]
  assert "; seed: seed: 0 in A, 2 in B" in report.why


def test_a_checkpoint_by_another_name_is_none_other(tmp_path):
  one, other = run(tmp_path / "a"), run(tmp_path / "b")
  edit(other, config__checkpoint="copies/toy")
  assert causes(repro.check(one, other)) == ["config"]
  weights = {"checkpoint": {"path": "x", "sha256": {"vae": "ff"}}}
  for folder in (one, other):
    edit(folder, weights=weights)
  assert causes(repro.check(one, other)) == []


def test_the_weight_of_a_lora_is_no_name(tmp_path):
  one, other = run(tmp_path / "a"), run(tmp_path / "b")
  weights = {"lora x": {"path": "x", "sha256": {"x": "ff"}}}
  edit(one, weights=weights, config__lora={"a/x": 0.5})
  edit(other, weights=weights, config__lora={"b/x": 0.5})
  assert causes(repro.check(one, other)) == []
  edit(other, config__lora={"b/x": 1.0})
  assert causes(repro.check(one, other)) == ["config", "config"]
  edit(other, config__lora={"a/x": 1.0})
  (cause,) = (
    d for d in repro.check(one, other).differences if d.kind != "other"
  )
  assert str(cause) == "lora.a/x: 0.5 in A, 1.0 in B"


@pytest.mark.parametrize("formats", [("mp4",), ("png", "mp4"), ("npz",)])
def test_rounding_needs_a_tolerance_that_is_met(tmp_path, formats):
  one = run(tmp_path / "a", formats=formats)
  other = run(tmp_path / "b", formats=formats, change=brighter(2))
  assert repro.check(one, other).verdict == "different"
  report = repro.check(one, other, tolerance=6.0)
  assert report.verdict == "equal to rounding"
  assert 30 < report.outputs.psnr < 60
  # The largest value of latents counts as 255.
  largest = float(toy_sampling.frames(1)[..., :1].max())
  worst = {"png": 2.0, "npz": 2 * 255 / largest}.get(formats[0])
  if worst is not None:
    assert report.outputs.max_abs == pytest.approx(worst, rel=1e-5)
  assert "tolerance 6" in report.why
  report = repro.check(one, other, tolerance=report.outputs.max_abs * 0.99)
  assert report.verdict == "different"
  assert report.outputs.max_abs > 0


def test_files_that_are_gone_or_changed_are_not_the_same(tmp_path):
  one, other = run(tmp_path / "a"), run(tmp_path / "b")
  file = sorted(other.glob("*.mp4"))[1]
  data = file.read_bytes()
  file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
  report = repro.check(one, other)
  assert report.verdict == "different"
  assert report.why.startswith("the files of 1 clips in B are not as written")
  file.unlink()
  assert repro.check(other, one).verdict == "different"
  file.write_bytes(data)
  assert repro.check(one, other).verdict == "identical"
  # A manifest that came alone says what it says.
  for path in other.iterdir():
    if path.name != "manifest.json":
      path.unlink()
  assert repro.check(one, other).verdict == "identical"


def test_npz_files_are_compared_where_there_are_no_frames(tmp_path):
  one = run(tmp_path / "a", formats=("npz",))
  other = run(tmp_path / "b", formats=("npz",))
  for folder in (one, other):
    held = json.loads((folder / "manifest.json").read_text())
    for clip in held["outputs"]["clips"]:
      clip["frames_sha256"] = None
    edit(folder, outputs=held["outputs"])
  assert repro.check(one, other).verdict == "identical"


def test_a_metric_that_is_no_number_is_a_difference(tmp_path, capsys):
  for name, loss in (("a", float("nan")), ("b", 1.0), ("c", float("nan"))):
    record = outputs.of_metrics({"loss": loss, "step": 3})
    run(tmp_path / name, count=0)
    edit(tmp_path / name, outputs=record)
  a, b, c = (str(tmp_path / name) for name in "abc")
  for tolerance in (None, 0.1, 0.99):
    report = repro.check(a, b, tolerance)
    assert report.verdict == "different"
    assert "loss: nan in A, 1 in B (inf)" in str(report)
  file = tmp_path / "found.json"
  assert main.main(["repro", "check", a, b, f"--json={file}"]) == 1
  assert json.loads(file.read_text())["outputs"]["max_abs"] == "inf"
  assert repro.check(a, c).verdict == "identical"


def test_metrics_are_compared_as_shares(tmp_path):
  """Counts are equal or not, and no share is more than all of it."""
  home = tmp_path / "runs"
  made = {"a": (5.0, 1000), "b": (5.01, 1000), "c": (5.01, 1010)}
  for name, (loss, step) in made.items():
    run(home / name, count=0)
    edit(home / name, outputs=outputs.of_metrics({"loss": loss, "step": step}))
  verdict = lambda b: repro.check(home / "a", home / b, 0.01).verdict
  assert verdict("b") == "equal to rounding"
  assert verdict("c") == "different"
  with pytest.raises(errors.InputError, match="give less than 1"):
    repro.check(home / "a", home / "b", 2.0)


def test_latents_are_compared_in_units_of_their_largest(tmp_path):
  one = run(tmp_path / "a", formats=("npz",))
  other = run(tmp_path / "b", formats=("npz",), change=brighter(2))
  (file,) = other.glob("000001*.npz")
  (before,) = one.glob("000001*.npz")
  latents = np.zeros_like(np.load(before)["latents"])
  latents[0, 0, 0] = 4.0
  video.write_latents(before, latents)
  video.write_latents(file, latents + 0.5)
  for folder, name in ((one, before.name), (other, file.name)):
    held = json.loads((folder / "manifest.json").read_text())
    held["outputs"]["clips"][1]["sha256"][name] = ledger.digest(folder / name)
    edit(folder, outputs=held["outputs"])
  report = repro.check(one, other, tolerance=2.0)
  assert report.verdict == "different"
  assert "largest difference 31.875" in str(report)


def test_equal_bytes_of_another_shape_are_different(tmp_path):
  one, other = run(tmp_path / "a"), run(tmp_path / "b")
  held = json.loads((other / "manifest.json").read_text())
  frames, height, width = held["outputs"]["clips"][1]["shape"]
  held["outputs"]["clips"][1]["shape"] = [frames, 2 * height, width // 2]
  edit(other, outputs=held["outputs"])
  assert repro.check(one, other).verdict == "different"


def test_what_is_no_number_is_no_rounding(tmp_path):
  one = run(tmp_path / "a", formats=("npz",))
  other = run(tmp_path / "b", formats=("npz",), change=brighter(2))
  (file,) = other.glob("000001*.npz")
  latents = np.load(file)["latents"]
  latents[0, 0, 0] = np.nan
  video.write_latents(file, latents)
  assert repro.check(one, other, tolerance=99.0).verdict == "different"


def test_missing_and_failed_clips(tmp_path):
  one, other = run(tmp_path / "a"), run(tmp_path / "b", count=2)
  report = repro.check(one, other, tolerance=255.0)
  assert report.verdict == "different"
  assert "clips in A alone: 2" in str(report)
  fails = lambda index, made: None if index == 2 else made
  report = repro.check(one, run(tmp_path / "c", change=fails))
  assert report.verdict == "different"
  assert "clips that failed in B: 2" in str(report)
  nothing = run(tmp_path / "d", count=0)
  assert repro.check(nothing, nothing).verdict == "different"


def test_another_size_is_no_rounding(tmp_path):
  half = lambda index, made: made[:, :16]
  report = repro.check(
    run(tmp_path / "a"), run(tmp_path / "b", change=half), tolerance=255.0
  )
  assert report.verdict == "different"
  assert "clip 0 has another size" in report.why


def test_a_killed_job_is_compared_by_its_ledger(tmp_path):
  one, other = run(tmp_path / "a"), run(tmp_path / "b")
  edit(other, outputs=None, exit={"reason": "running", "code": None})
  assert repro.check(one, other).verdict == "identical"
  (other / "clips.jsonl").unlink()
  with pytest.raises(errors.InputError, match="no outputs are recorded"):
    repro.check(one, other)


def test_attempts_under_other_conditions_are_a_cause(tmp_path):
  one, other = run(tmp_path / "a"), run(tmp_path / "b")
  for _ in range(2):
    run(other)
  assert causes(repro.check(one, other)) == []
  held = json.loads((other / "manifest.json").read_text())
  held["attempts"][0]["versions"]["jax"] = "0.0"
  edit(other, attempts=held["attempts"])
  assert causes(repro.check(one, other)) == ["attempts"]


def test_shards_are_one_job(tmp_path):
  whole = run(tmp_path / "whole")
  parts = tmp_path / "parts"
  run(parts, count=0)
  text = (parts / "manifest.json").read_text()
  (parts / "manifest.json").unlink()
  for shard in (1, 2):
    (parts / f"manifest-0000{shard}-of-00002.json").write_text(text)
  for index in range(3):
    name = f"clips-0000{index % 2 + 1}-of-00002.jsonl"
    made = toy_sampling.frames(index)
    toy_sampling.line(parts, index, made, name=name)
  assert repro.check(whole, parts).verdict == "identical"


def test_files_that_lines_name_are_inputs(tmp_path):
  (tmp_path / "in").mkdir()
  for name in ("0.png", "1.png"):
    (tmp_path / "in" / name).write_bytes(name.encode())
  given = {"0.png": None, "1.png": None}
  tell = lambda names: (
    lambda record: record.files(
      tmp_path / "in", {name: given[name] for name in names}, "lines"
    )
  )
  one = run(tmp_path / "a", count=2, tell=tell(given))
  parts = tmp_path / "parts"
  for shard in range(2):
    made = run(tmp_path / str(shard), count=2, tell=tell([f"{shard}.png"]))
    parts.mkdir(exist_ok=True)
    (made / "manifest.json").rename(
      parts / f"manifest-{shard:05d}-of-00002.json"
    )
  for file in made.iterdir():
    file.rename(parts / file.name)
  assert causes(repro.check(one, parts)) == []
  (tmp_path / "in" / "1.png").write_bytes(b"another")
  other = run(tmp_path / "b", count=2, change=brighter(3), tell=tell(given))
  assert "; inputs: lines/1.png: " in repro.check(one, other).why
  held = json.loads((one / "manifest.json").read_text())
  (tmp_path / "in" / "0.png").unlink()
  (tmp_path / "in" / "more.png").write_bytes(b"of another job")
  found = {d.name: d.second for d in rerun.changes(held) if d.kind == "inputs"}
  assert found.keys() == {"lines/0.png", "lines/1.png"}
  assert found["lines/0.png"] == "-" != found["lines/1.png"]


@pytest.mark.parametrize(
  "text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "command": 3}']
)
def test_no_manifest(tmp_path, text):
  one = run(tmp_path / "a")
  with pytest.raises(errors.InputError, match="holds no manifest"):
    repro.check(one, tmp_path)
  (tmp_path / "manifest.json").write_text(text)
  with pytest.raises(errors.CorruptError):
    repro.check(one, tmp_path)


def test_outputs_that_are_damaged(tmp_path):
  one = run(tmp_path / "a")
  other = run(tmp_path / "b")
  bad_clip = {"index": 0, "sha256": [], "frames_sha256": None}
  for bad in (
    3,
    {"kind": "clips"},
    {"kind": "clips", "clips": 3, "failed": []},
    {"kind": "clips", "clips": [{"index": "0"}], "failed": []},
    {"kind": "clips", "clips": [bad_clip], "failed": []},
    {"kind": "state", "metrics": {"loss": "x"}},
    {"kind": "other", "metrics": {}},
  ):
    edit(other, outputs=bad)
    with pytest.raises(errors.CorruptError, match="not as they were written"):
      repro.check(one, other)


def test_names_of_files_stay_in_their_folder(tmp_path):
  one = run(tmp_path / "a", count=1)
  other = run(tmp_path / "b", count=1, change=brighter(2, (0,)))
  held = json.loads((other / "manifest.json").read_text())
  held["outputs"]["clips"][0]["sha256"] = {"../a/000000_000000000000.mp4": "f"}
  edit(other, outputs=held["outputs"])
  with pytest.raises(errors.InputError, match="no name of a clip"):
    repro.check(one, other, tolerance=9.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """A training run, the same again, and one of another seed."""
  home = tmp_path_factory.mktemp("runs")
  config = toy_training.config(tiny_training.shapes(home), 6)
  for name in ("one", "same"):
    train.run(config, home / name)
  train.run(dataclasses.replace(config, seed=1), home / "other")
  train.run(dataclasses.replace(config, mesh={"data": 2}), home / "mesh")
  train.run(dataclasses.replace(config, num_steps=3), home / "parts")
  train.run(config, home / "parts")
  return home


def test_training_is_bit_equal_on_the_same_mesh(trained):
  report = repro.check(trained / "one", trained / "same")
  assert report.verdict == "identical"
  assert causes(report) == []


def test_training_in_two_goes_is_identical(trained):
  report = repro.check(trained / "one", trained / "parts")
  assert report.verdict == "identical"
  held = json.loads((trained / "parts" / "manifest.json").read_text())
  assert [a["exit"]["reason"] for a in held["attempts"]] == ["done", "done"]
  assert held["outputs"]["step"] == 6


def test_training_of_another_seed_is_different(trained):
  report = repro.check(trained / "one", trained / "other", tolerance=1e-3)
  assert report.verdict == "different"
  assert causes(report) == ["seed"]
  assert "; seed: seed: 0 in A, 1 in B" in report.why


def test_training_on_another_mesh_is_equal_to_rounding(trained):
  report = repro.check(trained / "one", trained / "mesh")
  assert set(causes(report)) == {"mesh"}
  if report.verdict != "identical":
    assert "; mesh: " in report.why
    close = repro.check(trained / "one", trained / "mesh", tolerance=1e-5)
    assert close.verdict == "equal to rounding"


def test_the_command(trained, tmp_path, capsys):
  a, b = os.fspath(trained / "one"), os.fspath(trained / "same")
  path = tmp_path / "report.json"
  assert main.main(["repro", "check", a, b, f"--json={path}"]) == 0
  out = capsys.readouterr().out
  assert out.splitlines()[-1].startswith("identical: the final states are eq")
  held = json.loads(path.read_text())
  assert held["verdict"] == "identical"
  assert held["differences"]
  other = os.fspath(trained / "other")
  assert main.main(["repro", "check", a, other, "--tolerance=1e-9"]) == 1
  assert "different: " in capsys.readouterr().out.splitlines()[-1]
  assert main.main(["repro", "check", a, f"{other}/manifest.json"]) == 1


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    ([], "give check A B"),
    (["compare", "a", "b"], "give check A B"),
    (["check", "a"], "give check A B"),
    (["check", "a", "b", "--out=c"], "--out: is for rerun"),
    (["check", "/none", "/none"], "/none: no such file"),
    (["rerun", "a"], "--out is missing"),
    (["check", "a", "b", "--tolerance=-1"], "--tolerance=-1.0: give 0 or mo"),
    (
      ["check", "a", "b", "--tolerance=1", "--within_intervals"],
      "has no --tol",
    ),
    (["rerun", "a", "--within_intervals"], "--within_intervals: is for check"),
    (["check", "a", "b", "--tol=1"], "--tol: there is no such flag"),
  ],
)
def test_mistaken_commands(capsys, argv, message):
  assert main.main(["repro", *argv]) == 2
  err = capsys.readouterr().err
  assert message in err
  assert err.count("\n") == 1
