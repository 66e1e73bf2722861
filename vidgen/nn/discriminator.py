"""A critic of videos, for training autoencoders."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vidgen.nn import conv
from vidgen.nn.norm import GroupNorm

_SLOPE = 0.2


def _conv3d(x: Array, kernel: Array, stride: tuple[int, int]) -> Array:
  """Convolves with an odd number of taps in time, as one 2-D convolution.

  The frames that meet the taps are stacked as channels, which is faster than a
  3-D convolution where there are few taps. Time is padded by the first and the
  last frame, so that a picture looks like a video that stands still; space by
  zeros.
  """
  taps, size = kernel.shape[:2]
  past = taps // 2
  edges = ((0, 0), (past, past), (0, 0), (0, 0), (0, 0))
  padded = jnp.pad(x, edges, mode="edge")
  last = x.shape[1] - 1
  frames = [padded[:, i : i + last + 1 : stride[0]] for i in range(taps)]
  x = jnp.concatenate(frames, axis=-1)
  kernel = jnp.moveaxis(kernel, 0, 2)
  kernel = kernel.reshape(size, size, -1, kernel.shape[-1])
  y = conv.convolve(x.reshape(-1, *x.shape[2:]), kernel, stride[1])
  return y.reshape(*x.shape[:2], *y.shape[1:])


class _Conv3D(nn.Module):
  features: int
  size: int
  stride: tuple[int, int] = (1, 1)
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b F H W i"]) -> Float[Array, "b f h w o"]:
    axes = (None, None, None, "conv_in", "conv_out")
    boxed = nn.with_logical_partitioning
    # Isola et al., section A.2.
    normal = nn.initializers.normal(0.02)
    shape = (3, self.size, self.size, x.shape[-1], self.features)
    kernel = self.param("kernel", boxed(normal, axes), shape, self.param_dtype)
    zeros = boxed(nn.initializers.zeros, axes[-1:])
    bias = self.param("bias", zeros, shape[-1:], self.param_dtype)
    kernel, bias = kernel.astype(self.dtype), bias.astype(self.dtype)
    return _conv3d(x.astype(self.dtype), kernel, self.stride) + bias


class Discriminator(nn.Module):
  """Says of each patch of a video whether it looks real: large is real.

  PatchGAN (Isola et al., https://arxiv.org/abs/1611.07004) with 3 taps in time
  and group norm, which unlike batch norm looks at one video alone. Every layer
  but the last two halves space, and time where there is more than one frame.

  Attributes:
    features: Channels of the first layer; they double up to eight times that.
    num_layers: Layers that halve.
    groups: Of the group norm, or 0 for none. Groups have 4 channels or more, so
      that there may be fewer of them.
    dtype: What convolutions compute in; the logits are float32.
  """

  features: int = 64
  num_layers: int = 3
  groups: int = 32
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, video: Float[Array, "b F H W 3"]
  ) -> Float[Array, "b f h w"]:
    types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    x = video
    for i in range(self.num_layers + 1):
      halves = i < self.num_layers
      size, stride = (4, (2, 2)) if halves else (3, (1, 1))
      width = self.features * min(2**i, 8)
      x = _Conv3D(width, size, stride, **types, name=f"conv_{i}")(x)
      if i and self.groups:
        # A group of one channel would undo its bias.
        groups = math.gcd(self.groups, max(width // 4, 1))
        x = GroupNorm(groups, param_dtype=self.param_dtype, name=f"norm_{i}")(x)
      x = jax.nn.leaky_relu(x, _SLOPE)
    x = _Conv3D(1, 3, **types, name="conv_out")(x)
    return x[..., 0].astype(jnp.float32)
