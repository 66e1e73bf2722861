import json
import os
import re
import subprocess
import sys
import time
import urllib.parse

import pytest

from tests import report_runs
from vidgen import errors, report
from vidgen.cli import main


def held(path):
  """The data of a page."""
  text = path.read_text()
  block = re.findall(r'id="data">(.*?)</script>', text, re.DOTALL)
  assert len(block) == 1
  return json.loads(block[0])


def test_texts_stay_data(tmp_path):
  report_runs.job(tmp_path / "job", report_runs.NASTY)
  path = report.write(tmp_path / "job")
  text = path.read_text()
  data = held(path)
  assert [data["texts"][c["prompt"]] for c in data["clips"]] == list(
    report_runs.NASTY
  )
  assert text.count("<script") == 2 and text.count("</script") == 2
  assert "onerror='" not in re.sub(r'id="data">.*', "", text)
  policy = re.search(r'Policy" content="([^"]*)"', text)[1]
  assert "unsafe" not in policy and "default-src 'none'" in policy
  assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)


def test_addresses_are_relative_and_encoded(tmp_path):
  folder = tmp_path / "a #1?%20"
  paths = report_runs.job(folder, ["x"])
  odd = folder / os.fsdecode(b"odd \xff;:'.mp4")
  paths[0].rename(odd)
  record = {"index": 0, "files": [odd.name]}
  (folder / "clips.jsonl").write_text(json.dumps(record) + "\n")
  for out in (folder / "report.html", tmp_path / "x" / "y.html"):
    out.parent.mkdir(exist_ok=True)
    data = held(report.write(folder, out=out))
    for name in ("src", "poster"):
      address = data["clips"][0][name]
      assert address.startswith("./") and not set(" #?:;'") & set(address)
      there = (
        os.fsencode(out.parent) + b"/" + urllib.parse.unquote_to_bytes(address)
      )
      assert os.path.isfile(there), address


def test_runs_are_compared_by_prompt_seed_and_clip(tmp_path):
  first, second = tmp_path / "first", tmp_path / "second"
  report_runs.job(first, ["a", "b", "c", "d"])
  report_runs.clip(second, 0, "a")
  report_runs.clip(second, 1, "b", pixels=report_runs.frames(9))
  report_runs.clip(second, 2, "c", seed=1)
  report_runs.clip(second, 3, "d", status="failed", error="no")
  data = held(report.write(first, second))
  assert data["columns"] == ["first", "second"]
  prompt = lambda i: (
    i if i is None else data["texts"][data["clips"][i]["prompt"]]
  )
  rows = [
    ([prompt(i) for i in row["cells"]], row.get("match"))
    for row in data["rows"]
  ]
  assert rows == [
    (["a", "a"], "same"),
    (["b", "b"], "differs"),
    (["c", None], None),
    (["d", "d"], None),
    ([None, "c"], None),
  ]


def test_without_frames_files_are_compared(tmp_path):
  for name, seed in (("first", 0), ("second", 0), ("third", 1)):
    pixels = report_runs.frames(seed)
    report_runs.clip(tmp_path / name, 0, "a", pixels=pixels, frames_sha256=None)
  for other, match in (("second", "same"), ("third", "differs")):
    data = held(report.write(tmp_path / "first", tmp_path / other))
    assert data["rows"][0]["match"] == match


def test_labels_tell_runs_apart(tmp_path):
  for name in ("a/job", "b/job"):
    (tmp_path / name).parent.mkdir()
    report_runs.job(tmp_path / name, ["x"])
  data = held(report.write(tmp_path / "a/job", tmp_path / "b/job"))
  assert data["columns"] == ["a/job", "b/job"]
  data = held(report.write(tmp_path / "a/job", tmp_path / "a/job"))
  assert len(set(data["columns"])) == 2


def test_samples_of_training_stand_by_step(tmp_path):
  report_runs.training(tmp_path / "run")
  data = held(report.write(tmp_path / "run"))
  assert data["columns"] == ["step 100", "step 200"] and data["by_step"]
  assert [row["cells"] for row in data["rows"]] == [[0, 2], [1, 3]]
  (run,) = data["runs"]
  assert run["curves"]["learning_rate"][1][0] == 0.001
  assert run["goodput"]["seconds"]["compile"] == 8.5
  posters = [clip["poster"] for clip in data["clips"]]
  assert posters[:2] == ["./posters/100/00.jpg", "./posters/100/01.jpg"]


def test_no_posters_and_a_clip_that_cannot_be_decoded(tmp_path):
  paths = report_runs.job(tmp_path / "job", ["a", "b"])
  assert (
    "poster"
    not in held(report.write(tmp_path / "job", posters=False))["clips"][0]
  )
  paths[1].write_bytes(b"x" * paths[1].stat().st_size)
  data = held(report.write(tmp_path / "job"))
  assert ["poster" in clip for clip in data["clips"]] == [True, False]
  # Once made, they are shown without being made.
  data = held(report.write(tmp_path / "job", posters=False))
  assert ["poster" in clip for clip in data["clips"]] == [True, False]


def test_the_old_page_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
  report_runs.job(tmp_path / "job", ["a"])
  path = report.write(tmp_path / "job")
  old = path.read_bytes()

  def fail(*args):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(os, "fsync", fail)
  with pytest.raises(errors.StorageError, match="No space left"):
    report.write(tmp_path / "job")
  assert path.read_bytes() == old
  assert sorted(p.suffix for p in path.parent.glob(".*")) == []


def test_what_killed_processes_left_is_removed(tmp_path):
  folder = tmp_path / "run"
  report_runs.training(folder)
  mark = "0123456789abcdef"
  home = folder / "posters" / "100"
  home.mkdir(parents=True)
  left = [
    folder / f".report.{mark}.tmp.html",
    folder / "posters" / f".{mark}.tmp",
    home / f".{mark}.tmp",
  ]
  others = [
    folder / f".other.{mark}.tmp.html",
    folder / f".report.{mark[1:]}.tmp.html",
    folder / f".report.{mark}.tmp.mp4",
    home / f".{mark}.tmp.jpg",
    home / "x.tmp",
  ]
  # Somebody may be at these.
  others += [path.with_name(path.name.replace("0", "a")) for path in left]
  then = time.time() - 7200
  for path in (*left, *others):
    path.write_bytes(b"half")
  for path in (*left, *others[:-3]):
    os.utime(path, (then, then))
  report.write(folder)
  assert [path for path in left if path.exists()] == []
  assert [path for path in others if not path.exists()] == []


def test_the_command(tmp_path, capsys):
  report_runs.job(tmp_path / "a", ["x"])
  report_runs.job(tmp_path / "b", ["x"])
  out = tmp_path / "both.html"
  command = ["report", str(tmp_path / "a"), str(tmp_path / "b")]
  assert main.main([*command, f"--out={out}"]) == 0
  assert capsys.readouterr().out == f"{out}\n" and out.is_file()
  assert main.main(["report", str(tmp_path / "c")]) == 2
  assert "no such folder" in capsys.readouterr().err
  assert main.main(["report"]) == 2
  assert "no folder is named" in capsys.readouterr().err
  assert main.main(["bench", "stray"]) == 2
  assert "is no flag" in capsys.readouterr().err


def test_jax_is_not_imported():
  code = (
    "import sys\nsys.modules['jax'] = sys.modules['tensorflow'] = None\n"
    "import vidgen.report, vidgen.cli.report"
  )
  subprocess.run([sys.executable, "-c", code], check=True)
