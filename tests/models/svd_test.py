"""What must hold of SVD's networks, whatever their weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.parity import compare
from vidgen import errors, sharding, weights
from vidgen.models.svd import transformer, unet, vae

CONFIG = unet.UnetConfig(
  block_out_channels=(32, 64),
  down_block_types=(unet.CROSS_DOWN, unet.DOWN),
  up_block_types=(unet.UP, unet.CROSS_UP),
  num_attention_heads=(2, 4),
  cross_attention_dim=16,
  addition_time_embed_dim=8,
  projection_class_embeddings_input_dim=24,
  layers_per_block=1,
)
# Compiles in half the time; the arithmetic is the same.
_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


pytestmark = pytest.mark.usefixtures("compiled_fast")


def normal(*shape):
  rng = np.random.default_rng(sum(shape))
  return jnp.asarray(rng.standard_normal(shape, np.float32))


def inputs(batch=2, frames=3, tokens=2):
  return {
    "latents": normal(batch, frames, 8, 8, CONFIG.in_channels),
    "timestep": jnp.linspace(1.6, -1.5, batch),
    "context": normal(batch, tokens, CONFIG.cross_attention_dim),
    "vector": normal(batch, 1, 24),
  }


def is_temporal(path):
  return any(t in path for t in ("/temporal", "/blend/", "/frames/"))


def randomized(params, keep=lambda path: False):
  """Draws all parameters but those to keep."""
  leaves = weights.flatten(jax.tree.map(np.asarray, params))
  rng = np.random.default_rng(0)
  for path, leaf in leaves.items():
    if not keep(path):
      draw = rng.standard_normal(leaf.shape, np.float32)
      fan_in = max(leaf.size // leaf.shape[-1], 1)
      leaves[path] = leaf + draw * (0.3 if leaf.ndim == 1 else fan_in**-0.5)
  return weights.unflatten(leaves, params)


@pytest.fixture(scope="module")
def initial():
  init = _jit(lambda key: unet.init(CONFIG, key))
  return nn.unbox(init(jax.random.key(0)))


@pytest.fixture(scope="module")
def params():
  """Random ones around scales of one: compiling `init` takes seconds."""
  shapes = jax.eval_shape(lambda: unet.init(CONFIG, jax.random.key(0)))
  leaves = weights.flatten(nn.unbox(shapes))
  for path, leaf in leaves.items():
    leaves[path] = np.full(leaf.shape, path.endswith("/scale"), np.float32)
  return randomized(weights.unflatten(leaves, nn.unbox(shapes)))


@functools.cache
def applied(images):
  return _jit(unet.Unet(CONFIG, images=images).apply)


def run(params, *, images=False, **kwargs):
  return applied(images)({"params": params}, **{**inputs(), **kwargs})


@pytest.mark.slow
def test_a_new_video_model_is_its_image_model(initial):
  """Whatever the layers over frames are, and however they are blended."""
  params = randomized(initial, lambda p: is_temporal(p) and "/blend/" not in p)
  want = run(params, images=True)
  assert np.abs(want).max() > 0.1
  assert compare.error(run(params), want) < 1e-6


@pytest.mark.slow
def test_a_new_decoder_is_that_of_images():
  config = vae.VaeConfig(block_out_channels=(32, 32))
  init = _jit(lambda key: vae.init(config, key))
  params = nn.unbox(init(jax.random.key(0)))
  keep = lambda p: "/temporal" in p or "time_out" in p
  params = randomized(params, keep)
  latents = normal(1, 4, 4, 4, 4)
  decode = _jit(
    lambda p, z, chunk: vae.decode(p, config, z, chunk=chunk), static_argnums=2
  )
  # Each frame by itself is an image: nothing flows between them.
  want = decode(params, latents, 1)
  assert compare.error(decode(params, latents, None), want) < 1e-6


def test_images_alone_are_the_image_model(params):
  want = run(params, images=True)
  got = run(params, image_only=jnp.ones((2, 3), bool))
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert compare.error(run(params), want) > 0.01


def test_one_token_is_what_many_alike_are():
  """Attention to one token is out(value(token)): the short way is the long."""
  layer = transformer.CrossAttention(heads=2)
  x, token = normal(2, 3, 5, 8), normal(2, 1, 6)
  variables = nn.unbox(layer.init(jax.random.key(0), x, token))
  short = layer.apply(variables, x, token)
  long = layer.apply(variables, x, jnp.repeat(token, 2, axis=1))
  np.testing.assert_allclose(
    jnp.broadcast_to(short, long.shape), long, atol=1e-6
  )
  kernels = variables["params"]
  want = token @ kernels["value"]["kernel"] @ kernels["out"]["kernel"]
  np.testing.assert_allclose(short[:, 0], want, atol=1e-6)


@pytest.mark.slow
def test_contexts_of_space_and_of_time_are_apart(params):
  both = run(params, time_context=inputs()["context"])
  np.testing.assert_array_equal(both, run(params))
  other = run(params, time_context=normal(2, 4, 16))
  assert compare.error(other, both) > 1e-3


def test_a_vector_of_each_frame(params):
  vector = inputs()["vector"]
  same = run(params, vector=jnp.repeat(vector, 3, axis=1))
  np.testing.assert_allclose(same, run(params), atol=1e-5)
  moved = run(params, vector=vector + jnp.arange(3.0)[:, None])
  assert compare.error(moved, same) > 1e-3


@pytest.mark.slow
def test_computing_again_changes_nothing(params):
  def gradient(remat):
    loss = lambda p: jnp.square(
      unet.Unet(CONFIG, remat=remat).apply({"params": p}, **inputs(1, 2, 1))
    ).sum()
    return _jit(jax.grad(loss))(params)

  want = weights.flatten(gradient("none"))
  for remat in ("full", "dots"):
    got = weights.flatten(gradient(remat))
    for path, leaf in want.items():
      np.testing.assert_allclose(got[path], leaf, rtol=1e-3, atol=1e-3)
  # To one token all attend alike: who asks does not matter.
  dead = [p for p in want if "cross_attention/query" in p]
  assert dead and all(not want[path].any() for path in dead)


LAYOUTS = {
  "cfg x context": {"cfg": 2, "context": 4},
  "ring x tensor": {"ring": 2, "tensor": 2},
  "fsdp": {"fsdp": 8},
}


@pytest.mark.parametrize(
  "layout",
  [
    "cfg x context",
    pytest.param("ring x tensor", marks=pytest.mark.slow),
    pytest.param("fsdp", marks=pytest.mark.slow),
  ],
)
def test_a_mesh_is_one_device(params, layout):
  want = run(params)
  mesh = sharding.make_mesh(LAYOUTS[layout])
  boxed = jax.eval_shape(lambda key: unet.init(CONFIG, key), jax.random.key(0))
  placed = jax.device_put(params, sharding.shardings(boxed, mesh))
  with sharding.use(mesh):
    apply = _jit(unet.Unet(CONFIG).apply)
    got = apply({"params": placed}, **inputs())
  compare.check("SVD UNet", layout, got, want, 1e-5)


@pytest.mark.parametrize(
  ("fields", "match"),
  [
    ({"layers_per_block": [2, 2]}, "layers_per_block"),
    ({"block_out_channels": [32, "64"]}, "list of int"),
    ({"num_attention_heads": [5, 10]}, "one a level"),
    ({"down_block_types": ["DownBlock2D"]}, "down_block_types"),
    ({"num_attention_heads": 7}, "7 heads"),
  ],
)
def test_unet_configs_that_are_not_read(fields, match):
  with pytest.raises(errors.InputError, match=match):
    unet.unet_config(fields)


@pytest.mark.parametrize(
  ("fields", "match"),
  [
    ({"_class_name": "AutoencoderKLCogVideoX"}, "unknown autoencoder"),
    ({"norm_num_groups": 16}, "norm_num_groups"),
    ({"layers_per_block": 1}, "layers_per_block"),
    ({"block_out_channels": [48]}, "multiples of 32"),
  ],
)
def test_vae_configs_that_are_not_read(fields, match):
  with pytest.raises(errors.InputError, match=match):
    vae.vae_config(fields)


def test_sizes_that_are_not_encoded():
  config = vae.VaeConfig(block_out_channels=(32, 32))
  with pytest.raises(errors.InputError, match="multiples of 2"):
    vae.encode({}, config, jnp.zeros((1, 1, 7, 8, 3)))


def test_numbers_are_embedded_in_float32():
  numbers = jnp.array([[6.0, 255.0, 0.02]], jnp.bfloat16)
  got = unet.embed_numbers(numbers.astype(jnp.float32), 8)
  assert got.dtype == jnp.float32 and got.shape == (1, 24)
  np.testing.assert_allclose(got[0, 8], np.cos(255.0), atol=1e-4)
