"""The ledger of a sampling job: what became of each clip, a line each.

A folder has one file for each shard of the job. Lines are only ever appended:
of a name, which is one clip, the last counts. A line that a killed job left
half written counts for nothing, and is cut off when the job goes on.
"""

import errno
import hashlib
import json
import math
import os
import pathlib
import re
import threading
import time
from collections.abc import Mapping
from typing import Any

from vidgen import errors, filelock, video

FILE = "clips.jsonl"
DONE, FAILED = "done", "failed"


def file_name(shard: int = 0, shards: int = 1) -> str:
  """Returns the name of a shard's file."""
  if shards == 1:
    return FILE
  return f"clips-{shard:05d}-of-{shards:05d}.jsonl"


def read(folder: str | os.PathLike) -> list[dict[str, Any]]:
  """Returns what became of each clip of a folder, in the order of the index.

  A failure is dropped where another line is of the same index: it was mended,
  or tried again.
  """
  found = []
  for path in sorted(pathlib.Path(folder).glob("clips*.jsonl")):
    latest = 0.0
    for record in _lines(path):
      # Within a file the order holds, whatever a clock that was set back says.
      latest = max(latest, record["time"])
      found.append((latest, record))
  # How many shards there are may change: the last line may be in any file.
  found.sort(key=lambda pair: pair[0])
  records: dict[Any, dict[str, Any]] = {}
  for _, record in found:
    key = record["name"] or ("unnamed", record["index"])
    records.pop(key, None)
    records[key] = record
  last = {record["index"]: record for record in records.values()}
  kept = [
    record
    for record in records.values()
    if record["status"] == DONE or last[record["index"]] is record
  ]
  return sorted(kept, key=lambda record: record["index"])


def damaged(folder: str | os.PathLike) -> list[str]:
  """Returns where lines are that count for nothing, "clips.jsonl:3".

  Not the last one of a file where it has no end: a killed job leaves that.
  """
  return [
    f"{path.name}:{number}"
    for path in sorted(pathlib.Path(folder).glob("clips*.jsonl"))
    for number, line in enumerate(_pieces(path)[:-1], 1)
    if line.strip() and not _is_good(_parsed(line))
  ]


def _is_good(record: dict[str, Any] | None) -> bool:
  # Lines of an older make have no status.
  statuses = (None, DONE, FAILED)
  return record is not None and record.get("status") in statuses


def _lines(path: pathlib.Path) -> list[dict[str, Any]]:
  """The whole lines of a file; what is no line of a ledger is left out."""
  parsed = map(_parsed, _pieces(path))
  return [_checked(record) for record in parsed if record is not None]


def _pieces(path: pathlib.Path) -> list[bytes]:
  """The lines of a file; the last of them is what has no end."""
  try:
    return path.read_bytes().split(b"\n")
  except FileNotFoundError:
    # A job that wrote nothing has removed it since.
    return [b""]


def _parsed(line: bytes) -> dict[str, Any] | None:
  """What a line says; None if it is no line of a ledger."""
  try:
    record = json.loads(line)
    index = record["index"]
  except (ValueError, TypeError, KeyError, RecursionError):
    return None
  return record if type(index) is int else None


def _checked(record: dict[str, Any]) -> dict[str, Any]:
  """A line whose parts are of the types that they should be of."""
  files = record.get("files")
  files = files if isinstance(files, list) else []
  files = [name for name in files if isinstance(name, str)]
  name = record.get("name")
  if not isinstance(name, str):
    # Lines of an older make have no name, nor a status.
    name = os.path.splitext(files[0])[0] if files else None
  status = DONE if record.get("status") in (None, DONE) else FAILED
  for key in ("bytes", "sha256"):
    if not isinstance(record.get(key, {}), dict):
      del record[key]
  at = record.get("time")
  if type(at) is not float or not math.isfinite(at):
    at = 0.0
  checked = {"files": files, "name": name, "status": status, "time": at}
  return {**record, **checked}


def damage(
  folder: pathlib.Path, record: Mapping[str, Any], hashes: bool = False
) -> str | None:
  """Returns what is wrong with a clip's files; None: nothing is.

  Args:
    folder: Of the job.
    record: Of a clip that is done.
    hashes: Whether every byte is read, rather than the sizes compared.
  """
  for name in record["files"]:
    path = folder / name
    if not path.exists():
      return f"{path}: is missing"
    size = record.get("bytes", {}).get(name)
    if size is None:
      return f"{path}: the ledger has no size of it"
    if size != size_of(path):
      return f"{path}: has another size than was written"
    if hashes and digest(path) != record.get("sha256", {}).get(name):
      return f"{path}: is not as it was written"
  return None


def size_of(path: pathlib.Path) -> int:
  """Returns the bytes of a file, or of all files in a folder."""
  if not path.is_dir():
    return path.stat().st_size
  return sum(item.stat().st_size for item in path.iterdir())


def digest(path: pathlib.Path) -> str:
  """Returns the SHA-256 of a file; of a folder that of its files' in order."""
  if path.is_dir():
    parts = "".join(digest(item) for item in sorted(path.iterdir()))
    return hashlib.sha256(parts.encode()).hexdigest()
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


class Ledger:
  """A shard's file while its job runs, which it keeps from other jobs."""

  def __init__(self, folder: pathlib.Path, shard: int = 0, shards: int = 1):
    """Opens the file, and cuts off what was written by half.

    Raises:
      InputError: Another job writes it.
      StorageError: It cannot be written.
    """
    self.path = folder / file_name(shard, shards)
    # Failures are told by one thread, what was written by another: a line that
    # is taken back must not take the other's along.
    self._appending = threading.Lock()
    try:
      # A job that ends removes an empty file: another may have opened it.
      while not self._open():
        self._lock.release()
      self._file = self._lock.file
      self._check_splits(folder, shards)
      self._cut()
    except OSError as error:
      if isinstance(error, errors.VidgenError):
        raise
      raise video.storage_error(self.path, error) from error

  def _open(self) -> bool:
    """Opens and locks the file; says whether it is still the one there."""
    try:
      self._lock = filelock.Lock(self.path)
    except BlockingIOError as error:
      raise errors.InputError(
        f"{self.path}: another job is writing it; wait for its end, choose "
        "another --out, or split the work by --shard=i/n."
      ) from error
    held = os.fstat(self._lock.file.fileno())
    try:
      return os.path.samestat(held, self.path.stat())
    except FileNotFoundError:
      return False

  def _check_splits(self, folder: pathlib.Path, shards: int) -> None:
    """Raises InputError where jobs that split the work otherwise are at it."""
    for path in folder.glob("clips*.jsonl"):
      other = re.search(r"-of-(\d+)\.jsonl$", path.name)
      if (int(other[1]) if other else 1) == shards:
        continue
      if filelock.is_locked(path):
        self._lock.release()
        raise errors.InputError(
          f"{path}: a job that splits the work in another way is writing it; "
          "wait for its end."
        )

  def _cut(self) -> None:
    """Ends the file after its last whole line."""
    end = self._file.seek(0, os.SEEK_END)
    while end:
      start = max(0, end - 2**16)
      self._file.seek(start)
      found = self._file.read(end - start).rfind(b"\n")
      if found >= 0:
        end = start + found + 1
        break
      end = start
    self._file.truncate(end)

  def append(self, record: Mapping[str, Any]) -> None:
    """Appends a line with the time, and flushes it to the disk.

    Raises:
      StorageError: It could not be written; nothing of it is left.
    """
    record = {**record, "time": round(time.time(), 3)}
    text = json.dumps(record, ensure_ascii=False) + "\n"
    # A name of a file that is no Unicode, as JSON escapes it.
    line = text.encode("utf-8", "backslashreplace")
    with self._appending:
      self._append(line)

  def _append(self, line: bytes) -> None:
    end = self._file.seek(0, os.SEEK_END)
    try:
      try:
        if self._file.write(line) < len(line):
          raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(self._file.fileno())
      except OSError:
        # Half a line would spoil the list for whoever reads it.
        self._file.truncate(end)
        raise
    except OSError as error:
      raise video.storage_error(self.path, error) from error

  def close(self) -> None:
    """Lets go of the file; it goes where nothing was written."""
    empty = self._file.seek(0, os.SEEK_END) == 0
    if empty:
      self.path.unlink(missing_ok=True)
    self._lock.release()
