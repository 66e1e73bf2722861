"""The batch sampling job: prompts in, files of videos out.

A clip is done when its files are there and its line in the ledger has their
hashes: the same command again makes what is left, and nothing twice.
"""

import collections
import contextlib
import pathlib
import tempfile
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from vidgen import (
  clips,
  errors,
  fingerprint,
  ledger,
  modelmark,
  outputs,
  posters,
  preemption,
  provenance,
  report,
  sample_model,
  sample_plan,
  video,
  writer,
)
from vidgen import progress as progress_lib

SampleConfig = sample_plan.SampleConfig
config_formats = sample_plan.config_formats
plan = sample_plan.plan

# What the pixels of every clip depend on, besides what a `Clip` says.
_SETTINGS = ("dtype", "lora", "lora_scale", "tiling", "batch_size")

# Fields of a config that change no pixel, besides places.
_IDLE = ("formats", "residency")

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
  was_there = pathlib.Path(config.out).exists()
  out = _make_folder(config.out)
  progress = progress_lib.Progress() if progress is None else progress
  try:
    with progress, preemption.Preemption() as stop:
      job = _Job(config, out, planned, failures, progress, stop)
      return job.run(verify, origin)
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
    # The shapes of clips that did not fit the devices.
    self.too_large: set[tuple[Any, ...]] = set()
    # When the first batch was made, and for how long devices had worked.
    self.warm: tuple[float, float] | None = None
    self.last: float | None = None
    self.ledger: ledger.Ledger | None = None
    self.todo: list[clips.Clip] = []
    self.told = 0

  def run(
    self, verify: bool, origin: provenance.Origin | None
  ) -> progress_lib.Summary:
    """Makes what is left, tells of it, and sums up."""
    part, parts = sample_plan.shard_of(self.config)
    with contextlib.ExitStack() as stack:
      if self.writes:
        self._check_folder(_manifest(part, parts))
        self.ledger = ledger.Ledger(self.out, part, parts)
        stack.callback(self.ledger.close)
        lines = ledger.read(self.out)
        self.known = {(r["index"], r.get("error")) for r in lines}
      for failure in self.failures:
        self._fail(failure, None)
      with self.progress.stage("load"), contextlib.suppress(_NothingLeft):
        self.pipeline = sample_model.load(
          self.config,
          self.clips,
          refused=self._refuse,
          left=lambda model, folder: self._left(model, folder, verify),
        )
      if not self.todo and self._is_recorded(_manifest(part, parts)):
        return self._summary()
      recording = provenance.recording(
        self.out,
        "sample",
        self.config,
        origin=origin,
        idle=_IDLE,
        name=_manifest(part, parts),
      )
      with recording as record:
        self._record(record)
        if self.todo:
          record.mesh(self.pipeline.mesh)
          if self.pipeline.why_mesh:
            self.progress.say(self.pipeline.why_mesh)
          self._make_all()
        if self.failures:
          record.end(f"{len(self.failures)} clips failed", 2)
      if self.writes and (self.total > 1 or parts > 1):
        # What is shown of clips comes last: their ledger and manifest first.
        report.write(self.out, posters=False)
    return self._summary()

  def _check_folder(self, manifest: str) -> None:
    """Raises InputError where the folder belongs to a run of another kind."""
    path = self.out / manifest
    if not path.exists():
      return
    try:
      command = outputs.read_json(path).get("command")
    except errors.CorruptError:
      command = None
    if command != "sample":
      what = f"of vidgen {command}" if command else "of nothing known here"
      raise errors.InputError(
        f"{path}: is {what}, and sampling would write over it; choose another "
        "--out."
      )

  def _is_recorded(self, manifest: str) -> bool:
    """Says whether the manifest tells of all that there is, and of its end."""
    path = self.out / manifest
    if self.failures or not path.exists():
      return False
    held = outputs.read_json(path)
    return held.get("exit", {}).get("code") == 0 and (
      held.get("outputs") == fingerprint.plain(self._outputs())
    )

  def _record(self, record: provenance.Record) -> None:
    """Says what the clips are made of."""
    config = self.config
    record.seeds(seed=config.seed)
    record.outputs(self._outputs)
    record.weights(self.folder)
    names = collections.Counter()
    for path in sample_plan.lora_files(config.lora):
      # Many files have the name that is usual.
      name = pathlib.Path(path).name
      names[name] += 1
      number = f" {names[name]}" if names[name] > 1 else ""
      record.weights(path, f"lora {name}{number}")
    for name in ("prompts", "image", "video"):
      path = getattr(config, name)
      if path is not None and pathlib.Path(path).exists():
        record.inputs(path, name)

  def _outputs(self) -> dict[str, Any]:
    """Returns what there is of the job's clips, whoever made them."""
    failures = {failure.index for failure in self.failures}
    return outputs.of_clips(self.out, {*self.names.values()}, failures)

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
    self.told += 1
    if self.told <= _TOLD:
      self.progress.say(failure.error, of_clip=False)
    elif self.told == _TOLD + 1:
      where = ledger.file_name(*sample_plan.shard_of(self.config))
      text = f"more cannot be made; {self.out / where} has them all"
      self.progress.say(text, of_clip=False)
    if self.ledger is None or (failure.index, failure.error) in self.known:
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
    self.folder = folder
    marks = {
      "weights": modelmark.of(folder, model.components),
      "options": sample_model.options_of(model, self.config),
    }
    settings = {name: getattr(self.config, name) for name in _SETTINGS} | marks
    digests = clips.Digests(settings)
    self.names = {
      clip.index: f"{clip.index:06d}_{digests.of(clip)}" for clip in self.clips
    }
    done = np.zeros(len(self.clips), bool)
    if self.writes:
      self._sweep()
      done = self._done(model, verify)
    if jax.process_count() > 1:
      done = multihost_utils.broadcast_one_to_all(done)
    pairs = zip(self.clips, done, strict=True)
    self.todo = [clip for clip, there in pairs if not there]
    self.there = len(self.clips) - len(self.todo)
    if not self.todo:
      raise _NothingLeft
    return self.todo

  def _done(self, model: Any, verify: bool) -> np.ndarray:
    """Says of each clip whether it is there, whole."""
    held = {r["name"]: r for r in ledger.read(self.out)}
    mine = {*self.names.values(), None}
    others = [n for n, r in held.items() if n not in mine and r["files"]]
    if others and sample_plan.shard_of(self.config)[1] == 1:
      self.progress.say(
        f"{len(others)} clips of other prompts, settings or weights are in "
        f"{self.out}, and stay there",
        of_clip=False,
      )
    wanted = config_formats(self.config)
    done = np.zeros(len(self.clips), bool)
    for number, clip in enumerate(self.clips):
      record = held.get(self.names[clip.index], {"status": ledger.FAILED})
      if record["status"] != ledger.DONE:
        continue
      stem = self.names[clip.index]
      if any(clips.file_name(stem, f) not in record["files"] for f in wanted):
        continue
      # The rate is no part of the name where it changes no pixel.
      timed = {"mp4", "gif"} & {*wanted}
      if timed and record.get("fps") != self._fps(model, clip):
        continue
      if damage := ledger.damage(self.out, record, verify):
        self.progress.say(f"{damage}; it is made anew", of_clip=False)
      done[number] = not damage
    return done

  def _sweep(self) -> None:
    """Removes what killed jobs of this shard left behind, half written."""
    manifest = _manifest(*sample_plan.shard_of(self.config))
    names = {*self.names.values(), pathlib.Path(manifest).stem}
    for path in self.out.glob(".*"):
      if video.target_of(path) in names:
        video.remove(path)

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
          if self.writes:
            files.put(self._write, clip, latents, frames, seconds)
        if self.warm is None:
          self.warm = time.perf_counter(), self._busy()
        else:
          self.last = time.perf_counter()
        files.look()
        several = jax.process_count() > 1
        if several and number < len(batches) and self.stop.requested(number):
          break
      else:
        number = 0
    self.progress.seconds["write"] = files.seconds
    self._tell()
    if number:
      failed = {failure.index for failure in self.failures}
      tried = sum(clip.index in failed for clip in self.todo)
      left = len(self.todo) - self.made - tried
      raise errors.PreemptedError(
        f"{self.out}: stopped with {left} of {len(self.todo)} clips left; run "
        "the same command to go on."
      )

  def _tell(self) -> None:
    done = self.there + self.made
    self.progress.clip(done + 1, self.total, len(self.failures), self.made)

  def _made(self, batch: list[clips.Clip]) -> list[tuple[clips.Clip, Any, Any]]:
    """Makes a batch; where one of its clips cannot be made, the others."""
    told = _Stopping(self.progress, self.stop, self.out)
    shape = tuple(getattr(batch[0], name) for name in clips.SHARED)
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
      failure = sample_plan.Failure(clip.where, clip.index, line)
      self.failures.append(failure)
      self._fail(failure, clip)
    return []

  def _write(
    self,
    clip: clips.Clip,
    latents: np.ndarray | None,
    frames: np.ndarray | None,
    seconds: float,
  ) -> list[str]:
    """Writes a clip's files, then its line; runs beside the devices."""
    fps = self._fps(self.pipeline.model, clip)
    name = self.names[clip.index]
    formats = config_formats(self.config)
    files = clips.write(self.out / name, formats, latents, frames, fps)
    line = clips.record(clip, name, files, frames, fps)
    self.ledger.append(line | {"seconds": round(seconds, 3)})
    if frames is not None and self.total > 1:
      # A page can do without them.
      with contextlib.suppress(OSError):
        home = self.out / "posters"
        home.mkdir(exist_ok=True)
        posters.write(home / f"{name}.jpg", frames[0])
    return files

  def _fps(self, model: Any, clip: clips.Clip) -> int | float:
    """Returns the frame rate of a clip's files."""
    if self.config.fps is not None:
      return self.config.fps
    planned = sample_model.check_clip(model, clip, self.config)
    return model.fps if planned is None else planned.fps

  def _written(self, files: list[str]) -> None:
    self.files += files
    self.progress.wrote(" ".join(files))

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


def _manifest(part: int, parts: int) -> str:
  """The name of a shard's manifest."""
  if parts == 1:
    return provenance.NAME
  return f"manifest-{part:05d}-of-{parts:05d}.json"


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
