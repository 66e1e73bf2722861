"""One step: parts of a batch, skipped steps, averages, layouts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from vidgen import errors, optimizers, sharding, train_step

KEY = jax.random.key(0)


def make(key):
  """A linear model of one group, boxed."""
  kernel = jax.random.normal(key, (4, 8))
  return {"net": {"kernel": nn.LogicallyPartitioned(kernel, ("embed", "mlp"))}}


def gradients(params, frozen, batch, key, step):
  def loss(params):
    kernel = params["net"]["kernel"]
    return jnp.mean(jnp.square(batch["x"] @ kernel - batch["y"]))

  value, grads = jax.value_and_grad(loss)(params)
  return grads, {"loss": value * frozen["factor"]}


FROZEN = {"factor": jnp.ones(())}


def batch_of(rows=8, seed=0, **arrays):
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((rows, 4)).astype(np.float32)
  y = rng.standard_normal((rows, 8)).astype(np.float32)
  return {"x": jnp.asarray(x), "y": jnp.asarray(y), **arrays}


def start(txs, mesh):
  init = functools.partial(train_step.init, make, ("net",), txs)
  _, places = train_step.shapes_and_places(init, mesh)
  return train_step.create(init, places, KEY, mesh)


def stepper(txs, parts=1, decay=0.9, sigmas=6.0, grads=gradients):
  return jax.jit(
    functools.partial(
      train_step.step,
      gradients=grads,
      txs=txs,
      rate=optax.constant_schedule(0.1),
      parts=parts,
      decay=decay,
      sigmas=sigmas,
    )
  )


TXS = {"net": optax.adam(1e-2)}
ONE = {"data": 1}


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(None)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_parts_of_a_batch_are_the_batch(mesh, parts):
  state, batch = start(TXS, mesh), batch_of()
  whole, scalars = stepper(TXS)(state, FROZEN, batch, KEY)
  some, others = stepper(TXS, parts)(state, FROZEN, batch, KEY)
  np.testing.assert_allclose(
    some.params["net"]["kernel"], whole.params["net"]["kernel"], rtol=1e-5
  )
  for name in ("loss", "grad_norm"):
    np.testing.assert_allclose(others[name], scalars[name], rtol=1e-5)


def test_a_mean_over_some_samples_is_that_of_the_whole_batch(mesh):
  """Though not all parts of the batch have some."""

  def some(params, frozen, batch, key, step):
    grads, scalars = gradients(params, frozen, batch, key, step)
    chosen = batch["chosen"]
    pair = jnp.sum(chosen * batch["x"][:, 0]), jnp.sum(chosen)
    return grads, scalars | {"some": pair}

  state = start(TXS, mesh)
  batch = batch_of(chosen=jnp.asarray([1.0, 0, 0, 0, 1, 0, 1, 0]))
  want = batch["x"][jnp.array([0, 4, 6]), 0].mean()
  for parts in (1, 4):
    scalars = stepper(TXS, parts, grads=some)(state, FROZEN, batch, KEY)[1]
    total, count = scalars["some"]
    np.testing.assert_allclose(total / count, want, rtol=1e-6)


def same(one, other):
  return all(
    np.asarray(a).tobytes() == np.asarray(b).tobytes()
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
  )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_skipped(mesh, bad):
  state = start(TXS, mesh)
  state, _ = stepper(TXS)(state, FROZEN, batch_of(), KEY)
  batch = batch_of()
  batch["x"] = batch["x"].at[3, 2].set(bad)
  after, scalars = stepper(TXS)(state, FROZEN, batch, KEY)
  assert same(after.params, state.params)
  assert same(after.opt, state.opt)
  assert same(after.ema, state.ema)
  assert int(after.step) == int(state.step) + 1
  assert int(scalars["skipped"]) == int(scalars["skipped_in_a_row"]) == 1
  after, scalars = stepper(TXS)(after, FROZEN, batch, KEY)
  assert int(scalars["skipped_in_a_row"]) == 2
  after, scalars = stepper(TXS)(after, FROZEN, batch_of(), KEY)
  assert int(scalars["skipped_in_a_row"]) == 0
  assert int(scalars["skipped"]) == 2
  assert not same(after.params, state.params)


def test_a_gradient_alone_that_is_not_finite(mesh):
  """The loss is a number, its gradient none: the square root of zero."""

  def odd(params, frozen, batch, key, step):
    grads = jax.tree.map(lambda x: x * jnp.inf, params)
    return grads, {"loss": jnp.ones(())}

  state = start(TXS, mesh)
  after, scalars = stepper(TXS, grads=odd)(state, FROZEN, batch_of(), KEY)
  assert int(scalars["skipped"]) == 1
  assert same(after.params, state.params)


def test_spikes_are_skipped_once_there_is_a_past(mesh):
  step = stepper(TXS)
  state = start(TXS, mesh)
  spike = batch_of()
  spike["y"] = spike["y"] * 100
  _, scalars = step(state, FROZEN, spike, KEY)
  assert int(scalars["skipped"]) == 0, "nothing is known yet"
  for i in range(130):
    state, scalars = step(state, FROZEN, batch_of(seed=i), KEY)
  assert int(scalars["skipped"]) == 0
  after, scalars = step(state, FROZEN, spike, KEY)
  assert int(scalars["skipped"]) == 1
  assert same(after.params, state.params) and same(after.ema, state.ema)
  new = state._replace(guard=train_step.forget(state.guard))
  new, scalars = step(new, FROZEN, spike, KEY)
  assert int(scalars["skipped"]) == 0, "another stage has other losses"
  assert int(new.guard.accepted) == int(state.guard.accepted) + 1
  unguarded, scalars = stepper(TXS, sigmas=0.0)(state, FROZEN, spike, KEY)
  assert int(scalars["skipped"]) == 0
  assert not same(unguarded.params, state.params)


def test_losses_that_stay_high_are_taken_after_a_while(mesh):
  """A harder kind of data must not be skipped for ever."""
  step, state = stepper(TXS), start(TXS, mesh)
  for i in range(130):
    state, _ = step(state, FROZEN, batch_of(seed=i), KEY)
  hard = batch_of()
  hard["y"] = hard["y"] * 4
  skipped = []
  for _ in range(60):
    state, scalars = step(state, FROZEN, hard, KEY)
    skipped.append(int(scalars["skipped"]))
  assert skipped[0] == 1
  assert skipped[-1] == skipped[-20] < 40


def test_average_follows(mesh):
  state, step = start(TXS, mesh), stepper(TXS, decay=0.5)
  want = np.asarray(state.params["net"]["kernel"])
  for i in range(12):
    state, _ = step(state, FROZEN, batch_of(seed=i), KEY)
    decay = min(0.5, (1 + i) / (10 + i))
    new = np.asarray(state.params["net"]["kernel"])
    want = decay * want + (1 - decay) * new
  np.testing.assert_allclose(state.ema["net"]["kernel"], want, rtol=1e-5)


def test_each_step_has_a_key_of_its_own(mesh):
  def noisy(params, frozen, batch, key, step):
    draw = jax.random.uniform(key)
    return jax.tree.map(jnp.zeros_like, params), {"loss": draw}

  state, losses = start(TXS, mesh), []
  for _ in range(3):
    state, scalars = stepper(TXS, grads=noisy)(state, FROZEN, batch_of(), KEY)
    losses.append(float(scalars["loss"]))
  assert len(set(losses)) == 3


LAYOUTS = [
  {"data": 8},
  {"fsdp": 4, "tensor": 2},
  {"data": 2, "fsdp": 2, "tensor": 2},
]


@pytest.mark.parametrize("sizes", LAYOUTS, ids=str)
def test_every_layout_starts_alike_and_steps_alike(mesh, sizes):
  many = sharding.make_mesh(sizes)
  one, other = start(TXS, mesh), start(TXS, many)
  assert same(one, other), "the first weights do not depend on the mesh"
  batch = jax.device_get(batch_of())
  want, _ = stepper(TXS)(one, FROZEN, batch, KEY)
  placed = train_step.place_batch(batch, many, 0, 8)
  frozen = jax.device_put(FROZEN, jax.devices()[0])
  with sharding.use(many):
    got, _ = stepper(TXS)(other, jax.device_get(frozen), placed, KEY)
  np.testing.assert_allclose(
    got.params["net"]["kernel"], want.params["net"]["kernel"], rtol=1e-5
  )


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adafactor", "sgd"])
def test_any_optimiser_in_any_layout(name):
  """The state of some is not made of arrays like the parameters."""
  # Factored state is for large kernels alone.
  options = {"min_dim_size_to_factor": 4} if name == "adafactor" else {}
  config = optimizers.OptimizerConfig(name, options)
  txs = {"net": optimizers.optimizer(config, optax.constant_schedule(1e-2))}
  kernels = []
  for sizes in (None, {"data": 2, "fsdp": 2, "tensor": 2}):
    each = sharding.make_mesh(sizes)
    batch = train_step.place_batch(jax.device_get(batch_of()), each, 0, 8)
    with sharding.use(each):
      state, scalars = stepper(txs)(start(txs, each), FROZEN, batch, KEY)
    assert not scalars["skipped"]
    kernels.append(np.asarray(state.params["net"]["kernel"]))
  assert np.abs(kernels[0] - np.asarray(make(KEY)["net"]["kernel"].value)).max()
  np.testing.assert_allclose(kernels[1], kernels[0], atol=1e-5)


def test_state_is_split_over_devices():
  many = sharding.make_mesh({"fsdp": 4, "tensor": 2})
  state = start(TXS, many)
  shard = state.params["net"]["kernel"].addressable_shards[0].data.shape
  assert shard == (1, 4)
  for leaf in jax.tree.leaves(state.opt):
    if leaf.ndim == 2:
      assert leaf.addressable_shards[0].data.shape == (1, 4)


def test_batch_that_does_not_divide_the_mesh():
  many = sharding.make_mesh({"data": 4})
  with pytest.raises(errors.InputError, match=r"6 .* 4 parts .*nearest is 8"):
    train_step.place_batch(batch_of(6), many, 0, 6)


def test_a_batch_knows_its_place(mesh):
  batch = train_step.place_batch({"x": np.zeros((4, 2))}, mesh, 0, 4)
  assert batch["index"].tolist() == [0, 1, 2, 3]
  assert batch["count"].tolist() == [4] * 4


def test_what_is_not_trained_stays():
  """Neither gradients, nor decay, nor what the optimiser remembers move it."""

  def make(key):
    box = nn.LogicallyPartitioned
    draw = lambda i: jax.random.normal(jax.random.fold_in(key, i), (4, 8))
    kernel = lambda i: {"kernel": box(draw(i), ("embed", "mlp"))}
    return {"net": {"one": kernel(0), "two": kernel(1)}}

  def gradients(params, frozen, batch, key, step):
    def loss(params):
      net = params["net"]
      kernel = net["one"]["kernel"] + net["two"]["kernel"]
      return jnp.mean(jnp.square(batch["x"] @ kernel - batch["y"]))

    value, grads = jax.value_and_grad(loss)(params)
    return grads, {"loss": value}

  txs = {"net": optax.adamw(0.1, weight_decay=0.5)}
  init = functools.partial(train_step.init, make, ("net",), txs)
  mesh = sharding.make_mesh(None)
  _, places = train_step.shapes_and_places(init, mesh)
  state = train_step.create(init, places, KEY, mesh)
  step = functools.partial(
    train_step.step,
    gradients=gradients,
    txs=txs,
    rate=optax.constant_schedule(0.1),
    parts=1,
    decay=0.9,
    sigmas=0.0,
  )
  some = {"net": {"one": {"kernel": True}, "two": {"kernel": False}}}
  both, _ = step(state, {}, batch_of(), KEY)
  after, scalars = step(both, {}, batch_of(seed=1), KEY, trained=some)
  before, now = both.params["net"], after.params["net"]
  np.testing.assert_array_equal(now["two"]["kernel"], before["two"]["kernel"])
  assert np.any(now["one"]["kernel"] != before["one"]["kernel"])
  _, whole = step(both, {}, batch_of(seed=1), KEY)
  assert float(scalars["grad_norm"]) < float(whole["grad_norm"])
