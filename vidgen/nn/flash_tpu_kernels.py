"""The two Pallas kernels behind `flash_tpu`; one head a grid row.

Both hold the scores transposed, keys by queries. A row of keys streams past
the queries that the matrix unit holds; the weights then are what the matrix
unit holds, and the 64 rows of transposed values stream past them. With scores
of queries by keys it is the weights that stream: four times as many rows. What
belongs to one query (maximum, sum) is a row of lanes, which costs nothing to
spread over keys.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

# Added to the scores of keys that are not there, and the log of no weight.
# Finite, as the infinity would turn into not-a-number where it is multiplied.
NOTHING = -1e30

LN2 = 0.6931471805599453

_NN = (((1,), (0,)), ((), ()))
_NT = (((1,), (1,)), ((), ()))

_MIB = 1 << 20


class Blocks(NamedTuple):
  """Queries and keys of a grid step, and keys whose scores are held at once."""

  q: int
  kv: int
  chunk: int


def forward(
  q: Float[Array, "bh lanes n"],
  k: Float[Array, "bh m lanes"],
  v: Float[Array, "bh rows m"],
  *,
  head_dim: int,
  running: bool,
  blocks: Blocks,
  interpret: Any,
) -> tuple[Float[Array, "bh head_dim n"], Float[Array, "bh 1 n"]]:
  """Returns the attention, transposed, and the log of the sum of exp(scores).

  Args:
    q: Queries, transposed, with log2(e) and the scale multiplied in.
    k: Keys.
    v: Values, transposed; the row at `head_dim` is 1 for a key that is there
      and 0 for one that is not, so that the matrix unit sums the weights.
    head_dim: Rows of the result.
    running: Subtract the running maximum from the scores.
    blocks: Divide `n` and `m`.
    interpret: Run on any platform, slowly.
  """
  bh, lanes, n = q.shape
  rows, m = v.shape[1:]
  kernel = functools.partial(
    _forward_kernel, chunk=blocks.chunk, running=running
  )
  return pl.pallas_call(
    kernel,
    grid=(bh, n // blocks.q, m // blocks.kv),
    in_specs=[
      pl.BlockSpec((1, lanes, blocks.q), lambda h, i, j: (h, 0, i)),
      pl.BlockSpec((1, blocks.kv, lanes), lambda h, i, j: (h, j, 0)),
      pl.BlockSpec((1, rows, blocks.kv), lambda h, i, j: (h, 0, j)),
    ],
    out_specs=[
      pl.BlockSpec((1, head_dim, blocks.q), lambda h, i, j: (h, 0, i)),
      pl.BlockSpec((1, 1, blocks.q), lambda h, i, j: (h, 0, i)),
    ],
    out_shape=[
      jax.ShapeDtypeStruct((bh, head_dim, n), q.dtype),
      jax.ShapeDtypeStruct((bh, 1, n), jnp.float32),
    ],
    scratch_shapes=[
      pltpu.VMEM((rows, blocks.q), jnp.float32),
      pltpu.VMEM((1, blocks.q), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary"),
      vmem_limit_bytes=48 * _MIB,
    ),
    interpret=interpret,
    name="flash_forward",
  )(q, k, v)


def _forward_kernel(
  q_ref, k_ref, v_ref, out_ref, lse_ref, sums_ref, max_ref, *, chunk, running
):
  """One block of queries and one of keys; the keys' blocks come in turn."""
  head_dim = out_ref.shape[1]

  @pl.when(pl.program_id(2) == 0)
  def _start():
    sums_ref[...] = jnp.zeros_like(sums_ref)
    max_ref[...] = jnp.full_like(max_ref, -jnp.inf if running else 0)

  scores = lambda keys: _dot(k_ref[0, keys, :], q_ref[0])
  chunks = _chunks(k_ref.shape[1], chunk)
  sums, top = sums_ref[...], max_ref[...]
  # The next scores are asked for before these are used, so that the matrix
  # unit works on them while the vector unit has its turn.
  ahead = scores(chunks[0])
  for keys, after in zip(chunks, [*chunks[1:], None], strict=True):
    logits, ahead = ahead, None if after is None else scores(after)
    if running:
      higher = jnp.maximum(top, jnp.max(logits, axis=0, keepdims=True))
      sums *= jnp.exp2(top - higher)
      logits -= higher
      top = higher
    weights = jnp.exp2(logits).astype(v_ref.dtype)
    sums += _dot(v_ref[0, :, keys], weights)
  sums_ref[...], max_ref[...] = sums, top

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _finish():
    total = sums_ref[head_dim : head_dim + 1]
    empty = total == 0
    out = sums_ref[:head_dim] / jnp.where(empty, 1, total)
    out_ref[0] = out.astype(out_ref.dtype)
    lse = jnp.log(jnp.where(empty, 1, total)) + max_ref[...] * LN2
    lse_ref[0] = jnp.where(empty, NOTHING, lse)


def backward(
  q: Float[Array, "bh lanes n"],
  k: Float[Array, "bh m lanes"],
  k_columns: Float[Array, "bh head_dim m"],
  v: Float[Array, "bh m head_dim"],
  dout: Float[Array, "bh head_dim n"],
  lse: Float[Array, "bh 1 n"],
  delta: Float[Array, "bh 1 n"],
  *,
  scale: float,
  blocks: Blocks,
  interpret: Any,
) -> tuple[
  Float[Array, "bh head_dim n"],
  Float[Array, "bh head_dim m"],
  Float[Array, "bh head_dim m"],
]:
  """Returns the gradients of queries, keys and values, transposed.

  One pass over the scores gives all three. The queries' gradient of a whole
  head stays on the chip while the keys go by, `4 head_dim n` bytes, so that no
  partial sums go to memory.

  Args:
    q: As for `forward`.
    k: As for `forward`, with `NOTHING` in a lane where q has 1 for a key that
      is not there.
    k_columns: Keys, transposed.
    v: Values.
    dout: Gradient of the result, transposed.
    lse: Log2 of the sum of exp2(scores).
    delta: Sum over head_dim of the result times its gradient.
    scale: Factor of the scores.
    blocks: Divide `n` and `m`.
    interpret: Run on any platform, slowly.
  """
  bh, lanes, n = q.shape
  m, head_dim = v.shape[1:]
  last = m // blocks.kv - 1
  rows = lambda width: pl.BlockSpec(
    (1, blocks.kv, width), lambda h, j, i: (h, j, 0)
  )
  keys = pl.BlockSpec((1, head_dim, blocks.kv), lambda h, j, i: (h, 0, j))
  queries = lambda height: pl.BlockSpec(
    (1, height, blocks.q), lambda h, j, i: (h, 0, i)
  )
  return pl.pallas_call(
    functools.partial(_backward_kernel, chunk=blocks.chunk, scale=scale),
    grid=(bh, m // blocks.kv, n // blocks.q),
    in_specs=[
      queries(lanes),
      rows(lanes),
      keys,
      rows(head_dim),
      queries(head_dim),
      queries(1),
      queries(1),
    ],
    out_specs=[
      # Written with the last keys alone; till then the first block stands by.
      pl.BlockSpec(
        (1, head_dim, blocks.q), lambda h, j, i: (h, 0, (j == last) * i)
      ),
      keys,
      keys,
    ],
    out_shape=[
      jax.ShapeDtypeStruct((bh, head_dim, n), q.dtype),
      jax.ShapeDtypeStruct((bh, head_dim, m), q.dtype),
      jax.ShapeDtypeStruct((bh, head_dim, m), q.dtype),
    ],
    scratch_shapes=[
      pltpu.VMEM((n // blocks.q, head_dim, blocks.q), jnp.float32),
      pltpu.VMEM((head_dim, blocks.kv), jnp.float32),
      pltpu.VMEM((head_dim, blocks.kv), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary", "arbitrary"),
      vmem_limit_bytes=40 * _MIB + 4 * n * head_dim,
    ),
    interpret=interpret,
    name="flash_backward",
  )(q, k, k_columns, v, dout, lse, delta)


def _backward_kernel(
  q_ref,
  k_ref,
  k_columns_ref,
  v_ref,
  dout_ref,
  lse_ref,
  delta_ref,
  dq_ref,
  dk_ref,
  dv_ref,
  dq_sum,
  dk_sum,
  dv_sum,
  *,
  chunk,
  scale,
):
  """One block of keys and one of queries; the queries' blocks come in turn."""
  j, i = pl.program_id(1), pl.program_id(2)
  head_dim = v_ref.shape[2]

  @pl.when(i == 0)
  def _start_keys():
    dk_sum[...] = jnp.zeros_like(dk_sum)
    dv_sum[...] = jnp.zeros_like(dv_sum)

  @pl.when(j == 0)
  def _start_queries():
    dq_sum[i] = jnp.zeros_like(dq_sum[i])

  q = q_ref[0, :head_dim]
  dout = dout_ref[0]

  def products(keys):
    return _dot(k_ref[0, keys, :], q_ref[0]), _dot(v_ref[0, keys, :], dout)

  chunks = _chunks(k_ref.shape[1], chunk)
  dq = dq_sum[i]
  ahead = products(chunks[0])
  for keys, after in zip(chunks, [*chunks[1:], None], strict=True):
    (logits, dweights), ahead = (
      ahead,
      None if after is None else products(after),
    )
    weights = jnp.exp2(logits - lse_ref[0])
    dlogits = (weights * (dweights - delta_ref[0])).astype(q.dtype)
    dv_sum[:, keys] += _dot(dout, weights.astype(q.dtype), _NT)
    dk_sum[:, keys] += _dot(q, dlogits, _NT)
    dq += _dot(k_columns_ref[0, :, keys], dlogits)
  dq_sum[i] = dq

  @pl.when(j == pl.num_programs(1) - 1)
  def _finish_queries():
    dq_ref[0] = (dq_sum[i] * scale).astype(dq_ref.dtype)

  @pl.when(i == pl.num_programs(2) - 1)
  def _finish_keys():
    # The scale is in the queries, and so is log2(e), which has to go.
    dk_ref[0] = (dk_sum[...] * LN2).astype(dk_ref.dtype)
    dv_ref[0] = dv_sum[...].astype(dv_ref.dtype)


def _dot(a, b, dims=_NN):
  """A product in float32; of float32 factors, with all of their bits."""
  exact = a.dtype == jnp.float32
  precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
  return jax.lax.dot_general(
    a, b, dims, precision=precision, preferred_element_type=jnp.float32
  )


def _chunks(length, size):
  """The slices of `size` that `length` is made of."""
  return [slice(at, at + size) for at in range(0, length, size)]
