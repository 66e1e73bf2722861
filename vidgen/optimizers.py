"""Optimisers by config: any of optax, clipped, with a rate in stages."""

import dataclasses
import inspect
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from vidgen import errors

SCHEDULES = ("cosine", "linear", "constant")


@dataclasses.dataclass
class OptimizerConfig:
  """An optimiser of optax.

  Attributes:
    name: Its name in optax: "adamw", "lion", "muon" (in optax.contrib), ...
    options: Its arguments; weight decay spares biases, norms and tables of
      positions, whatever the optimiser.
    clip_norm: The global norm that gradients are clipped to; None does not.
    scale: Factor of the stages' learning rate, for a group that learns faster
      or slower than the others.
  """

  name: str = "adamw"
  # Yang et al., https://arxiv.org/abs/2408.06072, table 6.
  options: dict[str, Any] = dataclasses.field(
    default_factory=lambda: {
      "b1": 0.9,
      "b2": 0.95,
      "eps": 1e-8,
      "weight_decay": 1e-4,
    }
  )
  clip_norm: float | None = 1.0
  scale: float = 1.0


@dataclasses.dataclass
class Rate:
  """The learning rate of a stage.

  Attributes:
    peak: What the warm-up leads to.
    warmup_steps: Steps from 0, or from the stage before, up to the peak.
    schedule: One of `SCHEDULES`, for the steps after the warm-up.
    final: Where cosine and linear end, as a share of the peak.
  """

  peak: float = 1e-4
  warmup_steps: int = 0
  schedule: str = "cosine"
  final: float = 0.0


def schedule(stages: Sequence[tuple[int, Rate]]) -> optax.Schedule:
  """Returns the learning rate at each step of a run's stages.

  Args:
    stages: The number of steps and the rate of each stage.

  Raises:
    InputError: A rate that makes no sense.
  """
  parts, ends, total, before = [], [], 0, 0.0
  for steps, rate in stages:
    _check(steps, rate)
    rest = max(1, steps - rate.warmup_steps)
    end = rate.peak * (1.0 if rate.schedule == "constant" else rate.final)
    match rate.schedule:
      case "cosine":
        after = optax.cosine_decay_schedule(rate.peak, rest, rate.final)
      case "linear":
        after = optax.linear_schedule(rate.peak, end, rest)
      case _:
        after = optax.constant_schedule(rate.peak)
    if rate.warmup_steps:
      # The first step of a run takes a small step, not an empty one.
      first = before if parts else rate.peak / rate.warmup_steps
      warm = optax.linear_schedule(first, rate.peak, rate.warmup_steps)
      after = optax.join_schedules([warm, after], [rate.warmup_steps])
    parts.append(after)
    total += steps
    ends.append(total)
    # A stage that is all warm-up ends at its peak.
    before = rate.peak if rate.warmup_steps == steps else end
  return optax.join_schedules(parts, ends[:-1])


def _check(steps: int, rate: Rate) -> None:
  if steps < 1:
    raise errors.InputError(
      f"config: a stage of {steps} steps; give 1 or more."
    )
  if not (math.isfinite(rate.peak) and rate.peak > 0):
    raise errors.InputError(
      f"config: a peak learning rate of {rate.peak}; it must be above 0."
    )
  if rate.schedule not in SCHEDULES:
    raise errors.InputError(
      f"config: schedule {rate.schedule!r} is unknown; known are "
      f"{', '.join(SCHEDULES)}."
    )
  if not 0 <= rate.warmup_steps <= steps:
    raise errors.InputError(
      f"config: {rate.warmup_steps} warmup_steps in a stage of {steps} steps."
    )


def optimizer(
  config: OptimizerConfig, learning_rate: optax.Schedule
) -> optax.GradientTransformation:
  """Returns the optimiser that a config names.

  Raises:
    InputError: optax has no such optimiser, or it has no such option.
  """
  make = getattr(optax, config.name, None) or getattr(
    optax.contrib, config.name, None
  )
  if not callable(make):
    raise errors.InputError(
      f"config: optax has no optimiser {config.name!r}; see its documentation."
    )
  options = dict(config.options)
  decay = options.pop("weight_decay", 0.0)
  rate = lambda count: config.scale * learning_rate(count)
  try:
    takes = inspect.signature(make).parameters
    if config.name == "muon":
      # Left alone it takes a stack of biases for a matrix, and one of kernels
      # for no matrix at all.
      options |= {"muon_weight_dimension_numbers": matrices}
      options |= {"weight_decay": decay, "weight_decay_mask": decayed}
    elif "weight_decay" in takes and "mask" in takes:
      # Also where it is 0: optax has defaults of its own, for all parameters.
      options |= {"weight_decay": decay, "mask": decayed}
    elif "weight_decay_mask" in takes:
      options |= {"weight_decay_mask": decayed}
      if decay:
        raise TypeError("its weight_decay is called weight_decay_rate")
    elif decay:
      raise TypeError(f"weight_decay is not for {config.name}")
    elif "weight_decay" in takes:
      options |= {"weight_decay": 0.0}
    tx = make(rate, **options)
  except (TypeError, ValueError) as error:
    raise errors.InputError(f"config: {config.name}: {error}.") from error
  if config.clip_norm is None:
    return tx
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)


def decayed(params: PyTree) -> PyTree:
  """Says of each parameter whether weight decay is for it: kernels alone."""

  def one(path: Any, leaf: Any) -> bool:
    del leaf
    return any(getattr(key, "key", None) == "kernel" for key in path)

  return jax.tree_util.tree_map_with_path(one, params)


def matrices(params: PyTree) -> PyTree:
  """Says which axes of each parameter make a matrix; None where none do.

  A matrix is the kernel of a linear layer, alone or in a stack over blocks.
  """

  def one(path: Any, leaf: Any) -> Any:
    # A boxed leaf has a last key of its own, which is no name.
    keys = [key.key for key in path if hasattr(key, "key")]
    if keys[-1] != "kernel" or leaf.ndim - ("blocks" in keys) != 2:
      return None
    return optax.contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1)

  return jax.tree_util.tree_map_with_path(one, params)


def ema(average: PyTree, params: PyTree, count: jax.Array, decay: float):
  """Returns the average after one more update, warmed up.

  The decay grows as (1 + count) / (10 + count), so that the first steps do not
  weigh for ever.
  """
  count = count.astype(jnp.float32)
  decay = jnp.minimum(decay, (1 + count) / (10 + count))
  # Written so that an average that equals its parameters keeps their bits.
  return jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), average, params)
