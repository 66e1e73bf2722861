"""Convolutions, residual blocks and the blend of space and time.

Blattmann et al., https://arxiv.org/abs/2304.08818, section 3.1: layers over
time stand behind the layers of an image model, and a learned factor blends what
the two give.
"""

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from vidgen import sharding
from vidgen.nn import conv, layers, norm

# Fixed in diffusers' blocks of this model.
GROUPS = 32


class _Conv(nn.Module):
  """Holds a kernel and a bias.

  Attributes:
    features: Output channels.
    kernel_init: Of the kernel.
    dtype: What is computed in.
    param_dtype: What parameters are made in.
  """

  features: int
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  def weights(self, *shape: int) -> tuple[Array, Array]:
    """Returns the kernel `[*shape, features]` and the bias, to be used."""
    axes = (None,) * (len(shape) - 1) + ("conv_in", "conv_out")
    boxed = nn.with_logical_partitioning
    shape = (*shape, self.features)
    kernel = self.param(
      "kernel", boxed(self.kernel_init, axes), shape, self.param_dtype
    )
    zeros = boxed(nn.initializers.zeros, axes[-1:])
    bias = self.param("bias", zeros, shape[-1:], self.param_dtype)
    kernel = sharding.gathered(kernel.astype(self.dtype), *axes)
    return kernel, sharding.gathered(bias.astype(self.dtype), *axes[-1:])


class Conv2D(_Conv):
  """Convolves each frame; zeros stand around it, as many on every side."""

  kernel_size: int = 3
  stride: int = 1

  @nn.compact
  def __call__(self, x: Float[Array, "b f h w i"]) -> Float[Array, "b f y x o"]:
    size = self.kernel_size
    kernel, bias = self.weights(size, size, x.shape[-1])
    x = conv.constrain(x.astype(self.dtype))
    if size == 1:
      return conv.constrain(layers.matmul(x, kernel[0, 0]) + bias)
    if (size, self.stride) == (3, 1):
      return conv.constrain(conv.frame_conv2d(x, kernel) + bias)
    y = conv.convolve(x.reshape(-1, *x.shape[2:]), kernel, self.stride)
    return conv.constrain(y.reshape(*x.shape[:2], *y.shape[1:]) + bias)


class TemporalConv(_Conv):
  """Convolves three frames, zeros before the first and after the last one."""

  @nn.compact
  def __call__(self, x: Float[Array, "b f h w i"]) -> Float[Array, "b f h w o"]:
    kernel, bias = self.weights(3, 1, 1, x.shape[-1])
    x = conv.constrain(x.astype(self.dtype))
    return conv.constrain(_over_time(x, kernel) + bias)


def _over_time(
  x: Float[Array, "b f h w i"], kernel: Float[Array, "3 1 1 i o"]
) -> Float[Array, "b f h w o"]:
  if sharding.platform() != "cpu":
    return conv.convolve(x, kernel)
  # XLA:CPU takes twice as long for a 3-D convolution as for a 2-D one.
  b, f, h, w, _ = x.shape
  y = conv.convolve(x.reshape(b, f, h * w, -1), kernel[:, :, 0])
  return y.reshape(b, f, h, w, -1)


class Upsample(_Conv):
  """Resizes each frame by nearest neighbour, then convolves it with 3x3.

  `size` is twice that of the input, or one less where halving rounded up.
  """

  @nn.compact
  def __call__(
    self, x: Float[Array, "b f h w i"], size: tuple[int, int]
  ) -> Float[Array, "b f y x o"]:
    kernel, bias = self.weights(3, 3, x.shape[-1])
    x = conv.constrain(x.astype(self.dtype))
    height, width = size
    if (height, width) == (2 * x.shape[2], 2 * x.shape[3]):
      return conv.constrain(conv.upsample_conv2d(x, kernel, bias))
    x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)[:, :, :height, :width]
    y = conv.convolve(x.reshape(-1, *x.shape[2:]), kernel)
    return conv.constrain(y.reshape(*x.shape[:-1], -1) + bias)


class FrameNorm(nn.Module):
  """Group norm of each frame by itself; float32.

  Attributes:
    eps: Epsilon.
    groups: Groups of channels.
    param_dtype: What parameters are made in.
  """

  eps: float
  groups: int = GROUPS
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f h w c"]:
    b, f, *frame = x.shape
    normalize = norm.GroupNorm(self.groups, self.eps, self.param_dtype)
    # The parameters stand where this module stands.
    nn.share_scope(self, normalize)
    return normalize(x.reshape(b * f, 1, *frame)).reshape(x.shape)


class Blend(nn.Module):
  """a · first + (1 - a) · second, a = sigmoid(a learned number), in float32.

  Images that stand in the place of frames take the first alone: "learned with
  images" in the original code.

  Attributes:
    initial: What the number starts at.
    param_dtype: What it is made in.
  """

  initial: float
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    first: Float[Array, "b f *n c"],
    second: Float[Array, "b f *n c"],
    image_only: Bool[Array, "b f"] | None = None,
  ) -> Float[Array, "b f *n c"]:
    init = nn.with_logical_partitioning(
      nn.initializers.constant(self.initial), ("norm",)
    )
    mix = self.param("mix_factor", init, (1,), self.param_dtype)
    a = nn.sigmoid(jnp.asarray(mix).astype(jnp.float32))
    if image_only is not None:
      ones = (1,) * (first.ndim - 2)
      a = jnp.where(image_only.reshape(*image_only.shape, *ones), 1.0, a)
    y = a * first.astype(jnp.float32) + (1 - a) * second.astype(jnp.float32)
    return y.astype(first.dtype)


class ResBlock(nn.Module):
  """Two norms, SiLUs and convolutions, of frames or of time, and a shortcut.

  Attributes:
    features: Output channels.
    eps: Of the norms.
    temporal: Convolves over time; statistics then are those of all frames.
    zero: Whether the last convolution starts at zero: the block is a shortcut.
    groups: Groups of the norms.
    dtype: What is computed in.
    param_dtype: What parameters are made in.
  """

  features: int
  eps: float
  temporal: bool = False
  zero: bool = True
  groups: int = GROUPS
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b f h w i"],
    temb: Float[Array, "b _f e"] | None = None,
  ) -> Float[Array, "b f h w o"]:
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    convolve = TemporalConv if self.temporal else Conv2D
    normalize = norm.GroupNorm if self.temporal else FrameNorm
    activate = lambda x, name: nn.silu(
      normalize(
        eps=self.eps,
        groups=self.groups,
        param_dtype=self.param_dtype,
        name=name,
      )(x)
    )
    zeros, normal = nn.initializers.zeros, nn.initializers.lecun_normal()
    last = zeros if self.zero else normal

    y = activate(x, "norm1").astype(self.dtype)
    y = convolve(self.features, name="conv1", **dtypes)(y)
    if temb is not None:
      project = layers.dense(
        self.features,
        ("conditioning", "conv_out"),
        name="time",
        param_dtype=self.param_dtype,
      )
      shift = project(nn.silu(temb))[:, :, None, None]
      y = y.astype(jnp.float32) + shift
    y = activate(y, "norm2").astype(self.dtype)
    y = convolve(self.features, kernel_init=last, name="conv2", **dtypes)(y)
    if x.shape[-1] != self.features:
      x = Conv2D(self.features, kernel_size=1, name="shortcut", **dtypes)(x)
    return x + y


class VideoResBlock(nn.Module):
  """A residual block of frames, one of time behind it, and their blend.

  Attributes:
    features: Output channels.
    eps: Of the norms of frames.
    temporal_eps: Of the norms of time.
    time_first: The blend's factor weighs time, not space: the autoencoder's.
    images: Leaves time out; parameters of it are not read.
    zero: As of `ResBlock`, of frames; time always starts at zero.
    initial: As of `Blend`.
    dtype: What is computed in.
    param_dtype: What parameters are made in.
  """

  features: int
  eps: float
  temporal_eps: float
  time_first: bool = False
  images: bool = False
  zero: bool = True
  initial: float = 0.5
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b f h w i"],
    temb: Float[Array, "b _f e"] | None = None,
    image_only: Bool[Array, "b f"] | None = None,
  ) -> Float[Array, "b f h w o"]:
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    space = ResBlock(
      self.features, self.eps, zero=self.zero, name="spatial", **dtypes
    )(x, temb)
    if self.images:
      return space
    time = ResBlock(
      self.features, self.temporal_eps, temporal=True, name="temporal", **dtypes
    )(space, temb)
    blend = Blend(self.initial, self.param_dtype, name="blend")
    if self.time_first:
      return blend(time, space)
    return blend(space, time, image_only)
