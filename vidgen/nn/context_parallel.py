"""Attention over a sequence that is split over devices.

Both ways run within `jax.shard_map`, on local arrays.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import ad_checkpoint
from jaxtyping import Array, Float

Axes = tuple[str, ...]

# What a checkpoint policy names to keep attention and each row's sum.
SAVED = "attention"


class Kernel(NamedTuple):
  """Attention of one device to keys of which `count` are no padding.

  Attributes:
    forward: `(q, k, v, count, bound) -> (out, lse)`; lse is the logarithm of
      each row's sum, `b n heads`, and `bound` of its scores, or None.
    backward: `(q, k, v, out, lse, d_out, count) -> (d_q, d_k, d_v)`; out and
      lse may be of more keys than these.
  """

  forward: Callable[..., tuple[Array, Array]]
  backward: Callable[..., tuple[Array, Array, Array]]


def ulysses(
  q: Float[Array, "b n heads head_dim"],
  k: Float[Array, "b n heads head_dim"],
  v: Float[Array, "b n heads head_dim"],
  attend: Callable[[Array, Array, Array], Array],
  axes: Axes,
  size: int,
) -> Float[Array, "b n heads head_dim"]:
  """Trades tokens for heads, attends to whole sequences, and trades back.

  Jacobs et al., https://arxiv.org/abs/2309.14509. Heads that do not divide are
  joined by heads of zeros.

  Args:
    q: The queries of this device's tokens.
    k: Likewise.
    v: Likewise.
    attend: Attention over the tokens of all devices.
    axes: Mesh axes that the tokens are split over.
    size: Devices along them.
  """
  heads = q.shape[2]
  pad = [(0, 0), (0, 0), (0, -heads % size), (0, 0)]
  trade = functools.partial(jax.lax.all_to_all, axis_name=axes, tiled=True)
  whole = lambda x: trade(jnp.pad(x, pad), split_axis=2, concat_axis=1)
  out = attend(whole(q), whole(k), whole(v))
  return trade(out, split_axis=1, concat_axis=2)[:, :, :heads]


class _Ring(NamedTuple):
  """What is known of a ring before tracing.

  Attributes:
    kernel: Attends to one part of the keys.
    axes: Mesh axes that the tokens are split over.
    size: Devices along them.
    last: Keys of the last part that are no padding; the others are full.
  """

  kernel: Kernel
  axes: Axes
  size: int
  last: int

  def on(self, tree: Any) -> Any:
    """Passes arrays to the next device."""
    to = [(i, (i + 1) % self.size) for i in range(self.size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axes, to), tree)

  def count(self, passes: int, n: int) -> int | Array:
    """The keys of the part that came here by so many passes."""
    if self.last == n:
      return n
    part = (jax.lax.axis_index(self.axes) - passes) % self.size
    return jnp.where(part == self.size - 1, self.last, n)


def ring(
  q: Float[Array, "b n heads head_dim"],
  k: Float[Array, "b n heads head_dim"],
  v: Float[Array, "b n heads head_dim"],
  kernel: Kernel,
  axes: Axes,
  size: int,
  num_keys: int,
  bound: Float[Array, ""] | None = None,
) -> Float[Array, "b n heads head_dim"]:
  """Passes keys and values around a ring and merges what each part gives.

  Liu et al., https://arxiv.org/abs/2310.01889. The backward pass sends keys and
  values around once more, with their gradients, so that no device ever keeps
  those of others.

  Args:
    q: The queries of this device's tokens.
    k: Likewise.
    v: Likewise.
    kernel: Attends to one part of the keys.
    axes: Mesh axes that the tokens are split over.
    size: Devices along them.
    num_keys: Keys of the whole sequence that are no padding; all parts must
      have some.
    bound: No score is larger.

  Raises:
    ValueError: A part would have padding alone.
  """
  n = k.shape[1]
  last = num_keys - n * (size - 1)
  if last < 1:
    raise ValueError(
      f"ring: {num_keys} keys leave one of {size} parts of {n} without any."
    )
  return _ring(_Ring(kernel, axes, size, last), q, k, v, bound)


def _forward(ring, q, k, v, bound):
  """The output in float32 and the logarithm of each row's sum."""
  out = lse = None
  for passes in range(ring.size):
    ahead = ring.on((k, v)) if passes < ring.size - 1 else None
    count = ring.count(passes, k.shape[1])
    part, part_lse = ring.kernel.forward(q, k, v, count, bound)
    part = part.astype(jnp.float32)
    if out is None:
      out, lse = part, part_lse
    else:
      total = jnp.logaddexp(lse, part_lse)
      share = lambda x, total=total: jnp.exp(x - total)[..., None]
      out = out * share(lse) + part * share(part_lse)
      lse = total
    if ahead is not None:
      k, v = ahead
  return out, lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(ring, q, k, v, bound):
  return _forward(ring, q, k, v, bound)[0].astype(q.dtype)


def _ring_forward(ring, q, k, v, bound):
  out, lse = _forward(ring, q, k, v, bound)
  out = ad_checkpoint.checkpoint_name(out.astype(q.dtype), SAVED)
  lse = ad_checkpoint.checkpoint_name(lse, SAVED)
  return out, (q, k, v, out, lse)


def _ring_backward(ring, kept, d_out):
  """Sends each part's gradients on with it; at the end they are home."""
  q, k, v, out, lse = kept
  d_q = d_kv = None
  for passes in range(ring.size):
    ahead = ring.on((k, v)) if passes < ring.size - 1 else None
    count = ring.count(passes, k.shape[1])
    d = ring.kernel.backward(q, k, v, out, lse, d_out, count)
    d = [x.astype(jnp.float32) for x in d]
    d_q = d[0] if d_q is None else d_q + d[0]
    d_kv = d[1:] if d_kv is None else jax.tree.map(jnp.add, d_kv, d[1:])
    d_kv = ring.on(d_kv)
    if ahead is not None:
      k, v = ahead
  return *(d.astype(q.dtype) for d in (d_q, *d_kv)), None


_ring.defvjp(_ring_forward, _ring_backward)


def whole(
  q: Float[Array, "b n heads head_dim"],
  k: Float[Array, "b m heads head_dim"],
  v: Float[Array, "b m heads head_dim"],
  kernel: Kernel,
  num_keys: int,
  bound: Float[Array, ""] | None = None,
) -> Float[Array, "b n heads head_dim"]:
  """Attends to keys that are all here; arguments as for `ring`."""
  return _whole(kernel, num_keys, q, k, v, bound)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _whole(kernel, num_keys, q, k, v, bound):
  return kernel.forward(q, k, v, num_keys, bound)[0]


def _whole_forward(kernel, num_keys, q, k, v, bound):
  out, lse = kernel.forward(q, k, v, num_keys, bound)
  out = ad_checkpoint.checkpoint_name(out, SAVED)
  lse = ad_checkpoint.checkpoint_name(lse, SAVED)
  return out, (q, k, v, out, lse)


def _whole_backward(kernel, num_keys, kept, d_out):
  return *kernel.backward(*kept, d_out, num_keys), None


_whole.defvjp(_whole_forward, _whole_backward)
