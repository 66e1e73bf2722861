import hashlib
import json
import os
import threading
import time

import pytest

from vidgen import errors, filehashes


def write(path, data=b"weights", age=10.0):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data)
  then = time.time() - age
  os.utime(path, (then, then))
  return path


def test_a_file_is_read_once(tmp_path):
  path, memory = write(tmp_path / "a.safetensors"), tmp_path / "m" / "h.json"
  want = hashlib.sha256(b"weights").hexdigest()
  first = filehashes.Hashes(memory)
  assert first.file(path) == want
  assert first.bytes_read == 7
  first.remember()
  second = filehashes.Hashes(memory)
  assert second.file(path) == want
  assert second.bytes_read == 0
  assert [p.name for p in memory.parent.iterdir()] == ["h.json"]


@pytest.mark.parametrize("what", ["time", "size", "inode"])
def test_a_changed_file_is_read_again(tmp_path, what):
  path, memory = write(tmp_path / "a.safetensors"), tmp_path / "h.json"
  first = filehashes.Hashes(memory)
  first.file(path)
  first.remember()
  before = path.stat()
  if what == "time":
    write(path, b"WEIGHTS", age=20)
  elif what == "size":
    path.write_bytes(b"weights and more")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
  else:
    other = write(tmp_path / "other", b"WEIGHTS")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)
  second = filehashes.Hashes(memory)
  assert second.file(path) == hashlib.sha256(path.read_bytes()).hexdigest()
  assert second.bytes_read == path.stat().st_size


def test_only_named_files_count(tmp_path):
  write(tmp_path / "a.png", b"x")
  write(tmp_path / "other.png")
  write(tmp_path / "frames" / "000001.png", b"2")
  write(tmp_path / "frames" / "000000.png", b"1")
  write(tmp_path / "frames" / "notes.txt")
  sha256 = lambda data: hashlib.sha256(data).hexdigest()
  found = filehashes.Hashes().files(tmp_path, ["a.png", "frames"])
  want = sha256((sha256(b"1") + sha256(b"2")).encode())
  assert found == {"a.png": sha256(b"x"), "frames": want}
  with pytest.raises(errors.StorageError, match=r"gone\.png: cannot be read"):
    filehashes.Hashes().files(tmp_path, ["gone.png"])


def test_a_file_of_this_moment_is_not_remembered(tmp_path):
  path, memory = write(tmp_path / "a.txt", age=0), tmp_path / "h.json"
  hashes = filehashes.Hashes(memory)
  hashes.file(path)
  hashes.remember()
  assert not memory.exists()


@pytest.mark.parametrize(
  "text", ["", "{", "[]", '{"a": 1}', '{"a": [1, 2, 3, "short"]}', "[" * 9999]
)
def test_a_bad_memory_is_no_memory(tmp_path, text):
  path, memory = write(tmp_path / "a.txt"), tmp_path / "h.json"
  memory.write_text(text)
  hashes = filehashes.Hashes(memory)
  hashes.file(path)
  hashes.remember()
  assert list(json.loads(memory.read_text())) == [os.path.realpath(path)]


def test_two_processes_share_a_memory(tmp_path):
  memory = tmp_path / "h.json"
  both = [filehashes.Hashes(memory) for _ in range(2)]
  for number, hashes in enumerate(both):
    hashes.file(write(tmp_path / f"{number}.txt"))
  for hashes in both:
    hashes.remember()
  assert len(json.loads(memory.read_text())) == 2


def test_a_memory_that_cannot_be_written_hinders_nobody(tmp_path):
  (tmp_path / "file").write_text("")
  hashes = filehashes.Hashes(tmp_path / "file" / "h.json")
  hashes.file(write(tmp_path / "a.txt"))
  hashes.remember()


def test_links_are_one_file(tmp_path):
  path = write(tmp_path / "blobs" / "x")
  (tmp_path / "a.safetensors").symlink_to(path)
  hashes = filehashes.Hashes()
  assert hashes.file(tmp_path / "a.safetensors") == hashes.file(path)
  assert hashes.bytes_read == 7


def test_parts_of_a_checkpoint(tmp_path):
  write(tmp_path / "model_index.json", b"{}")
  write(tmp_path / "README.md")
  write(tmp_path / ".cache" / "x.json")
  write(tmp_path / "vae" / "config.json", b"{}")
  write(tmp_path / "vae" / "a.safetensors")
  write(tmp_path / "notes" / "a.png")
  write(tmp_path / "unet" / "orbax" / "d" / "0123")
  one = filehashes.Hashes().path(tmp_path)
  assert sorted(one) == ["model_index.json", "unet", "vae"]
  write(tmp_path / "vae" / "notes.md")
  assert filehashes.Hashes().path(tmp_path) == one
  write(tmp_path / "vae" / "a.safetensors", b"wEights")
  two = filehashes.Hashes().path(tmp_path)
  assert [name for name in one if one[name] != two[name]] == ["vae"]
  write(tmp_path / "unet" / "orbax" / "d" / "0123", b"x")
  assert filehashes.Hashes().path(tmp_path)["unet"] != two["unet"]


def test_every_file_of_a_folder_of_videos(tmp_path):
  write(tmp_path / "a.mp4")
  write(tmp_path / "b" / "000000.png")
  write(tmp_path / ".b.tmp.mp4")
  assert filehashes.Hashes().path(tmp_path) == {}
  one = filehashes.Hashes().path(tmp_path, every=True)
  assert sorted(one) == ["a.mp4", "b"]
  write(tmp_path / "b" / "000000.png", b"other")
  assert filehashes.Hashes().path(tmp_path, every=True)["b"] != one["b"]


def test_it_stops_when_asked(tmp_path):
  stopped = threading.Event()
  stopped.set()
  hashes = filehashes.Hashes(None, stopped)
  with pytest.raises(filehashes.StoppedError):
    hashes.file(write(tmp_path / "a.txt"))


def test_what_is_not_there(tmp_path):
  with pytest.raises(errors.StorageError, match="cannot be read: No such"):
    filehashes.Hashes().file(tmp_path / "a.txt")
