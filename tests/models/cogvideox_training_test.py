"""What training asks of CogVideoX: loss, conditioning, memory, precision."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen as nn

from tests import tiny_cogvideox, tiny_tokenizer
from tests.parallel import equality
from tests.parity import compare, transformer_test
from vidgen import (
  diffusion,
  errors,
  samplers,
  sharding,
  train_step,
  weights,
)
from vidgen.models import base, cogvideox
from vidgen.models.cogvideox import transformer, vae
from vidgen.nn import posterior

pytestmark = pytest.mark.usefixtures("compiled_fast")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  tiny_tokenizer.write(folder)
  return folder


def make(config, words, dtype="float32", **options):
  """A model of a transformer's config and the demo's other networks."""
  demo = cogvideox.config_demo(300)
  demo.vae.scaling_factor = 0.7
  demo.vae.invert_scale_latents = config.patch_size_t is not None
  config = dataclasses.replace(demo, transformer=config)
  return cogvideox.create(config, dtype, words, **options)


SMALL = transformer.TransformerConfig(
  num_layers=2,
  num_attention_heads=2,
  attention_head_dim=16,
  in_channels=4,
  out_channels=4,
  time_embed_dim=32,
  text_embed_dim=32,
  max_text_seq_length=16,
  sample_height=8,
  sample_width=8,
  use_rotary_positional_embeddings=True,
)


@functools.cache
def random_params():
  """Parameters of which none hides at zero."""
  config = dataclasses.replace(cogvideox.config_demo(300), transformer=SMALL)
  component = next(
    c for c in cogvideox.components(config) if c.name == "transformer"
  )
  rng = np.random.default_rng(0)
  scale = lambda x: 0.1 if len(x.shape) < 2 else x.shape[-2] ** -0.5
  draw = lambda x: jnp.asarray(rng.normal(0, scale(x), x.shape), jnp.float32)
  return jax.tree.map(draw, base.shapes(component))


def at(model, timesteps):
  """The levels of a batch, as training draws them."""
  pick = lambda values: jnp.asarray(values[np.array(timesteps)], jnp.float32)
  return diffusion.NoiseLevel(*map(pick, model.levels()))


def batch(channels=4, frames=3, text=(16, 32)):
  normal = np.random.default_rng(1).standard_normal
  draw = lambda *shape: jnp.asarray(normal(shape, np.float32))
  x0, noise = (draw(2, frames, 4, 6, channels) for _ in range(2))
  return x0, noise, {"text": draw(2, *text)}


def loss(model, params, x0, noise, level, condition):
  x = diffusion.add_noise(x0, noise, level)
  v = model.predict({"transformer": params}, x, level, condition)
  return jnp.mean((v - model.target(x0, noise, level)) ** 2)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_program_does_not_grow_with_the_layers(words, remat):
  """Compiling 42 layers is compiling one: forward and backward."""

  def instructions(layers):
    config = dataclasses.replace(SMALL, num_layers=layers)
    model = make(config, words, remat=remat)
    part = next(c for c in model.components if c.name == "transformer")
    step = jax.jit(jax.value_and_grad(functools.partial(loss, model)))
    x0, noise, condition = batch()
    level = at(model, [7, 851])
    lowered = step.lower(base.shapes(part), x0, noise, level, condition)
    return lowered.as_text().count(" = ")

  assert instructions(42) <= 1.02 * instructions(2)


@pytest.mark.parametrize("variant", ["5b", "1.5-5b-i2v"])
def test_loss_and_gradients_are_those_of_upstream(variant, words, tmp_path):
  """CogVideo's finetune/models/cogvideox_t2v/lora_trainer.py, on diffusers."""
  module = tiny_cogvideox.transformer(variant)
  scheduler = tiny_cogvideox.scheduler(variant, "DPM")
  config, params = transformer_test.load(module, tmp_path)
  model = make(config, words)
  x0, noise, condition = batch(frames=4, text=(32, 32))
  if variant.endswith("i2v"):
    condition["image"] = x0[:, :1] * 0.5 + 0.1
  timesteps = [7, 851]
  got, gradients = jax.jit(jax.value_and_grad(functools.partial(loss, model)))(
    params, x0, noise, at(model, timesteps), condition
  )

  to_torch = lambda x: torch.from_numpy(np.array(x)).permute(0, 1, 4, 2, 3)
  t = torch.tensor(timesteps)
  latent = to_torch(x0)
  noisy = inputs = scheduler.add_noise(latent, to_torch(noise), t)
  if "image" in condition:
    image = torch.zeros_like(latent)
    image[:, :1] = to_torch(condition["image"])
    inputs = torch.cat([noisy, image], dim=2)
  output = module(
    inputs,
    torch.from_numpy(np.array(condition["text"])),
    t,
    ofs=torch.full((1,), 2.0) if config.ofs_embed_dim else None,
    image_rotary_emb=transformer_test.rotary(module, x0.shape[1:4]),
  ).sample
  x0_hat = scheduler.get_velocity(output, noisy, t)
  weight = 1 / (1 - scheduler.alphas_cumprod[t]).reshape(-1, 1, 1, 1, 1)
  want = (weight * (x0_hat - latent) ** 2).mean()
  want.backward()
  # Upstream divides by what it has multiplied with: 1 - alpha² is small.
  assert float(got) == pytest.approx(want.item(), rel=1e-4)
  table = cogvideox.components(model.config)[1].table
  exported = dict(weights.export(gradients, table))
  theirs = {k: p.grad.numpy() for k, p in module.named_parameters()}
  assert exported.keys() == theirs.keys()
  scale = max(np.abs(g).max() for g in theirs.values())
  for name, gradient in theirs.items():
    difference = np.abs(exported[name] - gradient).max()
    assert difference < 1e-3 * np.abs(gradient).max() + 1e-6 * scale, name


@pytest.mark.parametrize("variant", ["2b", "5b"])
def test_levels_and_target_are_diffusers(variant, words):
  scheduler = tiny_cogvideox.scheduler(variant)
  config = cogvideox.config_2b() if variant == "2b" else cogvideox.config_5b()
  model = cogvideox.create(config, "float32", words)
  levels = model.levels()
  assert {x.dtype for x in levels} == {np.dtype(np.float64)}
  alpha2 = scheduler.alphas_cumprod.numpy()
  np.testing.assert_allclose(levels.alpha**2, alpha2, atol=1e-6)
  np.testing.assert_array_equal(levels.timestep, np.arange(1000))
  assert (levels.alpha[-1], levels.sigma[-1]) == (0, 1)
  x0, noise, _ = batch()
  timesteps = [0, 999]
  want = scheduler.get_velocity(
    *(torch.from_numpy(np.array(x)) for x in (x0, noise)),
    torch.tensor(timesteps),
  )
  got = model.target(x0, noise, at(model, timesteps))
  np.testing.assert_allclose(got, want.numpy(), atol=1e-5)
  # What denoising makes of the target is the clean sample again.
  level = at(model, timesteps)
  x = diffusion.add_noise(x0, noise, level)
  np.testing.assert_allclose(diffusion.x0_from_v(x, got, level), x0, atol=1e-5)


def test_each_sample_has_its_own_level(words):
  model, params = make(SMALL, words), {"transformer": random_params()}
  x, _, condition = batch()
  predict, denoise = jax.jit(model.predict), jax.jit(model.denoise)
  both = predict(params, x, at(model, [3, 700]), condition)
  for i, timestep in enumerate([3, 700]):
    level = at(model, timestep)
    one = {"text": condition["text"][i : i + 1]}
    alone = predict(params, x[i : i + 1], level, one)
    assert compare.error(both[i], alone[0]) < 1e-5
    x0 = denoise(params, x[i : i + 1], level, one)
    want = diffusion.x0_from_v(x[i : i + 1], alone, level)
    assert compare.error(x0, want) < 1e-5


@pytest.mark.slow
def test_remat_changes_memory_alone(words):
  params, (x0, noise, condition) = random_params(), batch()
  tokens = 16 + 3 * 2 * 3
  got, kept, scores = {}, {}, {}
  for remat in transformer.REMATS:
    model = make(SMALL, words, remat=remat)
    level = at(model, [100, 900])
    run = lambda p, m=model, n=level: loss(m, p, x0, noise, n, condition)
    got[remat] = jax.jit(jax.value_and_grad(run))(params)
    residuals = jax.eval_shape(lambda p, f=run: jax.vjp(f, p)[1], params)
    residuals = jax.tree.leaves(residuals)
    kept[remat] = sum(x.size for x in residuals)
    scores[remat] = sum(x.shape[-2:] == (tokens, tokens) for x in residuals)
  for remat in transformer.REMATS:
    # What is computed again is rounded in another order; the bias that all keys
    # share has a gradient of nothing but that.
    assert equality.apart(got[remat], got["none"]) < 1e-6
  sizes = [kept[name] for name in ("full", "attention", "dots", "none")]
  assert sizes == sorted(set(sizes))
  # Attention computes them again in any case.
  assert not any(scores.values())


def test_unroll_changes_nothing(words):
  params, (x0, noise, condition) = random_params(), batch()
  got, loops = {}, {}
  for unroll in (1, SMALL.num_layers):
    model = make(SMALL, words, unroll=unroll)
    level = at(model, [100, 900])
    run = lambda p, m=model, n=level: loss(m, p, x0, noise, n, condition)
    step = jax.jit(jax.value_and_grad(run)).lower(params)
    loops[unroll] = step.as_text().count("stablehlo.while")
    got[unroll] = step.compile()(params)
  assert equality.apart(got[1], got[SMALL.num_layers]) < 1e-6
  # Forward and backward.
  assert loops[1] == loops[SMALL.num_layers] + 2


def test_unknown_remat(words):
  known = "known are none, full, attention, dots"
  with pytest.raises(errors.InputError, match=known):
    make(SMALL, words, remat="some")
  module = transformer.Transformer(SMALL, remat="some")
  with pytest.raises(errors.InputError, match="remat: 'some'"):
    jax.eval_shape(module.init, jax.random.key(0), *_arguments())


def _arguments():
  return jnp.zeros((1, 1, 4, 4, 4)), jnp.zeros((1, 16, 32)), jnp.zeros(1)


def test_float32_parameters_and_bfloat16_arithmetic(words):
  params, (x0, noise, condition) = random_params(), batch()
  values = {}
  for dtype in ("float32", "bfloat16"):
    model = make(SMALL, words, dtype)
    run = functools.partial(loss, model)
    arguments = (params, x0, noise, at(model, [100, 900]), condition)
    values[dtype] = jax.jit(jax.value_and_grad(run))(*arguments)
  v = jax.eval_shape(
    model.predict,
    {"transformer": params},
    x0,
    at(model, [100, 900]),
    condition,
  )
  assert v.dtype == jnp.float32
  flat = lambda tree: np.concatenate([x.ravel() for x in jax.tree.leaves(tree)])
  want, got = (flat(values[dtype]) for dtype in ("float32", "bfloat16"))
  assert {x.dtype.name for x in jax.tree.leaves(values["bfloat16"])} == {
    "float32"
  }
  assert 1e-4 < compare.error(got, want) < 0.05


def _products(jaxpr):
  """Yields all products of a program, those of its inner programs too."""
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      yield equation
    for value in equation.params.values():
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from _products(inner)


def test_blocks_compute_in_bfloat16(words):
  """Every product with a kernel of the blocks has two bfloat16 operands."""
  module = transformer.Transformer(SMALL, dtype=jnp.bfloat16)
  run = lambda params: module.apply({"params": params}, *_arguments())
  products = list(_products(jax.make_jaxpr(run)(random_params()).jaxpr))
  inner = [p for p in products if p.outvars[0].aval.shape == (1, 20, 32)]
  # Query, key, value, out, the second of the feed-forward's.
  assert len(inner) >= 5, products
  for product in inner:
    dtypes = [operand.aval.dtype for operand in product.invars]
    assert dtypes == [jnp.bfloat16, jnp.bfloat16], product


def test_pad_latents(words):
  later = dataclasses.replace(SMALL, patch_size_t=2)
  latents = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 4))
  latents = jnp.asarray(latents, jnp.float32)
  assert np.array_equal(make(SMALL, words).pad_latents(latents), latents)
  got = make(later, words).pad_latents(latents)
  np.testing.assert_array_equal(got[:, 1:], latents)
  np.testing.assert_array_equal(got[:, 0], latents[:, 0])
  np.testing.assert_array_equal(make(later, words).pad_latents(got), got)


def test_image_condition(words, monkeypatch):
  """A sample of the posterior, scaled as diffusers' pipelines scale it."""

  def encode(params, config, image, **options):
    del params, config, options
    mean = jnp.tile(image[:, :, ::8, ::8], (1, 1, 1, 1, 2))
    return posterior.Posterior(mean, 0.1 * mean)

  monkeypatch.setattr(vae, "encode", encode)
  params = {"vae": {}}
  image = np.random.default_rng(0).uniform(-1, 1, (2, 1, 16, 16, 3))
  image = jnp.asarray(image, jnp.float32)
  key = samplers.keys(0, np.arange(2, dtype=np.uint32), samplers.POSTERIOR)
  model = make(SMALL, words)
  later = make(dataclasses.replace(SMALL, patch_size_t=2), words)
  mean, logvar = encode(None, None, image)
  noise = samplers.normal(key, mean.shape[1:])
  sample = mean + jnp.exp(logvar / 2) * noise
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  close(model.image_condition(params, image, None), mean * 0.7)
  close(model.image_condition(params, image, key), sample * 0.7)
  close(later.image_condition(params, image, key), sample / 0.7)
  other = later.image_condition(params, image, key, scale=0.25)
  close(other, sample * 0.25)


def test_demo(words):
  config = cogvideox.config_demo(300, num_layers=2)
  assert config.transformer.num_layers == 2 and config.fps == 8
  model = cogvideox.create(config, "bfloat16", words, remat="dots")
  assert isinstance(model, base.Model)
  plan = model.plan(base.Request())
  assert (plan.num_frames, plan.height, plan.width) == (17, 64, 64)
  assert plan.latents == (5, 8, 8, 16) and plan.padding == 0
  mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2})
  for component in model.components:
    sharding.shardings(component.shapes(), mesh)
  struct = lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  v = jax.eval_shape(
    model.predict,
    {c.name: nn.unbox(c.shapes()) for c in model.components},
    struct((2, *plan.latents)),
    at(model, [1, 2]),
    {"text": struct((2, 32, 128))},
  )
  assert v.shape == (2, *plan.latents)


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}])
def test_more_devices_than_heads_begin(mesh):
  """A batch takes them; the one sample of the first weights does not."""
  mesh = sharding.make_mesh(mesh)
  txs = {"transformer": optax.identity()}
  make = functools.partial(
    train_step.init,
    lambda key: {"transformer": transformer.init(SMALL, key)},
    ("transformer",),
    txs,
  )
  _, places = train_step.shapes_and_places(make, mesh)
  state = train_step.create(make, places, jax.random.key(0), mesh)
  want = transformer.init(SMALL, jax.random.key(0))
  want = jax.tree.leaves(nn.unbox(want))
  got = jax.tree.leaves(state.params["transformer"])
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)
