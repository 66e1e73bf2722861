import fcntl
import json
import os
import pathlib
import subprocess
import sys

import pytest

import vidgen
from vidgen import errors, ledger


def write(path, *records, torn=""):
  text = "".join(json.dumps(r) + "\n" for r in records)
  path.write_text(text + torn)


def test_the_last_line_of_a_clip_counts_and_a_torn_one_does_not(tmp_path):
  write(
    tmp_path / "clips-00000-of-00002.jsonl",
    {"index": 2, "name": "2_a", "status": "failed", "error": "no"},
    {"index": 0, "name": "0_a", "status": "done"},
    {"index": 2, "name": "2_a", "status": "done"},
    torn='{"index": 3, "sta',
  )
  write(
    tmp_path / "clips-00001-of-00002.jsonl",
    {"index": 1, "name": "1_a", "status": "failed"},
  )
  told = [(r["index"], r["status"]) for r in ledger.read(tmp_path)]
  assert told == [(0, "done"), (1, "failed"), (2, "done")]


def test_damaged_lines_are_found_and_no_clip_is_done_by_them(tmp_path):
  good = {"index": 0, "name": "0_a", "status": "done"}
  lines = [
    json.dumps(good),
    '{"index": 1, "name": "1_a", "statu',
    "",
    '{"index": 2, "name": "2_a", "status": "dome"}',
    "\0" * 9,
    "[3]",
    '{"name": "4_a", "status": "done"}',
    json.dumps({**good, "index": 5, "name": "5_a"}),
  ]
  path = tmp_path / "clips.jsonl"
  path.write_text("\n".join(lines) + "\n")
  want = [f"clips.jsonl:{number}" for number in (2, 4, 5, 6, 7)]
  assert ledger.damaged(tmp_path) == want
  told = [(r["name"], r["status"]) for r in ledger.read(tmp_path)]
  assert told == [("0_a", "done"), ("2_a", "failed"), ("5_a", "done")]
  # What a killed job was about to write is no damage.
  write(path, good, torn='{"index": 3, "sta')
  assert ledger.damaged(tmp_path) == []


def test_clips_of_two_jobs_are_both_there_and_mended_failures_are_not(tmp_path):
  write(
    tmp_path / "clips.jsonl",
    {"index": 0, "name": "0_a", "status": "done"},
    {"index": 1, "name": None, "status": "failed"},
    {"index": 0, "name": "0_b", "status": "done"},
    {"index": 1, "name": "1_b", "status": "done"},
    {"index": 2, "name": "2_b", "status": "failed"},
  )
  told = [(r["name"], r["status"]) for r in ledger.read(tmp_path)]
  assert told == [
    ("0_a", "done"),
    ("0_b", "done"),
    ("1_b", "done"),
    ("2_b", "failed"),
  ]


def test_the_last_line_may_be_in_any_file(tmp_path):
  old, new = tmp_path / "clips.jsonl", tmp_path / "clips-00000-of-00002.jsonl"
  line = {"index": 0, "name": "0_a", "status": "done"}
  write(old, {**line, "fps": 8, "time": 5.0}, {**line, "fps": 9, "time": 4.0})
  write(new, {**line, "fps": 16, "time": 6.5})
  assert [r["fps"] for r in ledger.read(tmp_path)] == [16]
  write(new, {**line, "fps": 16, "time": 4.5})
  # A clock was set back.
  assert [r["fps"] for r in ledger.read(tmp_path)] == [9]
  write(new, {**line, "fps": 16, "time": "late"})
  assert [r["fps"] for r in ledger.read(tmp_path)] == [9]


def test_a_file_that_another_job_removes_meanwhile_is_made_anew(
  tmp_path, monkeypatch
):
  first, lock = ledger.Ledger(tmp_path), fcntl.flock

  def late(file, how):
    first.close()  # Between the opening of the second and its lock.
    monkeypatch.setattr(fcntl, "flock", lock)
    lock(file, how)

  monkeypatch.setattr(fcntl, "flock", late)
  second = ledger.Ledger(tmp_path)
  second.append({"index": 0, "name": "0_a", "status": "done"})
  second.close()
  assert len(ledger.read(tmp_path)) == 1


HOLD = """
import pathlib, sys, time
from vidgen import ledger
held = ledger.Ledger(pathlib.Path(sys.argv[1]))
held.append({"index": 0, "name": "0_a", "status": "done"})
print("held", flush=True)
time.sleep(60)
"""


def test_one_process_has_the_file_until_it_is_killed(tmp_path):
  argv = [sys.executable, "-c", HOLD, os.fspath(tmp_path)]
  root = pathlib.Path(vidgen.__file__).parents[1]
  with subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=root) as other:
    try:
      assert other.stdout.readline() == b"held\n"
      with pytest.raises(errors.InputError, match="another job is writing it"):
        ledger.Ledger(tmp_path)
      with pytest.raises(errors.InputError, match="in another way"):
        ledger.Ledger(tmp_path, 0, 2)
    finally:
      other.kill()
  held = ledger.Ledger(tmp_path)
  held.append({"index": 1, "name": "1_a", "status": "done"})
  held.close()
  assert [r["name"] for r in ledger.read(tmp_path)] == ["0_a", "1_a"]


def test_damage_is_found(tmp_path):
  file = tmp_path / "0_a.mp4"
  file.write_bytes(b"12345")
  record = {
    "files": [file.name],
    "bytes": {file.name: 5},
    "sha256": {file.name: ledger.digest(file)},
  }
  assert ledger.damage(tmp_path, record, hashes=True) is None
  file.write_bytes(b"12346")
  assert ledger.damage(tmp_path, record) is None
  assert "not as it was" in ledger.damage(tmp_path, record, hashes=True)
  file.write_bytes(b"1234")
  assert "another size" in ledger.damage(tmp_path, record)
  file.unlink()
  assert "is missing" in ledger.damage(tmp_path, record)
