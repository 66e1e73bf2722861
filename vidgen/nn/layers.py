"""Dense layers whose parameters carry logical axes, and updates of low rank."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import ad_checkpoint, lax
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float

from vidgen import sharding

# The variable collection that holds updates of low rank, and the name under
# which a checkpoint policy finds what dense layers give.
LORA = "lora"
SAVED = "dense"

# The logical axis of a kernel whose channels are heads.
HEADS = "heads"


def low_rank(
  module: nn.Module,
  x: Float[Array, "*n i"],
  dtype: DTypeLike,
  widen: Callable[[Array, int], Array] = lambda x, axis: x,
) -> Float[Array, "*n o"] | None:
  """Returns what a LoRA adds to the output of `module`, or None without one.

  Hu et al., https://arxiv.org/abs/2106.09685: (x A) B, with `down` = A of
  `[in, rank]` and `up` = B of `[rank, out]` in the collection `LORA` at the
  module's own path. A factor, alpha / rank, is part of `up` as it stands there.

  Args:
    module: Whose input and output it is beside.
    x: The input.
    dtype: What is computed in.
    widen: What is done to axis 0, the input's, and 1, the output's, of a
      kernel before use.
  """
  if not module.has_variable(LORA, "down"):
    return None
  down, up = (module.get_variable(LORA, name) for name in ("down", "up"))
  down, up = widen(down, 0), widen(up, 1)
  x = matmul(x.astype(dtype), down.astype(dtype))
  return matmul(x, up.astype(dtype))


def matmul(x: Float[Array, "*n i"], y: Float[Array, "i o"]) -> Array:
  """x @ y, in float32 exactly so, in bfloat16 with float32 sums.

  By default TPUs round the factors of float32 to bfloat16, and GPUs to TF32.
  CPUs have matrix units for bfloat16 as well, which XLA takes for products that
  leave in float32; rounded after, they are what the others give.
  """
  if x.dtype == jnp.bfloat16 and sharding.platform() == "cpu":
    return _matmul_bfloat16(x, y)
  return jnp.matmul(x, y, precision=precision(x.dtype))


@jax.custom_vjp
def _matmul_bfloat16(
  x: BFloat16[Array, "*n i"], y: BFloat16[Array, "i o"]
) -> BFloat16[Array, "*n o"]:
  return _product("...i,io->...o", x, y)


def _matmul_forward(x, y):
  return _matmul_bfloat16(x, y), (x, y)


def _matmul_backward(saved, d_out):
  # What JAX would make of it has one factor in float32, and takes no such unit.
  x, y = saved
  d_x = _product("...o,io->...i", d_out, y)
  return d_x, _product("...i,...o->io", x, d_out)


_matmul_bfloat16.defvjp(_matmul_forward, _matmul_backward)


def _product(axes: str, x: Array, y: Array) -> Array:
  """Returns a product in the dtype of its factors, of sums in float32."""
  y = jnp.einsum(axes, x, y, preferred_element_type=jnp.float32)
  return y.astype(x.dtype)


def precision(dtype: DTypeLike) -> lax.Precision | None:
  """Returns what a product of this dtype is computed in: itself."""
  is_float32 = jnp.dtype(dtype) == jnp.float32
  return lax.Precision.HIGHEST if is_float32 else None


class Dense(nn.Module):
  """Flax's dense layer, which adds a LoRA where there is one for it.

  Weights are computed with in `dtype`, gathered from where they are stored.
  Heads that the mesh does not divide are joined by heads of zeros, so that no
  activation is gathered because of them; nothing comes of those.

  Attributes:
    features: Of the output, as it is stored.
    use_bias: Whether there is one.
    axes: Logical axes of the kernel, `[in, out]`.
    kernel_init: Of the kernel.
    bias_init: Of the bias.
    heads: How many heads the axis "heads" has; None leaves it as it is.
    dtype: What is computed in.
    param_dtype: What parameters are made in.
  """

  features: int
  use_bias: bool
  axes: tuple[str | None, str | None]
  kernel_init: nn.initializers.Initializer
  bias_init: nn.initializers.Initializer
  heads: int | None
  dtype: DTypeLike
  param_dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
    boxed = nn.with_logical_partitioning
    inputs = x.shape[-1]
    if self.heads is not None and self.axes[0] == HEADS:
      inputs = inputs // padded_heads(self.heads) * self.heads
    shape = (inputs, self.features)
    kernel_init = boxed(self.kernel_init, self.axes)
    kernel = self.param("kernel", kernel_init, shape, self.param_dtype)
    kernel = sharding.gathered(kernel.astype(self.dtype), *self.axes)
    y = matmul(x.astype(self.dtype), self._widen(self._widen(kernel, 0), 1))
    if self.use_bias:
      bias_init = boxed(self.bias_init, self.axes[1:])
      bias = self.param("bias", bias_init, shape[1:], self.param_dtype)
      y = y + self._widen(bias.astype(self.dtype), 1)
    update = low_rank(self, x, self.dtype, self._widen)
    y = y if update is None else y + update
    return ad_checkpoint.checkpoint_name(y, SAVED)

  def _widen(self, x: Array, axis: int) -> Array:
    """Adds heads of zeros to what goes along an axis of the kernel."""
    if self.heads is None or self.axes[axis] != HEADS:
      return x
    extra = padded_heads(self.heads) - self.heads
    if not extra:
      return x
    at = axis if x.ndim == 2 else 0
    pad = [(0, 0)] * x.ndim
    pad[at] = (0, x.shape[at] // self.heads * extra)
    x = jnp.pad(x, pad)
    axes = [None] * x.ndim
    axes[at] = HEADS
    return sharding.constrain(x, *axes)


def padded_heads(heads: int) -> int:
  """Returns how many heads are computed, for the mesh to divide them."""
  return heads + -heads % sharding.parts(1, "activation_heads")


def dense(
  features: int,
  axes: tuple[str | None, str | None],
  *,
  name: str,
  use_bias: bool = True,
  kernel_init: nn.initializers.Initializer | None = None,
  heads: int | None = None,
  dtype: DTypeLike = jnp.float32,
  param_dtype: DTypeLike = jnp.float32,
) -> Dense:
  """Returns a dense layer whose kernel `[in, out]` has the logical `axes`.

  Its parameters, and `heads`, are those of `Dense`.
  """
  return Dense(
    features,
    use_bias,
    axes,
    kernel_init=kernel_init or nn.initializers.xavier_uniform(),
    bias_init=nn.initializers.zeros,
    heads=heads,
    dtype=dtype,
    param_dtype=param_dtype,
    name=name,
  )
