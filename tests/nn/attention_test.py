"""Every implementation of attention gives what the plain one gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidgen import sharding
from vidgen.nn import attention


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n", [5, 8, 21])
def test_blocked_is_plain(n, bias, monkeypatch):
  """One block, whole blocks, and a last block that is padded."""
  monkeypatch.setattr(attention, "_BLOCK", 8)
  keys = jax.random.split(jax.random.key(0), 4)
  q = jax.random.normal(keys[0], (2, n, 3, 4))
  k, v = (jax.random.normal(key, (2, 7, 3, 4)) for key in keys[1:3])
  bias = 3 * jax.random.normal(keys[3], (3, n, 7)) if bias else None
  run = lambda name: attention.attention(
    q, k, v, bias=bias, implementation=name
  )
  np.testing.assert_allclose(run("blocked"), run("plain"), rtol=1e-5, atol=1e-6)


def test_large_scores_do_not_overflow():
  q = jnp.full((1, 2, 1, 4), 100.0)
  out = attention.attention(q, q, jnp.ones((1, 2, 1, 4)))
  np.testing.assert_allclose(out, 1.0, rtol=1e-6)


def test_unknown_implementation():
  q = jnp.zeros((1, 2, 1, 4))
  with pytest.raises(ValueError, match="unknown"):
    attention.attention(q, q, q, implementation="fast")


def test_split_knows_the_mesh():
  assert not sharding.split("tokens")
  with sharding.use(sharding.make_mesh({"context": 2})):
    assert sharding.split("tokens")
    assert not sharding.split("heads")
