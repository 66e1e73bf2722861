import errno
import fcntl
import os
import pathlib
import subprocess
import sys

import pytest

import vidgen
from vidgen import errors, filelock

ROOT = pathlib.Path(vidgen.__file__).parents[1]


def test_one_holder_at_a_time(tmp_path):
  path = tmp_path / "a"
  assert not filelock.is_locked(path)
  held = filelock.Lock(path)
  held.file.write(b"mine")
  assert held.is_real and filelock.is_locked(path)
  with pytest.raises(BlockingIOError):
    filelock.Lock(path)
  held.release()
  assert not filelock.is_locked(path)
  again = filelock.Lock(path)
  again.file.seek(0)
  assert again.file.read() == b"mine"
  again.release()


def test_looking_takes_no_lock_away(tmp_path):
  held = filelock.Lock(tmp_path / "a")
  for _ in range(2):
    assert filelock.is_locked(tmp_path / "a")
  held.release()


def test_a_child_does_not_keep_the_lock(tmp_path):
  code = (
    "import os, pathlib, sys, time\n"
    "from vidgen import filelock\n"
    "held = filelock.Lock(pathlib.Path(sys.argv[1]))\n"
    "if os.fork() == 0:\n"
    "  print('held', flush=True)\n"
    "  sys.stdin.read()\n"
    "  os._exit(0)\n"
    "time.sleep(60)\n"
  )
  child = subprocess.Popen(
    [sys.executable, "-c", code, os.fspath(tmp_path / "a")],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    cwd=ROOT,
  )
  # The child's child ends when standard input does, with this block.
  with child:
    assert child.stdout.readline() == b"held\n"
    assert filelock.is_locked(tmp_path / "a")
    child.kill()
    child.wait(20)
    filelock.Lock(tmp_path / "a").release()


def test_a_folder_has_one_holder(tmp_path):
  home = tmp_path / "a/b"
  busy = "another run is at work"
  with (
    filelock.folder(home, busy),
    pytest.raises(errors.InputError, match=f"b: {busy}; "),
    filelock.folder(home, busy),
  ):
    pass
  # What is wrong inside is not taken for a lock.
  with pytest.raises(BlockingIOError), filelock.folder(home, ""):
    raise BlockingIOError
  with filelock.folder(home, ""):
    pass


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
  def flock(file, kind):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(fcntl, "flock", flock)
  held = filelock.Lock(tmp_path / "a")
  assert not held.is_real and not filelock.is_locked(tmp_path / "a")
  held.release()
  with filelock.folder(tmp_path, "another run is at work"):
    pass
