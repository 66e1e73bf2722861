"""Whose a run's folder is: its config, and a lock while a run is at work."""

import fnmatch
import json
import os
import pathlib
import socket
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vidgen import errors, filelock, tensorfile, tensorheader

CONFIG = "config.json"
_LOCK = ".lock"


class Lock(filelock.Lock):
  """The lock on a run's folder."""

  def __init__(self, workdir: pathlib.Path, warn: Callable[[str], None]):
    """Takes the lock.

    Raises:
      InputError: Another run has it.
    """
    path = workdir / _LOCK
    try:
      super().__init__(path)
    except BlockingIOError as e:
      owner = path.read_bytes()[:200].decode("utf-8", "replace").strip()
      raise errors.InputError(
        f"{workdir}: another run is at work in it ({ascii(owner)[1:-1]}); end "
        "that one, or choose another --workdir."
      ) from e
    if not self.is_real:
      warn(f"WARNING: {path}: this file system has no locks; start one run.")
    self.file.truncate(0)
    owner = f"process {os.getpid()} on {socket.gethostname()}\n"
    self.file.write(owner.encode())


def identify(
  path: pathlib.Path, config: Mapping[str, Any], free: tuple[str, ...]
) -> None:
  """Writes the config, after a check that it is the one that is there."""
  try:
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False) + "\n"
  except ValueError as e:
    raise errors.InputError(f"config: {e}; give finite numbers.") from e
  if path.exists():
    there = dict(_fields(tensorheader.read_json(path)))
    here = dict(_fields(json.loads(text)))
    names = sorted(
      name
      for name in there.keys() | here.keys()
      if there.get(name) != here.get(name)
      and not any(fnmatch.fnmatchcase(name, pattern) for pattern in free)
    )
    if names:
      items = [
        f"{name} ({_short(there.get(name, 'absent'))} there, "
        f"{_short(here.get(name, 'absent'))} here)"
        for name in names
      ]
      raise errors.InputError(
        f"{path}: is of a run with another config: "
        f"{tensorheader.listed(items, 8)}; choose another --workdir."
      )
    if there == here:
      return
  write_text(path, text)


def _fields(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
  """Yields the fields of a config with their JSON, "stages.0.num_steps"."""
  if isinstance(value, dict | list) and (value or not name):
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in pairs:
      yield from _fields(item, f"{name}.{key}" if name else str(key))
  else:
    yield name, json.dumps(value, sort_keys=True)


def _short(text: str) -> str:
  """Returns text for a message; of long ones the end tells more."""
  return text if len(text) <= 60 else f"{text[:27]}...{text[-30:]}"


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes a small file: the old text is there, or all of the new.

  Raises:
    StorageError: It could not be written; the old one is as it was.
  """
  temporary = path.with_name(f".{path.name}.tmp")
  try:
    try:
      temporary.write_text(text, encoding="utf-8")
      tensorfile.sync(temporary)
      temporary.replace(path)
      tensorfile.sync(path.parent)
    finally:
      temporary.unlink(missing_ok=True)
  except OSError as e:
    raise errors.StorageError(
      f"{path}: cannot be written: {e.strerror}; free some space, or choose "
      "another --workdir."
    ) from e
