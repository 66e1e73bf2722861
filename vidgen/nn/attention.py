"""Attention behind one door; the implementations stand behind it."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vidgen import sharding

# Rows of queries whose scores are held at once by the blocked implementation.
_BLOCK = 2048


def attention(
  q: Float[Array, "b n heads head_dim"],
  k: Float[Array, "b m heads head_dim"],
  v: Float[Array, "b m heads head_dim"],
  *,
  bias: Float[Array, "heads n m"] | None = None,
  scale: float | None = None,
  implementation: str | None = None,
) -> Float[Array, "b n heads head_dim"]:
  """Returns softmax(q kᵀ · scale + bias) v; the softmax runs in float32.

  Args:
    q: Queries.
    k: Keys.
    v: Values.
    bias: Added to the scores of every batch row.
    scale: Factor of the scores; 1 / sqrt(head_dim) by default.
    implementation: "plain" holds all scores; "blocked" holds a block of one
      head; "cudnn" is the fused kernel of NVIDIA GPUs (16 bit, no bias). By
      default cudnn where it can run, else blocked.

  Raises:
    ValueError: An unknown implementation.
  """
  if scale is None:
    scale = 1 / math.sqrt(q.shape[-1])
  if implementation is None:
    fused = jax.default_backend() == "gpu" and q.dtype.itemsize == 2
    # cuDNN's kernel refuses a sequence that is split over devices.
    fused = fused and bias is None and not sharding.split("tokens")
    implementation = "cudnn" if fused else "blocked"
  match implementation:
    case "plain":
      return _plain(q, k, v, bias, scale)
    case "blocked":
      return _blocked(q, k, v, bias, scale)
    case "cudnn":
      return jax.nn.dot_product_attention(
        q, k, v, scale=scale, implementation="cudnn"
      )
  raise ValueError(f"attention: unknown implementation {implementation!r}.")


def _plain(q, k, v, bias, scale):
  """Holds the scores of all heads at once."""
  scores = jnp.einsum(
    "bnhd,bmhd->bhnm", q, k, preferred_element_type=jnp.float32
  )
  scores = scores * scale
  if bias is not None:
    scores = scores + bias
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  return jnp.einsum("bhnm,bmhd->bnhd", weights, v)


def _blocked(q, k, v, bias, scale):
  """Holds the scores of one head and at most `_BLOCK` queries at once.

  One head after the other is also three times faster than a batched product on
  CPUs, whose XLA runs batched products without its fast kernels.
  """
  b, n, heads, d = q.shape
  rows = lambda x: x.transpose(0, 2, 1, 3).reshape(b * heads, -1, d)
  q, k, v = rows(q), rows(k), rows(v)

  if bias is None:
    head = lambda row: _head(*row, None, scale)
    out = jax.lax.map(head, (q, k, v))
  else:
    index = jnp.tile(jnp.arange(heads), b)
    head = lambda row: _head(*row[:3], bias[row[3]], scale)
    out = jax.lax.map(head, (q, k, v, index))
  return out.reshape(b, heads, n, d).transpose(0, 2, 1, 3)


def _head(q, k, v, bias, scale):
  """Attention of one head, `n d`, a block of queries at a time."""
  n = q.shape[0]
  block = functools.partial(_block, k=k, v=v, scale=scale)
  if n <= _BLOCK:
    return block(q, bias)
  count = -(-n // _BLOCK)
  pad = [(0, count * _BLOCK - n), (0, 0)]
  split = lambda x: jnp.pad(x, pad).reshape(count, _BLOCK, -1)
  if bias is None:
    out = jax.lax.map(lambda x: block(x, None), split(q))
  else:
    out = jax.lax.map(lambda x: block(*x), (split(q), split(bias)))
  return out.reshape(count * _BLOCK, -1)[:n]


def _block(q, bias, *, k, v, scale):
  """Attention of one block of queries, dividing after the second product."""
  scores = jnp.dot(
    q * jnp.asarray(scale, q.dtype), k.T, preferred_element_type=jnp.float32
  )
  if bias is not None:
    scores = scores + bias
  scores = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
  total = jnp.sum(scores, axis=-1, keepdims=True)
  out = jnp.dot(scores.astype(v.dtype), v, preferred_element_type=jnp.float32)
  return (out / total).astype(v.dtype)
