"""Networks that start as smaller ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests import tiny_svd_config
from vidgen import checkpoint, errors, publish, sharding, tensorfile, weights
from vidgen.models import base, svd
from vidgen.models.svd import unet
from vidgen.tasks import growth

pytestmark = pytest.mark.usefixtures("compiled_fast")


def tiny(config, **fields):
  return tiny_svd_config.one_level(
    config,
    layers_per_block=1,
    cross_attention_dim=8,
    addition_time_embed_dim=8,
    **fields,
  )


IMAGE = tiny(svd.config_image())
VIDEO = tiny(svd.config_svd(), projection_class_embeddings_input_dim=24)
VIEWS = tiny(svd.config_multiview(), projection_class_embeddings_input_dim=32)


def component(config):
  return next(p for p in svd.components(config) if p.name == "unet")


def write(folder, config):
  """Publishes random weights; returns them."""
  part = component(config)
  rng = np.random.default_rng(0)
  draw = lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32)
  params = jax.tree.map(draw, base.shapes(part))
  configs = svd.published_configs(config)
  publish.publish_component(folder, part, configs, params)
  return params


def grow(folder, config):
  part = component(config)
  mesh = sharding.make_mesh(None)
  places = sharding.shardings(part.shapes(), mesh)
  return growth.load(folder, part, places, jnp.float32, jax.random.key(0))


def run(params, config, vector, *, images=False, frames=3):
  rng = np.random.default_rng(1)
  shape = (1, frames, 4, 4, config.unet.in_channels)
  x = rng.standard_normal((*shape[:-1], 9)).astype(np.float32)
  context = rng.standard_normal((1, 1, 8)).astype(np.float32)
  module = unet.Unet(config.unet, images=images)
  return jax.jit(module.apply)(
    {"params": params},
    x[..., : shape[-1]],
    jnp.full(1, 0.3),
    context,
    vector,
  )


def test_a_video_model_starts_as_its_image_model(tmp_path):
  """Whatever the new channels hold, which stand beside the noisy ones."""
  image = write(tmp_path / "image", IMAGE)
  params = grow(tmp_path / "image", VIDEO)
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
  want = run(image, IMAGE, None, images=True)
  flat = weights.flatten(params)
  # The embedding of numbers is new, and the image model has none.
  for path, leaf in flat.items():
    if path.startswith("vector_embedding/out"):
      flat[path] = jnp.zeros_like(leaf)
  params = weights.unflatten(flat, params)
  got = run(params, VIDEO, jnp.ones((1, 1, 24)))
  assert np.abs(want).max() > 0.1
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_number_more_changes_nothing_yet(tmp_path):
  video = write(tmp_path / "video", VIDEO)
  params = weights.flatten(grow(tmp_path / "video", VIEWS))
  before = weights.flatten(video)
  path = "vector_embedding/in/kernel"
  np.testing.assert_array_equal(params[path][:24], before[path])
  assert params[path].shape[0] == 32 and not params[path][24:].any()
  for other, leaf in before.items():
    if other != path:
      np.testing.assert_array_equal(params[other], leaf)


def test_what_is_no_part_of_it_is_told(tmp_path):
  write(tmp_path / "video", VIDEO)
  home = tmp_path / "video" / "unet"
  files = tensorfile.open_folder(home)
  tensors = {name: files.read(name) for name in files}
  tensors["other.weight"] = np.zeros(3, np.float32)
  (path,) = home.glob("*.safetensors")
  path.unlink()
  shapes = {
    n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in tensors.items()
  }
  tensorfile.write(home, path.stem, shapes, tensors.items())
  with pytest.raises(errors.CorruptError, match="extra: other"):
    grow(tmp_path / "video", VIEWS)


def test_the_orbax_layout_does_not_grow(tmp_path):
  (tmp_path / "unet" / "orbax").mkdir(parents=True)
  with pytest.raises(errors.InputError, match="published layout"):
    grow(tmp_path, VIDEO)


def test_parts_that_are_learnt_anew(tmp_path):
  """The rest is what the files have, to the bit."""
  before = weights.flatten(write(tmp_path / "video", VIDEO))
  part, mesh = component(VIDEO), sharding.make_mesh(None)
  places = sharding.shardings(part.shapes(), mesh)
  params = checkpoint.load_component(
    tmp_path / "video", part, shardings=places, dtype=jnp.float32
  )
  parts = ["vector_embedding", "conv_in/kernel"]
  new = growth.renew(
    part, params, places, parts, jnp.float32, jax.random.key(1)
  )
  fresh = weights.flatten(nn.unbox(jax.jit(part.init)(jax.random.key(1))))
  changed = set()
  for path, leaf in weights.flatten(new).items():
    anew = path.startswith("vector_embedding/") or path == "conv_in/kernel"
    np.testing.assert_array_equal(leaf, (fresh if anew else before)[path])
    changed |= {path} if anew else set()
  assert len(changed) == 5
  for wrong in ("conv", "conv_in/kern", "vector_embedding/in/kernel/x"):
    with pytest.raises(errors.InputError, match=f"no {wrong}; it has.*conv_in"):
      growth.renew(
        part, params, places, [wrong], jnp.float32, jax.random.key(1)
      )
