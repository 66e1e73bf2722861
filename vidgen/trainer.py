"""What a training run does not change, and its loop over steps."""

import collections
import functools
import json
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from vidgen import (
  errors,
  optimizers,
  runs,
  sharding,
  tensorheader,
  train_step,
  video,
)
from vidgen.data import loader
from vidgen.optimizers import OptimizerConfig
from vidgen.tasks import base
from vidgen.train_config import Stage, TrainConfig


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
    given = self.task.start(self.places.params, key)
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


def _pattern(text: str) -> re.Pattern[str]:
  try:
    return re.compile(text)
  except re.error as error:
    raise errors.InputError(f"config: trainable {text!r}: {error}.") from error


def loop(trainer, state, frozen, folder, meter, stop, total):
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
