"""Dense and embedding layers whose parameters carry logical axes."""

import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike


def dense(
  features: int,
  axes: tuple[str | None, str | None],
  *,
  name: str,
  use_bias: bool = True,
  kernel_init: nn.initializers.Initializer | None = None,
  dtype: DTypeLike = jnp.float32,
  param_dtype: DTypeLike = jnp.float32,
) -> nn.Dense:
  """Returns a dense layer whose kernel `[in, out]` has the logical `axes`."""
  kernel_init = kernel_init or nn.initializers.xavier_uniform()
  return nn.Dense(
    features,
    use_bias=use_bias,
    kernel_init=nn.with_logical_partitioning(kernel_init, axes),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros, axes[1:]),
    dtype=dtype,
    param_dtype=param_dtype,
    name=name,
  )
