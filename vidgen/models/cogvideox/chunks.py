"""Long and large videos: chunks in time, slices of a batch, tiles in space.

The arithmetic is that of `AutoencoderKLCogVideoX` in diffusers. Nothing here
knows what the network does.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, PyTree

from vidgen import errors

Post = Callable[[Array], Array]


def identity(x: Array) -> Array:
  return x


def split_frames(frames: int, chunk: int) -> tuple[int, int]:
  """Returns the length of the first chunk and how many of `chunk` follow it.

  The first chunk takes the remainder.
  """
  rest = max(frames // chunk, 1) - 1
  return frames - rest * chunk, rest


def over_chunks(
  network: nn.Module,
  params: PyTree,
  x: Float[Array, "b f h w c"],
  chunk: int,
  post: Post = identity,
) -> Array:
  """Applies `network` to chunks of frames and `post` to what each becomes.

  The first chunk finds no "cache" and leaves one, the others carry it on. They
  write into one buffer, so that no working memory grows with the length.
  """
  first, rest = split_frames(x.shape[1], chunk)

  def apply(cache: PyTree, x: Array) -> tuple[Array, PyTree]:
    variables = {"params": params, **cache}
    y, cache = network.apply(variables, x, mutable=["cache"])
    return post(y), cache

  y, cache = apply({}, x[:, :first])
  if not rest:
    return y
  if rest == 1:
    # No loop for one: on a CPU its gradient takes three times as long.
    return jnp.concatenate([y, apply(cache, x[:, first:])[0]], axis=1)
  after = jax.eval_shape(apply, cache, x[:, :chunk])[0].shape[1]
  start = y.shape[1]
  shape = (y.shape[0], start + rest * after, *y.shape[2:])
  video = lax.dynamic_update_slice_in_dim(
    jnp.zeros(shape, y.dtype), y, 0, axis=1
  )

  def step(carry: tuple[PyTree, Array], i: Array) -> tuple[Any, None]:
    cache, video = carry
    now = lax.dynamic_slice_in_dim(x, first + i * chunk, chunk, axis=1)
    y, cache = apply(cache, now)
    at = start + i * after
    return (cache, lax.dynamic_update_slice_in_dim(video, y, at, axis=1)), None

  (_, video), _ = lax.scan(step, (cache, video), jnp.arange(rest))
  return video


class Loop(NamedTuple):
  """`over_chunks` with everything given but the frames."""

  network: nn.Module
  params: PyTree
  chunk: int
  slicing: bool = False

  def __call__(
    self, x: Float[Array, "b f h w c"], post: Post = identity
  ) -> Array:
    if not self.slicing or x.shape[0] == 1:
      return over_chunks(self.network, self.params, x, self.chunk, post)
    one = lambda item: over_chunks(
      self.network, self.params, item[None], self.chunk, post
    )[0]
    return lax.map(one, x)


class Axis(NamedTuple):
  """How tiles lie along height or width.

  Attributes:
    size: Of a tile, in the units of the input, as is `stride`.
    stride: From tile to tile.
    blend: What is blended with the tile before, in the units of the output.
    keep: What a tile that is followed by another gives to the output.
  """

  size: int
  stride: int
  blend: int
  keep: int


@dataclasses.dataclass
class Tiling:
  """The size of tiles in pixels, and which share of them overlaps."""

  height: int
  width: int
  overlap_height: float = 1 / 6
  overlap_width: float = 1 / 5

  def encode_axes(self, ratio: int) -> tuple[Axis, Axis]:
    """Returns the tiles of frames, `ratio` times as large as the latents."""

    def axis(pixels: int, overlap: float) -> Axis:
      latents = pixels // ratio
      blend = int(latents * overlap)
      stride = int(pixels * (1 - overlap))
      tiles = Axis(pixels, stride, blend, latents - blend)
      return self._check(tiles, tiles.keep * ratio == stride, ratio)

    return self._each(axis)

  def decode_axes(self, ratio: int) -> tuple[Axis, Axis]:
    """Returns the tiles of latents, of which frames are `ratio` times."""

    def axis(pixels: int, overlap: float) -> Axis:
      latents = pixels // ratio
      blend = int(pixels * overlap)
      stride = int(latents * (1 - overlap))
      tiles = Axis(latents, stride, blend, pixels - blend)
      return self._check(tiles, tiles.keep == stride * ratio, ratio)

    return self._each(axis)

  def _each(self, axis: Callable[[int, float], Axis]) -> tuple[Axis, Axis]:
    height = axis(self.height, self.overlap_height)
    return height, axis(self.width, self.overlap_width)

  def _check(self, axis: Axis, fits: bool, ratio: int) -> Axis:
    # Upstream goes on and returns a video of another size.
    if fits and axis.stride > 0:
      return axis
    raise errors.InputError(
      f"tiling: tiles of {self.height}x{self.width} pixels with overlaps "
      f"{self.overlap_height:.4g} and {self.overlap_width:.4g} do not join; "
      f"tile and overlap must be whole latents (multiples of {ratio} pixels)."
    )


def default_tiling(sample_height: int, sample_width: int) -> Tiling:
  """Returns upstream's tiles: half of the sample size that a config names."""
  return Tiling(sample_height // 2, sample_width // 2)


def over_tiles(
  run: Loop,
  x: Float[Array, "b f h w c"],
  axes: tuple[Axis, Axis],
  post: Post = identity,
) -> Array:
  """Applies `run` to overlapping tiles and blends what they become.

  A tile is blended with the one above, then with the one to its left, both
  already blended. Those at the right and at the bottom may be smaller, so that
  four shapes are compiled. Beside the result, the seams of one row are kept.
  """
  vertical, horizontal = axes
  height, width = x.shape[2:4]
  if height <= vertical.size and width <= horizontal.size:
    return _run(run.network, run.params, x, run.chunk, run.slicing, post)
  rows, above = [], []
  for i in range(0, height, vertical.stride):
    row, seams, left = [], [], None
    for j in range(0, width, horizontal.stride):
      tile = x[:, :, i : i + vertical.size, j : j + horizontal.size]
      tile = _run(run.network, run.params, tile, run.chunk, run.slicing)
      upper = above[len(seams)] if above else None
      tile, lower, left = _join(tile, upper, left, axes, post)
      row.append(tile)
      seams.append(lower)
    rows.append(jnp.concatenate(row, axis=3))
    above = seams
  return jnp.concatenate(rows, axis=2)


@functools.partial(
  jax.jit, static_argnames=("network", "chunk", "slicing", "post")
)
def _run(
  network: nn.Module,
  params: PyTree,
  x: Float[Array, "b f h w c"],
  chunk: int,
  slicing: bool,
  post: Post = identity,
) -> Array:
  return Loop(network, params, chunk, slicing)(x, post)


@functools.partial(jax.jit, static_argnames=("axes", "post"))
def _join(
  tile: Float[Array, "b f h w c"],
  above: Float[Array, "b f s w c"] | None,
  left: Float[Array, "b f h t c"] | None,
  axes: tuple[Axis, Axis],
  post: Post,
) -> tuple[Array, Array, Array]:
  """Returns what a tile gives to the output, and its lower and right seam."""
  vertical, horizontal = axes
  if above is not None:
    tile = _blend(above, tile, 2)
  if left is not None:
    tile = _blend(left, tile, 3)
  h, w = tile.shape[2:4]
  lower = tile[:, :, max(h - vertical.blend, 0) :]
  right = tile[:, :, :, max(w - horizontal.blend, 0) :]
  return post(tile[:, :, : vertical.keep, : horizontal.keep]), lower, right


def _blend(seam: Array, tile: Array, axis: int) -> Array:
  """Fades from the seam of the tile before into the start of `tile`."""
  extent = min(seam.shape[axis], tile.shape[axis])
  if not extent:
    return tile
  shape = [extent if i == axis else 1 for i in range(tile.ndim)]
  weight = (jnp.arange(extent) / extent).reshape(shape)
  old = lax.slice_in_dim(
    seam, seam.shape[axis] - extent, None, axis=axis
  ).astype(jnp.float32)
  new = lax.slice_in_dim(tile, 0, extent, axis=axis).astype(jnp.float32)
  mixed = (old * (1 - weight) + new * weight).astype(tile.dtype)
  rest = lax.slice_in_dim(tile, extent, None, axis=axis)
  return jnp.concatenate([mixed, rest], axis=axis)
