"""Sampling jobs that are told to stop, and such that fill the disk."""

import os
import pathlib
import signal
import subprocess
import time

import pytest

from tests.chaos import kill
from vidgen import ledger


@pytest.fixture
def prompts(tmp_path):
  path = tmp_path / "prompts.txt"
  path.write_text("".join(f"A blue star {i}.\n" for i in range(200)))
  return path


def wait_for_clips(out, count, child):
  """Waits until a job has made some clips."""
  path = pathlib.Path(out) / ledger.FILE
  deadline = time.monotonic() + 120
  while time.monotonic() < deadline:
    assert child.poll() is None, "it ended"
    if path.exists() and path.read_bytes().count(b"\n") >= count:
      return
    time.sleep(0.05)
  raise AssertionError("the job does not get on")


def test_told_to_stop_it_stops_at_once_and_goes_on(prompts, tmp_path):
  out, log = tmp_path / "out", tmp_path / "log"
  child = kill.start(kill.sample_argv(prompts, out), log)
  wait_for_clips(out, 3, child)
  child.send_signal(signal.SIGTERM)
  began = time.monotonic()
  assert child.wait(60) == 75
  assert time.monotonic() - began < 20
  assert "run the same command" in log.read_text().lower()
  before = kill.sampled(out)
  assert 3 <= len(before) < 200
  child = kill.start(kill.sample_argv(prompts, out), log)
  wait_for_clips(out, len(before) + 2, child)
  # Two signals do not wait for anything.
  child.send_signal(signal.SIGTERM)
  child.send_signal(signal.SIGINT)
  assert child.wait(60) in (75, 128 + signal.SIGINT, 128 + signal.SIGTERM)
  records = ledger.read(out)
  assert len({r["name"] for r in records}) == len(records) > len(before)
  assert not any(ledger.damage(out, r, hashes=True) for r in records)


@pytest.fixture
def small_disk(tmp_path):
  disk = tmp_path / "disk"
  disk.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
  if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("a small file system takes root's rights")
  yield disk
  subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_told_and_more_room_goes_on(small_disk, tmp_path):
  prompts = tmp_path / "prompts.txt"
  prompts.write_text("".join(f"A blue star {i}.\n" for i in range(30)))
  out, log = small_disk / "out", tmp_path / "log"
  argv = kill.sample_argv(prompts, out)
  assert kill.start(argv, log).wait() == 74
  (line,) = [x for x in log.read_text().splitlines() if "error" in x]
  assert "No space left on device; free some space" in line
  made = {r["name"]: r["frames_sha256"] for r in ledger.read(out)}
  assert 0 < len(made) < 30
  assert not [path for path in out.iterdir() if path.name.startswith(".")]
  remount = ["mount", "-o", "remount,size=4m", str(small_disk)]
  subprocess.run(remount, check=True)
  assert kill.start(argv, log).wait() == 0
  assert len(kill.sampled(out)) == 30
  assert kill.sampled(out).items() >= made.items()
