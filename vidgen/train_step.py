"""The state of a training run, and the one compiled step that moves it on."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from vidgen import optimizers, sharding

# Purposes of the run's seed: `fold_in(fold_in(seed, purpose), step)`.
INIT, STEP = range(2)

_WINDOW = 128


class Guard(NamedTuple):
  """What a run knows of its past losses, to tell a spike by.

  Attributes:
    losses: The last ones, in no order; NaN where there is none yet.
    accepted: How many steps were accepted.
    skipped: How many were not.
    streak: How many of the last were not, in a row.
  """

  losses: Float[Array, " window"]
  accepted: Int[Array, ""]
  skipped: Int[Array, ""]
  streak: Int[Array, ""]


class State(NamedTuple):
  """All that a run is, beside its config and the step that it reached.

  Attributes:
    step: Steps taken, skipped ones too: the data's position.
    params: By group, float32.
    opt: The optimiser's state, by group.
    ema: The averaged groups.
    guard: Of losses.
  """

  step: Int[Array, ""]
  params: dict[str, PyTree]
  opt: dict[str, PyTree]
  ema: dict[str, PyTree]
  guard: Guard


Optimizers = Mapping[str, optax.GradientTransformation]


def key_of(seed: int, purpose: int) -> Key[Array, ""]:
  """Returns the run's key for one purpose."""
  return jax.random.fold_in(jax.random.key(seed), purpose)


def guard() -> Guard:
  """Returns the guard of a run that has seen nothing."""
  zero = jnp.zeros((), jnp.int32)
  return Guard(_nothing(), zero, zero, zero)


def forget(guard: Guard) -> Guard:
  """Returns the guard of a run that goes on with other data."""
  return guard._replace(losses=_nothing(), streak=jnp.zeros((), jnp.int32))


def _nothing() -> Array:
  return jnp.full((_WINDOW,), jnp.nan, jnp.float32)


def init(
  make: Callable[[Key[Array, ""]], dict[str, PyTree]],
  averaged: tuple[str, ...],
  txs: Optimizers,
  key: Key[Array, ""],
) -> State:
  """Returns the first state; what `make` boxes stays boxed."""
  params = make(key)
  return State(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt={name: txs[name].init(tree) for name, tree in params.items()},
    # A copy: the step may write into the memory of what it is given.
    ema={name: jax.tree.map(jnp.copy, params[name]) for name in averaged},
    guard=guard(),
  )


def shapes_and_places(
  make: Callable[[Key[Array, ""]], State], mesh: Mesh
) -> tuple[State, State]:
  """Returns the shape and the sharding of each array of a state."""
  boxed = jax.eval_shape(make, jax.random.key(0))
  return _unbox(boxed), sharding.shardings(boxed, mesh)


def _unbox(tree: PyTree) -> PyTree:
  is_box = lambda leaf: isinstance(leaf, nn.Partitioned)
  return jax.tree.map(
    lambda x: x.unbox(apply_constraint=False) if is_box(x) else x,
    tree,
    is_leaf=is_box,
  )


def create(
  make: Callable[[Key[Array, ""]], State],
  places: State,
  key: Key[Array, ""],
  mesh: Mesh,
) -> State:
  """Runs `make` so that each array is born on its own devices."""
  with sharding.use(mesh):
    return jax.jit(lambda k: _unbox(make(k)), out_shardings=places)(key)


def accumulate(
  gradients: Callable[..., tuple[PyTree, dict[str, PyTree]]],
  params: PyTree,
  frozen: PyTree,
  batch: dict[str, Array],
  key: Key[Array, ""],
  step: Int[Array, ""],
  parts: int,
) -> tuple[PyTree, dict[str, PyTree]]:
  """Averages gradients and scalars over `parts` equal parts of a batch.

  Each part takes every `parts`-th sample, so that it is spread over the devices
  as the batch is.
  """
  if parts == 1:
    return gradients(params, frozen, batch, key, step)

  def split(x: Array) -> Array:
    x = x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)
    return sharding.constrain(x, None, "batch", *[None] * (x.ndim - 2))

  def one(total: PyTree, part: dict[str, Array]) -> tuple[PyTree, None]:
    result = gradients(params, frozen, part, key, step)
    return jax.tree.map(jnp.add, total, result), None

  batch = jax.tree.map(split, batch)
  first = jax.tree.map(lambda x: x[0], batch)
  shapes = jax.eval_shape(gradients, params, frozen, first, key, step)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
  total, _ = jax.lax.scan(one, zeros, batch)
  return jax.tree.map(lambda x: x / parts, total)


def limit(guard: Guard, sigmas: float) -> Float[Array, ""]:
  """Returns the loss above which a step is a spike: infinity for `sigmas` 0.

  It is `sigmas` deviations above the mean of the last losses, and NaN, which
  nothing is above, while there are too few of them.
  """
  if not sigmas:
    return jnp.asarray(jnp.inf, jnp.float32)
  return guard.losses.mean() + sigmas * guard.losses.std()


def after(
  guard: Guard, loss: Float[Array, ""], ok: Bool[Array, ""], sigmas: float
) -> Guard:
  """Returns the guard after a step.

  A spike counts as if it were at the limit. So one does little, and losses that
  stay high soon are the usual ones: else data that are harder than the rest
  would be skipped for ever, and nobody told.
  """
  at = (guard.accepted + guard.skipped) % _WINDOW
  top = limit(guard, sigmas)
  kept = jnp.where(loss > top, top, loss)
  kept = jnp.where(jnp.isfinite(loss), kept, guard.losses[at])
  good = ok.astype(jnp.int32)
  return Guard(
    guard.losses.at[at].set(kept),
    guard.accepted + good,
    guard.skipped + 1 - good,
    jnp.where(ok, 0, guard.streak + 1),
  )


def step(
  state: State,
  frozen: dict[str, PyTree],
  batch: dict[str, Array],
  key: Key[Array, ""],
  *,
  gradients: Callable[..., tuple[PyTree, dict[str, PyTree]]],
  txs: Optimizers,
  rate: optax.Schedule,
  parts: int,
  decay: float,
  sigmas: float,
  trained: dict[str, PyTree] | None = None,
) -> tuple[State, dict[str, PyTree]]:
  """Takes a step, or skips it where it would do harm.

  Args:
    state: Where the run stands.
    frozen: What is read and not trained.
    batch: Arrays with a leading batch axis.
    key: Of the run's steps.
    gradients: The task's.
    txs: The optimiser of each group.
    rate: The learning rate, to tell of it.
    parts: How many parts a batch is taken in.
    decay: Of the average.
    sigmas: What a spike is; see `limit`.
    trained: Whether each parameter is trained; None trains all.

  Returns:
    The new state, and scalars: the task's, and of the norm and the guard.
  """
  key = jax.random.fold_in(key, state.step)
  grads, scalars = accumulate(
    gradients, state.params, frozen, batch, key, state.step, parts
  )
  grads = _of_trained(grads, trained)
  norms = {name: optax.tree.norm(tree) for name, tree in grads.items()}
  finite = jnp.isfinite(scalars["loss"])
  for norm in norms.values():
    finite &= jnp.isfinite(norm)
  ok = finite & ~(scalars["loss"] > limit(state.guard, sigmas))
  keep = functools.partial(
    jax.tree.map, lambda new, old: jnp.where(ok, new, old)
  )
  params, opt = {}, {}
  for name, tx in txs.items():
    updates, opt[name] = tx.update(
      grads[name], state.opt[name], state.params[name]
    )
    # Decay of weights, and what the optimiser remembers, move them too.
    updates = _of_trained({name: updates}, trained)[name]
    params[name] = optax.apply_updates(state.params[name], updates)
  params, opt = keep(params, state.params), keep(opt, state.opt)
  count = state.guard.accepted
  ema = {
    name: optimizers.ema(tree, params[name], count, decay)
    for name, tree in state.ema.items()
  }
  checked = after(state.guard, scalars["loss"], ok, sigmas)
  first = next(iter(txs))
  scalars |= {"grad_norm": norms[first], "learning_rate": rate(count)}
  scalars |= {f"grad_norm_{n}": x for n, x in norms.items() if n != first}
  scalars |= {"skipped": checked.skipped, "skipped_in_a_row": checked.streak}
  ema = keep(ema, state.ema)
  return State(state.step + 1, params, opt, ema, checked), scalars


def _of_trained(
  trees: dict[str, PyTree], trained: dict[str, PyTree] | None
) -> dict[str, PyTree]:
  """Returns trees by group with zeros for parameters that are not trained."""
  if trained is None:
    return trees
  some = {name: trained[name] for name in trees}
  return jax.tree.map(
    lambda yes, x: x if yes else jnp.zeros_like(x), some, trees
  )


def place_batch(
  batch: Mapping[str, Any], mesh: Mesh, first: int, size: int
) -> dict[str, Array]:
  """Returns a host's part of a batch as global arrays.

  Adds `index`, each sample's number in the global batch, and `count`.

  Args:
    batch: This host's rows.
    mesh: The mesh.
    first: The number of this host's first row.
    size: Rows of the global batch.
  """
  rows = len(next(iter(batch.values())))
  batch = dict(batch)
  # numpy's: arrays of JAX would wait for the step that the device is at.
  batch["index"] = np.arange(first, first + rows, dtype=np.int32)
  batch["count"] = np.full((rows,), size, np.int32)
  place = sharding.training_batch(mesh, size)
  return {
    # With its whole shape, so that rows of another share are an error.
    name: jax.make_array_from_process_local_data(
      place, np.asarray(x), (size, *np.shape(x)[1:])
    )
    for name, x in batch.items()
  }
