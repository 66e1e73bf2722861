"""CLIP's towers against transformers, and what they see against diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.stable_video_diffusion import (
  pipeline_stable_video_diffusion,
)
from flax import linen as nn

from tests import tiny_svd
from tests.parity import compare
from vidgen import errors, tensorfile, weights
from vidgen.encoders import clip, clip_image

TOLERANCE = 1e-5
PIXELS = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
IDS = jax.ShapeDtypeStruct((1, 7), jnp.int32)


def read(module, folder, tower, table, example):
  """Saves the module; returns a function that runs ours with its weights."""
  module.save_pretrained(folder)
  init = jax.eval_shape(tower.init, jax.random.key(0), example)
  shapes = nn.unbox(init)["params"]
  params = weights.load(tensorfile.open_folder(folder), table, shapes)
  run = jax.jit(tower.apply)
  return params, lambda x: run({"params": params}, jnp.asarray(x))


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
  module = tiny_svd.image_encoder()
  config = clip.vision_config(module.config.to_dict())
  folder = tmp_path_factory.mktemp("image_encoder")
  tower = clip.VisionTower(config)
  return module, *read(module, folder, tower, clip.VISION_TABLE, PIXELS)


@pytest.mark.parametrize("batch", [1, 2])
def test_vision(vision, batch):
  module, _, run = vision
  rng = np.random.default_rng(batch)
  x = rng.standard_normal((batch, 224, 224, 3), np.float32)
  with torch.no_grad():
    want = module(torch.from_numpy(x).permute(0, 3, 1, 2)).image_embeds
  compare.check("CLIP", f"vision, batch {batch}", run(x), want, TOLERANCE)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_text(activation, tmp_path):
  module = tiny_svd.text_encoder(hidden_act=activation)
  tower = clip.TextTower(clip.text_config(module.config.to_dict()))
  _, run = read(module, tmp_path, tower, clip.TEXT_TABLE, IDS)
  for length in (7, 77):
    ids = np.random.default_rng(length).integers(1, 98, (2, length))
    ids[0, length // 2] = 99
    ids[0, length // 2 + 1 :] = 0
    with torch.no_grad():
      want = module(torch.from_numpy(ids)).last_hidden_state
    case = f"text, {activation}, {length} tokens"
    compare.check("CLIP", case, run(ids), want, TOLERANCE)


def test_text_with_and_without_the_prefix(tmp_path):
  """The published files have one, those that transformers 5 writes do not."""
  module = tiny_svd.text_encoder()
  tower = clip.TextTower(clip.text_config(module.config.to_dict()))
  params, _ = read(module, tmp_path, tower, clip.TEXT_TABLE, IDS)
  written = {name for name, _ in weights.export(params, clip.TEXT_TABLE)}
  assert written == {f"text_model.{name}" for name in module.state_dict()}
  sizes = {
    name: array.shape for name, array in weights.export(params, clip.TEXT_TABLE)
  }
  weights.match(sizes, clip.TEXT_TABLE, params)


def test_writes_what_transformers_reads(vision):
  module, params, _ = vision
  exported = dict(weights.export(params, clip.VISION_TABLE))
  state = module.state_dict()
  assert exported.keys() == state.keys()
  for name, array in exported.items():
    np.testing.assert_array_equal(array, state[name].numpy(), err_msg=name)


def test_full_size():
  """Counts, and every key of transformers' state dicts."""
  for tower, example, table, make, count in (
    (
      clip.VisionTower(clip.VisionConfig()),
      PIXELS,
      clip.VISION_TABLE,
      lambda fields: transformers.CLIPVisionModelWithProjection(
        transformers.CLIPVisionConfig(**fields)
      ),
      632_076_800,
    ),
    (
      clip.TextTower(clip.TextConfig()),
      IDS,
      clip.TEXT_TABLE,
      lambda fields: transformers.CLIPTextModel(
        transformers.CLIPTextConfig(**fields)
      ),
      340_387_840,
    ),
  ):
    shapes = jax.eval_shape(tower.init, jax.random.key(0), example)
    shapes = nn.unbox(shapes)["params"]
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count
    with torch.device("meta"):
      module = make(vars(tower.config))
    sizes = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    assert weights.match(sizes, table, shapes).keys() == sizes.keys()


def picture(width, height):
  """A PIL image of broad waves and of noise."""
  rng = np.random.default_rng(width)
  y, x = np.mgrid[:height, :width]
  waves = np.sin(x[..., None] / [9, 5, 31] + y[..., None] / [7, 40, 3])
  noise = rng.normal(0, 20, (height, width, 3))
  pixels = np.clip(128 + 80 * waves + noise, 0, 255).astype(np.uint8)
  return PIL.Image.fromarray(pixels)


# Smaller, equal and larger than 224, and either way round.
@pytest.mark.parametrize(
  "size",
  [
    (1024, 576),
    (576, 1024),
    (333, 517),
    (224, 224),
    (225, 449),
    (97, 61),
    (2, 3),
  ],
  ids=str,
)
def test_preprocessing(size):
  image = picture(*size)
  processor = VaeImageProcessor()
  x = processor.numpy_to_pt(processor.pil_to_numpy(image))
  resize = pipeline_stable_video_diffusion._resize_with_antialiasing
  resized = resize(x * 2 - 1, (224, 224))
  got = clip_image.resize_antialiased(
    np.asarray(image, np.float32) / 255 * 2 - 1, (224, 224)
  )
  case = "{}x{}".format(*size)
  want = resized[0].permute(1, 2, 0)
  compare.check("CLIP resize", case, got, want, TOLERANCE)
  want = transformers.CLIPImageProcessor()(
    images=(resized + 1) / 2,
    do_normalize=True,
    do_center_crop=False,
    do_resize=False,
    do_rescale=False,
    return_tensors="pt",
  ).pixel_values[0]
  got = clip_image.preprocess(np.asarray(image))
  want = want.permute(1, 2, 0)
  compare.check("CLIP pixels", case, got, want, TOLERANCE)


def test_floats_are_bytes_over_255():
  image = np.asarray(picture(40, 30))
  np.testing.assert_array_equal(
    clip_image.preprocess(image.astype(np.float32) / np.float32(255)),
    clip_image.preprocess(image),
  )


@pytest.mark.parametrize("shape", [(1, 50, 3), (50, 1, 3)])
def test_a_side_of_one_pixel(shape):
  with pytest.raises(errors.InputError, match="too few"):
    clip_image.preprocess(np.zeros(shape, np.uint8))
