import contextlib
import json
import os

import numpy as np
import pytest

from tests import report_runs
from vidgen import errors, ledger, report, runfiles, video


def test_clips_are_done_failed_or_missing(tmp_path):
  job = tmp_path / "job"
  paths = report_runs.job(job, ["a", "b", "c"])
  report_runs.clip(job, 3, "d", status="failed", error="out of memory")
  paths[1].unlink()
  with paths[2].open("ab") as file:
    file.write(b"x")
  clips = runfiles.load(job).clips
  assert [c.status for c in clips] == ["done", "missing", "missing", "failed"]
  assert clips[0].source == paths[0].name and clips[0].kind == "video"
  assert clips[0].settings == {"num_steps": "4"}
  assert "not there" in clips[1].error
  size = paths[2].stat().st_size
  assert f"{size} bytes, {size - 1}" in clips[2].error
  assert clips[3].error == "out of memory"


def test_files_of_a_job_at_work_may_go(tmp_path, monkeypatch):
  report_runs.job(tmp_path, ["a", "b"])
  going = [tmp_path / ".a.tmp.mp4", tmp_path / "clips-00000-of-00002.jsonl"]
  for path in going:
    path.write_bytes(b"")
  scandir, lines = os.scandir, ledger._lines

  @contextlib.contextmanager
  def scan(folder):
    with scandir(folder) as entries:
      listed = list(entries)
    going[0].unlink(missing_ok=True)
    yield listed

  def read(path):
    going[1].unlink(missing_ok=True)
    return lines(path)

  monkeypatch.setattr(os, "scandir", scan)
  monkeypatch.setattr(ledger, "_lines", read)
  assert [c.status for c in runfiles.load(tmp_path).clips] == ["done", "done"]


def test_clips_that_are_left(tmp_path):
  job = tmp_path / "job"
  report_runs.job(job, ["a", "b", "c"])
  report_runs.clip(job, 3, "d", status="failed", error="out of memory")
  assert runfiles.load(job).left is None

  def told(name="manifest.json", **fields):
    (job / name).write_text(json.dumps(fields))
    return runfiles.load(job).left

  assert told(planned=10, start="1", config={}) == 6
  # Once it has ended, only its own clips count.
  made = {"kind": "clips", "done": 2, "failed": [{"index": 3}]}
  assert told(planned=10, start="1", config={}, outputs=made) == 7
  assert told(planned=2, start="1", config={}) == 0
  assert told(planned="x", start="1") is None
  # A shard knows of the others that they are planned.
  name = "manifest-00001-of-00002.json"
  shard = {"planned": 9, "config": {"shard": "1/2"}, "outputs": made}
  assert told(name, start="2", **shard) == 5


def test_time_of_all_attempts(tmp_path):
  def took(*seconds):
    attempts = [{"seconds": one} for one in seconds]
    held = {"seconds": seconds[-1], "attempts": attempts}
    (tmp_path / "manifest.json").write_text(json.dumps(held))
    return runfiles.load(tmp_path).took

  assert took(5.5) == (5.5, 1, 0)
  assert took(100, None, 5.5) == (105.5, 3, 1)
  assert took(None) is None


def test_lines_of_an_older_make(tmp_path):
  video.write_gif(tmp_path / "000000_ab.gif", report_runs.frames(0), 8)
  record = {"index": 0, "prompt": None, "files": ["000000_ab.gif"]}
  (tmp_path / "clips.jsonl").write_text(json.dumps(record) + "\n")
  (clip,) = runfiles.load(tmp_path).clips
  assert (clip.name, clip.status, clip.kind) == ("000000_ab", "done", "image")


def test_frames_in_a_folder(tmp_path):
  video.write_png_frames(tmp_path / "000000_ab", report_runs.frames(0))
  record = {"index": 0, "files": ["000000_ab.npz", "000000_ab"]}
  (tmp_path / "000000_ab.npz").write_bytes(b"PK")
  (tmp_path / "clips.jsonl").write_text(json.dumps(record) + "\n")
  (clip,) = runfiles.load(tmp_path).clips
  assert clip.kind == "frames"
  assert clip.source == "000000_ab/000000.png"


def test_no_file_outside_the_folder_is_shown(tmp_path):
  (tmp_path / "secret.mp4").write_bytes(b"x")
  job = tmp_path / "job"
  job.mkdir()
  names = ["../secret.mp4", str(tmp_path / "secret.mp4"), "//host/x.mp4"]
  for index, name in enumerate(names):
    record = {"index": index, "files": [name]}
    with (job / "clips.jsonl").open("a") as file:
      file.write(json.dumps(record) + "\n")
  clips = runfiles.load(job).clips
  assert [(c.status, c.source) for c in clips] == [("missing", None)] * 3


def test_lines_of_any_shape_end_nothing(tmp_path):
  values = [None, 1, "x", [1], {"a": 1}, float("nan"), 1e308, True, 10**400]
  fields = ["index", "name", "where", "prompt", "negative_prompt", "seed"]
  fields += ["clip", "files", "sha256", "bytes", "size", "frames", "fps"]
  fields += ["seconds", "status", "error", "num_steps", "frames_sha256"]
  with (tmp_path / "clips.jsonl").open("w") as file:
    for i, field in enumerate(fields):
      for j, value in enumerate(values):
        record = {"index": 100 * i + j, "files": ["a.mp4"], "size": [value] * 2}
        record["name"] = f"{i}_{j}"
        file.write(json.dumps(record | {field: value}) + "\n")
    file.write("[]\nnull\n" + "[" * 5000 + "\n")
  (tmp_path / "manifest.json").write_text("[" * 100_000)
  (tmp_path / "goodput.json").write_bytes(b"\xff")
  (tmp_path / "evaluate.json").write_text('{"metrics": 3}')
  (tmp_path / "metrics.jsonl").write_text('{"step": "x", "loss": []}\n')
  run = runfiles.load(tmp_path)
  assert len(run.clips) > (len(fields) - 2) * len(values)
  assert not run.curves and not run.evaluations
  assert run.facts == {"manifest.json": "cannot be read"}
  report.write(tmp_path)


def test_a_training_run(tmp_path):
  report_runs.training(tmp_path / "run")
  run = runfiles.load(tmp_path / "run")
  assert [(c.step, c.name) for c in run.clips] == [
    (100, "00"),
    (100, "01"),
    (200, "00"),
    (200, "01"),
  ]
  first = run.clips[0]
  assert (first.height, first.width, first.frames, first.fps) == (32, 32, 9, 8)
  assert set(run.curves) == {
    "loss",
    "grad_norm",
    "learning_rate",
    "seconds_per_step",
  }
  np.testing.assert_allclose(run.curves["loss"][:, 0], [1, 5.1])
  assert run.curves["seconds_per_step"].shape == (2, 199)
  assert run.facts["config.seed"] == "3"


def test_what_was_measured_on_each_clip(tmp_path):
  first, _ = report_runs.job(tmp_path / "job", ["a", "b"])
  values = {first.stem: 31.5, "other": 1.0, "bad": None}
  found = {"psnr": {"value": 31.0, "clips": values}, "fvd": 3, "x": {}}
  (tmp_path / "job" / "evaluate_a.json").write_text(
    json.dumps({"metrics": found})
  )
  report_runs.training(tmp_path / "run")
  home = tmp_path / "run" / "samples" / "000000100"
  (home / "metrics.json").write_text('{"00": {"ssim": 0.5, "n": "x"}}')
  # Of samples of one name at other steps it says nothing.
  found = {"flicker": {"value": 3.0, "clips": {"00": 3.0}}}
  (tmp_path / "run/evaluate.json").write_text(json.dumps({"metrics": found}))
  told = [clip.metrics for clip in runfiles.load(tmp_path / "job").clips]
  assert told == [{"psnr": 31.5}, {}]
  told = [clip.metrics for clip in runfiles.load(tmp_path / "run").clips]
  assert told == [{"ssim": 0.5}, {}, {}, {}]


def test_a_long_curve_keeps_its_spikes():
  x = np.arange(100_000.0)
  y = np.sin(x / 5e3)
  y[[1234, 77_777]] = 9, -9
  thin = runfiles.thin(np.stack([x, y]))
  assert thin.shape[1] <= runfiles.POINTS + 2
  assert thin[1].max() == 9 and thin[1].min() == -9
  assert (np.diff(thin[0]) > 0).all()
  assert thin[0, 0] == 0 and thin[0, -1] == x[-1]
  short = np.stack([x[:100], y[:100]])
  assert runfiles.thin(short) is short


def test_what_is_smoothed_has_the_mean_of_all():
  x = np.arange(60_000.0)
  y = 2 + np.random.default_rng(0).exponential(0.5, len(x))
  thin = runfiles.thin(np.stack([x, y]))
  assert abs(thin[2].mean() - 2.5) < 0.01 < abs(thin[1].mean() - 2.5)


def test_long_lists_of_a_manifest_are_counted(tmp_path):
  value = {"outputs": [{"sha256": "0"}] * 1000, "mesh": {"cfg": 2}, "n": [1, 2]}
  (tmp_path / "manifest.json").write_text(json.dumps(value))
  assert runfiles.load(tmp_path).facts == {
    "outputs": "[1000 entries]",
    "mesh.cfg": "2",
    "n": "1, 2",
  }


def test_what_holds_no_run_is_refused(tmp_path):
  with pytest.raises(errors.InputError, match="holds no run"):
    runfiles.load(tmp_path)
  with pytest.raises(errors.InputError, match="no such folder"):
    runfiles.load(tmp_path / "none")
  os.mkfifo(tmp_path / "pipe.mp4")
  with pytest.raises(errors.InputError, match="holds no run"):
    runfiles.load(tmp_path)
