"""The batch sampling job: prompts in, files of videos out.

The same command again makes what is left, and nothing twice: `sample_folder`
says what is there.
"""

import contextlib
import pathlib
import time
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from vidgen import (
  clips,
  errors,
  preemption,
  provenance,
  report,
  sample_folder,
  sample_model,
  sample_plan,
  writer,
)
from vidgen import progress as progress_lib

SampleConfig = sample_plan.SampleConfig
config_formats = sample_plan.config_formats
plan = sample_plan.plan

# How many lines of a job may be told as bad before the rest is counted.
_TOLD = 20

_TOO_LARGE = (
  "clips of this size need more memory than the devices have; make them "
  "smaller, or set a smaller batch_size, tiling, residency=stage or a mesh."
)

# Stages that keep the devices at work.
_DEVICE = ("text", "image", "video", "denoise", "decode")


def run(
  config: SampleConfig,
  progress: progress_lib.Progress | None = None,
  *,
  verify: bool = False,
  origin: provenance.Origin | None = None,
) -> progress_lib.Summary:
  """Makes every video of the job that is not there yet.

  What is cheap to check is checked before the weights are read. A line of which
  no video can be made is told, and stops no other; the summary has it. While
  videos are written, the next ones are made.

  Args:
    config: Of the job.
    progress: Is told how far it is.
    verify: Whether every byte of the videos that are there is read again; one
      that is not as it was written is made anew.

  Raises:
    InputError: A bad config, or no prompt, image or video that is good.
    CorruptError: A bad checkpoint.
    StorageError: A folder that cannot be written, or a full disk.
    PreemptedError: It was told to stop; what was made is there.
  """
  planned, failures = sample_plan.sift(config)
  progress = progress_lib.Progress() if progress is None else progress
  with (
    sample_folder.opened(config) as folder,
    progress,
    preemption.Preemption() as stop,
  ):
    job = _Job(config, folder, planned, progress, stop)
    return job.run(failures, verify, origin)


class _NothingLeft(Exception):
  """Ends the loading of a model that has nothing to do."""


class _Job:
  """A job at work.

  Attributes:
    clips: All that are this process's to make.
    todo: Those of them that are left.
    files: What was written.
  """

  def __init__(self, config, folder, planned, progress, stop):
    self.config, self.folder = config, folder
    self.progress, self.stop = progress, stop
    self.clips = [clip for clip in planned if self._is_mine(clip)]
    self.todo: list[clips.Clip] = []
    self.files: list[str] = []
    self.made, self.told = 0, 0
    # Of all parts of the job, without what cannot be planned.
    self.planned = len(planned)
    # The shapes of clips that did not fit the devices.
    self.too_large: set[tuple[Any, ...]] = set()
    self.busy = _Busy(progress.seconds)

  def _is_mine(self, item: clips.Clip | sample_plan.Failure) -> bool:
    part, parts = sample_plan.shard_of(self.config)
    return item.index % parts == part

  def run(
    self,
    failures: list[sample_plan.Failure],
    verify: bool,
    origin: provenance.Origin | None,
  ) -> progress_lib.Summary:
    """Makes what is left, tells of it, and sums up."""
    planned = self.planned + len(failures)
    failures = [failure for failure in failures if self._is_mine(failure)]
    self.total = len(self.clips) + len(failures)
    for failure in failures:
      self._fail(failure)
    with self.progress.stage("load"), contextlib.suppress(_NothingLeft):
      self.pipeline = sample_model.load(
        self.config,
        self.clips,
        refused=self._refuse,
        left=lambda model, folder: self._left(model, folder, verify),
      )
    if not self.todo and self.folder.is_recorded():
      return self._summary()
    mesh = self.pipeline.mesh if self.todo else None
    with self.folder.recording(origin, mesh, planned) as record:
      if self.todo:
        if self.pipeline.why_mesh:
          self.progress.say(self.pipeline.why_mesh)
        self._make_all()
      if self.folder.failures:
        record.end(f"{len(self.folder.failures)} clips failed", 2)
    parts = sample_plan.shard_of(self.config)[1]
    if jax.process_index() == 0 and (self.total > 1 or parts > 1):
      # What is shown of clips comes last: their ledger and manifest first.
      report.write(self.folder.path, posters=False)
    return self._summary()

  def _say(self, text: str) -> None:
    self.progress.say(text, of_clip=False)

  def _refuse(self, clip: clips.Clip, error: errors.InputError) -> None:
    """Takes a clip out that the model cannot make."""
    self.clips.remove(clip)
    self._fail(sample_plan.Failure(clip.where, clip.index, str(error)), clip)

  def _fail(
    self, failure: sample_plan.Failure, clip: clips.Clip | None = None
  ) -> None:
    """Tells of a failure, and notes it."""
    self.told += 1
    if self.told <= _TOLD:
      self._say(failure.error)
    elif self.told == _TOLD + 1:
      self._say(f"more cannot be made; {self.folder.ledger} has them all")
    self.folder.fail(failure, clip)

  def _left(
    self, model: Any, checkpoint: pathlib.Path, verify: bool
  ) -> list[clips.Clip]:
    """Returns the clips that are to be made."""
    self.todo = self.folder.left(
      self.clips, model, checkpoint, self._say, verify
    )
    self.there = len(self.clips) - len(self.todo)
    if not self.todo:
      raise _NothingLeft
    return self.todo

  def _make_all(self) -> None:
    """Makes the clips that are left, batch by batch."""
    with writer.Writer(self._written) as files:
      batches = clips.batches(self.todo, self.config.batch_size)
      for number, batch in enumerate(batches, 1):
        # Asked while the model was loaded, or the last clips were made.
        if jax.process_count() == 1 and self.stop.requested(number):
          break
        self._tell()
        began = time.perf_counter()
        made = self._made(batch)
        seconds = (time.perf_counter() - began) / len(batch)
        for clip, latents, frames in made:
          self.made += 1
          if jax.process_index() == 0:
            files.put(self._write, clip, latents, frames, seconds)
        self.busy.lap()
        files.look()
        several = jax.process_count() > 1
        if several and number < len(batches) and self.stop.requested(number):
          break
      else:
        number = 0
    self.progress.seconds["write"] = files.seconds
    self._tell()
    if number:
      failed = {failure.index for failure in self.folder.failures}
      tried = sum(clip.index in failed for clip in self.todo)
      left = len(self.todo) - self.made - tried
      raise errors.PreemptedError(
        f"{self.folder.path}: stopped with {left} of {len(self.todo)} clips "
        "left; run the same command to go on."
      )

  def _tell(self) -> None:
    done = self.there + self.made
    failed = len(self.folder.failures)
    self.progress.clip(done + 1, self.total, failed, self.made)

  def _made(self, batch: list[clips.Clip]) -> list[tuple[clips.Clip, Any, Any]]:
    """Makes a batch; where one of its clips cannot be made, the others."""
    told = _Stopping(self.progress, self.stop, self.folder.path)
    first = batch[0]
    shape = tuple(getattr(first, name) for name in clips.SHARED)
    # A video has a length of its own.
    shape += (first.video, first.image is None)
    if shape in self.too_large:
      return self._all_fail(batch, _TOO_LARGE)
    try:
      made = sample_model.make(self.pipeline, batch, self.config, told)
      return [(c, *one) for c, one in zip(batch, made, strict=True)]
    except errors.InputError as error:
      if len(batch) > 1:
        return [one for clip in batch for one in self._made([clip])]
      return self._all_fail(batch, str(error))
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
      is_memory = isinstance(error, MemoryError)
      is_memory |= str(error).startswith("RESOURCE_EXHAUSTED")
      if not is_memory or jax.process_count() > 1:
        raise
      # Clips of other sizes may fit; more of this one need not be tried.
      self.too_large.add(shape)
      return self._all_fail(batch, _TOO_LARGE)

  def _all_fail(self, batch: list[clips.Clip], text: str) -> list[Any]:
    """Notes the same failure of each clip of a batch."""
    for clip in batch:
      is_told = not clip.where or text.startswith(clip.where)
      line = text if is_told else f"{clip.where}: {text}"
      self._fail(sample_plan.Failure(clip.where, clip.index, line), clip)
    return []

  def _write(
    self,
    clip: clips.Clip,
    latents: Float[np.ndarray, "f h w c"] | None,
    frames: UInt8[np.ndarray, "F H W 3"] | None,
    seconds: float,
  ) -> list[str]:
    """Writes a clip; runs beside the devices."""
    fps = sample_model.fps_of(self.pipeline.model, clip, self.config)
    return self.folder.write(
      clip,
      latents,
      frames,
      fps=fps,
      seconds=seconds,
      poster=self.total > 1,
    )

  def _written(self, files: list[str]) -> None:
    self.files += files
    self.progress.wrote(" ".join(files))

  def _summary(self) -> progress_lib.Summary:
    peak_bytes, peak_of = progress_lib.peak_memory()
    return progress_lib.Summary(
      out=self.config.out,
      files=self.files,
      clips=self.made,
      seconds=self.progress.seconds,
      compile_seconds=self.progress.compile_seconds,
      peak_bytes=peak_bytes,
      peak_of=peak_of,
      there=self.there,
      failures=[failure.error for failure in self.folder.failures],
      busy=self.busy.share(),
    )


class _Busy:
  """For what part of the time devices are at work, once all is compiled."""

  def __init__(self, seconds: dict[str, float]):
    """Takes the seconds of each stage, which grow."""
    self._seconds = seconds
    # When the first batch was made, and for how long devices had worked.
    self._first: tuple[float, float] | None = None
    self._last: float | None = None

  def lap(self) -> None:
    """Says that a batch has been made."""
    if self._first is None:
      self._first = time.perf_counter(), self._worked()
    else:
      self._last = time.perf_counter()

  def share(self) -> float | None:
    """Returns the part, from 0 to 1; None of less than two batches."""
    if self._last is None:
      return None
    since, worked = self._first
    return (self._worked() - worked) / (self._last - since)

  def _worked(self) -> float:
    return sum(self._seconds.get(name, 0.0) for name in _DEVICE)


class _Stopping:
  """Tells of a batch, and drops it when the job is told to stop.

  Of several processes none may stop alone: they end after the batch.
  """

  def __init__(self, progress, stop, out):
    self.stage, self._step = progress.stage, progress.step
    self._stop, self._out = stop, out

  def step(self, done: int, total: int) -> None:
    self._step(done, total)
    if jax.process_count() == 1 and self._stop.requested(done):
      raise errors.PreemptedError(
        f"{self._out}: stopped; the clips that were on their way are dropped. "
        "Run the same command to go on."
      )
