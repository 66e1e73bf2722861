"""SHA-256 of large files, remembered from run to run.

A file counts as the same one while its path, size, time of change and inode
stay: weights of 20 GB are read once, not for every run.
"""

import hashlib
import json
import os
import pathlib
import threading
import time
from collections.abc import Iterable
from typing import Any

from vidgen import errors, video

_PART = 2**24
# A file that was changed so lately may change again within its clock's tick.
_RECENT_NS = 2 * 10**9
# What weights and words are read from; notes and pictures beside them are not.
SUFFIXES = (".json", ".model", ".safetensors", ".txt")
_ORBAX = ("orbax", "state")
# Entries that are remembered, the newest.
_LIMIT = 10_000


class StoppedError(Exception):
  """Nobody waits for the hash any more."""


class Hashes:
  """Hashes files, and remembers the hashes in a JSON file.

  Several processes may share the file: what one of them does not see of
  another is hashed again.
  """

  def __init__(
    self,
    memory: pathlib.Path | None = None,
    stopped: threading.Event | None = None,
  ):
    """Makes them.

    Args:
      memory: The JSON file; None remembers nothing.
      stopped: Ends what is being hashed, by StoppedError, once it is set.
    """
    self._memory = memory
    self._stopped = threading.Event() if stopped is None else stopped
    self._known = _read(memory)
    self._new: dict[str, list[Any]] = {}
    self.bytes_read = 0

  def file(self, path: str | os.PathLike) -> str:
    """Returns the SHA-256 of a file.

    Raises:
      StorageError: It cannot be read.
      StoppedError: It was asked to stop.
    """
    # Caches of the hub link to where the content is.
    name = os.path.realpath(path)
    try:
      with open(name, "rb") as file:
        status = os.fstat(file.fileno())
        mark = [status.st_size, status.st_mtime_ns, status.st_ino]
        known = self._known.get(name)
        if known is not None and known[:3] == mark:
          return known[3]
        found = self._digest(file)
    except OSError as error:
      raise errors.StorageError(
        f"{path}: cannot be read: {error.strerror}."
      ) from error
    if time.time_ns() - status.st_mtime_ns > _RECENT_NS:
      self._known[name] = self._new[name] = [*mark, found]
    return found

  def folder(
    self, path: str | os.PathLike, every: bool = False
  ) -> dict[str, str]:
    """Returns a SHA-256 of each part of a folder.

    A part is a folder in it ("transformer"), or a file of its own. A folder's
    hash is that of the names and hashes of the files in it.

    Args:
      path: The folder.
      every: Counts every file; else those that weights and words are read
        from. Hidden ones never count.
    """
    home, parts = pathlib.Path(path), {}
    for item in sorted(home.iterdir()):
      if item.name.startswith("."):
        continue
      if item.is_file():
        if every or item.suffix in SUFFIXES:
          parts[item.name] = self.file(item)
        continue
      files = {
        file.relative_to(item).as_posix(): self.file(file)
        for file in sorted(item.rglob("*"))
        if file.is_file() and _counts(file.relative_to(item), every)
      }
      if files:
        text = json.dumps(files, sort_keys=True)
        parts[item.name] = hashlib.sha256(text.encode()).hexdigest()
    return parts

  def path(
    self, path: str | os.PathLike, every: bool = False
  ) -> dict[str, str]:
    """Returns the hashes of a folder, or of one file, by name."""
    if os.path.isdir(path):
      return self.folder(path, every)
    return {os.path.basename(path): self.file(path)}

  def files(
    self, folder: str | os.PathLike, names: Iterable[str]
  ) -> dict[str, str]:
    """Returns the SHA-256 of some files, by their names from a folder.

    That of a folder of frames is of the hashes of its numbered frames.
    """
    found = {}
    for name in names:
      path = pathlib.Path(folder, name)
      if path.is_dir():
        frames = [p for p in path.glob("*.png") if p.stem.isdecimal()]
        frames.sort(key=lambda p: (int(p.stem), p.name))
        text = "".join(map(self.file, frames))
        found[name] = hashlib.sha256(text.encode()).hexdigest()
      else:
        found[name] = self.file(path)
    return found

  def remember(self) -> None:
    """Writes what was hashed; whatever hinders that, it is hashed again."""
    if self._memory is None or not self._new:
      return
    merged = {**_read(self._memory), **self._new}
    merged = dict(list(merged.items())[-_LIMIT:])
    try:
      self._memory.parent.mkdir(parents=True, exist_ok=True)
      with video.atomic(self._memory) as temporary:
        temporary.write_text(json.dumps(merged), encoding="utf-8")
    except (OSError, ValueError):
      return
    self._new.clear()

  def _digest(self, file: Any) -> str:
    digest = hashlib.sha256()
    while part := file.read(_PART):
      if self._stopped.is_set():
        raise StoppedError
      digest.update(part)
      self.bytes_read += len(part)
    return digest.hexdigest()


def _counts(path: pathlib.Path, every: bool) -> bool:
  """Says whether a file is one of those that are read."""
  if any(part.startswith(".") for part in path.parts):
    return False
  return (
    every or path.suffix in SUFFIXES or bool({*_ORBAX} & {*path.parts[:-1]})
  )


def _read(memory: pathlib.Path | None) -> dict[str, list[Any]]:
  """Returns what is remembered; nothing if it cannot be made out."""
  if memory is None:
    return {}
  try:
    held = json.loads(memory.read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError):
    return {}
  if not isinstance(held, dict):
    return {}
  return {n: entry for n, entry in held.items() if _is_entry(entry)}


def _is_entry(entry: Any) -> bool:
  """Says whether it is size, time and inode of a file, and its SHA-256."""
  return (
    isinstance(entry, list)
    and [type(x) for x in entry] == [int, int, int, str]
    and len(entry[3]) == 64
  )
