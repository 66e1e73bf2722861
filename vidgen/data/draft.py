"""A cache while it is written, file by file, so that a killed run goes on.

The draft stands beside the folder to be: `plan.json` says what it is of, a JSON
file for each whole file counts its records, and in `cache/` is what becomes the
folder.
"""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from vidgen import errors, filelock, manifest, tensorfile, tensorheader, video
from vidgen.data import cache

# Nothing is compressed: latents are mostly noise. A record is read alone.
_WRITER = "group_size:1,uncompressed"
_PLAN = "plan.json"


class Draft:
  """The draft of a cache.

  Attributes:
    out: The folder to be.
    path: Where it is written.
  """

  def __init__(self, out: pathlib.Path):
    self.out = out
    self.path = out.with_name(f".{out.name}.draft")
    self._whole = self.path / "cache"

  def locked(self) -> contextlib.AbstractContextManager[None]:
    """Holds the draft for this run; see `filelock.folder`."""
    return filelock.folder(self.path, "another run is encoding there")

  def begin(self, facts: dict[str, Any]) -> None:
    """Begins the draft, or goes on with it if it is of the same cache.

    Raises:
      InputError: It is not, and something of it is whole.
    """
    plan = self.path / _PLAN
    self._whole.mkdir(exist_ok=True)
    for leftover in self._whole.glob(".*.tmp*"):
      leftover.unlink()
    there = tensorheader.read_json(plan) if plan.exists() else {}
    if there.get("key") == facts["key"]:
      return
    if any(self._whole.iterdir()):
      raise errors.InputError(
        f"{self.path}: is an unfinished cache of another "
        f"{differing(there, facts)}; remove it, or name another --out."
      )
    _write_json(plan, facts)

  def finish(self, groups: list[cache.Group], facts: dict[str, Any]) -> None:
    """Describes the files, which are all there; the folder appears."""
    arrays = {}
    for group in groups:
      counts = [
        count
        for name in group.files
        for count in tensorheader.read_json(self._counts(name))["counts"]
      ]
      arrays[f"{group.name}.clips"] = group.clips.astype(np.int64)
      arrays[f"{group.name}.counts"] = np.array(counts, np.int64)
    with video.atomic(self._whole / cache.INDEX) as temporary:
      safetensors.numpy.save_file(arrays, temporary)
    _write_json(self._whole / cache.NAME, facts)
    manifest.write(self._whole)
    tensorfile.sync(self._whole / manifest.NAME)
    tensorfile.sync(self._whole)
    self._whole.rename(self.out)
    tensorfile.sync(self.out.parent)
    self.remove()

  def remove(self) -> None:
    """Removes what is left of the draft."""
    shutil.rmtree(self.path, ignore_errors=True)

  def holds(self, name: str) -> bool:
    """Says whether a file is there, whole."""
    return (self._whole / name).exists()

  @contextlib.contextmanager
  def writing(self, name: str) -> Iterator[Callable[[bytes], None]]:
    """Gives a function that appends a record to a file, which appears whole.

    Raises:
      StorageError: The disk is full, or writing fails otherwise.
    """
    # Takes a moment to import.
    from array_record.python import array_record_module

    path, count = self._whole / name, 0
    with video.atomic(path) as temporary:
      target = os.fspath(temporary)
      make = array_record_module.ArrayRecordWriter
      writer = _told(path, make, target, _WRITER)

      def write(record: bytes) -> None:
        nonlocal count
        _told(path, writer.write, record)
        count += 1

      yield write
      _told(path, writer.close)
      reader = _told(path, array_record_module.ArrayRecordReader, target)
      if reader.num_records() != count:
        raise errors.StorageError(f"{path}: could not be written whole.")
      reader.close()

  def count(self, name: str, counts: list[int]) -> None:
    """Notes the records of each clip of a file, before it is whole."""
    _write_json(self._counts(name), {"counts": counts})

  def _counts(self, name: str) -> pathlib.Path:
    return self.path / f"{name}.json"


def check_same(out: pathlib.Path, facts: dict[str, Any]) -> None:
  """Raises InputError where a folder is another cache."""
  there = tensorheader.read_json(out / cache.NAME)
  if there.get("key") != facts["key"]:
    raise errors.InputError(
      f"{out}: exists, a cache of another {differing(there, facts)}; name "
      "another --out, or remove it."
    )


def differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
  """Returns in words which parts of the facts of two caches differ."""
  column = lambda value, *names: [
    [group.get(name) for name in names] for group in value.get("groups", ())
  ]
  encoders = lambda value, *names: [
    value.get("encoders", {}).get(name) for name in names
  ]
  parts = {
    "data": lambda v: column(v, "split", "fingerprint", "fps", "clips"),
    "model": lambda v: encoders(v, "vae", "text", "image"),
    "size": lambda v: [column(v, "size"), v.get("windows")],
    "dtype": lambda v: [v.get("dtype"), encoders(v, "dtype")],
    "version": lambda v: v.get("version"),
  }
  names = [name for name, of in parts.items() if of(there) != of(here)]
  return ", ".join(names) or "layout"


def _told(path: pathlib.Path, function: Callable[..., Any], *args: Any) -> Any:
  """Calls a function of array_record, which tells all in RuntimeErrors."""
  try:
    return function(*args)
  except RuntimeError as error:
    text = " ".join(str(error).split())
    raise errors.StorageError(f"{path}: cannot write: {text}.") from error


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
  with video.atomic(path) as temporary:
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
