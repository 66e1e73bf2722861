"""Attention that never holds all scores, in plain JAX: for any platform.

Dao, https://arxiv.org/abs/2307.08691: the backward pass computes the scores
again, from the logarithm of each row's sum that the forward pass leaves.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vidgen.nn import layers

# Rows of queries whose scores are held at once.
BLOCK = 2048


def biased(
  q: Float[Array, "b n heads head_dim"],
  k: Float[Array, "b m heads head_dim"],
  v: Float[Array, "b m heads head_dim"],
  bias: Float[Array, "heads n m"],
  *,
  scale: float,
  block: int = BLOCK,
) -> Float[Array, "b n heads head_dim"]:
  """Returns softmax(q kᵀ · scale + bias) v; JAX differentiates it.

  Holds the scores of one head and at most `block` queries, as all here do. One
  head after the other is also three times faster than a batched product on
  CPUs, whose XLA runs batched products without its fast kernels.
  """
  b, _, heads, _ = q.shape
  q, k, v = _rows(q), _rows(k), _rows(v)
  index = jnp.tile(jnp.arange(heads), b)

  def head(row):
    q, k, v, i = row
    one = jax.checkpoint(
      lambda q, bias: _attend(_scores(q, k, scale) + bias, v)[0]
    )
    return _over_blocks(one, (q, bias[i]), block)

  return _unrows(jax.lax.map(head, (q, k, v, index)), b)


def forward(
  q: Float[Array, "b n heads head_dim"],
  k: Float[Array, "b m heads head_dim"],
  v: Float[Array, "b m heads head_dim"],
  count: int | Int[Array, ""],
  *,
  scale: float,
  block: int = BLOCK,
) -> tuple[Float[Array, "b n heads head_dim"], Float[Array, "b n heads"]]:
  """Returns attention, and the logarithm of each row's sum in float32.

  Args:
    q: Queries.
    k: Keys.
    v: Values.
    count: Keys from here on are padding; there must be one that is none.
    scale: Factor of the scores.
    block: Queries at once.
  """
  b = q.shape[0]

  def head(row):
    q, k, v = row
    one = lambda q: _attend(_masked(_scores(q, k, scale), count), v)
    return _over_blocks(one, (q,), block)

  out, lse = jax.lax.map(head, (_rows(q), _rows(k), _rows(v)))
  return _unrows(out, b), _unrows(lse[..., None], b)[..., 0]


def backward(
  q: Float[Array, "b n heads head_dim"],
  k: Float[Array, "b m heads head_dim"],
  v: Float[Array, "b m heads head_dim"],
  out: Float[Array, "b n heads head_dim"],
  lse: Float[Array, "b n heads"],
  d_out: Float[Array, "b n heads head_dim"],
  count: int | Int[Array, ""],
  *,
  scale: float,
  block: int = BLOCK,
) -> tuple[
  Float[Array, "b n heads head_dim"],
  Float[Array, "b m heads head_dim"],
  Float[Array, "b m heads head_dim"],
]:
  """Returns the part of these keys in the gradients of q, k and v.

  Args:
    q: Queries.
    k: Some of the keys, or all.
    v: Their values.
    out: Attention to all keys.
    lse: Of the scores of all keys.
    d_out: The gradient of `out`.
    count: As for `forward`, and so are the others.
    scale: Likewise.
    block: Likewise.
  """
  b = q.shape[0]
  # What flows into a row's sum, over all of its scores.
  inner = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
  flat = lambda x: _rows(x[..., None])[..., 0]
  rows = (_rows(q), flat(lse), _rows(d_out.astype(v.dtype)), flat(inner))

  def head(row):
    return _backward_head(*row, count, scale=scale, block=block)

  grads = jax.lax.map(head, (_rows(k), _rows(v), rows))
  return tuple(_unrows(x, b) for x in grads)


def _backward_head(k, v, rows, count, *, scale, block):
  """The gradients of q, k and v of one head, a block of queries at a time."""
  n = rows[0].shape[0]
  product = functools.partial(
    jnp.dot,
    precision=layers.precision(k.dtype),
    preferred_element_type=jnp.float32,
  )

  def step(sums, row):
    q, lse, d_out, inner = row
    scores = _masked(_scores(q, k, scale), count)
    weights = jnp.exp(scores - lse[:, None])
    d_v = product(weights.astype(v.dtype).T, d_out)
    d_scores = weights * (product(d_out, v.T) - inner[:, None]) * scale
    d_scores = d_scores.astype(q.dtype)
    sums = (sums[0] + product(d_scores.T, q), sums[1] + d_v)
    return sums, product(d_scores, k).astype(q.dtype)

  sums = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
  if n <= block:
    (d_k, d_v), d_q = step(sums, rows)
  else:
    rows = jax.tree.map(lambda x: _split(x, block), rows)
    (d_k, d_v), d_q = jax.lax.scan(step, sums, rows)
    d_q = d_q.reshape(-1, d_q.shape[-1])[:n]
  return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype)


def _rows(x: Array) -> Array:
  """`b n heads d` to `b·heads n d`."""
  b, n, heads, d = x.shape
  return x.transpose(0, 2, 1, 3).reshape(b * heads, n, d)


def _unrows(x: Array, b: int) -> Array:
  """`b·heads n d` to `b n heads d`."""
  return x.reshape(b, -1, *x.shape[1:]).transpose(0, 2, 1, 3)


def _over_blocks(one, rows, block):
  """Maps `one` over blocks of rows; the last one is padded."""
  n = rows[0].shape[0]
  if n <= block:
    return one(*rows)
  split = functools.partial(_split, block=block)
  out = jax.lax.map(lambda x: one(*x), jax.tree.map(split, rows))
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], out)


def _split(x, block):
  """`n ...` to `count block ...`, padded with zeros."""
  count = -(-x.shape[0] // block)
  pad = [(0, count * block - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
  return jnp.pad(x, pad).reshape(count, block, *x.shape[1:])


def _scores(q, k, scale):
  q = q * jnp.asarray(scale, q.dtype)
  precision = layers.precision(q.dtype)
  return jnp.dot(
    q, k.T, precision=precision, preferred_element_type=jnp.float32
  )


def _masked(scores, count):
  """Drops the keys that are padding."""
  m = scores.shape[-1]
  if isinstance(count, int) and count == m:
    return scores
  return jnp.where(jnp.arange(m) < count, scores, -jnp.inf)


def _attend(scores, v):
  """One block of queries of one head, dividing after the second product."""
  top = jnp.max(scores, axis=-1, keepdims=True)
  scores = jnp.exp(scores - top)
  total = jnp.sum(scores, axis=-1, keepdims=True)
  out = jnp.dot(
    scores.astype(v.dtype),
    v,
    precision=layers.precision(v.dtype),
    preferred_element_type=jnp.float32,
  )
  return (out / total).astype(v.dtype), (top + jnp.log(total))[:, 0]
