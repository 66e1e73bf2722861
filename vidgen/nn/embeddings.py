"""Sinusoidal embeddings of scalars and positions, and the MLP behind them."""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vidgen.nn import layers


def sinusoid(x: Float[Array, " b"], dim: int) -> Float[Array, "b dim"]:
  """Embeds a scalar as cosines, then sines, of `dim / 2` frequencies.

  Vaswani et al., https://arxiv.org/abs/1706.03762, section 3.5, in float32 with
  the halves in the order [cos | sin].
  """
  half = dim // 2
  exponents = jnp.arange(half, dtype=jnp.float32) / half
  angles = x[:, None].astype(jnp.float32) * jnp.exp(
    -np.log(10000.0) * exponents
  )
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def sincos_1d(positions: np.ndarray, dim: int) -> np.ndarray:
  """Returns the table `[len(positions), dim]`: sines, then cosines; float64."""
  omega = 10000.0 ** -(np.arange(dim // 2, dtype=np.float64) / (dim / 2))
  angles = positions.astype(np.float64)[:, None] * omega
  return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)


class ScalarEmbedding(nn.Module):
  """The two-layer MLP on the sinusoid of a scalar."""

  features: int
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b e"]:
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    x = layers.dense(
      self.features, ("embed", "conditioning"), name="in", **dtypes
    )(x)
    return layers.dense(
      self.features, (None, "conditioning"), name="out", **dtypes
    )(nn.silu(x))
