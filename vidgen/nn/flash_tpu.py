"""Attention of one TPU core that holds no scores in memory.

Dao et al., https://arxiv.org/abs/2205.14135, shaped for a head_dim of 64, which
fills a quarter of the matrix unit: the vector unit and the order of the work
decide the speed, see `flash_tpu_kernels`.

The softmax does without the maximum where the scores are known to be small:
exp(s) of |s| <= 64 and its sum over 2^20 keys lie within 1.6e-28 and 6.6e33,
inside what float32 (and bfloat16, of the same range) holds, 1.2e-38 to 3.4e38,
with a factor of 5e4 left for the values. Floating point is as exact there as
around 1, so nothing is lost. Elsewhere the running maximum is subtracted.

Cycles per 1000 scores of one head in bfloat16, as the compiler schedules them
(`tests/bench/attention_cycles.py`; 17,776 tokens, of v5p 45,106):

          forward  forward, running maximum  backward
    v6e      1.60                      2.23      4.48
    v5e      3.31                                7.61
    v5p      3.37                                7.85

Keys that are padding have zeros for values and no part in the sum of weights,
which is the product of the weights with a row of ones beside the values.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vidgen.nn import flash_tpu_kernels as kernels

Blocks = kernels.Blocks

# The largest |score| for which exp needs no maximum subtracted; see above.
MAX_LOGIT_BOUND = 64.0

# A side of the matrix unit of v6e; earlier ones have half of it.
_TILE = 256


class _Options(NamedTuple):
  """What is known before tracing; `masked` where keys may be padding."""

  scale: float
  running: bool
  masked: bool
  blocks: Blocks | None
  interpret: Any


def flash(
  q: Float[Array, "b n heads head_dim"],
  k: Float[Array, "b m heads head_dim"],
  v: Float[Array, "b m heads head_dim"],
  *,
  scale: float,
  num_keys: int | Int[Array, ""] | None = None,
  logit_bound: float | None = None,
  blocks: Blocks | None = None,
  interpret: Any = False,
) -> Float[Array, "b n heads head_dim"]:
  """Returns softmax(q kᵀ · scale) v; differentiable.

  Args:
    q: Queries, bfloat16 or float32, as are keys and values.
    k: Keys.
    v: Values.
    scale: Factor of the scores.
    num_keys: Keys from this one on are padding; what they hold has no effect.
    logit_bound: No |q · k| · scale is larger. Up to `MAX_LOGIT_BOUND` it makes
      the running maximum unnecessary; a larger one, or None, changes nothing.
    blocks: Block sizes, of both passes; chosen by the lengths by default.
    interpret: Run on any platform, slowly.

  Raises:
    ValueError: A dtype that the kernels do not take.
  """
  options = _options(q, k, v, scale, num_keys, logit_bound, blocks, interpret)
  return _flash(options, q, k, v, _count(k, num_keys))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(options, q, k, v, count):
  return _forward(options, q, k, v, count)[0]


def _flash_fwd(options, q, k, v, count):
  out, lse = _forward(options, q, k, v, count)
  return out, (q, k, v, count, out, lse)


def _flash_bwd(options, kept, dout):
  return *_grads(options, *kept, dout), None


_flash.defvjp(_flash_fwd, _flash_bwd)


def flash_with_lse(
  q: Float[Array, "b n heads head_dim"],
  k: Float[Array, "b m heads head_dim"],
  v: Float[Array, "b m heads head_dim"],
  *,
  scale: float,
  num_keys: int | Int[Array, ""] | None = None,
  logit_bound: float | None = None,
  blocks: Blocks | None = None,
  interpret: Any = False,
) -> tuple[Float[Array, "b n heads head_dim"], Float[Array, "b n heads"]]:
  """Returns the attention and log(sum(exp(scores))), as parts are merged by.

  Where there is no key the attention is 0 and the log is -1e30. Arguments as
  for `flash`; `flash_grads` is the other direction.
  """
  options = _options(q, k, v, scale, num_keys, logit_bound, blocks, interpret)
  return _forward(options, q, k, v, _count(k, num_keys))


def flash_grads(
  q: Float[Array, "b n heads head_dim"],
  k: Float[Array, "b m heads head_dim"],
  v: Float[Array, "b m heads head_dim"],
  out: Float[Array, "b n heads head_dim"],
  lse: Float[Array, "b n heads"],
  dout: Float[Array, "b n heads head_dim"],
  *,
  scale: float,
  num_keys: int | Int[Array, ""] | None = None,
  blocks: Blocks | None = None,
  interpret: Any = False,
) -> tuple[
  Float[Array, "b n heads head_dim"],
  Float[Array, "b m heads head_dim"],
  Float[Array, "b m heads head_dim"],
]:
  """Returns the part of these keys in the gradients of q, k and v.

  Args:
    q: Queries.
    k: All of the keys, or some.
    v: Their values.
    out: The attention to all keys, these among them.
    lse: log(sum(exp(scores))) of all keys.
    dout: Gradient of `out`.
    scale: As for `flash`, and so are the others.
    num_keys: Keys from this one on are padding; their gradients are 0.
    blocks: Block sizes.
    interpret: Run on any platform, slowly.
  """
  options = _options(q, k, v, scale, num_keys, None, blocks, interpret)
  return _grads(options, q, k, v, _count(k, num_keys), out, lse, dout)


def choose_blocks(
  n: int, m: int, *, backward: bool = False, exact: bool = False
) -> Blocks:
  """Returns blocks with little padding; of those, a large one costs less.

  The largest are what was counted to be best of what fits, see
  `tests/bench/attention_cycles.py`.

  Args:
    n: Queries.
    m: Keys.
    backward: Of `flash_grads`.
    exact: Of float32, where a product is six and large blocks take the compiler
      many minutes.
  """
  kv = _block(m, 512 if exact else 2560)
  wide = not backward and not exact and kv % (2 * _TILE) == 0
  q = _block(n, 512 if backward or exact else 1792)
  return Blocks(q, kv, 2 * _TILE if wide else _TILE)


def _options(q, k, v, scale, num_keys, logit_bound, blocks, interpret):
  """Checks the dtypes and decides what can be decided now."""
  if not (q.dtype == k.dtype == v.dtype) or q.dtype not in (
    jnp.bfloat16,
    jnp.float32,
  ):
    raise ValueError(
      "flash: q, k and v have to be all bfloat16 or all float32, not "
      f"{q.dtype}, {k.dtype} and {v.dtype}."
    )
  small = logit_bound is not None and logit_bound <= MAX_LOGIT_BOUND
  whole = num_keys is None or (
    isinstance(num_keys, int) and num_keys == k.shape[1]
  )
  return _Options(scale, not small, not whole, blocks, interpret)


def _count(k, num_keys):
  """The keys that are no padding, as an array."""
  return jnp.asarray(k.shape[1] if num_keys is None else num_keys, jnp.int32)


def _forward(options, q, k, v, count):
  """Lays the heads out for the kernel and its results as the caller's."""
  b, n, heads, head_dim = q.shape
  exact = q.dtype == jnp.float32
  blocks = options.blocks or choose_blocks(n, k.shape[1], exact=exact)
  n_pad, m_pad = _up(n, blocks.q), _up(k.shape[1], blocks.kv)
  there = jnp.arange(m_pad) < count
  # The maximum alone has to know of keys that are not there.
  masked = options.running and (options.masked or m_pad != k.shape[1])

  values = jnp.where(there, _columns(v, m_pad), 0)
  values = _beside(values, there.astype(v.dtype), axis=1)
  out, lse = kernels.forward(
    _queries(q, n_pad, options.scale, masked),
    _keys(k, m_pad, there, masked),
    values,
    head_dim=head_dim,
    running=options.running,
    blocks=blocks,
    interpret=options.interpret,
  )
  lse = lse.reshape(b, heads, -1)[..., :n].transpose(0, 2, 1)
  return _tokens(out, b, n), lse


def _grads(options, q, k, v, count, out, lse, dout):
  """The gradients of q, k and v."""
  b, n, _, head_dim = q.shape
  m = k.shape[1]
  exact = q.dtype == jnp.float32
  blocks = options.blocks or choose_blocks(n, m, backward=True, exact=exact)
  n_pad, m_pad = _up(n, blocks.q), _up(m, blocks.kv)
  there = jnp.arange(m_pad) < count
  masked = options.masked or m_pad != m

  delta = jnp.sum(out.astype(jnp.float32) * dout, axis=-1)
  # A query without keys has weights of exp(NOTHING - 0).
  lse = jnp.where(lse > kernels.NOTHING / 2, lse / kernels.LN2, 0)
  statistic = lambda x: _columns(x[..., None], n_pad)

  keys = _keys(k, m_pad, there, masked)
  dq, dk, dv = kernels.backward(
    _queries(q, n_pad, options.scale, masked),
    keys,
    keys[..., :head_dim].transpose(0, 2, 1),
    jnp.where(there[:, None], _rows(v, m_pad), 0),
    _columns(dout.astype(q.dtype), n_pad),
    statistic(lse),
    statistic(delta),
    scale=options.scale,
    blocks=blocks,
    interpret=options.interpret,
  )
  return _tokens(dq, b, n), _tokens(dk, b, m), _tokens(dv, b, m)


def _queries(q, n_pad, scale, masked):
  """Queries in columns; the kernels take exp2, so log2(e) goes into them."""
  scaled = q.astype(jnp.float32) * (scale / kernels.LN2)
  columns = _columns(scaled.astype(q.dtype), n_pad)
  if not masked:
    return columns
  return _beside(columns, jnp.ones(n_pad, q.dtype), axis=1)


def _keys(k, m_pad, there, masked):
  """Keys in rows; a lane that meets the queries' 1 drops those not there."""
  rows = jnp.where(there[:, None], _rows(k, m_pad), 0)
  if not masked:
    return rows
  lane = jnp.where(there, 0, kernels.NOTHING).astype(k.dtype)
  return _beside(rows, lane, axis=2)


def _beside(x, line, axis):
  """Puts a line behind `axis` of x, and zeros till whole registers are full."""
  length = x.shape[axis]
  pad = [(0, 0)] * 3
  pad[axis] = (0, _up(length + 1, 16) - length - 1)
  line = jnp.broadcast_to(
    jnp.expand_dims(line, axis - 1),
    (*x.shape[:axis], 1, *x.shape[axis + 1 :]),
  )
  return jnp.pad(jnp.concatenate([x, line], axis), pad)


def _columns(x, padded):
  """`b n heads d` to `(b heads) d padded`."""
  b, n, heads, d = x.shape
  x = x.transpose(0, 2, 3, 1).reshape(b * heads, d, n)
  return jnp.pad(x, [(0, 0), (0, 0), (0, padded - n)])


def _rows(x, padded):
  """`b n heads d` to `(b heads) padded d`."""
  b, n, heads, d = x.shape
  x = x.transpose(0, 2, 1, 3).reshape(b * heads, n, d)
  return jnp.pad(x, [(0, 0), (0, padded - n), (0, 0)])


def _tokens(x, b, n):
  """`(b heads) d padded` to `b n heads d`."""
  x = x[..., :n].reshape(b, -1, x.shape[1], n)
  return x.transpose(0, 3, 1, 2)


def _block(length, most):
  """The block size for a side of the scores.

  Filling and draining the units takes as long as some hundred rows, in every
  block; rows that pad the last block take as long as any.
  """
  sizes = range(_TILE, most + 1, _TILE)
  return min(sizes, key=lambda size: _up(length, size) * (1 + 100 / size))


def _up(length, size):
  """`length` rounded up to a multiple of `size`."""
  return math.ceil(length / size) * size
