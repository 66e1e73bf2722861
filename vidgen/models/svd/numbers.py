"""What the network is told in numbers, and how each is embedded."""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vidgen.models.svd import unet

FPS, MOTION, NOISE, ELEVATION = "fps", "motion", "noise_aug", "elevation"
POLAR, AZIMUTH = "polar", "azimuth"
# Embeddings that are so many times as wide as the others: SV3D's,
# https://arxiv.org/abs/2403.12008 and sv3d_p.yaml of the original code.
_WIDE = {POLAR: 2, AZIMUTH: 2}
# Every number: degrees are told as degrees, SV3D's as radians.
NAMES = (FPS, MOTION, NOISE, ELEVATION, POLAR, AZIMUTH)
# What of a clip has to be known for each, where that has another name.
_OF = {POLAR: ELEVATION, AZIMUTH: None, NOISE: None}


def width(names: Sequence[str], dim: int) -> int:
  """Returns the width of all embeddings, the usual one being `dim` wide."""
  return dim * sum(_WIDE.get(name, 1) for name in names)


def needed(names: Sequence[str]) -> tuple[str, ...]:
  """Returns what has to be known of a clip to tell these numbers."""
  of = [_OF.get(name, name) for name in names]
  return tuple(dict.fromkeys(name for name in of if name is not None))


def told(
  names: Sequence[str],
  of_clip: Mapping[str, Float[np.ndarray, " b"]],
  num_frames: int,
  given: int = 0,
) -> Float[np.ndarray, "b *f k"]:
  """Returns the numbers of clips; with SV3D's poses, of each of their frames.

  The rate is told as fps - 1, as the published models were trained. An orbit
  goes around evenly, and azimuth 0 is that of the frame that is given.

  Args:
    names: Which numbers.
    of_clip: What is `needed` of each clip. The noise on its image is 0 unless
      it is there.
    num_frames: Frames of a clip.
    given: The frame that is given as an image.
  """
  count = len(next(iter(of_clip.values()), np.zeros(1)))
  if not names:
    return np.zeros((count, 0), np.float32)
  each = AZIMUTH in names
  columns = []
  for name in names:
    if name == AZIMUTH:
      turn = 2 * np.pi * np.arange(num_frames) / num_frames
      column = np.tile((turn - turn[given]) % (2 * np.pi), (count, 1))
    else:
      column = _of_clip(name, of_clip, count)
      column = np.tile(column[:, None], (1, num_frames)) if each else column
    columns.append(column)
  return np.stack(columns, axis=-1).astype(np.float32)


def _of_clip(name, of_clip, count):
  if name == FPS:
    return of_clip[FPS] - 1
  if name == POLAR:
    return np.radians(90 - of_clip[ELEVATION])
  if name == NOISE:
    return of_clip.get(NOISE, np.zeros(count))
  return of_clip[name]


def embed(
  names: Sequence[str], numbers: Float[Array, "*n k"], dim: int
) -> Float[Array, "*n d"]:
  """Embeds each number, and puts the embeddings side by side; float32."""
  parts = [
    unet.embed_numbers(numbers[..., i : i + 1], dim * _WIDE.get(name, 1))
    for i, name in enumerate(names)
  ]
  return jnp.concatenate(parts, axis=-1)
