"""What a model is told of a clip in numbers: rate, motion, labels."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, UInt8

from vidgen import errors
from vidgen.data import loader

# What a model is told of how much moves, and a cache's array of it.
MOTION = "motion"
# The most that motion is told as, and the mean difference that it stands for.
_MOST, _SATURATED = 255.0, 64.0


def motion(video: UInt8[np.ndarray, "b F H W 3"]) -> Float[np.ndarray, " b"]:
  """Returns how much moves in clips, from 0 to 255.

  d is the mean absolute difference of neighbouring frames, in bytes, over all
  pixels and channels; what is told is 255 · sqrt(min(d / 64, 1)). 127 stands
  for a d of 16. The rule is ours: Blattmann et al. tell no more than that they
  score optical flow. A single frame does not move.
  """
  if video.shape[1] < 2:
    return np.zeros(len(video))
  # Clip by clip: differences take twice the memory of bytes.
  mean = [
    np.abs(np.diff(clip.astype(np.int16), axis=0)).mean() for clip in video
  ]
  return _MOST * np.sqrt(np.minimum(np.array(mean) / _SATURATED, 1))


def numbers(
  names: Sequence[str], batch: loader.Batch
) -> dict[str, Float[np.ndarray, " b"]]:
  """Returns what clips are told as: "fps", "motion", or a label that is one.

  Raises:
    InputError: A clip has no such label.
  """
  return {name: _number(name, batch) for name in names}


def _number(name: str, batch: loader.Batch) -> Float[np.ndarray, " b"]:
  if name == "fps":
    return np.asarray(batch.fps, np.float64)
  if name == MOTION:
    if MOTION in batch.arrays:
      return np.asarray(batch.arrays[MOTION], np.float64)
    return motion(batch.video)
  try:
    return np.array([float(labels[name]) for labels in batch.labels])
  except (KeyError, TypeError, ValueError) as error:
    raise errors.InputError(
      f"config: this model is told {name}, which is no number among the labels "
      f"of {batch.ids[0]}; train it on a dataset that has it."
    ) from error
