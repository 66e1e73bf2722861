"""Buckets: the shapes that batches come in, and which clip goes where."""

import dataclasses
import warnings

import numpy as np
from jaxtyping import Bool, Float, Int

from vidgen import errors, tensorheader
from vidgen.data import records

# A clip a little slower than asked is taken frame by frame, not doubled.
_SLOWER = 0.9


# Not frozen, so that a command line can override a field; hashed by value all
# the same, so that a bucket can be a key.
@dataclasses.dataclass(unsafe_hash=True)
class Bucket:
  """The shape of a batch.

  Attributes:
    num_frames: Of each clip; 1 makes a bucket of images.
    height: In pixels.
    width: In pixels.
    batch_size: Clips of a step, on all hosts together; 0 takes as many as fit
      the config's token budget.
    weight: How often a step takes this bucket, relative to the others.
  """

  num_frames: int
  height: int
  width: int
  batch_size: int
  weight: float = 1.0

  def __str__(self) -> str:
    return f"{self.num_frames}x{self.height}x{self.width}"


def token_budget(
  num_frames: int,
  height: int,
  width: int,
  budget: int,
  *,
  temporal: int = 4,
  spatial: int = 16,
  multiple: int = 1,
) -> int:
  """Returns the batch size whose latent tokens fit a budget.

  Args:
    num_frames: Of each clip.
    height: In pixels.
    width: In pixels.
    budget: Tokens of a batch, at most.
    temporal: Frames of a token; the first frame has tokens of its own.
    spatial: Pixels of a token along height and along width: 8 of the
      autoencoder's times 2 of a patch.
    multiple: The batch size is a multiple of it, for hosts or accumulation.

  Raises:
    InputError: Not even `multiple` clips fit.
  """
  along_time = 1 + -(-(num_frames - 1) // temporal)
  tokens = along_time * -(-height // spatial) * -(-width // spatial)
  size = budget // tokens // multiple * multiple
  if size < 1:
    raise errors.InputError(
      f"token_budget: {budget} tokens hold no {multiple} clips of "
      f"{num_frames}x{height}x{width}, which have {tokens} tokens each."
    )
  return size


def check(buckets: tuple[Bucket, ...]) -> None:
  """Checks the numbers of buckets.

  Raises:
    InputError: One makes no sense, or there is no bucket.
  """
  if not buckets:
    raise errors.InputError("buckets: name at least one.")
  for bucket in buckets:
    for name in ("num_frames", "height", "width", "batch_size"):
      if getattr(bucket, name) < 1:
        raise errors.InputError(
          f"bucket {bucket}: {name} is {getattr(bucket, name)}, not positive."
        )
    if not 0 < bucket.weight < float("inf"):
      raise errors.InputError(
        f"bucket {bucket}: weight is {bucket.weight}, not positive."
      )


def strides(
  rates: Float[np.ndarray, " n"], fps: float | None
) -> Float[np.ndarray, " n"]:
  """Returns how many frames of each clip make one at the rate `fps`.

  It is 0 for a clip that is too slow for it.
  """
  if fps is None:
    return np.ones_like(rates)
  stride = rates / fps
  return np.where(stride < _SLOWER, 0.0, np.maximum(stride, 1.0))


def frames(num_frames: int, stride: float) -> Int[np.ndarray, " F"]:
  """Returns the frames of a clip that are taken, counted from the first."""
  return np.floor(np.arange(num_frames) * stride + 0.5).astype(np.int64)


def assign(
  buckets: tuple[Bucket, ...],
  index: records.Index,
  numbers: Int[np.ndarray, " m"],
  fps: float | None,
  name: str,
) -> list[Int[np.ndarray, " k"]]:
  """Returns the records of each bucket.

  A clip goes to a bucket that it has enough frames for: that of the nearest
  aspect ratio, then of the most frames, then of the nearest size. To a bucket
  of images go all clips, by aspect ratio. A bucket that is nobody's first
  choice takes every clip that has enough frames for it.

  Args:
    buckets: The shapes.
    index: Of the split.
    numbers: The records to choose from.
    fps: The rate at which frames are taken, or None for all frames.
    name: What a message calls the split.

  Raises:
    InputError: No clip has enough frames for some bucket.
  """
  stride = strides(index.fps[numbers], fps)
  length = index.num_frames[numbers]
  fits = np.stack([_fits(bucket, length, stride) for bucket in buckets])
  for bucket, mask in zip(buckets, fits, strict=True):
    if not mask.any():
      raise errors.InputError(
        _no_clip(bucket, index, numbers, stride, fps, name)
      )
  _tell_left_out(index, numbers[~fits.any(axis=0)], name)
  shape = index.height[numbers], index.width[numbers]
  images = np.array([bucket.num_frames == 1 for bucket in buckets])
  chosen = np.zeros_like(fits)
  for kind in (images, ~images):
    group = np.flatnonzero(kind)
    if len(group):
      some = tuple(buckets[i] for i in group)
      chosen[group] = _choose(some, fits[group], *shape)
  return [
    numbers[mask if mask.any() else fit]
    for mask, fit in zip(chosen, fits, strict=True)
  ]


def _fits(
  bucket: Bucket,
  length: Int[np.ndarray, " m"],
  stride: Float[np.ndarray, " m"],
) -> Bool[np.ndarray, " m"]:
  """Says which clips have enough frames."""
  if bucket.num_frames == 1:
    return np.ones(len(length), bool)
  last = np.floor((bucket.num_frames - 1) * stride + 0.5)
  return (stride > 0) & (last < length)


def _choose(
  buckets: tuple[Bucket, ...],
  fits: Bool[np.ndarray, "k m"],
  height: Int[np.ndarray, " m"],
  width: Int[np.ndarray, " m"],
) -> Bool[np.ndarray, "k m"]:
  """Says which bucket each clip prefers of those that it fits."""
  aspect, area = np.log(width / height), np.log(width * height)
  best = np.full(len(height), -1)
  scores = [
    (
      # Ratios that differ in the last bit are the same.
      np.round(np.abs(np.log(b.width / b.height) - aspect), 9),
      np.full(len(height), -float(b.num_frames)),
      np.abs(np.log(b.width * b.height) - area),
    )
    for b in buckets
  ]
  for i, score in enumerate(scores):
    better = best < 0
    # From the last score to the first, which decides.
    held = [
      np.choose(np.maximum(best, 0), [other[j] for other in scores])
      for j in range(3)
    ]
    closer = np.zeros_like(better)
    for mine, theirs in zip(score[::-1], held[::-1], strict=True):
      closer = (mine < theirs) | ((mine == theirs) & closer)
    best = np.where(fits[i] & (better | closer), i, best)
  return best == np.arange(len(buckets))[:, None]


def _no_clip(
  bucket: Bucket,
  index: records.Index,
  numbers: Int[np.ndarray, " m"],
  stride: Float[np.ndarray, " m"],
  fps: float | None,
  name: str,
) -> str:
  """Returns the line on a bucket without clips, and on the nearest clip."""
  length = index.num_frames[numbers]
  taken = np.where(stride > 0, (length - 1) / np.maximum(stride, 1) + 1, 0)
  # Of clips that are all too slow, the fastest.
  best = np.lexsort((index.fps[numbers], taken))[-1]
  nearest = numbers[best]
  rate = "" if fps is None else f" at {fps:g} frames per second"
  return (
    f"bucket {bucket}: no clip of {name} has {bucket.num_frames} frames{rate}; "
    f"the nearest, {index.ids[nearest]}, has {index.num_frames[nearest]} at "
    f"{index.fps[nearest]:g}."
  )


def _tell_left_out(
  index: records.Index, numbers: Int[np.ndarray, " k"], name: str
) -> None:
  if len(numbers):
    ids = tensorheader.listed((index.ids[i] for i in numbers), 5)
    warnings.warn(
      f"{name}: {len(numbers)} clips have too few frames for every bucket and "
      f"are left out: {ids}.",
      stacklevel=3,
    )
