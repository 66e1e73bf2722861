"""Attention behind one door; the implementations stand behind it."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vidgen import sharding
from vidgen.nn import blocked, context_parallel, layers

# Implementation -> the platform it runs on; None is any.
IMPLEMENTATIONS: dict[str, str | None] = {
  "plain": None,
  "blocked": None,
  "cudnn": "gpu",
  "flash": "tpu",
}

# The most bytes of scores that a GPU holds at once: there a loop over heads
# takes longer than what is in it.
PLAIN_BYTES = 2**28

_named = jax.checkpoint_policies.save_only_these_names(context_parallel.SAVED)


def saved(primitive: Any, *avals: Any, **params: Any) -> bool:
  """The checkpoint policy that keeps attention for the backward pass.

  What JAX makes of cuDNN's kernel has no name but that of its primitive.
  """
  if primitive.name.startswith("dot_product_attention_fwd"):
    return True
  return _named(primitive, *avals, **params)


def unavailable(implementation: str | None, platform: str) -> str | None:
  """Returns why an implementation cannot run on a platform; None: it can."""
  if implementation is None:
    return None
  if implementation not in IMPLEMENTATIONS:
    known = ", ".join(IMPLEMENTATIONS)
    return f"{implementation!r} is unknown; known are {known}"
  needs = IMPLEMENTATIONS[implementation]
  if needs is None or needs == platform:
    return None
  able = [n for n, p in IMPLEMENTATIONS.items() if p in (None, platform)]
  return (
    f"{implementation!r} runs on a {needs}, this is a {platform}; here are "
    f"{', '.join(able)}"
  )


def attention(
  q: Float[Array, "b n heads head_dim"],
  k: Float[Array, "b m heads head_dim"],
  v: Float[Array, "b m heads head_dim"],
  *,
  bias: Float[Array, "heads n m"] | None = None,
  scale: float | None = None,
  num_keys: int | None = None,
  bound: Float[Array, ""] | None = None,
  implementation: str | None = None,
  interpret: bool = False,
) -> Float[Array, "b n heads head_dim"]:
  """Returns softmax(q kᵀ · scale + bias) v; the softmax runs in float32.

  On a mesh, batch and heads are split over it, and tokens too: over the ring,
  which passes keys and values on, and over the context, which trades tokens for
  heads. With a bias, or with keys that are not the queries' tokens, tokens stay
  together.

  Args:
    q: Queries.
    k: Keys.
    v: Values.
    bias: Added to the scores of every batch row.
    scale: Factor of the scores; 1 / sqrt(head_dim) by default.
    num_keys: Keys from here on are padding: none attends to them. What comes
      out for the queries there is of no use.
    bound: No |score| is larger, bias aside; a small one saves "flash" a pass.
    implementation: "plain" holds all scores; "blocked" holds a block of one
      head; "cudnn" is the fused kernel of NVIDIA GPUs (16 bit, no bias) and
      "flash" that of TPUs (no bias). By default the fastest that can run on the
      platform; on a GPU that is "plain" where scores are few and "cudnn" can't.
      Around a ring, where parts are merged, "blocked" stands in for those that
      cannot.
    interpret: Runs "flash" on any platform, slowly.

  Raises:
    ValueError: An implementation that is unknown or cannot run here, or no key.
  """
  scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
  num_keys = k.shape[1] if num_keys is None else num_keys
  if not 1 <= num_keys <= k.shape[1]:
    raise ValueError(f"attention: {num_keys} of {k.shape[1]} keys.")
  platform = "tpu" if interpret else sharding.platform()
  if reason := unavailable(implementation, platform):
    raise ValueError(f"attention: {reason}.")
  implementation = implementation or _choose(platform, q, k, bias)
  kernel = _kernel(implementation, scale, interpret)

  whole = bias is not None or k.shape[1] != q.shape[1]
  split = sharding.attention(q.shape, whole)

  def local(q, k, v, bias, bound):
    if bias is not None or implementation in ("plain", "cudnn"):
      one = functools.partial(
        _local, implementation, scale=scale, num_keys=num_keys, bias=bias
      )
    else:
      one = functools.partial(
        context_parallel.whole, kernel=kernel, num_keys=num_keys, bound=bound
      )
    if split is not None and split.ring:
      one = functools.partial(
        context_parallel.ring,
        kernel=kernel,
        axes=split.ring,
        size=split.ring_size,
        num_keys=num_keys,
        bound=bound,
      )
    if split is None or not split.context:
      return one(q, k, v)
    return context_parallel.ulysses(
      q, k, v, one, split.context, split.context_size
    )

  if split is None:
    return local(q, k, v, bias, bound)
  # Kernels cannot be partitioned: every mesh axis is taken by hand.
  return jax.shard_map(
    local,
    in_specs=(split.qkv, split.qkv, split.qkv, split.bias, split.scalar),
    out_specs=split.qkv,
    check_vma=False,
  )(q, k, v, bias, bound)


def _choose(platform: str, q: Array, k: Array, bias: Array | None) -> str:
  """The fastest implementation that can run."""
  if platform == "tpu" and bias is None:
    return "flash" if q.dtype in (jnp.bfloat16, jnp.float32) else "blocked"
  if platform == "gpu":
    if bias is None and q.dtype.itemsize == 2:
      return "cudnn"
    b, n, heads, _ = q.shape
    if 4 * b * heads * n * k.shape[1] <= PLAIN_BYTES:
      return "plain"
  return "blocked"


def _kernel(
  implementation: str, scale: float, interpret: bool
) -> context_parallel.Kernel:
  """What attends to the keys of one device, forward and backward."""
  if implementation == "flash":
    return context_parallel.Kernel(
      functools.partial(_flash, scale=scale, interpret=interpret),
      functools.partial(_flash_grads, scale=scale, interpret=interpret),
    )
  return context_parallel.Kernel(
    lambda q, k, v, count, bound: blocked.forward(q, k, v, count, scale=scale),
    functools.partial(blocked.backward, scale=scale),
  )


def _flash(q, k, v, count, bound, *, scale, interpret):
  """Decides as it runs whether scores are small enough to go without maximum.

  So one program is right for any weights.
  """
  # Pallas takes time to import, and no CPU needs it.
  from vidgen.nn import flash_tpu

  count = None if isinstance(count, int) and count == k.shape[1] else count
  run = lambda largest: (
    lambda q, k, v: flash_tpu.flash_with_lse(
      q,
      k,
      v,
      scale=scale,
      num_keys=count,
      logit_bound=largest,
      interpret=interpret,
    )
  )
  if bound is None:
    return run(None)(q, k, v)
  largest = flash_tpu.MAX_LOGIT_BOUND
  return jax.lax.cond(bound <= largest, run(largest), run(None), q, k, v)


def _flash_grads(q, k, v, out, lse, d_out, count, *, scale, interpret):
  from vidgen.nn import flash_tpu

  count = None if isinstance(count, int) and count == k.shape[1] else count
  return flash_tpu.flash_grads(
    q, k, v, out, lse, d_out, scale=scale, num_keys=count, interpret=interpret
  )


def _local(implementation, q, k, v, *, scale, num_keys, bias):
  """Attention of one device that is differentiated by others than us."""
  if implementation == "cudnn":
    return _cudnn(q, k, v, num_keys, scale)
  k, v = k[:, :num_keys], v[:, :num_keys]
  bias = None if bias is None else bias[..., :num_keys]
  if implementation == "plain":
    return _plain(q, k, v, bias, scale)
  return blocked.biased(q, k, v, bias, scale=scale)


def _cudnn(q, k, v, num_keys, scale):
  lengths = None
  if num_keys < k.shape[1]:
    lengths = jnp.full(k.shape[:1], num_keys, jnp.int32)
  return jax.nn.dot_product_attention(
    q,
    k,
    v,
    scale=scale,
    key_value_seq_lengths=lengths,
    implementation="cudnn",
  )


def _plain(q, k, v, bias, scale):
  """Holds the scores of all heads at once."""
  scores = jnp.einsum(
    "bnhd,bmhd->bhnm",
    q,
    k,
    precision=layers.precision(q.dtype),
    preferred_element_type=jnp.float32,
  )
  scores = scores * scale
  if bias is not None:
    scores = scores + bias
  weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
  precision = layers.precision(v.dtype)
  return jnp.einsum("bhnm,bmhd->bnhd", weights, v, precision=precision)
