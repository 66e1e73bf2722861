"""The candidate for Hopper GPUs is lowered for them, without one."""

import functools

import jax
import jax.numpy as jnp
import pytest

from tests.bench import flash_hopper


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("tokens, num_keys", [(304, 304), (304, 300), (64, 64)])
def test_it_lowers(tokens, num_keys, bounded):
  call = functools.partial(
    flash_hopper.flash_with_lse, scale=0.125, num_keys=num_keys, bounded=bounded
  )
  x = jax.ShapeDtypeStruct((2, tokens, 3, 64), jnp.bfloat16)
  lowered = jax.jit(call).trace(x, x, x).lower(lowering_platforms=("cuda",))
  assert "mosaic_gpu" in lowered.as_text()
  out, lse = lowered.out_info
  assert (out.shape, lse.shape) == (x.shape, x.shape[:3])


@pytest.mark.parametrize(
  "shape, dtype, message",
  [
    ((1, 64, 2, 128), jnp.bfloat16, "head_dim 64 and 16 bits"),
    ((1, 64, 2, 64), jnp.float32, "head_dim 64 and 16 bits"),
    ((1, 60, 2, 64), jnp.bfloat16, "multiple of 8"),
  ],
)
def test_refuses(shape, dtype, message):
  x = jnp.zeros(shape, dtype)
  with pytest.raises(ValueError, match=message):
    flash_hopper.flash_with_lse(x, x, x, scale=1.0)
