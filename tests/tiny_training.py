"""Small training runs: a few seconds each, on a small checkpoint."""

import dataclasses
import pathlib
from typing import Any

from vidgen import optimizers, prepare, train
from vidgen.data import buckets, loader
from vidgen.tasks import diffusion, noising, sources


def shapes(folder: pathlib.Path, num_clips: int = 40) -> str:
  """Prepares a few moving shapes; returns the folder of datasets."""
  prepare.run(
    prepare.PrepareConfig(
      "moving_shapes", str(folder / "data"), num_clips=num_clips
    )
  )
  return str(folder / "data")


def checkpoint(folder: pathlib.Path, variant: str = "5b") -> str:
  """Writes a small random checkpoint; returns its folder."""
  # Takes seconds to import, which runs of the toy do not need.
  from tests import tiny_cogvideox

  folder = folder / variant
  tiny_cogvideox.write(folder, variant)
  return str(folder / "checkpoint")


def stage(
  data_dir: str,
  num_steps: int = 6,
  batch_size: int = 4,
  peak: float = 1e-3,
  shapes: tuple[tuple[int, int, int], ...] = ((9, 32, 32),),
  **options: Any,
) -> train.Stage:
  """A stage on moving shapes, at a constant rate."""
  return train.Stage(
    num_steps,
    loader.DataConfig(
      data_dir=data_dir,
      buckets=tuple(buckets.Bucket(*s, batch_size) for s in shapes),
      threads=1,
    ),
    optimizers.Rate(peak, schedule="constant"),
    options,
  )


def config(
  data_dir: str,
  checkpoint: str,
  *,
  stages: tuple[train.Stage, ...] | None = None,
  task: dict[str, Any] | None = None,
  noised: dict[str, Any] | None = None,
  source: dict[str, Any] | None = None,
  **fields: Any,
) -> train.TrainConfig:
  """A diffusion run in float32 without samples."""
  built = diffusion.DiffusionTaskConfig(
    source=sources.Source(checkpoint=checkpoint, **(source or {})),
    noising=noising.NoisingConfig(**(noised or {})),
    dtype="float32",
    **(task or {}),
  )
  defaults = dict(
    checkpoint_every=100, sample_every=0, log_every=1, ema_decay=0.9
  )
  return train.TrainConfig(
    task=built,
    stages=stages or (stage(data_dir),),
    **{**defaults, **fields},
  )


def replace(config: Any, **fields: Any) -> Any:
  """A copy with other fields."""
  return dataclasses.replace(config, **fields)
