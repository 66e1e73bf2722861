"""The TPU kernels, interpreted, give what a softmax that holds all gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from vidgen import sharding
from vidgen.nn import flash_tpu

# Several blocks and chunks each way, and a padded last one.
_BLOCKS = flash_tpu.Blocks(q=16, kv=32, chunk=16)

_SCALE = 0.25


def _inputs(n, m, dtype=jnp.float32, size=1.0, shape=(2, 3, 16)):
  """Random q, k, v and a cotangent of the result."""
  keys = jax.random.split(jax.random.key(n + m), 4)
  b, heads, d = shape
  lengths = (n, m, m, n)
  x = [
    jax.random.normal(key, (b, length, heads, d))
    for key, length in zip(keys, lengths, strict=True)
  ]
  return [
    (x * s).astype(dtype) for x, s in zip(x, (size, 1, 1, 1), strict=True)
  ]


def _plain(q, k, v, num_keys=None):
  """Attention and the log of its sum, in float32, with all scores in memory."""
  q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
  k, v = k[:, :num_keys], v[:, :num_keys]
  scores = _SCALE * jnp.einsum("bnhd,bmhd->bhnm", q, k, precision="highest")
  lse = jax.nn.logsumexp(scores, axis=-1)
  weights = jnp.exp(scores - lse[..., None])
  out = jnp.einsum("bhnm,bmhd->bnhd", weights, v, precision="highest")
  return out, lse.transpose(0, 2, 1)


_flash = functools.partial(
  flash_tpu.flash, scale=_SCALE, blocks=_BLOCKS, interpret=True
)


def _both(function, q, k, v, dout):
  """The result and the gradients of q, k and v."""

  @jax.jit
  def run(q, k, v, dout):
    out, vjp = jax.vjp(function, q, k, v)
    return out, vjp(dout)

  return run(q, k, v, dout)


def _close(got, want, tolerance):
  """Compares relative to the largest value of what is wanted."""
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("bound", [None, 30.0])
@pytest.mark.parametrize(("n", "m"), [(64, 128), (37, 101), (90, 23)])
def test_float32_is_plain(n, m, bound):
  q, k, v, dout = _inputs(n, m)
  flash = functools.partial(_flash, logit_bound=bound)
  plain = lambda q, k, v: _plain(q, k, v)[0]
  _close(_both(flash, q, k, v, dout), _both(plain, q, k, v, dout), 1e-5)


@pytest.mark.parametrize("bound", [None, 30.0])
def test_bfloat16_is_nearly_plain(bound):
  q, k, v, dout = _inputs(37, 101, jnp.bfloat16, shape=(1, 2, 64))
  flash = functools.partial(_flash, logit_bound=bound)
  plain = lambda q, k, v: _plain(q, k, v)[0]
  exact = [x.astype(jnp.float32) for x in (q, k, v, dout)]
  _close(_both(flash, q, k, v, dout), _both(plain, *exact), 1e-2)


def test_chosen_blocks():
  """As many tokens as a small video has, with its text."""
  q, k, v, dout = _inputs(226 + 1350, 226 + 1350, shape=(1, 1, 64))
  flash = functools.partial(
    flash_tpu.flash, scale=_SCALE, logit_bound=30.0, interpret=True
  )
  plain = lambda q, k, v: _plain(q, k, v)[0]
  _close(_both(flash, q, k, v, dout), _both(plain, q, k, v, dout), 1e-5)
  for length in (1, 226, 1576, 17_776, 45_106):
    for option in ({}, {"backward": True}, {"exact": True}):
      blocks = flash_tpu.choose_blocks(length, length, **option)
      assert blocks.kv % blocks.chunk == 0
      assert all(-length % size < 0.15 * length + 256 for size in blocks[:2])


@pytest.mark.parametrize(
  ("traced", "bound"), [(False, None), (True, None), (True, 30.0)]
)
def test_padding_has_no_effect(traced, bound):
  """Not even not-a-number, be the number of keys known or computed."""
  q, k, v, dout = _inputs(40, 110)
  plain = lambda q, k, v: _plain(q, k, v, 77)[0]
  want = _both(plain, q, k, v, dout)
  k, v = (x.at[:, 77:].set(jnp.nan) for x in (k, v))

  count = jnp.int32(77) if traced else 77
  flash = functools.partial(_flash, num_keys=count, logit_bound=bound)
  got = _both(flash, q, k, v, dout)
  _close(got, want, 1e-5)
  for grad in got[1][1:]:
    np.testing.assert_array_equal(grad[:, 77:], 0)


@pytest.mark.parametrize("top", [-60.0, 60.0, -300.0, 300.0])
def test_large_scores(top):
  """All scores of a row far above or below those of padding, which are 0."""
  q, k, v, dout = _inputs(40, 100)
  # One dimension of q and k shifts all scores of a query together.
  q, k = q.at[..., 0].set(top / _SCALE), k.at[..., 0].set(1)
  q = q.at[..., 1:].multiply(0.1)
  bound = 64.0 if abs(top) < 64 else 1000.0
  scores = jnp.einsum("bnhd,bmhd->bhnm", q, k) * _SCALE
  assert float(jnp.abs(scores).max()) <= bound
  # The scores themselves are rounded to some 1e-7 of their size.
  tolerance = 1e-6 * max(100, abs(top))
  flash = functools.partial(_flash, logit_bound=bound)
  plain = lambda q, k, v: _plain(q, k, v)[0]
  _close(_both(flash, q, k, v, dout), _both(plain, q, k, v, dout), tolerance)


def test_bound_decides_whether_the_maximum_runs():
  """A wrong bound shows it: without the maximum these scores overflow."""
  q, k, v, _ = _inputs(8, 64)
  q = 100 * q
  out = lambda bound: _flash(q, k, v, logit_bound=bound)
  assert np.isfinite(out(None)).all()
  assert np.isfinite(out(64.5)).all()
  assert not np.isfinite(out(64.0)).all()


@pytest.mark.parametrize("bound", [None, 30.0])
def test_parts_merge_to_the_whole(bound):
  """As on a ring: parts of the keys, one of them without any, in any order."""
  q, k, v, _ = _inputs(40, 100)
  part = jax.jit(
    lambda k, v, count: flash_tpu.flash_with_lse(
      q,
      k[:, :64],
      v[:, :64],
      scale=_SCALE,
      num_keys=count,
      logit_bound=bound,
      blocks=_BLOCKS,
      interpret=True,
    )
  )
  outs, lses = [], []
  for start, count in [(60, 40), (0, 0), (0, 60)]:
    out, lse = part(jnp.roll(k, -start, 1), jnp.roll(v, -start, 1), count)
    outs.append(out)
    lses.append(lse)
  lse = jax.nn.logsumexp(jnp.stack(lses), axis=0)
  shares = jnp.exp(jnp.stack(lses) - lse)[..., None]
  out = jnp.sum(shares * jnp.stack(outs), axis=0)
  _close((out, lse), _plain(q, k, v), 1e-5)


def test_grads_of_parts_add_up():
  q, k, v, dout = _inputs(40, 100)
  plain = lambda q, k, v: _plain(q, k, v)[0]
  out, want = _both(plain, q, k, v, dout)
  lse = _plain(q, k, v)[1]
  part = functools.partial(
    flash_tpu.flash_grads, scale=_SCALE, blocks=_BLOCKS, interpret=True
  )
  first = part(q, k[:, :60], v[:, :60], out, lse, dout)
  # The last part is padded to the size of the others.
  pad = lambda x: jnp.pad(x[:, 60:], [(0, 0), (0, 20), (0, 0), (0, 0)])
  last = part(q, pad(k), pad(v), out, lse, dout, num_keys=40)
  got = (
    first[0] + last[0],
    jnp.concatenate([first[1], last[1][:, :40]], 1),
    jnp.concatenate([first[2], last[2][:, :40]], 1),
  )
  _close(got, want, 1e-5)


def test_within_shard_map():
  """Heads split over devices."""
  q, k, v, dout = _inputs(40, 100, shape=(2, 4, 16))
  mesh = sharding.make_mesh({"tensor": 2})
  spec = PartitionSpec(None, None, "tensor")
  split = jax.shard_map(
    _flash,
    mesh=mesh,
    in_specs=(spec, spec, spec),
    out_specs=spec,
    check_vma=False,
  )
  plain = lambda q, k, v: _plain(q, k, v)[0]
  _close(_both(split, q, k, v, dout), _both(plain, q, k, v, dout), 1e-5)


def test_refuses_other_dtypes():
  q, k, v, _ = _inputs(8, 64)
  with pytest.raises(ValueError, match="bfloat16"):
    _flash(q.astype(jnp.float16), k, v)
