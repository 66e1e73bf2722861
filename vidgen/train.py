"""The training job: a config and a folder in, a model out.

The folder holds the config, checkpoints, metrics, samples and, at the end, what
was trained. The same command again goes on where the last one ended.
"""

import dataclasses
import functools
import math
import pathlib
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from vidgen import (
  errors,
  layouts,
  meters,
  outputs,
  preemption,
  provenance,
  runs,
  sharding,
)
from vidgen.data import cache, loader
from vidgen.train_config import Stage, TrainConfig, check, reading
from vidgen.trainer import Trainer, loop, trained

__all__ = [
  "FREE",
  "IDLE",
  "PUBLISHED",
  "Stage",
  "TrainConfig",
  "Trainer",
  "check",
  "choose_mesh",
  "open_folder",
  "reading",
  "run",
]

# The folder of what was trained, within the run's.
PUBLISHED = "published"

# What may change between two starts of a run. Another mesh goes on from the
# same bits, and with the same data and noise, but rounds in another way.
FREE = (
  "num_steps",
  "checkpoint_every",
  "keep",
  "sample_every",
  "log_every",
  "mesh",
  "mesh.*",
  "task.samples",
  "task.samples.*",
  "stages.*.data.threads",
  "stages.*.data.workers",
  "stages.*.data.prefetch",
)
# Of these, what changes no number: not where it ends, nor on which mesh.
IDLE = tuple(
  name for name in FREE if name not in ("num_steps", "mesh", "mesh.*")
)


def run(
  config: TrainConfig,
  workdir: str | pathlib.Path,
  origin: provenance.Origin | None = None,
) -> pathlib.Path:
  """Trains, and returns the folder of what was trained.

  Args:
    config: The run.
    workdir: Its folder.
    origin: How the job was called, for its manifest.

  Raises:
    InputError: A bad config, no data, or a folder of another config.
    CorruptError: No checkpoint of the run can be read.
    StorageError: The disk is full.
    PreemptedError: It was asked to stop, and saved.
    DivergedError: Too many steps in a row would have done harm.
  """
  total = check(config)
  mesh, why = choose_mesh(config)
  if why:
    _say(why)
  workdir = pathlib.Path(workdir)
  # A folder is made once all is checked that can be without the weights.
  task = config.task.build(mesh)
  trainer = Trainer(config, task, mesh)
  trainer.check_data()
  _check_folder(workdir, total)
  with (
    open_folder(config, workdir) as folder,
    provenance.recording(
      folder.path, "train", config, origin=origin, idle=IDLE
    ) as record,
    meters.Meters(
      workdir,
      total,
      log_every=config.log_every,
      devices=list(mesh.devices.flat),
    ) as meter,
    preemption.Preemption() as stop,
  ):
    _record_sources(record, trainer)
    with meter.timing("load"):
      state = trainer.start(folder)
      frozen = task.frozen(mesh, **reading(config))
    begun = int(state.step)
    _say(
      f"goes on from step {begun} of {total}"
      if begun
      else f"begins: {total} steps; the first of each size compiles"
    )
    meter.resume(begun)
    state = loop(trainer, state, frozen, folder, meter, stop, total)
    with meter.timing("checkpoint"):
      if begun < total:  # Else it is what was read.
        folder.save(int(state.step), state)
      folder.wait()
    with meter.timing("manifest"):
      digest = outputs.state_digest(state)
      record.outputs(
        lambda: outputs.of_training(folder.path, folder.latest(), digest)
      )
    with meter.timing("publish"):
      return _publish(task, state, frozen, workdir)


def choose_mesh(
  config: TrainConfig,
  devices: Sequence[Any] | None = None,
  device_bytes: int | None = None,
) -> tuple[Mesh, str]:
  """Returns the mesh of a run, and why it is this if it was chosen.

  Args:
    config: Of the run.
    devices: All there are by default.
    device_bytes: Memory of each; by default what they say themselves.

  Raises:
    InputError: A mesh that is unknown or does not fit the devices.
  """
  devices = jax.devices() if devices is None else list(devices)

  def need() -> layouts.Need:
    one = sharding.make_mesh(None, devices[:1])
    task = config.task.build(one)
    shapes = jax.tree.leaves(Trainer(config, task, one).shapes)
    sizes = [b.batch_size for s in config.stages for b in loader.sized(s.data)]
    return layouts.Need(
      heads=task.heads or len(devices),
      batch=math.gcd(*sizes) // config.accumulate,
      stored_bytes=sum(math.prod(x.shape) * x.dtype.itemsize for x in shapes),
      device_bytes=device_bytes or layouts.memory_of(jax.local_devices()[0]),
      training=True,
    )

  return layouts.make(config.mesh, need, devices)


def _say(text: str) -> None:
  if jax.process_index() == 0:
    print(text, file=sys.stderr, flush=True)


def _check_folder(workdir: pathlib.Path, total: int) -> None:
  """Refuses a folder before anything is written to it."""
  for path in (workdir / provenance.NAME, *workdir.glob(provenance.SHARDS)):
    provenance.check_owner(path, "train", "workdir")
  steps = runs.checkpoint_steps(workdir)
  if steps and steps[-1] > total:
    raise errors.InputError(
      f"config: {total} steps, where {workdir} has made {steps[-1]} already; "
      "set more, or another --workdir."
    )


def open_folder(config: TrainConfig, workdir: str | pathlib.Path) -> runs.Run:
  """Opens a run's folder, which must be this config's or new."""
  return runs.Run.open(
    workdir, dataclasses.asdict(config), free=FREE, keep=config.keep
  )


def _record_sources(record: provenance.Record, trainer: Trainer) -> None:
  """Says what the run is made of."""
  config = trainer.config
  record.mesh(trainer.mesh)
  record.seeds(seed=config.seed)
  for name, path in trainer.task.reads().items():
    # Words are read as weights are; who compares two runs tells them apart.
    tell = record.tokenizer if name == "tokenizer" else record.weights
    tell(path, name)
  for number, stage in enumerate(config.stages):
    give = functools.partial(loader.dataset_fingerprint, stage.data)
    record.data(f"stages.{number}", give)
    if stage.data.cache is not None:
      path = stage.data.cache
      give = lambda path=path: cache.Cache(path).key
      record.data(f"stages.{number}.cache", give)


def _publish(task, state, frozen, workdir):
  """Writes what was trained, in the place of what an earlier end wrote.

  Process 0 alone writes, once all have handed it their parts.
  """
  target = workdir / PUBLISHED
  params, frozen = _whole(trained(state)), _whole(frozen)
  if jax.process_index() == 0:
    _replace(target, lambda draft: task.publish(draft, params, frozen))
  _meet("published")
  return target


def _whole(tree: PyTree) -> PyTree:
  """Returns arrays that this process can read, whoever holds their parts."""

  def one(x: Array) -> Any:
    if x.is_fully_addressable or x.is_fully_replicated:
      return x
    return multihost_utils.process_allgather(x, tiled=True)

  return jax.tree.map(one, tree)


def _meet(name: str) -> None:
  """Waits for the other processes."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def _replace(
  target: pathlib.Path, write: Callable[[pathlib.Path], None]
) -> None:
  """Puts a folder that `write` fills in the place of another."""
  draft = target.with_name(f".{target.name}")
  old = target.with_name(f".{target.name}.old")
  for leftover in (draft, old):
    shutil.rmtree(leftover, ignore_errors=True)
  write(draft)
  if target.exists():
    target.rename(old)
  draft.rename(target)
  shutil.rmtree(old, ignore_errors=True)
