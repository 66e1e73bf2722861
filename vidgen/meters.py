"""What a training run tells of itself: a line, metrics.jsonl, TensorBoard."""

import collections
import contextlib
import errno
import io
import json
import math
import os
import pathlib
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import rich.console
import rich.progress
from jaxtyping import UInt8

from vidgen import board, errors, goodput, progress, tensorheader

T = TypeVar("T")

# Dense bfloat16 FLOP/s of one device as jax counts them, by `device_kind`. From
# the makers' data sheets; a part of a GPU (MIG) is none of these.
PEAKS = (
  (r"TPU v4", 275e12),
  (r"TPU v5 ?lite|TPU v5e", 197e12),
  (r"TPU v5p?", 459e12),
  (r"TPU v6 ?lite|TPU v6e", 918e12),
  (r"NVIDIA A100[- ](SXM4|PCIE|PCIe|80GB PCIe)(-\d+GB)?", 312e12),
  (r"NVIDIA H100 80GB HBM3|NVIDIA H100 SXM5.*", 989e12),
  (r"NVIDIA H100 PCIe", 756e12),
  (r"NVIDIA H200", 989e12),
)

# The pace is the mean of this many steps, of a logging interval at least.
_WINDOW = 20


class Meters:
  """Tells how a run is doing; a context manager.

  Process 0 alone writes. The values of a step are fetched when the next one has
  been dispatched, so that the devices always have work.
  """

  def __init__(
    self,
    folder: str | os.PathLike,
    total: int,
    *,
    log_every: int = 10,
    devices: Sequence[jax.Device] | None = None,
    stream: io.TextIOBase | None = None,
  ):
    """Makes them.

    Args:
      folder: Of the run.
      total: The steps of the whole run.
      log_every: Steps from one record to the next; a terminal has a live line.
      devices: What the run computes on, of all processes; all by default.
      stream: Where lines go; None is standard error.
    """
    self._folder, self._total = pathlib.Path(folder), total
    self._log_every = log_every
    self._writes = jax.process_index() == 0
    self._clock = goodput.Clock()
    self._ledger = goodput.Ledger(self._folder, self._clock)
    self._peak = peak_flops(jax.devices() if devices is None else devices)
    # Of each step: its number, seconds, videos and FLOPs so far.
    self._marks: collections.deque[tuple[int, float, float, float]]
    self._marks = collections.deque(maxlen=max(_WINDOW, log_every) + 1)
    self._pending: tuple[int, Mapping[str, Any], int, int | float | None] | None
    self._pending = None
    self._caught: dict[str, float] | None = None
    self._done = 0
    self._board: board.Board | None = None
    self._show: _Show | None = None
    if self._writes:
      stream = sys.stderr if stream is None else stream
      self._show = _Live(stream) if stream.isatty() else _Show(stream)

  def __enter__(self) -> "Meters":
    self._clock.__enter__()
    if self._show is not None:
      self._show.start()
    return self

  def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
    try:
      with contextlib.ExitStack() as stack:
        if self._show is not None:
          stack.callback(self._show.stop)
        stack.enter_context(self._clock)
        stack.callback(self._close)
        if error is None or isinstance(error, errors.VidgenError):
          self._catch_up()
    except errors.StorageError:
      # The error that ends the run is the one to show.
      if error is None:
        raise

  @contextlib.contextmanager
  def timing(self, name: str) -> Iterator[None]:
    """Counts the seconds within: "load", "step", "checkpoint", "sample", ...

    Before a "checkpoint" the last step's record is written, so that a run that
    goes on from there has it; after it, where the time went so far. What waits
    for the devices' last step, as a "sample" does, too, counts as "step".
    """
    if name in ("checkpoint", "sample"):
      with self._clock.timing("step"):
        self._catch_up()
    with self._clock.timing(name):
      yield
    if name == "checkpoint" and self._writes:
      self._ledger.write(self._done)

  def waiting(self, items: Iterable[T]) -> Iterator[T]:
    """Yields `items`, and counts the waiting for them as "data"."""
    iterator, end = iter(items), object()
    while True:
      with self._clock.timing("data"):
        item = next(iterator, end)
      if item is end:
        return
      yield item

  def resume(self, step: int) -> None:
    """Says that the run goes on from `step`; 0 begins it.

    Records of later steps are dropped: these steps are taken again.

    Raises:
      StorageError: The files cannot be written.
    """
    self._done = step
    if self._writes:
      with _storage(self._folder):
        records = _cut(self._folder / goodput.METRICS, step)
        self._ledger.resume(step, records)
        self._board = board.Board(self._folder / "tensorboard", step)

  def step(
    self,
    done: int,
    scalars: Mapping[str, Any],
    *,
    videos: int = 0,
    flops: int | float | None = None,
  ) -> dict[str, float] | None:
    """Takes the scalars of a step, and returns those of the step before, once.

    Args:
      done: The steps that are done, this one included.
      scalars: On the devices; "loss" and "grad_norm" are shown. A pair is a sum
        and how many it is of, of which the mean is told, of none nothing.
      videos: How many the step took, on all devices.
      flops: Of the model for them, forward and backward, recomputation left
        out; None leaves out the utilisation.

    Raises:
      StorageError: The files cannot be written.
    """
    with self._clock.timing("step"):
      for value in jax.tree.leaves(dict(scalars)):
        if isinstance(value, jax.Array):
          value.copy_to_host_async()
      pending, self._pending = self._pending, (done, scalars, videos, flops)
      caught, self._caught = self._caught, None
      return caught if pending is None else self._tell(*pending)

  def video(
    self,
    name: str,
    frames: UInt8[np.ndarray, "F H W 3"],
    fps: int | float,
    step: int,
  ) -> None:
    """Shows a clip, or an image if it has one frame, in TensorBoard."""
    if self._board is not None:
      with _storage(self._folder):
        self._board.video(name, frames, fps, step)

  def say(self, text: str) -> None:
    """Shows a line that stays."""
    if self._show is not None:
      self._show.say(text)

  def _catch_up(self) -> None:
    """Tells of the last step, without one after it."""
    pending, self._pending = self._pending, None
    if pending is not None:
      self._caught = self._tell(*pending)

  def _tell(
    self,
    step: int,
    scalars: Mapping[str, Any],
    videos: int,
    flops: int | float | None,
  ) -> dict[str, float]:
    """Fetches a step's scalars, and writes and shows them."""
    values = {}
    for name, x in scalars.items():
      total, count = x if isinstance(x, tuple) else (x, 1)
      if count := float(np.asarray(count)):
        values[name] = float(np.asarray(total)) / count
    self._done = step
    rates = self._rates(step, videos, math.nan if flops is None else flops)
    if self._show is not None:
      due = step % self._log_every == 0 or step == self._total
      if due:
        record = {"step": step, **values, **rates, "time": time.time()}
        _append(self._folder / goodput.METRICS, record)
        if self._board is not None:
          with _storage(self._folder):
            self._board.scalars({**values, **rates}, step)
      line = _line(values, rates, self._total - step)
      self._show.step(step, self._total, line, due)
    return values

  def _rates(
    self, step: int, videos: int, flops: int | float
  ) -> dict[str, float | None]:
    """Returns how fast the last steps were; None where it is not known.

    MFU is the model's FLOPs over what all devices could do in that time.
    """
    last = self._marks[-1] if self._marks else (0, 0.0, 0.0, 0.0)
    now = self._clock.moving()
    self._marks.append((step, now, last[2] + videos, last[3] + flops))
    first, last = self._marks[0], self._marks[-1]
    steps, seconds = last[0] - first[0], last[1] - first[1]
    names = ("seconds_per_step", "videos_per_second", "mfu")
    if steps < 1 or seconds <= 0:
      return dict.fromkeys(names)
    rates = [seconds / steps, (last[2] - first[2]) / seconds, None]
    done = last[3] - first[3]
    if self._peak is not None and done > 0:
      rates[2] = done / (seconds * self._peak)
    return dict(zip(names, rates, strict=True))

  def _close(self) -> None:
    """Ends the files."""
    if self._writes:
      try:
        self._ledger.write(self._done)
      finally:
        if self._board is not None:
          with _storage(self._folder):
            self._board.close()


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
  """Returns the dense bfloat16 FLOP/s of all devices, None if not known."""
  peaks = [
    next(
      (peak for kind, peak in PEAKS if re.fullmatch(kind, device.device_kind)),
      None,
    )
    for device in devices
  ]
  return None if None in peaks else sum(peaks)


class _Show:
  """Plain lines, for logs."""

  def __init__(self, stream: io.TextIOBase):
    self._stream = stream

  def start(self) -> None:
    """Begins to show."""

  def stop(self) -> None:
    """Ends showing."""

  def say(self, text: str) -> None:
    print(text, file=self._stream, flush=True)

  def step(self, step: int, total: int, note: str, due: bool) -> None:
    """Shows a step; `due` are those that are logged."""
    if due:
      self.say(f"step {step}/{total}, {note}")


class _Live(_Show):
  """One live line, on a terminal."""

  def __init__(self, stream: io.TextIOBase):
    super().__init__(stream)
    self._bar = rich.progress.Progress(
      rich.progress.TextColumn("step {task.completed}/{task.total}"),
      rich.progress.BarColumn(20),
      rich.progress.TextColumn("{task.fields[note]}", markup=False),
      console=rich.console.Console(file=stream),
      transient=True,
    )
    self._task: rich.progress.TaskID | None = None

  def start(self) -> None:
    self._bar.start()

  def stop(self) -> None:
    self._bar.stop()

  def say(self, text: str) -> None:
    self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

  def step(self, step: int, total: int, note: str, due: bool) -> None:
    if self._task is None:
      self._task = self._bar.add_task("", total=total, note=note)
    self._bar.update(self._task, completed=step, note=note)


def _line(
  values: Mapping[str, float], rates: Mapping[str, float | None], left: int
) -> str:
  """Returns what a line says of a step, when `left` are to come."""
  parts = [
    f"{name.replace('_', ' ')} {values[name]:.4g}"
    for name in ("loss", "grad_norm")
    if name in values
  ]
  if values.get("skipped"):
    parts.append(f"{values['skipped']:.0f} skipped")
  pace = rates["seconds_per_step"]
  mfu = "-" if rates["mfu"] is None else f"{100 * rates['mfu']:.1f}%"
  if pace is not None:
    parts += [
      f"{pace:.3g} s/step",
      f"{rates['videos_per_second']:.3g} videos/s",
      f"MFU {mfu}",
      f"{progress.duration(pace * left)} left",
    ]
  return ", ".join(parts)


def _append(path: pathlib.Path, record: Mapping[str, Any]) -> None:
  """Appends one line, whole or not at all; what is not finite becomes text."""
  plain = {
    name: str(x) if isinstance(x, float) and not math.isfinite(x) else x
    for name, x in record.items()
  }
  data = json.dumps(plain, allow_nan=False).encode() + b"\n"
  with _storage(path), open(path, "ab", buffering=0) as file:
    size = file.tell()
    try:
      if file.write(data) < len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
      file.truncate(size)
      raise


def _cut(path: pathlib.Path, step: int) -> list[dict[str, Any]]:
  """Ends metrics.jsonl after `step`, or before a line that is half written.

  Returns the last record up to it, and those that were cut off.
  """
  if not path.exists():
    return []
  kept, cut, end = [], [], 0
  with open(path, "rb+") as file:
    for line in file:
      try:
        record = tensorheader.parse_json(line, str(path))
        at = int(record["step"])
        record["seconds_per_step"]
      except (errors.CorruptError, KeyError, TypeError, ValueError):
        break
      if at > step:
        cut.append(record)
      elif not cut:
        kept, end = [record], end + len(line)
    file.truncate(end)
  return kept + cut


@contextlib.contextmanager
def _storage(path: pathlib.Path) -> Iterator[None]:
  """Makes a failure to write below `path` the one line of a StorageError."""
  try:
    yield
  except errors.VidgenError:
    raise
  except OSError as e:
    raise errors.StorageError(
      f"{path}: cannot be written: {e.strerror}; free some space, or choose "
      "another --workdir."
    ) from e
