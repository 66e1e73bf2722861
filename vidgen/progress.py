"""Tells how far a job is, and what it took."""

import contextlib
import dataclasses
import io
import resource
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import rich.console
import rich.progress

from vidgen import errors

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"

# How many files a summary names.
_LISTED = 20
# Seconds between two lines that say how a job of many clips stands; of a job
# of more clips than _EACH the first ones alone have lines of their own.
_TALLY, _EACH, _FIRST = 30, 20, 3


class Progress:
  """Collects the seconds of each stage, and tells nobody.

  A context manager: while it is entered, XLA's compile seconds are counted
  apart from the stages they fall in.

  Attributes:
    seconds: Seconds per stage, compiling left out.
    compile_seconds: Seconds that XLA compiled.
  """

  def __init__(self):
    self.seconds: dict[str, float] = {}
    self.compile_seconds = 0.0
    self.number, self.total = 0, 0
    self.made, self.failed = 0, 0
    self._first: tuple[int, float] | None = None

  def __enter__(self) -> "Progress":
    jax.monitoring.register_event_duration_secs_listener(self._listen)
    return self

  def __exit__(self, *exception: Any) -> None:
    jax.monitoring.unregister_event_duration_listener(self._listen)

  def _listen(self, event: str, seconds: float, **kwargs: Any) -> None:
    del kwargs
    if event == COMPILE_EVENT:
      self.compile_seconds += seconds

  def clip(
    self, number: int, total: int, failed: int = 0, made: int = 0
  ) -> None:
    """Says that clip `number` of `total` begins, counted from 1.

    Args:
      number: Of those that are there or begun; failures are counted apart.
      total: Of the whole job.
      failed: How many could not be made.
      made: How many this process has made.
    """
    self.number, self.total, self.failed = number, total, failed
    self.made = made
    if self._first is None and made:
      # The first ones compiled.
      self._first = made, time.perf_counter()

  def tally(self) -> str:
    """Returns how a job of many clips stands, with its peak memory."""
    done = max(0, self.number - 1)
    parts = [f"{done}/{self.total} clips"]
    if self.failed:
      parts.append(f"{self.failed} failed")
    if self._first is not None and self.made > self._first[0]:
      seconds = time.perf_counter() - self._first[1]
      rate = (self.made - self._first[0]) / seconds
      left = self.total - self.failed - done
      parts.append(f"{3600 * rate:,.0f}/h")
      parts.append(f"{duration(left / rate)} left")
    parts.append(f"{peak_memory()[0] / 2**30:.1f} GiB")
    return ", ".join(parts)

  @contextlib.contextmanager
  def stage(self, name: str) -> Iterator[None]:
    """Times a stage: "load", "text", "image", "denoise", "decode", ..."""
    start, compiled = time.perf_counter(), self.compile_seconds
    self._begin(name)
    try:
      yield
    except BaseException:
      self._end(name, None, 0.0)
      raise
    compiled = self.compile_seconds - compiled
    # While weights load, compiling goes on beside it, and not before or after.
    beside = compiled if name != "load" else 0.0
    seconds = max(0.0, time.perf_counter() - start - beside)
    self.seconds[name] = self.seconds.get(name, 0.0) + seconds
    self._end(name, seconds, compiled)

  def step(self, done: int, total: int) -> None:
    """Says that `done` of `total` denoising steps are done."""

  def say(self, text: str, of_clip: bool = True) -> None:
    """Shows a line that stays; `of_clip`: it is of the clip at hand."""

  def wrote(self, text: str) -> None:
    """Says what files a clip was written to."""

  def _begin(self, name: str) -> None:
    """Shows that a stage begins."""

  def _end(self, name: str, seconds: float | None, compiled: float) -> None:
    """Shows that a stage ended, or failed if `seconds` is None."""

  def _prefix(self) -> str:
    return f"clip {self.number}/{self.total} " if self.total else ""


class Rate:
  """Seconds per step, from the first report on: what came before compiled."""

  def __init__(self):
    self._first: tuple[int, float] | None = None
    self.seconds: float | None = None

  def update(self, done: int) -> None:
    """Counts a report of `done` steps."""
    now = time.perf_counter()
    if self._first is None or done < self._first[0]:
      self._first, self.seconds = (done, now), None
    elif done > self._first[0]:
      self.seconds = (now - self._first[1]) / (done - self._first[0])


class Lines(Progress):
  """Plain lines, for logs: each stage, and about every tenth of the steps."""

  def __init__(self, stream: io.TextIOBase):
    super().__init__()
    self._stream = stream
    self._rate, self._tenth = Rate(), 0
    self._tallied = time.perf_counter()

  def clip(
    self, number: int, total: int, failed: int = 0, made: int = 0
  ) -> None:
    super().clip(number, total, failed, made)
    if time.perf_counter() - self._tallied >= _TALLY:
      self._tallied = time.perf_counter()
      print(self.tally(), file=self._stream, flush=True)

  def say(self, text: str, of_clip: bool = True) -> None:
    prefix = self._prefix() if of_clip else ""
    print(f"{prefix}{text}", file=self._stream, flush=True)

  def wrote(self, text: str) -> None:
    if not self._terse():
      self.say(text, of_clip=False)

  def _terse(self) -> bool:
    """Whether a clip among many has no lines of its own."""
    return self.total > _EACH and self.made >= _FIRST

  def _begin(self, name: str) -> None:
    self._rate, self._tenth = Rate(), 0
    if not self._terse():
      self.say(f"{name} ...")

  def _end(self, name: str, seconds: float | None, compiled: float) -> None:
    if seconds is None:
      self.say(f"{name} stopped")
      return
    if self._terse():
      return
    apart = f" (and {compiled:.1f} s compiling)" if compiled >= 0.05 else ""
    self.say(f"{name} took {seconds:.1f} s{apart}")

  def step(self, done: int, total: int) -> None:
    self._rate.update(done)
    tenth = 10 * done // total
    if self._terse() or (tenth == self._tenth and done > 1):
      return
    self._tenth = tenth
    text = f"step {done}/{total}"
    if self._rate.seconds is not None:
      left = duration(self._rate.seconds * (total - done))
      text += f", {self._rate.seconds:.2f} s/step, {left} left"
    self.say(text)


class Bar(Progress):
  """A bar per stage on a terminal, with seconds per step and the time left."""

  def __init__(self, stream: io.TextIOBase):
    super().__init__()
    columns = (
      rich.progress.TextColumn("{task.description}"),
      rich.progress.BarColumn(bar_width=30),
      rich.progress.TextColumn("{task.fields[note]}"),
      rich.progress.TimeElapsedColumn(),
    )
    # Whatever is shown last stays; finished stages leave no bar behind.
    self._bar = rich.progress.Progress(
      *columns, console=rich.console.Console(file=stream), transient=True
    )
    self._task: rich.progress.TaskID | None = None
    self._whole: rich.progress.TaskID | None = None
    self._rate = Rate()

  def clip(
    self, number: int, total: int, failed: int = 0, made: int = 0
  ) -> None:
    super().clip(number, total, failed, made)
    if total < 2:
      return
    if self._whole is None:
      self._whole = self._bar.add_task("job", total=total, note="")
    done = number - 1 + failed
    self._bar.update(self._whole, completed=done, note=self.tally())

  def __enter__(self) -> "Bar":
    super().__enter__()
    self._bar.start()
    return self

  def __exit__(self, *exception: Any) -> None:
    self._bar.stop()
    super().__exit__(*exception)

  def say(self, text: str, of_clip: bool = True) -> None:
    prefix = self._prefix() if of_clip else ""
    self._bar.console.print(
      f"{prefix}{text}", markup=False, highlight=False, soft_wrap=True
    )

  def wrote(self, text: str) -> None:
    if self.total <= _EACH:
      self.say(text, of_clip=False)

  def _begin(self, name: str) -> None:
    self._rate = Rate()
    self._task = self._bar.add_task(
      f"{self._prefix()}{name}", total=None, note=""
    )

  def _end(self, name: str, seconds: float | None, compiled: float) -> None:
    if self._task is not None:
      self._bar.remove_task(self._task)
      self._task = None

  def step(self, done: int, total: int) -> None:
    self._rate.update(done)
    note = f"{done}/{total}"
    if self._rate.seconds is not None:
      left = duration(self._rate.seconds * (total - done))
      note += f", {self._rate.seconds:.2f} s/step, {left} left"
    if self._task is not None:
      self._bar.update(self._task, total=total, completed=done, note=note)


def create(stream: io.TextIOBase | None = None) -> Progress:
  """Returns a bar if `stream` (standard error) is a terminal, lines if not."""
  stream = sys.stderr if stream is None else stream
  return Bar(stream) if stream.isatty() else Lines(stream)


@dataclasses.dataclass
class Summary:
  """What a job made and what it took.

  Attributes:
    out: The folder.
    files: What was written, in order.
    clips: How many clips were made.
    seconds: Seconds per stage, compiling left out.
    compile_seconds: Seconds that XLA compiled.
    peak_bytes: Peak memory, and `peak_of` says of what.
    there: How many clips were there already.
    failures: What is wrong with each that could not be made, in a line.
    busy: The part of the time for which devices worked, from the second batch
      on; None without one.
  """

  out: str
  files: list[str]
  clips: int
  seconds: dict[str, float]
  compile_seconds: float
  peak_bytes: int
  peak_of: str
  there: int = 0
  failures: list[str] = dataclasses.field(default_factory=list)
  busy: float | None = None

  def check(self) -> None:
    """Raises InputError if a clip could not be made."""
    if not self.failures:
      return
    if self.clips + self.there == 0 and len(self.failures) == 1:
      raise errors.InputError(self.failures[0])
    count = len(self.failures)
    total = count + self.clips + self.there
    raise errors.InputError(
      f"{self.out}: {count} of {total} clips could not be made, for one: "
      f"{self.failures[0]}"
    )

  def __str__(self) -> str:
    """Returns a small table."""
    if not self.clips:
      return f"{self._counted()}; nothing was left to do."
    beside = ("load", "write")  # One is once, the other while clips are made.
    per_clip = sum(s for name, s in self.seconds.items() if name not in beside)
    rows = [(name, f"{s:.1f}", "s") for name, s in self.seconds.items()]
    rows.append(("compile (XLA)", f"{self.compile_seconds:.1f}", "s"))
    rows.append(("per clip", f"{per_clip / max(1, self.clips):.1f}", "s"))
    if self.busy is not None:
      rows.append(
        ("devices at work", f"{100 * self.busy:.0f}", "% of the time")
      )
    peak = f"{self.peak_bytes / 2**30:.2f}"
    rows.append(("peak memory", peak, f"GiB ({self.peak_of})"))
    left = max(len(name) for name, _, _ in rows)
    right = max(len(number) for _, number, _ in rows)
    lines = [f"{name:{left}}  {n:>{right}} {unit}" for name, n, unit in rows]
    lines.append(f"{self._counted()}:")
    lines += [f"  {file}" for file in self.files[:_LISTED]]
    if len(self.files) > _LISTED:
      lines.append(f"  ... and {len(self.files) - _LISTED} more")
    return "\n".join(lines)

  def _counted(self) -> str:
    clips = "1 clip" if self.clips == 1 else f"{self.clips} clips"
    there = f", beside {self.there} there before" if self.there else ""
    failed = f", {len(self.failures)} failed" if self.failures else ""
    if not self.clips and self.there:
      was = "1 clip was" if self.there == 1 else f"{self.there} clips were"
      return f"{was} in {self.out} already{failed}"
    return f"{clips} in {self.out}{there}{failed}"


def peak_memory() -> tuple[int, str]:
  """Returns the peak memory in bytes, and of what.

  Of the fullest device where the backend counts it, else of this process.
  """
  stats = [device.memory_stats() for device in jax.local_devices()]
  peaks = [s["peak_bytes_in_use"] for s in stats if s]
  if peaks:
    return max(peaks), "fullest device"
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  # Kibibytes on Linux, bytes on macOS.
  scale = 1 if sys.platform == "darwin" else 1024
  return peak * scale, "this process"


def duration(seconds: float) -> str:
  """Returns seconds as people say them: 42 s, 3 min 20 s, 1 h 5 min."""
  seconds = round(seconds)
  if seconds < 60:
    return f"{seconds} s"
  if seconds < 3600:
    return f"{seconds // 60} min {seconds % 60} s"
  return f"{seconds // 3600} h {seconds % 3600 // 60} min"
