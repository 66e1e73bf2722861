"""What the training job knows of a task: what is optimised, and on what."""

import pathlib
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Int, Key, PyTree

from vidgen.data import buckets, loader


class Sample(NamedTuple):
  """A video to look at while a run goes on.

  Attributes:
    name: What the file is called.
    text: What it shows.
    frames: `F H W 3`, bytes.
    fps: Frames a second.
    metrics: What was measured on it, by name; None is nothing.
  """

  name: str
  text: str
  frames: np.ndarray
  fps: float
  metrics: dict[str, float] | None = None


@runtime_checkable
class Task(Protocol):
  """What is optimised: pure functions of groups of parameters.

  Each group has an optimiser of its own. Batches are dicts of arrays with a
  leading batch axis; the job adds `index`, a sample's number in the global
  batch, and `count`, the size of the global batch. A loss is a mean over
  samples, and what is random of a sample comes from its index alone, so that a
  batch in parts is the batch.

  Attributes:
    groups: Their names.
    averaged: Those of which an average is kept (EMA).
    heads: Heads of attention, which a mesh may split; None: it has none.
  """

  groups: tuple[str, ...]
  averaged: tuple[str, ...]
  heads: int | None

  def init(self, key: Key[Array, ""]) -> dict[str, PyTree]:
    """Returns random parameters by group, float32, boxed with logical axes."""

  def start(
    self, places: dict[str, PyTree], key: Key[Array, ""]
  ) -> dict[str, PyTree]:
    """Returns the groups that start from a checkpoint, on their devices.

    Args:
      places: The sharding of each parameter, by group.
      key: Decides what the checkpoint has not.
    """

  def reads(self) -> dict[str, pathlib.Path]:
    """Returns the folders of weights and words that it reads, by name."""

  def with_options(self, options: dict[str, Any]) -> "Task":
    """Returns the task as a stage has it, some of its fields replaced."""

  def frozen(
    self, mesh: Any, *, cached: bool = False, sampled: bool = True
  ) -> dict[str, PyTree]:
    """Returns the parameters that are read and not trained.

    Args:
      mesh: Where they go.
      cached: Whether every clip of the run comes from a cache.
      sampled: Whether it makes samples. What such a run never reads is left
        out, and `publish` does without.
    """

  def frozen_shapes(
    self, mesh: Any, *, cached: bool = False, sampled: bool = True
  ) -> dict[str, PyTree]:
    """Returns what `frozen` would, as shapes with shardings; reads nothing."""

  def host_batch(self, batch: loader.Batch) -> dict[str, np.ndarray]:
    """Returns what of a batch goes to the devices."""

  def gradients(
    self,
    params: dict[str, PyTree],
    frozen: dict[str, PyTree],
    batch: dict[str, Array],
    key: Key[Array, ""],
    step: Int[Array, ""],
  ) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    """Returns each group's gradient of its own loss, and scalars to tell.

    `loss` is among the scalars, each of which is a mean over the batch, or a
    sum and how many it is of, where that depends on the batch. `key` is the
    step's own.
    """

  def flops(self, bucket: buckets.Bucket) -> float | None:
    """Returns the floating-point operations of a step, forward and backward."""

  def samples(
    self, params: dict[str, PyTree], frozen: dict[str, PyTree]
  ) -> list[Sample]:
    """Makes the fixed samples of a run."""

  def publish(
    self,
    folder: pathlib.Path,
    params: dict[str, PyTree],
    frozen: dict[str, PyTree],
  ) -> None:
    """Writes what was trained, as other programs read it."""
