"""The expert DiT against diffusers' CogVideoXTransformer3DModel."""

import dataclasses

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import (
  get_resize_crop_region_for_grid,
)

from tests import tiny_cogvideox
from tests.parity import compare
from vidgen import tensorfile, weights
from vidgen.models import base, cogvideox
from vidgen.models.cogvideox import (
  positions,
  transformer,
  transformer_weights,
)

TOLERANCE = 1e-5


def load(module, folder):
  """Saves a diffusers transformer; returns its config and our parameters."""
  module.save_pretrained(folder)
  names = {f.name for f in dataclasses.fields(transformer.TransformerConfig)}
  fields = {k: v for k, v in module.config.items() if k in names}
  config = transformer.TransformerConfig(**fields)
  component = base.Component(
    "transformer",
    lambda key: transformer.init(config, key),
    transformer_weights.table(config.patch_size_t is not None),
  )
  params = weights.load(
    tensorfile.open_folder(folder), component.table, base.shapes(component)
  )
  return config, params


def rotary(module, shape):
  """The rotary tables as diffusers' pipelines make them."""
  config = module.config
  if not config.use_rotary_positional_embeddings:
    return None
  p, p_t = config.patch_size, config.patch_size_t
  grid = (shape[1] // p, shape[2] // p)
  base_size = (config.sample_height // p, config.sample_width // p)
  if p_t is None:
    return get_3d_rotary_pos_embed(
      config.attention_head_dim,
      get_resize_crop_region_for_grid(grid, base_size[1], base_size[0]),
      grid,
      shape[0],
    )
  return get_3d_rotary_pos_embed(
    config.attention_head_dim,
    None,
    grid,
    (shape[0] + p_t - 1) // p_t,
    grid_type="slice",
    max_size=base_size,
  )


def both(module, folder, shape, batch=2):
  """Runs both networks on random inputs; returns ours and theirs."""
  config, params = load(module, folder)
  generator = torch.Generator().manual_seed(0)
  x = torch.randn(
    (batch, shape[0], config.in_channels, *shape[1:]), generator=generator
  )
  text = torch.randn(
    (batch, config.max_text_seq_length, config.text_embed_dim),
    generator=generator,
  )
  timestep = torch.tensor([999, 319][:batch])
  with torch.no_grad():
    want = module(
      x,
      text,
      timestep,
      ofs=torch.full((1,), 2.0) if config.ofs_embed_dim else None,
      image_rotary_emb=rotary(module, shape),
    ).sample
  apply = jax.jit(transformer.Transformer(config).apply)
  got = apply(
    {"params": params},
    jnp.asarray(x.permute(0, 1, 3, 4, 2).numpy()),
    jnp.asarray(text.numpy()),
    jnp.asarray(timestep.numpy(), jnp.float32),
  )
  return got, want.permute(0, 1, 3, 4, 2).numpy()


@pytest.mark.parametrize("variant", tiny_cogvideox.VARIANTS)
@pytest.mark.parametrize("frames", [2, 3, 4])
def test_transformer(variant, frames, tmp_path):
  module = tiny_cogvideox.transformer(variant)
  if module.config.patch_size_t is not None:
    frames *= 2
  shape = (frames, 8, 12)
  got, want = both(module, tmp_path, shape)
  compare.check("DiT", f"{variant}, {frames} latents", got, want, TOLERANCE)


SIZES = {"landscape": (6, 14), "square": (12, 12), "portrait": (14, 6)}


@pytest.mark.parametrize("variant", ["2b", "5b", "1.5-5b", "1.5-5b-i2v"])
@pytest.mark.parametrize("size", SIZES)
def test_other_sizes(variant, size, tmp_path):
  module = tiny_cogvideox.transformer(variant)
  got, want = both(module, tmp_path, (4, *SIZES[size]), batch=1)
  compare.check("DiT", f"{variant}, {size}", got, want, TOLERANCE)


@pytest.mark.parametrize(
  ("variant", "heads"),
  [
    ("2b", 30),
    pytest.param("5b", 48, marks=pytest.mark.slow),
    pytest.param("1.5-5b-i2v", 48, marks=pytest.mark.slow),
  ],
)
def test_published_width(variant, heads, tmp_path):
  fields = {"ofs_embed_dim": 512} if variant == "1.5-5b-i2v" else {}
  channels = 32 if variant == "1.5-5b-i2v" else 16
  module = tiny_cogvideox.transformer(
    variant,
    num_attention_heads=heads,
    attention_head_dim=64,
    in_channels=channels,
    out_channels=16,
    time_embed_dim=512,
    text_embed_dim=4096,
    max_text_seq_length=226,
    **fields,
  )
  got, want = both(module, tmp_path, (2, 8, 12), batch=1)
  case = f"{variant}, {heads} x 64, depth 2"
  compare.check("DiT", case, got, want, TOLERANCE)


PUBLISHED = {
  "2b": (cogvideox.config_2b, 1_693_783_872, 736),
  "5b": (cogvideox.config_5b, 5_570_283_072, 1024),
  "5b-i2v": (cogvideox.config_5b_i2v, 5_570_479_680 + 54_607_872, 1025),
  "1.5-5b": (cogvideox.config_1_5_5b, 5_570_676_352, 1024),
  "1.5-5b-i2v": (cogvideox.config_1_5_5b_i2v, 5_571_594_880, 1028),
}


@pytest.mark.parametrize("variant", PUBLISHED)
def test_full_size(variant):
  """Counts, and every key of diffusers' state dict, at the published size."""
  make, parameters, keys = PUBLISHED[variant]
  config = make()
  parts = {c.name: c for c in cogvideox.components(config)}
  assert base.count(parts["transformer"]) == parameters
  assert base.count(parts["vae"]) == 215_583_907
  assert base.count(parts["text_encoder"]) == 4_762_310_656

  with torch.device("meta"):
    module = diffusers.CogVideoXTransformer3DModel(
      **dataclasses.asdict(config.transformer)
    )
  published = {k: tuple(v.shape) for k, v in module.state_dict().items()}
  assert len(published) == keys
  shapes = base.shapes(parts["transformer"])
  matched = weights.match(published, parts["transformer"].table, shapes)
  assert matched.keys() == published.keys()


@pytest.mark.parametrize("variant", PUBLISHED)
def test_traces_at_full_size(variant):
  config = PUBLISHED[variant][0]()
  dit = config.transformer
  frames = (dit.sample_frames - 1) // 4 + 1
  frames += frames % (dit.patch_size_t or 1)
  size = (2, frames, dit.sample_height, dit.sample_width)
  struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  parts = {c.name: c for c in cogvideox.components(config)}
  params = jax.tree.map(
    lambda leaf: struct(*leaf.shape), base.shapes(parts["transformer"])
  )
  module = transformer.Transformer(dit, dtype=jnp.bfloat16)
  out = jax.eval_shape(
    module.apply,
    {"params": params},
    struct(*size, dit.in_channels),
    struct(2, 226, 4096),
    jax.ShapeDtypeStruct((2,), jnp.float32),
  )
  assert out.shape == (*size, dit.out_channels)


def test_compile_time_does_not_grow_with_depth():
  """The blocks are one loop: depth changes a trip count, not the program."""

  def program(depth):
    config = transformer.TransformerConfig(
      num_layers=depth, num_attention_heads=1, attention_head_dim=16
    )
    component = base.Component(
      "t", lambda key: transformer.init(config, key), ()
    )
    module = transformer.Transformer(config)
    lowered = jax.jit(module.apply).lower(
      {"params": base.shapes(component)},
      jnp.zeros((1, 1, 4, 4, 16)),
      jnp.zeros((1, 226, 4096)),
      jnp.zeros(1),
    )
    return len(lowered.as_text().splitlines())

  assert program(2) == program(8)


def test_other_length_than_the_learned_table_falls_back_to_sincos(tmp_path):
  """As diffusers does, without a word: a named difference of lengths."""
  module = tiny_cogvideox.transformer("5b-i2v")
  config, params = load(module, tmp_path)
  changed = dict(params, pos_embedding=params["pos_embedding"] + 1)
  apply = jax.jit(transformer.Transformer(config).apply)
  for frames, same in ((3, False), (2, True)):
    x = jnp.zeros((1, frames, 8, 12, config.in_channels))
    inputs = (x, jnp.ones((1, 32, 32)), jnp.ones(1))
    a = apply({"params": params}, *inputs)
    b = apply({"params": changed}, *inputs)
    assert np.array_equal(a, b) == same


def test_published_epsilon():
  """The published configs say 1e-5 where upstream's training code has 1e-6."""
  assert (
    diffusers.CogVideoXTransformer3DModel(
      num_layers=1, num_attention_heads=1, attention_head_dim=16
    ).config.norm_eps
    == transformer.TransformerConfig().norm_eps
  )


@pytest.mark.parametrize("grid", [(32, 32), (45, 30), (30, 46), (20, 64)])
def test_crop_rounds_half_to_even(grid):
  """The rotary grid of 1.0 at sizes whose margins end on a half."""
  _, height, width = positions.rotary_positions((1, *grid), (30, 45), crop=True)
  (top, left), (bottom, right) = get_resize_crop_region_for_grid(grid, 45, 30)
  n, m = grid
  np.testing.assert_allclose(
    height, np.linspace(top, bottom * (n - 1) / n, n), rtol=1e-6
  )
  np.testing.assert_allclose(
    width, np.linspace(left, right * (m - 1) / m, m), rtol=1e-6
  )


def test_query_and_key_norms_have_their_own_epsilon(tmp_path):
  """Queries and keys so small that 1e-6 and 1e-5 differ."""
  module = tiny_cogvideox.transformer("5b")
  with torch.no_grad():
    for block in module.transformer_blocks:
      for layer in (block.attn1.to_q, block.attn1.to_k):
        layer.weight.mul_(0.003)
        layer.bias.mul_(0.003)
  got, want = both(module, tmp_path, (2, 8, 12), batch=1)
  compare.check("DiT", "5b, small queries and keys", got, want, TOLERANCE)
