"""A training run of a second: a line that learns how bright videos are."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests import tiny_training
from vidgen import train


@dataclasses.dataclass
class ToyTaskConfig:
  """The toy, as a config names it."""

  pause: float = 0.0

  def build(self, mesh: Any) -> "Toy":
    return Toy(mesh, self.pause)


@dataclasses.dataclass
class Toy:
  """Predicts a video's brightness from its first frame's, with noise."""

  mesh: Any
  pause: float
  groups: tuple[str, ...] = ("line",)
  heads: int | None = None
  averaged: tuple[str, ...] = ("line",)

  def init(self, key):
    return {"line": {"kernel": jax.random.normal(key, (8, 4))}}

  def start(self, places, key):
    return {}

  def reads(self):
    return {}

  def with_options(self, options):
    return self

  def frozen(self, mesh, *, cached=False, sampled=True):
    return {}

  def frozen_shapes(self, mesh, *, cached=False, sampled=True):
    return {}

  def host_batch(self, batch):
    import time

    time.sleep(self.pause)
    return {"mean": batch.video.mean((1, 2, 3, 4)).astype(np.float32) / 255}

  def gradients(self, params, frozen, batch, key, step):
    def loss(line):
      noise = jax.random.normal(key, (len(batch["mean"]), 8))
      guess = (noise + 1) @ line["kernel"]
      return jnp.mean((guess - batch["mean"][:, None]) ** 2)

    value, gradient = jax.value_and_grad(loss)(params["line"])
    return {"line": gradient}, {"loss": value}

  def flops(self, bucket):
    return None

  def samples(self, params, frozen):
    return []

  def publish(self, folder, params, frozen):
    folder.mkdir(parents=True)
    text = json.dumps(np.asarray(params["line"]["kernel"]).tolist())
    (folder / "line.json").write_text(text)


def config(
  data_dir: str | pathlib.Path, num_steps: int, pause: float = 0.0, **fields
) -> train.TrainConfig:
  """A run of the toy on moving shapes."""
  defaults = dict(
    checkpoint_every=5, sample_every=0, log_every=1, ema_decay=0.9
  )
  return train.TrainConfig(
    task=ToyTaskConfig(pause),
    stages=(tiny_training.stage(str(data_dir), num_steps),),
    **{**defaults, **fields},
  )
