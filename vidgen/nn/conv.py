"""Convolutions over videos: one door each, the fastest way behind it.

XLA:CPU runs one 3-D convolution at half the speed of the same as 2-D ones, so
on a CPU the doors lead to 2-D convolutions, and to products of matrices where
2-D ones are slow; elsewhere to XLA's own. The choice is made when a program is
lowered: lowering for a TPU on a CPU gives the TPU's.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from vidgen import sharding
from vidgen.nn import layers

Frames = tuple[Array, ...]
Bilinear = Callable[[Array, Frames], Array]

# Measured on two cores of an Intel Xeon. Of fewer positions, XLA:CPU's
# convolution takes longer to read the kernel than a matrix product does; of
# fewer channels, what Winograd's transforms add takes longer than they save.
_FEW_POSITIONS = 128
_MANY_CHANNELS = 256


def convolve(
  x: Float[Array, "b *n i"],
  kernel: Float[Array, "*k i o"],
  stride: int = 1,
  padding: tuple | None = None,
) -> Float[Array, "b *m o"]:
  """Convolves channels-last `x`, 2-D or 3-D by the rank of the kernel.

  Args:
    x: Batch, the axes that are convolved, channels.
    kernel: Taps along each of them.
    stride: Along each of them.
    padding: Zeros before and after; None is (taps - 1) // 2 of each, which
      keeps the size where taps are odd and the stride is 1.
  """
  if padding is None:
    padding = tuple(((size - 1) // 2,) * 2 for size in kernel.shape[:-2])
  y = _convolve(stride, padding, x, kernel)
  if sharding.covered(*x.shape[-3:-1]) and sharding.covered(*y.shape[-3:-1]):
    return y
  return _convolve_safely(stride, padding, x, kernel)


def _convolve(stride: int, padding: tuple, x: Array, kernel: Array) -> Array:
  axes = "DHW"[5 - kernel.ndim :]
  return lax.conv_general_dilated(
    x,
    kernel,
    (stride,) * len(axes),
    padding,
    dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
    precision=layers.precision(x.dtype),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolve_safely(
  stride: int, padding: tuple, x: Array, kernel: Array
) -> Array:
  """The same with a gradient of the kernel that holds on every mesh.

  XLA's partitioner takes that gradient for a convolution. Where several devices
  have the same part of split frames it adds that part up as often, and the
  gradient is that many times too large. Of products of matrices, one a tap, it
  counts each part once.
  """
  return _convolve(stride, padding, x, kernel)


def _convolve_safely_bwd(stride, padding, kept, d):
  x, kernel = kept
  run = functools.partial(_convolve, stride, padding)
  (dx,) = jax.vjp(lambda x: run(x, kernel), x)[1](d)
  padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  summed = tuple(range(x.ndim - 1))
  taps = []
  for start in np.ndindex(kernel.shape[:-2]):
    seen = tuple(
      slice(first, first + stride * (size - 1) + 1, stride)
      for first, size in zip(start, d.shape[1:-1], strict=True)
    )
    tap = lax.dot_general(
      padded[:, *seen],
      d,
      ((summed, summed), ((), ())),
      precision=layers.precision(x.dtype),
      preferred_element_type=jnp.float32,
    )
    taps.append(tap.astype(kernel.dtype))
  return dx, jnp.stack(taps).reshape(kernel.shape)


_convolve_safely.defvjp(
  lambda stride, padding, x, kernel: (
    _convolve(stride, padding, x, kernel),
    (x, kernel),
  ),
  _convolve_safely_bwd,
)


def _per_frame(
  x: Array, kernel: Array, stride: int = 1, padding: tuple = ((1, 1), (1, 1))
) -> Array:
  """Convolves each frame of `x` with a 2-D kernel."""
  y = convolve(x.reshape(-1, *x.shape[2:]), kernel, stride, padding)
  return y.reshape(*x.shape[:2], *y.shape[1:])


def _per_frame_on_cpu(
  x: Array, kernel: Array, padding: tuple = ((1, 1), (1, 1))
) -> Array:
  """The same by one product of matrices where there are few positions."""
  if x.size // x.shape[-1] > _FEW_POSITIONS:
    return _per_frame(x, kernel, 1, padding)
  rows, columns, _, features = kernel.shape
  x = jnp.pad(x, ((0, 0), (0, 0), *padding, (0, 0)))
  h, w = x.shape[2] - rows + 1, x.shape[3] - columns + 1
  seen = [
    x[:, :, i : i + h, j : j + w] for i in range(rows) for j in range(columns)
  ]
  return layers.matmul(
    jnp.concatenate(seen, axis=-1), kernel.reshape(-1, features)
  )


def _door(fast: Bilinear, plain: Bilinear) -> Bilinear:
  """Returns `fast` on a CPU and `plain` elsewhere, differentiable.

  Both are bilinear in the kernel and the frames. The derivative is written out
  because that of a choice keeps the residuals of every branch.
  """

  def run(kernel: Array, frames: Frames) -> Array:
    in_float32 = lambda *args: fast(*_cast(args, jnp.float32)).astype(
      kernel.dtype
    )
    return lax.platform_dependent(kernel, frames, cpu=in_float32, default=plain)

  def jvp(primals, tangents):
    is_zero = lambda t: isinstance(t, SymbolicZero)
    (kernel, frames), (d_kernel, d_frames) = primals, tangents
    y = run(kernel, frames)
    tangent = jnp.zeros_like(y)
    if not is_zero(d_kernel):
      tangent += run(d_kernel, frames)
    if not all(is_zero(d) for d in d_frames):
      full = lambda d, x: jnp.zeros_like(x) if is_zero(d) else d
      tangent += run(kernel, tuple(map(full, d_frames, frames)))
    return y, tangent

  door = jax.custom_jvp(run)
  door.defjvp(jvp, symbolic_zeros=True)
  return door


def _cast(tree, dtype: DTypeLike):
  return jax.tree.map(lambda x: x.astype(dtype), tree)


def _with_past(frames: Frames) -> Array:
  """Puts two frames before `x`: the history, or the first frame repeated."""
  *history, x = frames
  return jnp.concatenate([*(history or [x[:, :1]] * 2), x], axis=1)


def _causal_plain(kernel: Array, frames: Frames) -> Array:
  padding = ((0, 0), (1, 1), (1, 1))
  return convolve(_with_past(frames), kernel, 1, padding)


def _winograd(
  parts: Sequence[Array], taps: Array, run: Callable[[Array, Array], Array]
) -> tuple[Array, Array]:
  """Two neighbouring results of three taps by four products, not six: F(2, 3).

  Lavin and Gray, https://arxiv.org/abs/1509.09308, section 4.1.

  Args:
    parts: What the first tap meets for the first result, and the three next.
    taps: Three, along the first axis.
    run: The product of a part and a tap.
  """
  d0, d1, d2, d3 = parts
  outer, middle = (taps[0] + taps[2]) / 2, taps[1] / 2
  m0 = run(d0 - d2, taps[0])
  m1 = run(d1 + d2, outer + middle)
  m2 = run(d2 - d1, outer - middle)
  m3 = run(d1 - d3, taps[2])
  return m0 + (m1 + m2), (m1 - m2) - m3


def _causal_by_frames(kernel: Array, frames: Frames) -> Array:
  """Convolves in time by Winograd's F(2, 3), of 2-D convolutions.

  Time alone is transformed, so the transforms add whole frames. Frames are
  taken in pairs; an odd first one goes alone, and without a history its three
  taps are one.
  """
  x, padded = frames[-1], _with_past(frames)
  alone = x.shape[1] % 2
  parts = []
  if alone and len(frames) == 1:
    parts.append(_per_frame(x[:, :1], kernel.sum(0)))
  elif alone:
    taps = [_per_frame(padded[:, i : i + 1], kernel[i]) for i in range(3)]
    parts.append(sum(taps))
  if pairs := x.shape[1] // 2:
    shifts = range(alone, alone + 4)
    shifted = [padded[:, i : i + 2 * pairs - 1 : 2] for i in shifts]
    y = jnp.stack(_winograd(shifted, kernel, _per_frame), axis=2)
    parts.append(y.reshape(y.shape[0], -1, *y.shape[3:]))
  return jnp.concatenate(parts, axis=1)


def _per_frame_by_rows(x: Array, kernel: Array) -> Array:
  """Convolves along the height by Winograd's F(2, 3), where that pays.

  The height alone is transformed, so the transforms add whole rows; where it is
  split over devices, it stays as it is.
  """
  few = x.size // x.shape[-1] <= _FEW_POSITIONS
  thin = min(kernel.shape[2:]) < _MANY_CHANNELS
  if few or thin or x.shape[2] % 2 or sharding.grid() != (1, 1):
    return _per_frame_on_cpu(x, kernel)
  padded = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0), (0, 0)))
  shifted = [padded[:, :, i : i + x.shape[2] - 1 : 2] for i in range(4)]
  run = lambda x, tap: _per_frame(x, tap[None], 1, ((0, 0), (1, 1)))
  y = jnp.stack(_winograd(shifted, kernel, run), axis=3)
  return y.reshape(*x.shape[:-1], -1)


def _upsample_plain(kernel: Array, frames: Frames) -> Array:
  x = jnp.repeat(jnp.repeat(frames[0], 2, axis=2), 2, axis=3)
  return _per_frame(x, kernel)


def _upsample_by_phase(kernel: Array, frames: Frames) -> Array:
  """Convolves the small frames four times with kernels of 2x2.

  An even row of the enlarged frame sees rows i-1, i, i of the small one and an
  odd row i, i, i+1: taps that meet the same row are summed. 16 products where
  the enlarged frame needs 36.
  """
  (x,) = frames
  phases = [((0,), (1, 2)), ((0, 1), (2,))]
  merge = lambda k, taps: jnp.stack([sum(k[i] for i in tap) for tap in taps])
  rows = []
  for i, taps in enumerate(phases):
    by_row = jnp.swapaxes(merge(kernel, taps), 0, 1)
    row = []
    for j, taps in enumerate(phases):
      small = jnp.swapaxes(merge(by_row, taps), 0, 1)
      row.append(_per_frame_on_cpu(x, small, ((1 - i, i), (1 - j, j))))
    rows.append(jnp.stack(row, axis=4))
  y = jnp.stack(rows, axis=3)
  b, f, h, _, w, _, c = y.shape
  return y.reshape(b, f, 2 * h, 2 * w, c)


_causal = _door(_causal_by_frames, _causal_plain)
_upsample = _door(_upsample_by_phase, _upsample_plain)


def causal_conv3d(
  x: Float[Array, "b f h w i"],
  kernel: Float[Array, "3 3 3 i o"],
  bias: Float[Array, " o"],
  history: Float[Array, "b 2 h w i"] | None = None,
) -> Float[Array, "b f h w o"]:
  """Convolves with a 3x3x3 kernel that sees this frame and the two before it.

  Space is padded by zeros. Before the first frame stand the two frames of
  `history`, or, without one, the first frame twice.
  """
  frames = (x,) if history is None else (history, x)
  run = _causal if sharding.covered(*x.shape[2:4]) else _causal_plain
  return run(kernel, frames) + bias


def frame_conv2d(
  x: Float[Array, "b f h w i"], kernel: Float[Array, "3 3 i o"]
) -> Float[Array, "b f h w o"]:
  """Convolves each frame with 3x3, padded by zeros.

  The choice is made when it is traced: a UNet has a hundred of these, and to
  trace both ways of each takes minutes.
  """
  if sharding.platform() != "cpu":
    return _per_frame(x, kernel)
  fast = _per_frame_by_rows(*_cast((x, kernel), jnp.float32))
  return fast.astype(kernel.dtype)


def upsample_conv2d(
  x: Float[Array, "b f h w i"],
  kernel: Float[Array, "3 3 i o"],
  bias: Float[Array, " o"],
) -> Float[Array, "b f 2*h 2*w o"]:
  """Doubles each frame by nearest neighbour, then convolves it with 3x3."""
  h, w = x.shape[2:4]
  is_covered = sharding.covered(h, w) and sharding.covered(2 * h, 2 * w)
  run = _upsample if is_covered else _upsample_plain
  return run(kernel, (x,)) + bias


class _Conv(nn.Module):
  """Holds a kernel and a bias; `features` are the output channels."""

  features: int
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  def weights(self, *shape: int) -> tuple[Array, Array]:
    axes = (None,) * (len(shape) - 1) + ("conv_in", "conv_out")
    boxed = nn.with_logical_partitioning
    kernel_init = boxed(nn.initializers.lecun_normal(), axes)
    bias_init = boxed(nn.initializers.zeros, axes[-1:])
    shape = (*shape, self.features)
    kernel = self.param("kernel", kernel_init, shape, self.param_dtype)
    bias = self.param("bias", bias_init, shape[-1:], self.param_dtype)
    kernel = sharding.gathered(kernel.astype(self.dtype), *axes)
    return kernel, sharding.gathered(bias.astype(self.dtype), *axes[-1:])


def constrain(x: Float[Array, "b f h w c"]) -> Float[Array, "b f h w c"]:
  """Keeps frames split over devices, along height and width, as they are."""
  return sharding.constrain(x, "batch", None, "height", "width", None)


class CausalConv3D(_Conv):
  """A causal 3x3x3 convolution that goes on where the last chunk ended.

  With the collection "cache" mutable it leaves there the last two frames of its
  padded input, and where it finds them it starts from them.
  """

  @nn.compact
  def __call__(self, x: Float[Array, "b f h w i"]) -> Float[Array, "b f h w o"]:
    kernel, bias = self.weights(3, 3, 3, x.shape[-1])
    x = constrain(x.astype(self.dtype))
    history = None
    if self.has_variable("cache", "history"):
      history = self.get_variable("cache", "history")
    if self.is_mutable_collection("cache") and not self.is_initializing():
      before = x[:, :1] if history is None else history[:, 1:]
      last = jnp.concatenate([before, x[:, -2:]], axis=1)[:, -2:]
      self.put_variable("cache", "history", constrain(last))
    return constrain(causal_conv3d(x, kernel, bias, history))


class PointwiseConv3D(_Conv):
  """A 1x1x1 convolution."""

  @nn.compact
  def __call__(self, x: Float[Array, "b f h w i"]) -> Float[Array, "b f h w o"]:
    kernel, bias = self.weights(1, 1, 1, x.shape[-1])
    return layers.matmul(x.astype(self.dtype), kernel[0, 0, 0]) + bias


class DownsampleConv2D(_Conv):
  """Halves each frame: 3x3, stride 2, zeros on the right and at the bottom."""

  @nn.compact
  def __call__(self, x: Float[Array, "b f h w i"]) -> Float[Array, "b f y x o"]:
    kernel, bias = self.weights(3, 3, x.shape[-1])
    x = constrain(x.astype(self.dtype))
    y = _per_frame(x, kernel, 2, ((0, 1), (0, 1)))
    return constrain(y + bias)


class UpsampleConv2D(_Conv):
  """Doubles each frame by nearest neighbour, then convolves it with 3x3."""

  @nn.compact
  def __call__(
    self, x: Float[Array, "b f h w i"]
  ) -> Float[Array, "b f 2*h 2*w o"]:
    kernel, bias = self.weights(3, 3, x.shape[-1])
    x = constrain(x.astype(self.dtype))
    return constrain(upsample_conv2d(x, kernel, bias))
