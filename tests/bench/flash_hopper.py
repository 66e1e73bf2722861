"""Attention of one Hopper GPU: a candidate, timed by `attention_gpu`.

Shah et al., https://arxiv.org/abs/2407.08608: one warpgroup loads keys and
values, three take 64 queries each; while a block of values is weighed, the
scores of the next are made. At a head_dim of 64 the exponentials take as long
as the products (512 cycles a block of 64 x 128 scores, either), so what else
there is to do decides. Where scores are known to be small the running maximum
can go: a thread then has 345 instructions for its 64 scores of a block instead
of 455, no register spilled (counted in what ptxas 12.9 makes for sm_90a).

Not part of vidgen: it has run in JAX's interpreter, and on no device yet.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as gpu
from jaxtyping import Array, Float

# The kernel's exponentials are of base 2.
_LOG2E = math.log2(math.e)

# TMA reads whole tiles of so many rows.
_TILE = 8


class Blocks(NamedTuple):
  """`groups` warpgroups of `q` queries; `stages` blocks of `kv` keys."""

  q: int = 64
  kv: int = 128
  groups: int = 3
  stages: int = 2


BLOCKS = Blocks()


class _Refs(NamedTuple):
  """What a thread block sees: arrays, shared memory, barriers."""

  q: Any
  k: Any
  v: Any
  out: Any
  lse: Any
  q_tile: Any
  k_tiles: Any
  v_tiles: Any
  lse_tile: Any
  q_there: Any
  k_there: Any
  v_there: Any
  k_free: Any
  v_free: Any


class _Kernel(NamedTuple):
  """What is known before tracing."""

  scale: float
  bounded: bool
  num_keys: int
  blocks: Blocks
  interpret: Any

  @property
  def steps(self) -> int:
    return pl.cdiv(self.num_keys, self.blocks.kv)

  @property
  def stages(self) -> int:
    return min(self.blocks.stages, self.steps)

  @property
  def tail(self) -> int:
    """Keys in the last block."""
    return self.num_keys - (self.steps - 1) * self.blocks.kv

  def slot(self, step: Any) -> Any:
    return lax.rem(step, jnp.int32(self.stages))

  def scores_ref(self) -> Any:
    return gpu.ACC((self.blocks.q, self.blocks.kv), jnp.float32)

  def row(self, value: float) -> Array:
    """A number of each query, laid out as sums over keys are."""
    x = jnp.full((self.blocks.q,), value, jnp.float32)
    # The interpreter knows no layouts.
    return x if self.interpret else gpu.layout_cast(x, _ROW)


_ROW = gpu.Layout.WGMMA.reduce(1)


def flash_with_lse(
  q: Float[Array, "b n heads head_dim"],
  k: Float[Array, "b m heads head_dim"],
  v: Float[Array, "b m heads head_dim"],
  *,
  scale: float,
  num_keys: int | None = None,
  bounded: bool = False,
  blocks: Blocks = BLOCKS,
  interpret: Any = False,
) -> tuple[Float[Array, "b n heads head_dim"], Float[Array, "b n heads"]]:
  """Returns softmax(q kᵀ · scale) v and log(sum(exp(scores))).

  Args:
    q: Queries, of 16 bits, as are keys and values; head_dim is 64.
    k: Keys.
    v: Values, finite.
    scale: Factor of the scores.
    num_keys: Keys from here on are padding.
    bounded: No |score| is larger than 64: exp needs no maximum subtracted, see
      `vidgen.nn.flash_tpu`.
    blocks: Sizes of the tiles.
    interpret: Parameters of JAX's interpreter, to run without a GPU.

  Raises:
    ValueError: A shape or dtype that the kernel does not take.
  """
  if q.shape[-1] != 64 or q.dtype.itemsize != 2:
    raise ValueError("flash_hopper: takes head_dim 64 and 16 bits alone.")
  if q.shape[1] % _TILE or k.shape[1] % _TILE:
    raise ValueError(f"flash_hopper: tokens are not a multiple of {_TILE}.")
  num_keys = k.shape[1] if num_keys is None else num_keys
  kernel = _Kernel(scale, bounded, num_keys, blocks, interpret)
  batch, n, heads, _ = q.shape
  tiles = pl.cdiv(n, blocks.q * blocks.groups)
  padded = tiles * blocks.q * blocks.groups
  out, lse = gpu.kernel(
    functools.partial(_thread, kernel),
    out_type=[
      jax.ShapeDtypeStruct(q.shape, q.dtype),
      jax.ShapeDtypeStruct((batch, heads, padded), jnp.float32),
    ],
    scratch_types=_scratch(kernel, q.dtype),
    # Tiles of one head run at once, and read its keys from the L2 cache.
    grid=(tiles, heads, batch),
    grid_names=("tile", "head", "batch"),
    num_threads=blocks.groups + 1,
    thread_name="warpgroup",
    compiler_params=gpu.CompilerParams(approx_math=True),
    **({"interpret": interpret} if interpret else {}),
  )(q, k, v)
  return out, lse[:, :, :n].swapaxes(1, 2)


def _scratch(kernel: _Kernel, dtype: Any) -> list[Any]:
  groups, stages = kernel.blocks.groups, kernel.stages
  transforms = (gpu.TilingTransform((_TILE, 64)), gpu.SwizzleTransform(128))
  tiles = lambda *shape: gpu.SMEM((*shape, 64), dtype, transforms=transforms)
  there = lambda number: gpu.Barrier(num_barriers=number)
  free = gpu.Barrier(num_arrivals=groups, num_barriers=stages)
  return [
    tiles(groups, kernel.blocks.q),
    tiles(stages, kernel.blocks.kv),
    tiles(stages, kernel.blocks.kv),
    gpu.SMEM((groups, kernel.blocks.q), jnp.float32),
    there(groups),
    there(stages),
    there(stages),
    free,
    free,
  ]


def _thread(kernel: _Kernel, *refs: Any) -> None:
  """One warpgroup: the last one loads, the others compute."""
  group = lax.axis_index("warpgroup")
  groups = kernel.blocks.groups

  @pl.when(group < groups)
  def _():
    # A thread has 65,536 / (128 · warpgroups) registers; the loader gives its.
    gpu.set_max_registers(160 if groups == 3 else 240, action="increase")
    _compute(kernel, group, _Refs(*refs))

  @pl.when(group == groups)
  def _():
    gpu.set_max_registers(24, action="decrease")
    _load(kernel, _Refs(*refs))


def _load(kernel: _Kernel, refs: _Refs) -> None:
  """Keeps the blocks of keys and values coming."""
  batch, head = lax.axis_index("batch"), lax.axis_index("head")

  @pl.loop(0, kernel.steps)
  def _(step):
    at = kernel.slot(step)
    keys = (batch, pl.ds(step * kernel.blocks.kv, kernel.blocks.kv), head)
    for source, tiles, there, free in (
      (refs.k, refs.k_tiles, refs.k_there, refs.k_free),
      (refs.v, refs.v_tiles, refs.v_there, refs.v_free),
    ):
      pl.when(step >= kernel.stages)(
        functools.partial(gpu.barrier_wait, free.at[at])
      )
      gpu.copy_gmem_to_smem(source.at[keys], tiles.at[at], there.at[at])

  for at in range(kernel.stages):
    gpu.barrier_wait(refs.k_free.at[at])
    gpu.barrier_wait(refs.v_free.at[at])


def _compute(kernel: _Kernel, group: Any, refs: _Refs) -> None:
  """Attention of the queries of a warpgroup."""
  batch, head = lax.axis_index("batch"), lax.axis_index("head")
  rows = kernel.blocks.q
  base = (lax.axis_index("tile") * kernel.blocks.groups + group) * rows
  tile, lse = refs.q_tile.at[group], refs.lse_tile.at[group]
  queries = pl.ds(base, rows)
  gpu.copy_gmem_to_smem(
    refs.q.at[batch, queries, head], tile, refs.q_there.at[group]
  )
  gpu.barrier_wait(refs.q_there.at[group])

  acc, largest, total = pl.run_scoped(
    lambda acc_ref: _attend(kernel, tile, refs, acc_ref),
    gpu.ACC((rows, 64), jnp.float32),
  )
  tile[...] = (acc / _columns(total, acc)).astype(tile.dtype)
  lse[...] = (largest + jnp.log2(total)) / _LOG2E
  gpu.commit_smem()
  # What is out of bounds is not written.
  gpu.copy_smem_to_gmem(tile, refs.out.at[batch, queries, head])
  gpu.copy_smem_to_gmem(lse, refs.lse.at[batch, head, queries])
  gpu.wait_smem_to_gmem(0)


def _attend(kernel: _Kernel, tile: Any, refs: _Refs, acc_ref: Any) -> Any:
  """Returns the sum of weighted values, the maximum and the sum of weights."""
  dtype = tile.dtype

  def start(scores_ref):
    scores = _scores(kernel, jnp.int32(0), tile, refs, scores_ref, wait=0)
    return _mask(kernel, scores) if kernel.steps == 1 else scores

  def step(number, carry, last=False):
    """Makes the scores of a block while those before weigh their values."""
    weights, *sums = carry
    before = kernel.slot(number - 1)

    def both(scores_ref):
      weigh = lambda: _weigh(refs, before, weights, acc_ref)
      s = _scores(kernel, number, tile, refs, scores_ref, wait=1, then=weigh)
      p, largest, shrink, total = _softmax(
        kernel, _mask(kernel, s) if last else s, *sums
      )
      gpu.wgmma_wait(0)
      gpu.barrier_arrive(refs.v_free.at[before])
      if shrink is not None:
        acc = acc_ref[...]
        acc_ref[...] = acc * _columns(shrink, acc)
      return p.astype(dtype), largest, total

    return pl.run_scoped(both, kernel.scores_ref())

  first = pl.run_scoped(start, kernel.scores_ref())
  lowest = 0.0 if kernel.bounded else -math.inf
  p, largest, _, total = _softmax(
    kernel, first, kernel.row(lowest), kernel.row(0.0)
  )
  carry = (p.astype(dtype), largest, total)
  if kernel.steps > 1:
    carry = lax.fori_loop(1, kernel.steps - 1, step, carry)
    carry = step(jnp.int32(kernel.steps - 1), carry, last=True)
  weights, largest, total = carry
  end = (kernel.steps - 1) % kernel.stages
  _weigh(refs, end, weights, acc_ref)
  acc = acc_ref[...]
  gpu.barrier_arrive(refs.v_free.at[end])
  return acc, largest, total


def _scores(kernel, step, tile, refs, scores_ref, *, wait, then=lambda: None):
  """Returns q kᵀ of a block; `then` issues what need not be waited for."""
  at = kernel.slot(step)
  gpu.barrier_wait(refs.k_there.at[at])
  gpu.wgmma(scores_ref, tile, gpu.transpose_ref(refs.k_tiles.at[at], (1, 0)))
  then()
  scores = gpu.wgmma_accumulator_load(scores_ref, wait_n=wait)
  gpu.barrier_arrive(refs.k_free.at[at])
  return scores


def _weigh(refs, at, weights, acc_ref):
  """Begins to add a block's values."""
  gpu.barrier_wait(refs.v_there.at[at])
  gpu.wgmma(acc_ref, weights, refs.v_tiles.at[at])


def _softmax(kernel, scores, before, total):
  """Returns weights, the maximum so far, what shrinks sums before, the sum."""
  scale = kernel.scale * _LOG2E
  if kernel.bounded:
    p = jnp.exp2(scores * scale)
    return p, before, None, total + p.sum(axis=1)
  largest = jnp.maximum(before, scores.max(axis=1) * scale)
  shrink = jnp.exp2(before - largest)
  p = jnp.exp2(scores * scale - _columns(largest, scores))
  return p, largest, shrink, total * shrink + p.sum(axis=1)


def _mask(kernel, scores):
  """Keys past the last have no weight; what is out of bounds was read as 0."""
  if kernel.tail == kernel.blocks.kv:
    return scores
  iota = functools.partial(gpu.broadcasted_iota, layout=gpu.Layout.WGMMA)
  if kernel.interpret:
    iota = lax.broadcasted_iota
  columns = iota(jnp.int32, scores.shape, 1)
  return jnp.where(columns < kernel.tail, scores, -jnp.inf)


def _columns(row, like):
  return lax.broadcast_in_dim(row, like.shape, [0])
