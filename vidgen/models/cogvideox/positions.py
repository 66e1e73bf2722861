"""Where the tokens of a video stand: sincos tables and rotary grids.

Yang et al., https://arxiv.org/abs/2408.06072, section 2.2; the grids follow
diffusers' pipeline_cogvideox.py and embeddings.py.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vidgen.nn import embeddings

Grid = tuple[int, int, int]


def sincos_table(
  grid: Grid, dim: int, spatial_scale: float, temporal_scale: float
) -> Float[Array, "n dim"]:
  """Returns the absolute table of CogVideoX-2b, a row a token, float32.

  A quarter of the channels tells the time, then three eighths the *width*, then
  three eighths the height.

  Args:
    grid: Tokens along time, height and width.
    dim: Width of the transformer.
    spatial_scale: Spatial positions are divided by it.
    temporal_scale: Times are divided by it.
  """
  f, h, w = grid
  time_dim, space_dim = dim // 4, dim // 4 * 3
  sincos = embeddings.sincos_1d
  # diffusers scales the positions in float32 before the float64 table.
  axis = lambda n, scale: np.arange(n, dtype=np.float32) / np.float32(scale)
  time = sincos(axis(f, temporal_scale), time_dim)
  width = sincos(axis(w, spatial_scale), space_dim // 2)
  height = sincos(axis(h, spatial_scale), space_dim // 2)

  def spread(x, index):
    # Only the small tables of one axis are constants of the program.
    x = jnp.asarray(x, jnp.float32)[index]
    return jnp.broadcast_to(x, (f, h, w, x.shape[-1]))

  table = jnp.concatenate(
    [
      spread(time, np.s_[:, None, None]),
      spread(width, np.s_[None, None, :]),
      spread(height, np.s_[None, :, None]),
    ],
    axis=-1,
  )
  return table.reshape(f * h * w, dim)


def rotary_positions(
  grid: Grid, base: tuple[int, int], crop: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns the positions along time, height and width.

  Args:
    grid: Tokens along time, height and width.
    base: Tokens along height and width of the trained size.
    crop: Whether another size is a resized crop of the trained grid (CogVideoX
      1.0) or the head of one long table (1.5).
  """
  f, h, w = grid
  time = np.arange(f, dtype=np.float32)
  if not crop:
    return time, np.arange(h, dtype=np.float32), np.arange(w, dtype=np.float32)
  (top, left), (bottom, right) = _resize_crop_region((h, w), base)
  stretch = lambda start, stop, n: np.linspace(
    start, stop * (n - 1) / n, n, dtype=np.float32
  )
  return time, stretch(top, bottom, h), stretch(left, right, w)


def _resize_crop_region(grid, base):
  """The corners of the `base` grid that shows `grid`'s aspect, centred.

  Python's round, half to even, is part of the definition.
  """
  (h, w), (base_h, base_w) = grid, base
  if h / w > base_h / base_w:
    height, width = base_h, round(base_h / h * w)
  else:
    height, width = round(base_w / w * h), base_w
  top, left = round((base_h - height) / 2), round((base_w - width) / 2)
  return (top, left), (top + height, left + width)
