"""The training job: a config and a folder in, a model out.

The folder holds the config, checkpoints, metrics, samples and, at the end, what
was trained. The same command again goes on where the last one ended.
"""

import collections
import dataclasses
import functools
import json
import math
import pathlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from vidgen import (
  errors,
  layouts,
  meters,
  optimizers,
  outputs,
  preemption,
  provenance,
  runs,
  sharding,
  tensorheader,
  train_step,
  video,
)
from vidgen.data import cache, loader
from vidgen.optimizers import OptimizerConfig, Rate
from vidgen.tasks import base


@dataclasses.dataclass
class Stage:
  """A part of a run: so many steps on data of one kind.

  Attributes:
    num_steps: Steps.
    data: What is read, in which sizes.
    rate: The learning rate.
    options: Fields of the task that differ in this stage, by name.
    trainable: What alone is trained in this stage: regular expressions, each of
      which is looked for in "GROUP/path/of/a/parameter"; empty trains all.
  """

  num_steps: int
  data: loader.DataConfig
  rate: Rate
  options: dict[str, Any] = dataclasses.field(default_factory=dict)
  trainable: tuple[str, ...] = ()


@dataclasses.dataclass
class TrainConfig:
  """What a training run does.

  Attributes:
    task: What is optimised: a config with `build(mesh)`.
    stages: One after another; steps are counted through all of them.
    seed: Decides the first weights, the order of data and all noise.
    num_steps: Where the run ends; None is after the last stage.
    optimizers: By group of parameters; a group that is not named has the
      default.
    accumulate: Parts that a batch is taken in, one after another.
    ema_decay: Of the average of the weights.
    mesh: Mesh axis to size; empty is one device. "auto" chooses for the task
      and all devices, and names of `layouts.PRESETS` stand for theirs.
    checkpoint_every: Steps from one checkpoint to the next.
    keep: Checkpoints that stay, the newest.
    sample_every: Steps from one set of samples to the next; 0 makes none.
    log_every: Steps from one line of metrics to the next.
    spike_sigmas: A loss so many deviations above the last 128 is skipped; 0
      skips none but what is not finite.
    max_skipped: So many skipped steps in a row end the run.
  """

  task: Any
  stages: tuple[Stage, ...]
  seed: int = 0
  num_steps: int | None = None
  optimizers: dict[str, OptimizerConfig] = dataclasses.field(
    default_factory=dict
  )
  accumulate: int = 1
  ema_decay: float = 0.9999
  mesh: dict[str, int] | str = dataclasses.field(default_factory=dict)
  checkpoint_every: int = 1000
  keep: int = 3
  sample_every: int = 1000
  log_every: int = 10
  spike_sigmas: float = 6.0
  max_skipped: int = 20


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


def check(config: TrainConfig) -> int:
  """Returns the number of steps of a run, its config checked.

  Raises:
    InputError: A field that makes no sense.
  """
  if not config.stages:
    raise errors.InputError("config: a run needs at least one stage.")
  whole = sum(stage.num_steps for stage in config.stages)
  total = whole if config.num_steps is None else config.num_steps
  if not 1 <= total <= whole:
    raise errors.InputError(
      f"config: num_steps {total}; the stages have {whole} steps in all."
    )
  for name in ("checkpoint_every", "keep", "log_every", "accumulate"):
    if getattr(config, name) < 1:
      raise errors.InputError(f"config: {name} must be 1 or more.")
  if not 0 <= config.seed < 2**32:
    raise errors.InputError("config: seed must be in [0, 2^32).")
  if not 0 <= config.ema_decay < 1:
    raise errors.InputError("config: ema_decay must be in [0, 1).")
  for stage in config.stages:
    for bucket in loader.sized(stage.data):
      if bucket.batch_size % config.accumulate:
        raise errors.InputError(
          f"config: a batch of {bucket.batch_size} cannot be taken in "
          f"{config.accumulate} equal parts (accumulate)."
        )
  return total


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
  if why and jax.process_index() == 0:
    print(why, file=sys.stderr)
  workdir = pathlib.Path(workdir)
  # A folder is made once all is checked that can be without the weights.
  task = config.task.build(mesh)
  trainer = Trainer(config, task, mesh)
  trainer.check_data()
  with (
    open_folder(config, workdir) as folder,
    provenance.recording(
      folder.path, "train", config, origin=origin, idle=IDLE
    ) as record,
    meters.Meters(workdir, total, log_every=config.log_every) as meter,
    preemption.Preemption() as stop,
  ):
    _record_sources(record, trainer)
    with meter.timing("load"):
      state = trainer.start(folder)
      frozen = task.frozen(mesh)
    meter.resume(int(state.step))
    state = _loop(trainer, state, frozen, folder, meter, stop, total)
    with meter.timing("checkpoint"):
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


def open_folder(config: TrainConfig, workdir: str | pathlib.Path) -> runs.Run:
  """Opens a run's folder, which must be this config's or new."""
  return runs.Run.open(
    workdir, dataclasses.asdict(config), free=FREE, keep=config.keep
  )


def _record_sources(record: provenance.Record, trainer: "Trainer") -> None:
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


def _pattern(text: str) -> re.Pattern[str]:
  try:
    return re.compile(text)
  except re.error as error:
    raise errors.InputError(f"config: trainable {text!r}: {error}.") from error


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


def trained(state: train_step.State) -> dict[str, PyTree]:
  """Returns the weights that count: the averages, where there are any."""
  return {**state.params, **state.ema}


class Trainer:
  """What a run does not change: the optimisers, the shapes, the stages."""

  def __init__(self, config: TrainConfig, task: base.Task, mesh: Mesh):
    self.config, self.task, self.mesh = config, task, mesh
    for stage in config.stages:
      task.with_options(stage.options)  # Raises before any weight is read.
    stages = [(stage.num_steps, stage.rate) for stage in config.stages]
    rate = optimizers.schedule(stages)
    self.rate = rate
    if unknown := config.optimizers.keys() - set(task.groups):
      raise errors.InputError(
        f"config: optimizers for {', '.join(sorted(unknown))}; this task "
        f"trains {', '.join(task.groups)}."
      )
    default = OptimizerConfig()
    self.txs = {
      group: optimizers.optimizer(config.optimizers.get(group, default), rate)
      for group in task.groups
    }
    self._make = functools.partial(
      train_step.init, task.init, task.averaged, self.txs
    )
    self.shapes, self.places = train_step.shapes_and_places(self._make, mesh)
    self._steps: dict[str, Any] = {}
    for stage in config.stages:
      self._trained(stage)

  def check_data(self) -> None:
    """Looks at every stage's data, so that none is missed after a night.

    Raises:
      InputError: No data, a bucket without clips, or a batch that does not
        divide over hosts and devices.
      CorruptError: The data are damaged.
    """
    part, parts = sharding.host_part(self.mesh)
    for stage in self.config.stages:
      steps = loader.Steps(
        stage.data, self.config.seed, 0, stage.num_steps, part, parts
      )
      for bucket in steps.buckets:
        sharding.training_batch(self.mesh, bucket.batch_size)

  def start(self, folder: runs.Run) -> train_step.State:
    """Returns the newest state of a run, or its first."""
    placed = lambda x, place: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=place
    )
    restored = folder.restore(jax.tree.map(placed, self.shapes, self.places))
    if restored is not None:
      return restored[1]
    key = train_step.key_of(self.config.seed, train_step.INIT)
    state = train_step.create(self._make, self.places, key, self.mesh)
    given = self.task.start(self.places.params)
    if not given:
      return state
    copy = lambda tree: jax.tree.map(lambda x: x.copy(), tree)
    ema = {
      name: copy(tree) for name, tree in given.items() if name in state.ema
    }
    # Some optimisers hold the weights too: those that were given. What they had
    # goes first: both would not fit.
    for name in given:
      jax.tree.map(lambda x: x.delete(), state.opt[name])
    opt = {
      name: jax.jit(self.txs[name].init, out_shardings=self.places.opt[name])(
        tree
      )
      for name, tree in given.items()
    }
    return state._replace(
      params={**state.params, **given},
      opt={**state.opt, **opt},
      ema={**state.ema, **ema},
    )

  def forget(self, state: train_step.State) -> train_step.State:
    """Returns the state at the start of a stage."""
    guard = jax.jit(train_step.forget, out_shardings=self.places.guard)
    return state._replace(guard=guard(state.guard))

  def stage_steps(self, stage: Stage) -> Any:
    """Returns the compiled step of a stage, and the task it takes.

    Stages that differ in data alone share it: what is compiled once stays.
    """
    said = repr((sorted(stage.options.items()), stage.trainable))
    if said not in self._steps:
      self._steps[said] = self._make_step(stage)
    return self._steps[said]

  def _make_step(self, stage: Stage) -> Any:
    task = self.task.with_options(stage.options)
    step = functools.partial(
      train_step.step,
      gradients=task.gradients,
      txs=self.txs,
      rate=self.rate,
      parts=self.config.accumulate,
      decay=self.config.ema_decay,
      sigmas=self.config.spike_sigmas,
      trained=self._trained(stage),
    )
    # The state comes back in the layout it had, and in its memory.
    return task, jax.jit(
      step, donate_argnums=0, out_shardings=(self.places, None)
    )

  def _trained(self, stage: Stage) -> dict[str, PyTree] | None:
    """Says of each parameter whether a stage trains it; None: it trains all."""
    if not stage.trainable:
      return None
    wanted = [_pattern(text) for text in stage.trainable]
    used = set()

    def is_wanted(path: Any, leaf: Any) -> bool:
      del leaf
      name = jax.tree_util.keystr(path, simple=True, separator="/")
      found = [pattern for pattern in wanted if pattern.search(name)]
      used.update(found)
      return bool(found)

    says = jax.tree_util.tree_map_with_path(is_wanted, self.shapes.params)
    if unused := [p.pattern for p in wanted if p not in used]:
      raise errors.InputError(
        f"config: trainable {unused[0]!r} is found in no parameter's path."
      )
    return says

  def batches(
    self, stage: Stage, before: int, start: int, stop: int
  ) -> Iterator[loader.Batch]:
    """Yields a stage's batches from step `start` of the run on.

    `before` is the number of steps of the stages before.
    """
    part, parts = sharding.host_part(self.mesh)
    return loader.batches(
      stage.data,
      seed=self.config.seed + before,
      start=start - before,
      stop=stop - before,
      process_index=part,
      process_count=parts,
    )


def _loop(trainer, state, frozen, folder, meter, stop, total):
  """Takes the steps that are left."""
  config = trainer.config
  key = train_step.key_of(config.seed, train_step.STEP)
  done, before = int(state.step), 0
  ids = collections.deque(maxlen=config.max_skipped + 2)
  for stage in config.stages:
    end = min(before + stage.num_steps, total)
    if done < end:
      task, step = trainer.stage_steps(stage)
      if done == before:
        # What is usual for one stage's loss is a spike for another's.
        state = trainer.forget(state)
      batches = meter.waiting(trainer.batches(stage, before, done, end))
      for batch in batches:
        ids.append((done, batch.ids))
        arrays = _place(task, batch, trainer.mesh)
        with sharding.use(trainer.mesh), meter.timing("step"):
          state, scalars = step(state, frozen, arrays, key)
        done += 1
        told = meter.step(
          done, scalars, videos=_size(batch), flops=task.flops(batch.bucket)
        )
        if told and told["skipped_in_a_row"] >= config.max_skipped:
          _diverged(folder, config, ids)
        # Samples come after: whatever fails in them costs no step.
        if done % config.checkpoint_every == 0 and done < total:
          with meter.timing("checkpoint"):
            folder.save(done, state)
        if config.sample_every and done % config.sample_every == 0:
          _samples(task, state, frozen, folder, meter, done)
        if stop.requested(done):
          _preempted(folder, meter, state, done)
    before += stage.num_steps
  return state


def _size(batch: loader.Batch) -> int:
  """The number of videos of a global batch."""
  return batch.bucket.batch_size


def _place(
  task: base.Task, batch: loader.Batch, mesh: Mesh
) -> dict[str, Array]:
  """A batch on its devices."""
  arrays = task.host_batch(batch)
  part, _ = sharding.host_part(mesh)
  first = part * len(batch.ids)
  return train_step.place_batch(arrays, mesh, first, _size(batch))


def _samples(task, state, frozen, folder, meter, done):
  """Makes the fixed samples, as files and for TensorBoard."""
  with meter.timing("sample"):
    samples = task.samples(trained(state), frozen)
    if jax.process_index() != 0:
      return
    home = folder.path / "samples" / f"{done:09d}"
    home.mkdir(parents=True, exist_ok=True)
    for sample in samples:
      video.write_mp4(home / f"{sample.name}.mp4", sample.frames, sample.fps)
      meter.video(f"samples/{sample.name}", sample.frames, sample.fps, done)
    if samples and samples[0].metrics:
      _tell_metrics(samples, home, meter, done)


def _tell_metrics(samples, home, meter, done):
  """Writes what was measured on each sample, and tells the means."""
  rows = {sample.name: dict(sample.metrics) for sample in samples}
  with video.atomic(home / "metrics.json") as path:
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
  names = samples[0].metrics
  mean = {n: np.mean([row[n] for row in rows.values()]) for n in names}
  text = ", ".join(f"{name} {value:.4g}" for name, value in mean.items())
  meter.say(f"samples at step {done}: {text}")


def _diverged(folder, config, ids):
  """Ends a run that no longer learns; its last checkpoint is as it was."""
  folder.wait()
  bad = list(ids)[-config.max_skipped - 1 :]
  names = sorted({name for _, batch in bad for name in batch})
  last = max(folder.steps(), default=0)
  raise errors.DivergedError(
    f"{folder.path}: {config.max_skipped} steps in a row up to step "
    f"{bad[-1][0]} were skipped, for a loss or a gradient that is not finite, "
    f"or a spike; lower the learning rate, or look at the clips: "
    f"{tensorheader.listed(names)}. The last good checkpoint is of step {last}."
  )


def _preempted(folder, meter, state, done):
  """Saves, and says that the same command goes on."""
  with meter.timing("checkpoint"):
    folder.save(done, state)
    folder.wait()
  raise errors.PreemptedError(
    f"{folder.path}: stopped and saved at step {done}; run the same command "
    "to go on."
  )
