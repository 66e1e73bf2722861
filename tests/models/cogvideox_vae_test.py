"""The autoencoder by itself: config, weights, memory, chunks and tiles."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn

from vidgen import errors, sharding, weights
from vidgen.models.cogvideox import chunks, vae, vae_weights

_jit = lambda f: jax.jit(
  f, compiler_options={"xla_backend_optimization_level": 0}
)


@pytest.fixture(scope="module")
def config():
  return vae.VaeConfig(
    block_out_channels=(4, 4),
    norm_num_groups=2,
    # One resnet per block of the decoder, none but the middle's before.
    layers_per_block=0,
    latent_channels=4,
    temporal_compression_ratio=2,
  )


@pytest.fixture(scope="module")
def params(config):
  run = lambda key: nn.unbox(vae.init(config, key))
  return _jit(run)(jax.random.key(0))


def _bytes(video):
  return jnp.uint8(jnp.round(127.5 * (jnp.clip(video, -1, 1) + 1)))


def test_config_takes_upstreams_defaults():
  with torch.device("meta"):
    published = dict(diffusers.AutoencoderKLCogVideoX().config)
  assert vae.vae_config({}) == vae.vae_config(published) == vae.VaeConfig()
  published |= {"invert_scale_latents": True, "scaling_factor": 0.7}
  config = vae.vae_config(published)
  assert config.invert_scale_latents and config.scaling_factor == 0.7


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("use_quant_conv", True),
    ("use_post_quant_conv", True),
    ("shift_factor", 0.1),
    ("latents_mean", [0.0] * 16),
    ("act_fn", "gelu"),
    ("down_block_types", ["CogVideoXDownBlock3D"]),
    ("temporal_compression_ratio", 3),
    ("temporal_compression_ratio", 16),
    ("norm_num_groups", 48),
  ],
)
def test_config_refuses_what_it_cannot_build(key, value):
  with pytest.raises(errors.InputError, match=key):
    vae.vae_config({key: value})


def test_weight_table_covers_the_published_tensors():
  with torch.device("meta"):
    state = diffusers.AutoencoderKLCogVideoX().state_dict()
  published = {name: tuple(value.shape) for name, value in state.items()}
  boxed = vae.shapes(vae.VaeConfig())
  shapes = nn.unbox(boxed)
  targets = weights.match(published, vae_weights.VAE_TABLE, shapes)
  assert targets.keys() == published.keys()
  back = weights.published_shapes(shapes, vae_weights.VAE_TABLE)
  assert {name: leaf.shape for name, leaf in back.items()} == published
  count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
  assert count(shapes["encoder"]) == 92_215_456
  assert count(shapes["decoder"]) == 123_368_451
  assert count(shapes) == 215_583_907
  mesh = sharding.make_mesh({"fsdp": 2})
  assert len(jax.tree.leaves(sharding.shardings(boxed, mesh))) == len(published)


@pytest.mark.parametrize(
  ("frames", "chunk", "want"),
  [
    (1, 8, (1, 0)),
    (9, 8, (9, 0)),
    (13, 8, (13, 0)),
    (16, 8, (8, 1)),
    (49, 8, (9, 5)),
    (85, 8, (13, 9)),
    (13, 2, (3, 5)),
    (22, 2, (2, 10)),
  ],
)
def test_split_frames(frames, chunk, want):
  assert chunks.split_frames(frames, chunk) == want


def test_memory_does_not_grow_with_the_length(config, params):
  def working_bytes(run, *shape):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    memory = _jit(run).lower(params, x).compile().memory_analysis()
    return memory.temp_size_in_bytes, memory.output_size_in_bytes

  decode = lambda p, z: vae.decode(p, config, z, post=_bytes)
  encode = lambda p, x: vae.encode(p, config, x).mean
  for run, shape, short, long, copies in (
    (decode, (8, 8, 4), 41, 161, 0),
    # The moments, whose first half is the mean.
    (encode, (16, 16, 3), 161, 321, 2),
  ):
    temp, out = working_bytes(run, 1, short, *shape)
    more_temp, more_out = working_bytes(run, 1, long, *shape)
    assert more_out > 1.9 * out
    assert more_temp - temp <= (copies + 0.1) * (more_out - out)


def test_post_is_applied_to_each_chunk(config, params):
  latents = jax.random.normal(jax.random.key(1), (1, 5, 4, 4, 4))
  plain = _jit(lambda p, z: vae.decode(p, config, z))(params, latents)
  got = _jit(lambda p, z: vae.decode(p, config, z, post=_bytes))(
    params, latents
  )
  assert got.dtype == jnp.uint8 and got.shape == plain.shape
  # A chunk is compiled with `post`, so that a value may fall on the other side.
  assert np.abs(np.int32(got) - np.int32(_bytes(plain))).max() <= 1
  assert (np.asarray(got) != np.asarray(_bytes(plain))).mean() < 1e-3


def test_decoding_is_differentiable(config, params):
  """Through the scan and its cache: finite differences along a direction."""
  latents = jax.random.normal(jax.random.key(1), (1, 4, 2, 2, 4))
  toward = jax.random.normal(jax.random.key(2), latents.shape)
  loss = lambda z: jnp.mean(jnp.square(vae.decode(params, config, z)))
  slope = jnp.vdot(_jit(jax.grad(loss))(latents), toward)
  run = _jit(loss)
  step = 1e-2
  ends = run(latents + step * toward) - run(latents - step * toward)
  np.testing.assert_allclose(slope, ends / (2 * step), rtol=0.02)


def test_published_tiles():
  tiling = chunks.default_tiling(480, 720)
  encode = (chunks.Axis(240, 200, 5, 25), chunks.Axis(360, 288, 9, 36))
  decode = (chunks.Axis(30, 25, 40, 200), chunks.Axis(45, 36, 72, 288))
  assert tiling.encode_axes(8) == encode
  assert tiling.decode_axes(8) == decode


def test_tiles_that_do_not_join_are_an_error(config, params):
  for tiling in (chunks.Tiling(35, 40), chunks.Tiling(48, 40, 0.3)):
    with pytest.raises(errors.InputError, match="do not join"):
      vae.decode(params, config, jnp.zeros((1, 1, 99, 99, 4)), tiling=tiling)
    with pytest.raises(errors.InputError, match="do not join"):
      vae.encode(params, config, jnp.zeros((1, 1, 99, 99, 3)), tiling=tiling)


def test_nothing_to_code_is_an_error(config, params):
  with pytest.raises(errors.InputError, match="too few to encode"):
    vae.encode(params, config, jnp.zeros((1, 1, 1, 8, 3)))
  with pytest.raises(errors.InputError, match="nothing to decode"):
    vae.decode(params, config, jnp.zeros((1, 0, 2, 2, 4)))
