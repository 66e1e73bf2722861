"""Dense layers whose parameters carry logical axes, and updates of low rank."""

import jax.numpy as jnp
from flax import linen as nn
from jax import ad_checkpoint
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# The variable collection that holds updates of low rank, and the name under
# which a checkpoint policy finds what dense layers give.
LORA = "lora"
SAVED = "dense"


def low_rank(
  module: nn.Module, x: Float[Array, "*n i"], dtype: DTypeLike
) -> Float[Array, "*n o"] | None:
  """Returns what a LoRA adds to the output of `module`, or None without one.

  Hu et al., https://arxiv.org/abs/2106.09685: (x A) B, with `down` = A of
  `[in, rank]` and `up` = B of `[rank, out]` in the collection `LORA` at the
  module's own path. A factor, alpha / rank, is part of `up` as it stands there.
  """
  if not module.has_variable(LORA, "down"):
    return None
  down, up = (module.get_variable(LORA, name) for name in ("down", "up"))
  return x.astype(dtype) @ down.astype(dtype) @ up.astype(dtype)


class Dense(nn.Module):
  """Flax's dense layer, which adds a LoRA where there is one for it."""

  features: int
  use_bias: bool
  kernel_init: nn.initializers.Initializer
  bias_init: nn.initializers.Initializer
  dtype: DTypeLike
  param_dtype: DTypeLike

  @nn.compact
  def __call__(self, x: Float[Array, "*n i"]) -> Float[Array, "*n o"]:
    shape = (x.shape[-1], self.features)
    kernel = self.param("kernel", self.kernel_init, shape, self.param_dtype)
    y = x.astype(self.dtype) @ kernel.astype(self.dtype)
    if self.use_bias:
      bias = self.param("bias", self.bias_init, shape[1:], self.param_dtype)
      y = y + bias.astype(self.dtype)
    update = low_rank(self, x, self.dtype)
    y = y if update is None else y + update
    return ad_checkpoint.checkpoint_name(y, SAVED)


def dense(
  features: int,
  axes: tuple[str | None, str | None],
  *,
  name: str,
  use_bias: bool = True,
  kernel_init: nn.initializers.Initializer | None = None,
  dtype: DTypeLike = jnp.float32,
  param_dtype: DTypeLike = jnp.float32,
) -> Dense:
  """Returns a dense layer whose kernel `[in, out]` has the logical `axes`."""
  kernel_init = kernel_init or nn.initializers.xavier_uniform()
  return Dense(
    features,
    use_bias,
    kernel_init=nn.with_logical_partitioning(kernel_init, axes),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[1:]),
    dtype=dtype,
    param_dtype=param_dtype,
    name=name,
  )
