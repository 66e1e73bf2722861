"""manifest.json: what a run was made of, where it ran, and what came of it.

It is written when a run starts, and again when it ends: a run that was killed
still says "running". Started again in the same folder, a run is told of as one
more of the "attempts" of its manifest; what stands beside them is of the last.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
from jax.sharding import Mesh

from vidgen import (
  environment,
  errors,
  filehashes,
  fingerprint,
  outputs,
  video,
)

NAME = "manifest.json"
# Those of the shards of a job.
SHARDS = "manifest-*.json"
FORMAT = 1

# What every attempt has of its own.
_ATTEMPT = (
  "command",
  "argv",
  "config_fingerprint",
  "code",
  "versions",
  "system",
  "devices",
  "flags",
  "mesh",
  "start",
  "end",
  "seconds",
  "exit",
)
# What a job tells of itself as it finds it out.
_FOUND = ("seeds", "weights", "tokenizer", "inputs", "data")


@dataclasses.dataclass(frozen=True)
class Origin:
  """How a job was called.

  Attributes:
    argv: The command line without "vidgen"; None is a call from Python, which
      cannot be run again by a command.
    out_flag: Which flag names the folder that it writes to.
    config_path: The config file, as it was named.
    config_text: What it held.
    memory: A JSON file that remembers the hashes of large files.
  """

  argv: tuple[str, ...] | None = None
  out_flag: str = "out"
  config_path: str | None = None
  config_text: str | None = None
  memory: pathlib.Path | None = None


class Record:
  """What is to be told of a run. Process 0 alone writes; the others' calls do
  nothing.

  Files are hashed in a thread while the job runs. What could not be hashed has
  a reason in "unknown".
  """

  def __init__(
    self,
    path: pathlib.Path,
    values: dict[str, Any],
    attempts: list[dict[str, Any]],
    memory: pathlib.Path | None = None,
    writes: bool = True,
  ):
    self.path, self._writes = path, writes
    self._values, self._attempts = values, attempts
    self._stopped = threading.Event()
    self._hashes = filehashes.Hashes(memory, self._stopped)
    self._pool = futures.ThreadPoolExecutor(1, "manifest")
    self._jobs: list[tuple[str, str, futures.Future]] = []
    self._outputs: Callable[[], dict[str, Any]] | None = None
    self._exit: tuple[str, int] | None = None
    self._since = time.monotonic()

  def mesh(self, mesh: Mesh) -> None:
    """Says which mesh it runs on; axes of one device are left out."""
    sizes = {str(name): size for name, size in mesh.shape.items() if size > 1}
    self._values["mesh"] = {"axes": sizes, "devices": mesh.size}

  def seeds(self, **seeds: int | None) -> None:
    """Says what decides the noise, by name."""
    self._values["seeds"].update(seeds)

  def weights(self, path: str | os.PathLike, name: str = "checkpoint") -> None:
    """Hashes a folder or a file of weights; of a folder, each component.

    The tokenizer that lies in a checkpoint is one of its components.
    """
    self._hash("weights", name, path)

  def tokenizer(self, path: str | os.PathLike, name: str = "tokenizer") -> None:
    """Hashes a tokenizer that is no part of a checkpoint."""
    self._hash("tokenizer", name, path)

  def inputs(self, path: str | os.PathLike, name: str) -> None:
    """Hashes a file that is read besides, or a folder: prompts, videos."""
    self._hash("inputs", name, path)

  def files(
    self,
    folder: str | os.PathLike,
    hashes: Mapping[str, str | None],
    name: str,
  ) -> None:
    """Hashes some files that are read besides; no others in their folder count.

    Args:
      folder: Of which they are named.
      hashes: The SHA-256 of each by its name; None has it found out.
      name: What they are, "reference".
    """
    # Not its real path: a name may lead out of it.
    place = os.path.abspath(folder)
    item = {"path": place, "sha256": None, "listed": True}
    self._values["inputs"][name] = item
    known = dict(hashes)
    left = [file for file, mark in known.items() if mark is None]
    give = lambda: known | self._hashes.files(place, left)
    self._submit("inputs", name, give)

  def data(self, name: str, value: str | Callable[[], Any]) -> None:
    """Says what tells the content of a data set, its fingerprint for one.

    Args:
      name: Which data: "stages.0".
      value: It, or a function that finds it out, in a thread.
    """
    self._values["data"][name] = None
    give = value if callable(value) else lambda: value
    self._submit("data", name, give)

  def outputs(
    self, value: Mapping[str, Any] | Callable[[], Mapping[str, Any]]
  ) -> None:
    """Says what has been made; a function is called when the run ends.

    However the run ends, by an error too: what a job had made by then counts.
    """
    give = value if callable(value) else lambda: value
    self._outputs = lambda: fingerprint.plain(give())

  def end(self, reason: str, code: int) -> None:
    """Says how the run ends, where no error says so."""
    self._exit = (reason, code)

  def _hash(self, group: str, name: str, path: str | os.PathLike) -> None:
    place = os.path.realpath(path)
    self._values[group][name] = {"path": place, "sha256": None}
    every = group == "inputs"
    self._submit(group, name, lambda: self._hashes.path(place, every))

  def _submit(self, group: str, name: str, give: Callable[[], Any]) -> None:
    if self._writes:
      self._jobs.append((group, name, self._pool.submit(give)))

  def finish(self, error: BaseException | None) -> None:
    """Writes the end of the run.

    A run that is done waits for its hashes; one that was stopped or failed has
    no time for them.

    Raises:
      StorageError: It could not be written.
    """
    if error is not None:
      self._stopped.set()
    # Those that have not begun are not begun any more.
    self._pool.shutdown(wait=True, cancel_futures=error is not None)
    for group, name, job in self._jobs:
      self._settle(group, name, job)
    self._hashes.remember()
    reason, code = self._exit or _exit(error)
    if error is not None:
      reason, code = _exit(error)
    self._values["exit"] = {"reason": reason, "code": code}
    self._values["end"] = _now()
    self._values["seconds"] = round(time.monotonic() - self._since, 3)
    if self._outputs is not None:
      # A run that was good stays good, whatever its record lacks.
      try:
        self._values["outputs"] = self._outputs()
      except Exception as problem:
        self._values["unknown"]["outputs"] = _line(problem)
    if error is None:
      for name, problem in self._values["unknown"].items():
        _warn(f"{self.path}: has no {name}: {problem}")
    self.write()

  def _settle(self, group: str, name: str, job: futures.Future) -> None:
    """Takes the result of what was found out in the thread."""
    try:
      found = job.result()
    except (futures.CancelledError, filehashes.StoppedError):
      self._values["unknown"][f"{group}.{name}"] = "the run ended before"
      return
    except Exception as problem:
      self._values["unknown"][f"{group}.{name}"] = _line(problem)
      return
    if group == "data":
      self._values["data"][name] = fingerprint.plain(found)
    else:
      self._values[group][name]["sha256"] = found

  def write(self) -> None:
    """Writes all that is known by now, whole or not at all."""
    attempt = {name: self._values[name] for name in _ATTEMPT}
    whole = {**self._values, "attempts": [*self._attempts, attempt]}
    with video.atomic(self.path) as temporary:
      text = json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False)
      # A name of a file that is no Unicode, as JSON escapes it.
      temporary.write_bytes((text + "\n").encode("utf-8", "backslashreplace"))


@contextlib.contextmanager
def recording(
  folder: str | os.PathLike,
  command: str,
  config: Any,
  *,
  origin: Origin | None = None,
  idle: Sequence[str] = (),
  name: str = NAME,
  planned: int | None = None,
) -> Iterator[Record]:
  """Records a run in a manifest, as long as it is entered.

  Args:
    folder: That the run writes to; it is there.
    command: "sample", "train" and so on.
    config: The job's config, a dataclass.
    origin: How it was called; None from Python.
    idle: Patterns of the fields of the config that change no number,
      "stages.*.data.threads", besides `fingerprint.PLACES`.
    name: Of the file; jobs that share a folder have one each,
      "manifest-00001-of-00004.json".
    planned: How many clips the job is to make, its other shards' too.

  Raises:
    StorageError: It could not be written. Where the run itself fails, that
      error comes through.
  """
  path = pathlib.Path(folder) / name
  if jax.process_index() != 0:
    blank = {name: {} for name in _FOUND}
    yield Record(path, blank, [], writes=False)
    return
  origin = Origin() if origin is None else origin
  values = _begin(command, config, origin, tuple(idle), path.parent)
  values["planned"] = planned
  record = Record(path, values, _earlier(path), origin.memory)
  record.write()
  try:
    yield record
  except BaseException as error:
    # The error that ends the run is the one to show.
    with contextlib.suppress(errors.StorageError):
      record.finish(error)
    raise
  record.finish(None)


def check_owner(path: pathlib.Path, command: str, flag: str) -> None:
  """Raises InputError where a manifest is that of another command.

  Args:
    path: Where the manifest is, if there is one.
    command: "sample", "train" and so on: whose it may be.
    flag: Which flag names the folder, "out".
  """
  if not path.exists():
    return
  try:
    there = outputs.read_json(path).get("command")
  except errors.CorruptError:
    there = None
  if there != command:
    what = f"of vidgen {there}" if there else "of nothing known here"
    raise errors.InputError(
      f"{path}: is {what}, and vidgen {command} would write over it; choose "
      f"another --{flag}."
    )


def _begin(
  command: str,
  config: Any,
  origin: Origin,
  idle: tuple[str, ...],
  folder: pathlib.Path,
) -> dict[str, Any]:
  """Returns what is known before the run."""
  said = fingerprint.plain(config)
  return {
    "format": FORMAT,
    "command": command,
    "argv": None if origin.argv is None else list(origin.argv),
    "out_flag": origin.out_flag,
    "directory": os.getcwd(),
    "folder": os.fspath(folder.absolute()),
    "config": said,
    "config_fingerprint": fingerprint.fingerprint(said, idle),
    "idle": list(idle),
    "config_file": origin.config_path,
    "config_text": origin.config_text,
    **{name: {} for name in _FOUND},
    "code": environment.code(),
    "versions": environment.versions(),
    "system": environment.system(),
    "devices": environment.devices(),
    "flags": environment.flags(),
    "mesh": None,
    "start": _now(),
    "end": None,
    "seconds": None,
    "exit": {"reason": "running", "code": None},
    "outputs": None,
    "unknown": {},
  }


def _earlier(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the attempts that a manifest tells of; a damaged one has none."""
  if not path.exists():
    return []
  try:
    attempts = outputs.read_json(path).get("attempts", [])
    if isinstance(attempts, list):
      return [_ended(attempt) for attempt in attempts]
    reason = f"{path}: has no list of attempts."
  except errors.VidgenError as error:
    reason = str(error)
  _warn(f"what it told of earlier attempts is lost: {reason}")
  return []


def _ended(attempt: Any) -> Any:
  """An earlier attempt; one that still says that it runs was killed."""
  there = attempt.get("exit") if isinstance(attempt, dict) else None
  if isinstance(there, dict) and there.get("reason") == "running":
    killed = {"reason": "ended without a word", "code": None}
    return {**attempt, "exit": killed}
  return attempt


def _exit(error: BaseException | None) -> tuple[str, int]:
  """Returns why a run ended, and the exit code that says so."""
  if error is None:
    return "done", 0
  if isinstance(error, errors.PreemptedError):
    return "preempted", error.exit_code
  if isinstance(error, errors.VidgenError):
    return f"failed: {_line(error)}", error.exit_code
  if isinstance(error, KeyboardInterrupt):
    return "interrupted", 130
  if isinstance(error, SystemExit) and isinstance(error.code, int):
    return "ended", error.code
  return f"failed: {type(error).__name__}: {_line(error)}", 1


def _warn(text: str) -> None:
  print(f"WARNING: {text}", file=sys.stderr, flush=True)


def _line(error: BaseException) -> str:
  return " ".join(str(error).split())


def _now() -> str:
  """Returns the time, in UTC."""
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
