"""Where the time of a run goes, over all its starts: goodput.json."""

import contextlib
import json
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import jax

from vidgen import errors, progress, tensorheader
from vidgen import workdir as workdir_lib

NAME = "goodput.json"
METRICS = "metrics.jsonl"

# What time is called that goes by between what is timed.
OTHER = "other"
# Steps and the waiting for their data; the rest is time that steps stand still.
_MOVING = ("step", "data", OTHER)


class Clock:
  """Adds up the seconds of what a process does, each counted once.

  A context manager: while it is entered, what XLA compiles is counted as
  "compile" and not as what it falls in.

  Attributes:
    seconds: By what they went to: "load", "data", "step", "checkpoint", ...
  """

  def __init__(self):
    self.seconds: dict[str, float] = {}
    self._stack = [OTHER]
    self._since = time.perf_counter()

  def __enter__(self) -> "Clock":
    jax.monitoring.register_event_duration_secs_listener(self._listen)
    return self

  def __exit__(self, *exception: Any) -> None:
    jax.monitoring.unregister_event_duration_listener(self._listen)

  @contextlib.contextmanager
  def timing(self, name: str) -> Iterator[None]:
    """Counts what is within as `name`; one within another is its own alone."""
    self._settle()
    self._stack.append(name)
    try:
      yield
    finally:
      self._settle()
      self._stack.pop()

  def moving(self) -> float:
    """Returns the seconds so far that were for steps, or for nothing named."""
    self._settle()
    return sum(self.seconds.get(name, 0.0) for name in _MOVING)

  def read(self) -> dict[str, float]:
    """Returns the seconds so far."""
    self._settle()
    return dict(self.seconds)

  def _settle(self) -> None:
    """Counts the time since it was last counted."""
    now = time.perf_counter()
    self._add(self._stack[-1], now - self._since)
    self._since = now

  def _listen(self, event: str, seconds: float, **kwargs: Any) -> None:
    del kwargs
    if event == progress.COMPILE_EVENT:
      self._add("compile", seconds)
      self._add(self._stack[-1], -seconds)

  def _add(self, name: str, seconds: float) -> None:
    self.seconds[name] = self.seconds.get(name, 0.0) + seconds


class Ledger:
  """The seconds of a run over all its starts, kept in its folder."""

  def __init__(self, folder: pathlib.Path, clock: Clock):
    self._path, self._clock = folder / NAME, clock
    self._before: dict[str, float] = {}
    self._starts = 1

  def resume(self, step: int, records: list[dict[str, Any]]) -> None:
    """Takes over what earlier starts took, when the run goes on from `step`.

    What they did beyond is lost: it is done again. How long it took is
    estimated from the metrics of those steps, which are the only trace of them
    if the process was killed.

    Args:
      step: Where the run goes on.
      records: Of the steps up to it, the last, and all beyond.
    """
    try:
      held = tensorheader.read_json(self._path)
      before, counted = dict(held["seconds"]), int(held["step"])
      self._before = {str(name): float(x) for name, x in before.items()}
      self._starts = int(held["starts"]) + 1
    except (errors.VidgenError, KeyError, TypeError, ValueError):
      # There is none yet, or it is not ours: no reason not to train.
      self._before, counted = {}, 0
    again, unseen = _lost(step, counted, records)
    again = min(again, self._before.get("step", 0.0))
    if again + unseen:
      self._before["step"] = self._before.get("step", 0.0) - again
      lost = self._before.get("lost", 0.0) + again + unseen
      self._before["lost"] = lost

  def write(self, step: int) -> None:
    """Writes the file, when `step` steps are done.

    Raises:
      StorageError: It could not be written.
    """
    seconds = self._clock.read()
    for name, value in self._before.items():
      seconds[name] = seconds.get(name, 0.0) + value
    # A compilation on another thread may be longer than what it falls in.
    seconds = {name: max(0.0, x) for name, x in sorted(seconds.items())}
    total = sum(seconds.values())
    value = {
      "step": step,
      "starts": self._starts,
      "seconds": {name: round(x, 3) for name, x in seconds.items()},
      "total_seconds": round(total, 3),
      "goodput": round(seconds.get("step", 0.0) / total, 4) if total else 0.0,
    }
    workdir_lib.write_text(self._path, json.dumps(value, indent=2) + "\n")


def _lost(
  step: int, counted: int, records: list[dict[str, Any]]
) -> tuple[float, float]:
  """Returns seconds of steps beyond `step`: up to `counted`, and after it.

  A record has the mean seconds of the last steps before it.
  """
  paces = [r["seconds_per_step"] for r in records]
  known = [x for x in paces if isinstance(x, float)]
  typical = sum(known) / len(known) if known else 0.0
  again = unseen = 0.0
  last = step
  for record, pace in zip(records, paces, strict=True):
    end = record["step"]
    if end <= step:
      continue
    pace = pace if isinstance(pace, float) else typical
    inside = max(0, min(end, counted) - last)
    again += pace * inside
    unseen += pace * (end - last - inside)
    last = end
  return again, unseen
