"""Normalisation. Statistics and affine run in float32, whatever the dtype."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vidgen import sharding


class LayerNorm(nn.Module):
  """Layer norm over the last axis, affine, in float32.

  Returns float32: the caller modulates it and casts once.
  """

  eps: float = 1e-5
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    boxed = lambda init: nn.with_logical_partitioning(init, ("norm",))
    shape = x.shape[-1:]
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    scale = self.param("scale", boxed(ones), shape, self.param_dtype)
    bias = self.param("bias", boxed(zeros), shape, self.param_dtype)
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axis=-1, keepdims=True)
    x = (x - mean) * jax.lax.rsqrt(variance + self.eps)
    return x * scale.astype(jnp.float32) + bias.astype(jnp.float32)

  def longest(self) -> Float[Array, ""]:
    """Bounds the norm of any result, by the parameters; without a gradient."""

    def param(name: str) -> Array:
      value = self.get_variable("params", name)
      if isinstance(value, nn.Partitioned):  # While they are made.
        value = value.unbox(apply_constraint=False)
      return jax.lax.stop_gradient(value.astype(jnp.float32))

    scale, bias = param("scale"), param("bias")
    root = scale.shape[-1] ** 0.5
    return root * jnp.max(jnp.abs(scale)) + jnp.linalg.norm(bias)


class RMSNorm(nn.Module):
  """Root-mean-square norm without mean or bias, in float32.

  Zhang and Sennrich, https://arxiv.org/abs/1910.07467.
  """

  eps: float = 1e-6
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "*n d"]) -> Float[Array, "*n d"]:
    init = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
    scale = self.param("scale", init, x.shape[-1:], self.param_dtype)
    x = x.astype(jnp.float32)
    variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(variance + self.eps) * scale.astype(jnp.float32)


class GroupNorm(nn.Module):
  """Group norm over time, height, width and the channels of a group.

  Wu and He, https://arxiv.org/abs/1803.08494. Statistics, affine and result are
  float32.
  """

  groups: int = 32
  eps: float = 1e-6
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f h w c"]:
    boxed = lambda init: nn.with_logical_partitioning(init, ("norm",))
    shape = x.shape[-1:]
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    scale = self.param("scale", boxed(ones), shape, self.param_dtype)
    bias = self.param("bias", boxed(zeros), shape, self.param_dtype)
    x = x.astype(jnp.float32)
    mean = self._average(x)
    variance = self._average(jnp.square(x - mean))
    x = (x - mean) * jax.lax.rsqrt(variance + self.eps)
    return x * scale.astype(jnp.float32) + bias.astype(jnp.float32)

  def _average(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b 1 1 1 c"]:
    """Averages a group, one axis at a time.

    Channels go last, because rows of channels add up in vectors; short sums of
    short sums also round less than one long sum. Where frames are split over
    devices, each averages its own part, and one small sum joins them.
    """
    b, f, h, w, c = x.shape
    rows, columns = sharding.grid()
    if h % rows or w % columns:
      rows = columns = 1
    x = x.reshape(b, f, rows, h // rows, columns, w // columns, c)
    x = x.mean(3).mean(4).mean(1).mean((1, 2)).reshape(b, self.groups, -1)
    x = jnp.broadcast_to(x.mean(2, keepdims=True), x.shape)
    return x.reshape(b, 1, 1, 1, c)
