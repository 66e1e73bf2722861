"""The folder of a sampling job: what its clips are called, and which are done.

A clip is done when its files are there and its line in the ledger has their
hashes.
"""

import collections
import contextlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Float, UInt8

from vidgen import (
  clips,
  fingerprint,
  ledger,
  modelmark,
  outputs,
  posters,
  provenance,
  sample_model,
  sample_plan,
  video,
)

# What the pixels of every clip depend on, besides what a `Clip` says.
_SETTINGS = ("dtype", "lora", "lora_scale", "tiling", "batch_size")

# Fields of a config that change no pixel, besides places.
_IDLE = ("formats", "residency")


class Folder:
  """The folder of a job at work, or of the part that is this process's.

  Of several processes that make one job, the first alone writes to it.

  Attributes:
    path: Where it is.
    ledger: The file in it that says what became of each clip.
    names: What each clip's files are called, by its index.
    failures: What could not be made.
  """

  def __init__(
    self, config: sample_plan.SampleConfig, lines: ledger.Ledger | None
  ):
    """Takes a folder that is there.

    Args:
      config: Of the job.
      lines: Its ledger, where this process writes.
    """
    shard = sample_plan.shard_of(config)
    self.path = pathlib.Path(config.out)
    self.ledger = self.path / ledger.file_name(*shard)
    self.names: dict[int, str] = {}
    self.failures: list[sample_plan.Failure] = []
    self._config, self._lines = config, lines
    self._manifest = _manifest(config)
    self._checkpoint: pathlib.Path | None = None
    self._wanted: list[clips.Clip] = []
    held = [] if lines is None else ledger.read(self.path)
    self._known = {(r["index"], r.get("name"), r.get("error")) for r in held}

  def fail(
    self, failure: sample_plan.Failure, clip: clips.Clip | None = None
  ) -> None:
    """Notes what could not be made; once, however often a job is started."""
    self.failures.append(failure)
    record = {"index": failure.index, "name": None, "where": failure.where}
    if clip is not None:
      record = clips.about(clip, self.names.get(clip.index))
    known = (failure.index, record["name"], failure.error) in self._known
    if self._lines is None or known:
      return
    record |= {"status": ledger.FAILED, "error": failure.error}
    self._lines.append(record)

  def left(
    self,
    wanted: list[clips.Clip],
    model: Any,
    checkpoint: pathlib.Path,
    say: Callable[[str], None],
    verify: bool = False,
  ) -> list[clips.Clip]:
    """Names the clips of the job, and returns those that are to be made.

    What killed jobs left half written is removed.

    Args:
      wanted: All clips.
      model: That makes them.
      checkpoint: Its folder.
      say: Is told of what is there, and is not as it should be.
      verify: Whether every byte of what is there is read.
    """
    self._checkpoint, self._wanted = checkpoint, wanted
    self.names = _names(self._config, wanted, model, checkpoint)
    done = np.zeros(len(wanted), bool)
    if self._lines is not None:
      self._sweep()
      done = self._done(wanted, model, say, verify)
    if jax.process_count() > 1:
      done = multihost_utils.broadcast_one_to_all(done)
    pairs = zip(wanted, done, strict=True)
    return [clip for clip, there in pairs if not there]

  def _sweep(self) -> None:
    """Removes what killed jobs left behind, half written.

    What was to be a file of this part of the job is nobody else's. Of other
    jobs, which may be at work, only what is old.
    """
    names = {*self.names.values(), self._manifest.stem}
    for path in self.path.glob(".*"):
      target = video.target_of(path)
      if target in names or (target is not None and video.is_old(path)):
        video.remove(path)

  def _done(
    self,
    wanted: list[clips.Clip],
    model: Any,
    say: Callable[[str], None],
    verify: bool,
  ) -> np.ndarray:
    """Says of each clip whether it is there, whole."""
    if damaged := ledger.damaged(self.path):
      more = f" and {len(damaged) - 1} more" if damaged[1:] else ""
      say(
        f"WARNING: {self.path / damaged[0]}{more}: damaged; clips of which "
        "nothing else tells are made anew"
      )
    held = {r["name"]: r for r in ledger.read(self.path)}
    mine = {*self.names.values(), None}
    others = [n for n, r in held.items() if n not in mine and r["files"]]
    if others and sample_plan.shard_of(self._config)[1] == 1:
      are = "clip is" if len(others) == 1 else "clips are"
      say(
        f"{len(others)} {are} in {self.path} already, of other prompts, "
        f"settings or weights; they stay, but {provenance.NAME} tells of the "
        "last job alone: give each its own --out if it is to be checked"
      )
    formats = sample_plan.config_formats(self._config)
    done = np.zeros(len(wanted), bool)
    for number, clip in enumerate(wanted):
      stem = self.names[clip.index]
      record = held.get(stem, {"status": ledger.FAILED})
      if record["status"] != ledger.DONE:
        continue
      if any(clips.file_name(stem, f) not in record["files"] for f in formats):
        continue
      # The rate is no part of the name where it changes no pixel.
      if {"mp4", "gif"} & {*formats} and record.get(
        "fps"
      ) != sample_model.fps_of(model, clip, self._config):
        continue
      if damage := ledger.damage(self.path, record, verify):
        say(f"{damage}; it is made anew")
      done[number] = not damage
    return done

  def write(
    self,
    clip: clips.Clip,
    latents: Float[np.ndarray, "f h w c"] | None,
    frames: UInt8[np.ndarray, "F H W 3"] | None,
    *,
    fps: int | float,
    seconds: float,
    poster: bool,
  ) -> list[str]:
    """Writes a clip's files, then its line; returns the files.

    Args:
      clip: It.
      latents: What it was decoded from, if that is wanted.
      frames: It, if that is wanted.
      fps: Of the files.
      seconds: For how long it was made.
      poster: Whether the page shows a picture of it.
    """
    name = self.names[clip.index]
    formats = sample_plan.config_formats(self._config)
    files = clips.write(self.path / name, formats, latents, frames, fps)
    line = clips.record(clip, name, files, frames, fps)
    self._lines.append(line | {"seconds": round(seconds, 3)})
    if frames is not None and poster:
      # A page can do without them.
      with contextlib.suppress(OSError):
        home = self.path / "posters"
        home.mkdir(exist_ok=True)
        posters.write(home / f"{name}.jpg", frames[0])
    return files

  def is_recorded(self) -> bool:
    """Says whether the manifest tells of all that there is, and of its end."""
    if self.failures or not self._manifest.exists():
      return False
    held = outputs.read_json(self._manifest)
    return held.get("exit", {}).get("code") == 0 and (
      held.get("outputs") == fingerprint.plain(self._outputs())
    )

  @contextlib.contextmanager
  def recording(
    self, origin: provenance.Origin | None, mesh: Mesh | None, planned: int
  ) -> Iterator[provenance.Record]:
    """Records the job in its manifest; see `provenance.recording`.

    Args:
      origin: How the job was called.
      mesh: On which clips are made; None where none is left to be made.
      planned: How many clips the job has, those of other parts too.
    """
    config = self._config
    mesh = self._known_mesh() if mesh is None else mesh
    with provenance.recording(
      self.path,
      "sample",
      config,
      origin=origin,
      idle=_IDLE,
      name=self._manifest.name,
      planned=planned,
    ) as record:
      record.seeds(seed=config.seed)
      if mesh is not None:
        record.mesh(mesh)
      if self._lines is not None:
        # Of a job that is killed this is all that is known.
        record.write()
      record.outputs(self._outputs)
      record.weights(self._checkpoint)
      names = collections.Counter()
      for path in sample_plan.lora_files(config.lora):
        # Many files have the name that is usual.
        name = pathlib.Path(path).name
        names[name] += 1
        number = f" {names[name]}" if names[name] > 1 else ""
        record.weights(path, f"lora {name}{number}")
      self._record_inputs(record)
      yield record

  def _record_inputs(self, record: provenance.Record) -> None:
    """Records the prompts, images and videos, and those that lines name."""
    config = self._config
    for name in ("prompts", *clips.READ):
      path = getattr(config, name)
      if name == "prompts" and path is not None and not os.path.exists(path):
        # Of a split of a data set its folder counts.
        path = path.rpartition(":")[0]
      if path is not None and os.path.exists(path):
        record.inputs(path, name)
    if config.prompts is None:
      return
    home = os.path.dirname(config.prompts) or "."
    files = lambda one: {getattr(one, name) for name in clips.READ}
    read = {path for clip in self._wanted for path in files(clip)}
    if named := sorted(read - files(config) - {None}):
      files = {os.path.relpath(path, home): None for path in named}
      record.files(home, files, "lines")

  def _known_mesh(self) -> Mesh | None:
    """The mesh of this job's last attempt that told it, without devices."""
    if not self._manifest.exists():
      return None
    config = fingerprint.plain(self._config)
    mark = fingerprint.fingerprint(config, _IDLE)
    try:
      attempts = outputs.read_json(self._manifest)["attempts"]
      told = [a["mesh"] for a in attempts if a["config_fingerprint"] == mark]
      axes = next(mesh for mesh in reversed(told) if mesh is not None)["axes"]
      # An axis of one device more is left out of what is told.
      return Mesh(np.empty((1, *axes.values()), object), ("", *axes))
    except (KeyError, TypeError, ValueError, StopIteration):
      return None

  def _outputs(self) -> dict[str, Any]:
    """Returns what there is of the job's clips, whoever made them."""
    failures = {failure.index for failure in self.failures}
    return outputs.of_clips(self.path, {*self.names.values()}, failures)


@contextlib.contextmanager
def opened(config: sample_plan.SampleConfig) -> Iterator[Folder]:
  """Makes the folder of a job, and keeps it from other jobs meanwhile.

  A job that makes nothing leaves no empty folder of its own behind.

  Raises:
    InputError: It is that of a run of another kind, or another job is at work.
    StorageError: It cannot be written.
  """
  path = pathlib.Path(config.out)
  was_there = path.exists()
  _make(path)
  try:
    with contextlib.ExitStack() as stack:
      lines = None
      if jax.process_index() == 0:
        provenance.check_owner(_manifest(config), "sample", "out")
        lines = ledger.Ledger(path, *sample_plan.shard_of(config))
        stack.callback(lines.close)
      yield Folder(config, lines)
  finally:
    if not was_there:
      with contextlib.suppress(OSError):
        path.rmdir()


def _manifest(config: sample_plan.SampleConfig) -> pathlib.Path:
  """The manifest of a job, or of its part."""
  part, parts = sample_plan.shard_of(config)
  name = f"manifest-{part:05d}-of-{parts:05d}.json"
  return pathlib.Path(config.out) / (provenance.NAME if parts == 1 else name)


def _make(path: pathlib.Path) -> None:
  """Makes a folder, and finds out now whether it can be written."""
  try:
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
      pass
  except OSError as error:
    raise video.storage_error(path, error) from error


def _names(
  config: sample_plan.SampleConfig,
  wanted: list[clips.Clip],
  model: Any,
  checkpoint: pathlib.Path,
) -> dict[int, str]:
  """Returns what each clip's files are called, by its index."""
  settings = {name: getattr(config, name) for name in _SETTINGS}
  settings["weights"] = modelmark.of(checkpoint, model.components)
  settings["options"] = sample_model.options_of(model, config)
  digests = clips.Digests(settings)
  return {c.index: f"{c.index:06d}_{digests.of(c)}" for c in wanted}
