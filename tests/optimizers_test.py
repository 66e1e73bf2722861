"""Rates in stages, weight decay where it belongs, averages."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vidgen import errors, optimizers

Rate, Config = optimizers.Rate, optimizers.OptimizerConfig


def test_rate_of_stages():
  rate = optimizers.schedule(
    [
      (100, Rate(1e-3, warmup_steps=10, final=0.1)),
      (50, Rate(4e-4, warmup_steps=20, schedule="constant")),
      (50, Rate(2e-4, schedule="linear")),
    ]
  )
  at = lambda step: float(rate(step))
  np.testing.assert_allclose(at(0), 1e-4, rtol=1e-5)
  np.testing.assert_allclose(at(10), 1e-3, rtol=1e-5)
  half = 1e-3 * (0.1 + 0.9 * 0.5)
  np.testing.assert_allclose(at(55), half, rtol=1e-5)
  # The next stage warms up from where the last one ended.
  np.testing.assert_allclose(at(100), 1e-4, rtol=1e-5)
  np.testing.assert_allclose(at(120), 4e-4, rtol=1e-5)
  np.testing.assert_allclose(at(149), 4e-4, rtol=1e-5)
  np.testing.assert_allclose(at(150), 2e-4, rtol=1e-5)
  np.testing.assert_allclose(at(175), 1e-4, rtol=1e-5)
  np.testing.assert_allclose(at(200), 0, atol=1e-9)


def test_a_stage_that_is_all_warm_up_ends_at_its_peak():
  warm = (10, Rate(1e-3, warmup_steps=10))
  rate = optimizers.schedule([warm, (20, Rate(1e-3, warmup_steps=10))])
  np.testing.assert_allclose(
    [float(rate(step)) for step in (10, 15, 20)], 1e-3, rtol=1e-5
  )


@pytest.mark.parametrize(
  "steps, fields, word",
  [
    (0, {}, "0 steps"),
    (10, {"peak": 0.0}, "above 0"),
    (10, {"peak": float("nan")}, "above 0"),
    (10, {"schedule": "cubic"}, "cubic"),
    (10, {"warmup_steps": 11}, "warmup_steps"),
  ],
)
def test_bad_rates(steps, fields, word):
  with pytest.raises(errors.InputError, match=word):
    optimizers.schedule([(steps, Rate(**fields))])


def test_decay_is_for_kernels_alone():
  params = {"dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones((3,))}}
  config = Config(options={"weight_decay": 0.1}, clip_norm=None)
  tx = optimizers.optimizer(config, optax.constant_schedule(0.5))
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(zeros, tx.init(params), params)
  np.testing.assert_allclose(updates["dense"]["kernel"], -0.05)
  np.testing.assert_allclose(updates["dense"]["bias"], 0)


@pytest.mark.parametrize(
  "name", ["adamw", "lion", "nadamw", "adamaxw", "novograd"]
)
@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.0}])
def test_no_decay_is_none(name, options):
  """optax has a decay of its own, where none is given."""
  config = optimizers.OptimizerConfig(name, options)
  tx = optimizers.optimizer(config, lambda _: 1.0)
  params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
  updates, _ = tx.update(
    jax.tree.map(jnp.zeros_like, params), tx.init(params), params
  )
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))


def test_gradients_are_clipped_by_their_global_norm():
  config = Config(name="sgd", options={}, clip_norm=1.0)
  tx = optimizers.optimizer(config, optax.constant_schedule(1.0))
  grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
  updates, _ = tx.update(grads, tx.init(grads), grads)
  np.testing.assert_allclose(updates["a"], -0.6, rtol=1e-6)
  np.testing.assert_allclose(updates["b"], -0.8, rtol=1e-6)


def test_scale_is_a_factor_of_the_rate():
  config = Config(name="sgd", options={}, clip_norm=None, scale=3.0)
  tx = optimizers.optimizer(config, optax.constant_schedule(0.1))
  params = jnp.ones(1)
  updates, _ = tx.update(params, tx.init(params), params)
  np.testing.assert_allclose(updates, -0.3, rtol=1e-6)


@pytest.mark.parametrize(
  "fields, word",
  [
    ({"name": "adamww"}, "adamww"),
    ({"options": {"beta": 1}}, "beta"),
    ({"name": "sgd", "options": {"weight_decay": 0.1}}, "weight_decay"),
  ],
)
def test_unknown_optimisers_and_options(fields, word):
  with pytest.raises(errors.InputError, match=word):
    optimizers.optimizer(Config(**fields), optax.constant_schedule(0.1))


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor", "muon"])
def test_any_optimiser_of_optax(name):
  tx = optimizers.optimizer(
    Config(name=name, options={}), optax.constant_schedule(0.1)
  )
  params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
  updates, _ = tx.update(params, tx.init(params), params)
  assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(updates))
  assert jnp.abs(updates["kernel"]).max() > 0


def test_muon_of_a_stack_is_muon_of_each_block():
  tx = optimizers.optimizer(
    Config("muon", {"weight_decay": 0.1}, None), optax.constant_schedule(0.1)
  )
  rng = np.random.default_rng(0)
  stack, grads = (
    {
      "kernel": rng.standard_normal((3, 8, 4), np.float32),
      "bias": rng.standard_normal((3, 4), np.float32),
    }
    for _ in range(2)
  )
  one = lambda tree, i: jax.tree.map(lambda x: x[i], tree)

  def update(params, grads):
    return tx.update(grads, tx.init(params), params)[0]

  got = update({"blocks": stack}, {"blocks": grads})["blocks"]
  for i in range(3):
    want = update(one(stack, i), one(grads, i))
    for name in want:
      np.testing.assert_allclose(got[name][i], want[name], 1e-5, 1e-6)
  # The orthogonal factor, nearly: its singular values are about 1.
  plain = got["kernel"][0] + 0.1 * 0.1 * stack["kernel"][0]
  values = np.linalg.svd(plain, compute_uv=False)
  np.testing.assert_allclose(values, values[0], rtol=0.5)


def test_average_in_closed_form():
  """Warmed up by (1 + n) / (10 + n), then the decay itself."""
  average, value = jnp.zeros(1), jnp.ones(1)
  want = 0.0
  for n in range(300):
    average = optimizers.ema(average, value, jnp.int32(n), 0.9)
    decay = min(0.9, (1 + n) / (10 + n))
    want = decay * want + (1 - decay)
    np.testing.assert_allclose(average, want, rtol=1e-4)


def test_average_of_what_does_not_move_keeps_its_bits():
  value = jnp.asarray(np.random.default_rng(0).standard_normal(100), "float32")
  average = optimizers.ema(value, value, jnp.int32(5), 0.999)
  assert (np.asarray(average) == np.asarray(value)).all()
