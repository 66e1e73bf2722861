"""What a training run is told, and what of it can be told wrong."""

import dataclasses
from typing import Any

from vidgen import errors
from vidgen.data import loader
from vidgen.optimizers import OptimizerConfig, Rate


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


def reading(config: TrainConfig) -> dict[str, bool]:
  """Returns what of a run decides which frozen networks it reads.

  They are the keywords of a task's `frozen`.
  """
  cached = all(stage.data.cache is not None for stage in config.stages)
  return {"cached": cached, "sampled": config.sample_every > 0}
