"""The batch sampling job: prompts in, files of videos out.

A clip is done when its files are there and its line in the ledger has their
hashes: the same command again makes what is left, and nothing twice.
"""

import contextlib
import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, UInt8

import vidgen
from vidgen import (
  arguments,
  clips,
  errors,
  ledger,
  modelmark,
  preemption,
  sample_plan,
  video,
  writer,
)
from vidgen import progress as progress_lib
from vidgen.models import base

SampleConfig = sample_plan.SampleConfig
config_formats = sample_plan.config_formats
plan = sample_plan.plan

# What the pixels of every clip depend on, besides what a `Clip` says.
_SETTINGS = ("dtype", "lora", "lora_scale", "tiling")

# Stages that keep the devices at work.
_DEVICE = ("text", "image", "video", "denoise", "decode")


def run(
  config: SampleConfig,
  progress: progress_lib.Progress | None = None,
  *,
  verify: bool = False,
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
  was_there = pathlib.Path(config.out).exists()
  out = _make_folder(config.out)
  progress = progress_lib.Progress() if progress is None else progress
  try:
    with progress, preemption.Preemption() as stop:
      job = _Job(config, out, planned, failures, progress, stop)
      return job.run(verify)
  finally:
    # A job that made nothing leaves no empty folder of its own behind.
    if not was_there:
      with contextlib.suppress(OSError):
        out.rmdir()


class _NothingLeft(Exception):
  """Ends the loading of a model that has nothing to do."""


class _Job:
  """A job at work.

  Attributes:
    names: What each clip's files are called, by its index.
    failures: What could not be made.
    files: What was written.
  """

  def __init__(self, config, out, planned, failures, progress, stop):
    part, parts = sample_plan.shard_of(config)
    mine = lambda item: item.index % parts == part
    self.config, self.out = config, out
    self.progress, self.stop = progress, stop
    self.clips = [clip for clip in planned if mine(clip)]
    self.failures = [one for one in failures if mine(one)]
    self.writes = jax.process_index() == 0
    self.names: dict[int, str] = {}
    self.files: list[str] = []
    self.made, self.total = 0, len(self.clips) + len(self.failures)
    # When the first batch was made, and for how long devices had worked.
    self.warm: tuple[float, float] | None = None
    self.last: float | None = None
    self.ledger: ledger.Ledger | None = None

  def run(self, verify: bool) -> progress_lib.Summary:
    """Makes what is left, and sums up."""
    with contextlib.ExitStack() as stack:
      if self.writes:
        shard = sample_plan.shard_of(self.config)
        self.ledger = ledger.Ledger(self.out, *shard)
        stack.callback(self.ledger.close)
      for failure in self.failures:
        self._fail(failure, None)
      with self.progress.stage("load"), contextlib.suppress(_NothingLeft):
        self.pipeline = load(
          self.config,
          self.clips,
          refused=self._refuse,
          left=lambda model, folder: self._left(model, folder, verify),
        )
      if self.todo:
        if self.pipeline.why_mesh:
          self.progress.say(self.pipeline.why_mesh)
        self._make_all()
    return self._summary()

  def _refuse(self, clip: clips.Clip, error: errors.InputError) -> None:
    """Takes a clip out that the model cannot make."""
    self.clips.remove(clip)
    failure = sample_plan.Failure(clip.where, clip.index, str(error))
    self.failures.append(failure)
    self._fail(failure, clip)

  def _fail(
    self, failure: sample_plan.Failure, clip: clips.Clip | None
  ) -> None:
    """Tells of a failure, and notes it."""
    self.progress.say(failure.error)
    if self.ledger is None:
      return
    record = {"index": failure.index, "name": None, "where": failure.where}
    if clip is not None:
      record = clips.about(clip, self.names.get(clip.index))
    record |= {"status": ledger.FAILED, "error": failure.error}
    self.ledger.append(record)

  def _left(
    self, model: Any, folder: pathlib.Path, verify: bool
  ) -> list[clips.Clip]:
    """Returns the clips that are to be made; names all."""
    marks = {
      "weights": modelmark.of(folder, model.components),
      "options": _options(model, self.config),
    }
    settings = {name: getattr(self.config, name) for name in _SETTINGS} | marks
    digests = clips.Digests(settings)
    self.names = {
      clip.index: f"{clip.index:06d}_{digests.of(clip)}" for clip in self.clips
    }
    done = np.zeros(len(self.clips), bool)
    if self.writes:
      self._sweep()
      done = self._done(verify)
    if jax.process_count() > 1:
      done = multihost_utils.broadcast_one_to_all(done)
    pairs = zip(self.clips, done, strict=True)
    self.todo = [clip for clip, there in pairs if not there]
    self.there = len(self.clips) - len(self.todo)
    if not self.todo:
      raise _NothingLeft
    return self.todo

  def _done(self, verify: bool) -> np.ndarray:
    """Says of each clip whether it is there, whole."""
    held = {r["name"]: r for r in ledger.read(self.out)}
    wanted = config_formats(self.config)
    done = np.zeros(len(self.clips), bool)
    for number, clip in enumerate(self.clips):
      record = held.get(self.names[clip.index], {"status": ledger.FAILED})
      if record["status"] != ledger.DONE:
        continue
      stem = self.names[clip.index]
      if any(clips.file_name(stem, f) not in record["files"] for f in wanted):
        continue
      if damage := ledger.damage(self.out, record, verify):
        self.progress.say(f"{damage}; it is made anew")
      done[number] = not damage
    return done

  def _sweep(self) -> None:
    """Removes what killed jobs of this shard left behind, half written."""
    names = set(self.names.values())
    for path in self.out.glob(".*"):
      if video.target_of(path) in names:
        video.remove(path)

  def _make_all(self) -> None:
    """Makes the clips that are left, batch by batch."""
    with writer.Writer(self._written) as files:
      batches = clips.batches(self.todo, self.config.batch_size)
      for number, batch in enumerate(batches, 1):
        self._tell(batch)
        for clip, latents, frames in self._made(batch):
          self.made += 1
          if self.writes:
            files.put(self._write, clip, latents, frames)
        if self.warm is None:
          self.warm = time.perf_counter(), self._busy()
        else:
          self.last = time.perf_counter()
        files.look()
        if number < len(batches) and self.stop.requested(number):
          break
      else:
        number = 0
    self.progress.seconds["write"] = files.seconds
    if number:
      left = len(self.todo) - self.made
      raise errors.PreemptedError(
        f"{self.out}: stopped with {left} of {len(self.todo)} clips left; run "
        "the same command to go on."
      )

  def _tell(self, batch: list[clips.Clip]) -> None:
    done = self.there + self.made
    self.progress.clip(done + 1, self.total, len(self.failures), self.made)

  def _made(self, batch: list[clips.Clip]) -> list[tuple[clips.Clip, Any, Any]]:
    """Makes a batch; where one of its clips cannot be made, the others."""
    told = _Stopping(self.progress, self.stop, self.out)
    try:
      made = make(self.pipeline, batch, self.config, told)
      return [(c, *one) for c, one in zip(batch, made, strict=True)]
    except errors.InputError as error:
      if len(batch) > 1:
        return [one for clip in batch for one in self._made([clip])]
      text = str(error)
      if batch[0].where and not text.startswith(batch[0].where):
        text = f"{batch[0].where}: {text}"
      failure = sample_plan.Failure(batch[0].where, batch[0].index, text)
      self.failures.append(failure)
      self._fail(failure, batch[0])
      return []

  def _write(
    self,
    clip: clips.Clip,
    latents: np.ndarray | None,
    frames: np.ndarray | None,
  ) -> list[str]:
    """Writes a clip's files, then its line; runs beside the devices."""
    planned = _check_clip(self.pipeline.model, clip, self.config)
    fps = self.pipeline.fps if planned is None else planned.fps
    fps = fps if self.config.fps is None else self.config.fps
    name = self.names[clip.index]
    formats = config_formats(self.config)
    files = clips.write(self.out / name, formats, latents, frames, fps)
    self.ledger.append(clips.record(clip, name, files, frames, fps))
    return files

  def _written(self, files: list[str]) -> None:
    self.files += files
    self.progress.say(" ".join(files))

  def _busy(self) -> float:
    """The seconds in which devices worked."""
    return sum(self.progress.seconds.get(name, 0.0) for name in _DEVICE)

  def _summary(self) -> progress_lib.Summary:
    busy = None
    if self.last is not None:
      busy = (self._busy() - self.warm[1]) / (self.last - self.warm[0])
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
      failures=[failure.error for failure in self.failures],
      busy=busy,
    )


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


def load(
  config: SampleConfig,
  planned: list[clips.Clip],
  default_prompt: str | None = None,
  refused: Callable[[clips.Clip, errors.InputError], None] | None = None,
  left: Callable[[Any, pathlib.Path], list[clips.Clip]] | None = None,
) -> Any:
  """Returns the pipeline that a config names.

  The model is asked for every clip before its weights are read: line 900 of a
  file should not fail after a night of sampling.

  Args:
    config: Of the job.
    planned: Its clips.
    default_prompt: Of clips without one, where the model takes text.
    refused: Takes the clips that the model cannot make, with the error; without
      it, or where it can make none of them, the error is raised.
    left: Says of the model and its folder which clips are to be made.
  """

  def check(model: Any, folder: pathlib.Path) -> list[Any]:
    good, errors_of = {}, {}
    for clip in planned:
      given = prompted(model, clip, default_prompt)
      try:
        made = sample_plan.with_line(
          clip.where, _check_clip, model, given, config
        )
        good[clip.index] = made
      except errors.InputError as error:
        if refused is None:
          raise
        errors_of[clip.index] = (clip, error)
    if not good:
      raise next(iter(errors_of.values()))[1]
    for clip, error in errors_of.values():
      refused(clip, error)
    todo = planned if left is None else left(model, folder)
    # Other sizes are compiled when they come up; batches and tiles always are.
    ahead = [good[clip.index] for clip in todo[:1]]
    if config.tiling or config.batch_size > 1:
      return []
    return [one for one in ahead if one is not None]

  return vidgen.load(
    config.checkpoint,
    dtype=config.dtype,
    mesh=config.mesh or None,
    revision=config.revision,
    residency=config.residency,
    lora=config.lora,
    lora_scale=config.lora_scale,
    check=check,
    executables=config.executables,
  )


def prompted(model: Any, clip: clips.Clip, prompt: str | None) -> clips.Clip:
  """Returns a clip with a prompt, if it has none and the model takes one."""
  if clip.prompt is None and model.takes_text:
    return dataclasses.replace(clip, prompt=prompt)
  return clip


def _make_folder(out: str) -> pathlib.Path:
  """Makes the folder, and finds out now whether it can be written."""
  folder = pathlib.Path(out)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as error:
    raise video.storage_error(folder, error) from error
  return folder


def _check_clip(
  model: Any, clip: clips.Clip, config: SampleConfig
) -> base.Plan | None:
  """Asks the model how it will make a clip; None where that is not known."""
  arguments.check_text(model.takes_text, clip.prompt)
  if clip.video is not None:
    return None  # Its length is not known until all of it is read.
  names = [
    "num_frames",
    "height",
    "width",
    "num_steps",
    "guidance_scale",
    "sampler",
  ]
  planned = model.plan(
    base.Request(
      **{name: getattr(clip, name) for name in names},
      image=clip.image is not None,
      tiling=config.tiling,
      options=_options(model, config),
    )
  )
  is_guided = planned is None or planned.guidance is not None
  arguments.check_negative(is_guided, clip.negative_prompt)
  return planned


def _options(model: Any, config: SampleConfig) -> dict[str, Any]:
  """Returns the family's options; of some the rate of the files is one."""
  if model.takes_fps and config.fps is not None:
    return {**config.options, "fps": config.fps}
  return dict(config.options)


def make(
  pipeline: Any,
  batch: list[clips.Clip],
  config: SampleConfig,
  progress: Any,
) -> list[
  tuple[
    Float[np.ndarray, "f h w c"] | None, UInt8[np.ndarray, "F H W 3"] | None
  ]
]:
  """Makes clips that one program makes, filled up to the job's batch size.

  Returns:
    Of each its latents and its frames, None if nobody wants them.
  """
  formats = config_formats(config)
  first = batch[0]
  given = {name: getattr(first, name) for name in clips.SHARED}
  given |= {"video": first.video, **_of_each(batch, config.batch_size)}
  if first.video is not None:
    given["strength"] = first.strength
  memory = {"tiling": config.tiling}
  options = _options(pipeline.model, config)
  result = pipeline.sample(
    output="latents" if "npz" in formats else "uint8",
    progress=progress,
    **given,
    **memory,
    **options,
  )
  if "npz" not in formats:
    return [(None, np.asarray(frames)) for frames in result[: len(batch)]]
  if formats == ("npz",):
    return [(np.asarray(latents), None) for latents in result[: len(batch)]]
  planned = _check_clip(pipeline.model, first, config)
  if planned is not None and planned.decode_chunk is not None:
    memory["decode_chunk"] = planned.decode_chunk
  with progress.stage("decode"):
    frames = pipeline.decode(result, output="uint8", **memory)
  pairs = zip(result, frames, strict=True)
  return [(np.asarray(a), np.asarray(b)) for a, b in pairs][: len(batch)]


def _of_each(batch: list[clips.Clip], size: int) -> dict[str, Any]:
  """Returns the arguments that differ from clip to clip.

  Clips that change a video are alone: they are not filled up.
  """
  if batch[0].video is None:
    batch = batch + batch[-1:] * (size - len(batch))
  names = ("prompt", "negative_prompt", "image", "seed")
  values = {name: [getattr(clip, name) for clip in batch] for name in names}
  if len(batch) == 1:
    values = {name: value[0] for name, value in values.items()}
  elif batch[0].image is None:
    values["image"] = None
  if batch[0].prompt is None:
    values |= {"prompt": None, "negative_prompt": batch[0].negative_prompt}
  return {**values, "clips": [clip.clip for clip in batch]}
