"""The product that dense layers are made of, in each dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidgen.nn import layers


def _operands(dtype):
  normal = np.random.default_rng(0).standard_normal
  draw = lambda *shape: jnp.asarray(normal(shape, np.float32), dtype)
  return draw(2, 5, 64), draw(64, 48), draw(2, 5, 48)


def _gradients(product, x, y, d_out):
  out, back = jax.vjp(product, x, y)
  return out, *back(d_out)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_product_and_gradients(dtype):
  """In float64, rounded once."""
  x, y, d_out = _operands(dtype)
  got = jax.jit(lambda *args: _gradients(layers.matmul, *args))(x, y, d_out)
  a, b, c = (np.asarray(z, np.float64) for z in (x, y, d_out))
  rows = a.reshape(-1, a.shape[-1]), c.reshape(-1, c.shape[-1])
  want = a @ b, c @ b.T, rows[0].T @ rows[1]
  one_rounding = float(jnp.finfo(dtype).eps) / 2
  for ours, exact in zip(got, want, strict=True):
    assert ours.dtype == dtype
    sums = 1e-5 if dtype == jnp.float32 else 1e-6
    np.testing.assert_allclose(
      np.asarray(ours, np.float64), exact, rtol=one_rounding, atol=sums * 64
    )


def test_bfloat16_stays_in_products():
  """Forward and backward: XLA would compute with float32 copies."""
  args = _operands(jnp.bfloat16)
  text = jax.jit(lambda *args: _gradients(layers.matmul, *args)).lower(*args)
  products = [
    line for line in text.as_text().splitlines() if "dot_general" in line
  ]
  assert len(products) == 3
  for line in products:
    operands, result = line.split(" : ")[-1].split("->")
    assert operands.count("bf16>") == 2 and "f32>" in result, line


def test_same_over_a_batch_of_weights():
  x, y, _ = _operands(jnp.bfloat16)
  many = jnp.stack([y, 2 * y])
  got = jax.vmap(layers.matmul, (None, 0))(x, many)
  assert jnp.array_equal(got[1], 2 * layers.matmul(x, y))
  grads = jax.vmap(jax.grad(lambda y: layers.matmul(x, y).sum()))(many)
  assert jnp.array_equal(grads[0], grads[1])
