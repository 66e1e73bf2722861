"""Rotary position embedding over time, height and width."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_THETA = 10000.0


def tables(
  positions: tuple[np.ndarray, np.ndarray, np.ndarray],
  dims: tuple[int, int, int],
) -> tuple[Float[Array, "n d"], Float[Array, "n d"]]:
  """Returns the cosines and sines of each token's rotation, in float32.

  Su et al., https://arxiv.org/abs/2104.09864. The head is split into one part
  for each axis; neighbouring channels form a pair and share a frequency.

  Args:
    positions: The positions along time, height and width.
    dims: Channels of the head that each axis rotates; all even.

  Returns:
    Two arrays with the tokens of the grid in row-major order, time slowest.
  """
  shape = tuple(len(p) for p in positions)
  cos, sin = [], []
  for axis, (position, dim) in enumerate(zip(positions, dims, strict=True)):
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    inverse = np.float32(1) / np.float32(_THETA) ** exponents
    angle = np.outer(position.astype(np.float32), inverse)
    angle = np.repeat(angle, 2, axis=-1)
    # Only the small tables of one axis are constants of the program.
    index = tuple(slice(None) if a == axis else None for a in range(3))
    spread = lambda x, i=index, d=dim: jnp.broadcast_to(
      jnp.asarray(x)[i], (*shape, d)
    )
    cos.append(spread(np.cos(angle)))
    sin.append(spread(np.sin(angle)))
  join = lambda x: jnp.concatenate(x, axis=-1).reshape(-1, sum(dims))
  return join(cos), join(sin)


def rotate(
  x: Float[Array, "b n heads d"],
  cos: Float[Array, "n d"],
  sin: Float[Array, "n d"],
) -> Float[Array, "b n heads d"]:
  """Returns x · cos + turned · sin, with (x0, x1) turned to (-x1, x0)."""
  pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
  turned = jnp.stack([-pairs[..., 1], pairs[..., 0]], axis=-1).reshape(x.shape)
  out = x.astype(jnp.float32) * cos[:, None] + turned * sin[:, None]
  return out.astype(x.dtype)
