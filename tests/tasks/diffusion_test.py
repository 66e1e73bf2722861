"""What the diffusion task writes, and what it counts."""

import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests import tiny_training
from vidgen import adapters, errors, sharding, tensorfile
from vidgen.data import buckets
from vidgen.tasks import diffusion


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return tiny_training.checkpoint(tmp_path_factory.mktemp("checkpoint"))


def tensors(folder, name):
  files = tensorfile.open_folder(pathlib.Path(folder) / name)
  return {key: files.read(key) for key in files}


def test_the_autoencoder_is_published_as_exact_as_it_encoded(
  checkpoint, tmp_path
):
  """To the bit, though the rest is published in bfloat16."""
  config = tiny_training.config("data", checkpoint).task
  config = tiny_training.replace(
    config, dtype="bfloat16", vae_dtype="float32", train_text_encoder=True
  )
  mesh = sharding.make_mesh(None)
  task = config.build(mesh)
  places = {
    part.name: sharding.shardings(part.shapes(), mesh)
    for part in task.model.components
    if part.name in task.groups
  }
  params = task.start(places, jax.random.key(0))
  task.publish(tmp_path / "out", params, task.frozen(mesh))
  source = tensors(checkpoint, "vae")
  got = tensors(tmp_path / "out", "vae")
  assert got.keys() == source.keys()
  for name, tensor in got.items():
    assert tensor.dtype == np.float32
    np.testing.assert_array_equal(tensor, source[name])
  for name in ("transformer", "text_encoder"):
    kinds = {x.dtype for x in tensors(tmp_path / "out", name).values()}
    assert kinds == {np.dtype(ml_dtypes.bfloat16)}


def names(shapes):
  return jax.tree.map(lambda x: (x.shape, x.dtype), shapes)


@pytest.mark.parametrize("sampled", [False, True])
def test_a_run_from_caches_keeps_no_encoder_that_it_does_not_read(
  checkpoint, sampled, tmp_path
):
  """And publishes it, to the bit, as if it had."""
  config = tiny_training.config("data", checkpoint).task
  if sampled:
    settings = diffusion.SampleSettings(prompts=("a",))
    config = tiny_training.replace(config, samples=settings)
  mesh = sharding.make_mesh(None)
  task = config.build(mesh)
  every, cached = task.frozen(mesh), task.frozen(mesh, cached=True)
  want = {*every} if sampled else {"empty_text"}
  assert {*cached} == want < {*every, "more"}
  shapes = task.frozen_shapes(mesh, cached=True)
  assert names(shapes) == names(cached)
  np.testing.assert_array_equal(cached["empty_text"], every["empty_text"])
  # Prompts make no samples where a run is asked for none.
  assert {*task.frozen(mesh, cached=True, sampled=False)} == {"empty_text"}
  denoiser = {part.name: part for part in task.model.components}["transformer"]
  places = sharding.shardings(denoiser.shapes(), mesh)
  params = task.start({"transformer": places}, jax.random.key(0))
  for name, frozen in (("every", every), ("cached", cached)):
    task.publish(tmp_path / name, params, frozen)
  for path in sorted((tmp_path / "every").rglob("*.safetensors")):
    other = tmp_path / "cached" / path.relative_to(tmp_path / "every")
    assert path.read_bytes() == other.read_bytes()


def test_an_encoder_of_given_images_stays(tmp_path):
  checkpoint = tiny_training.checkpoint(tmp_path, "1.5-5b-i2v")
  mesh = sharding.make_mesh(None)
  task = tiny_training.config("data", checkpoint).task.build(mesh)
  assert {*task.frozen(mesh, cached=True)} == {"vae", "empty_text"}


def test_a_lora_saves_the_gradients_of_weights(checkpoint):
  mesh = sharding.make_mesh(None)
  bucket = buckets.Bucket(9, 32, 32, 2)
  full = tiny_training.config("data", checkpoint).task
  lora = tiny_training.replace(full, lora=adapters.LoraConfig(rank=4))
  model = full.build(mesh).model
  forward, weights = (
    2 * model.flops(9, 32, 32, by_weights=by) for by in (False, True)
  )
  assert 0 < weights < forward
  assert full.build(mesh).flops(bucket) == 3 * forward
  assert lora.build(mesh).flops(bucket) == 3 * forward - weights


def test_the_autoencoder_computes_in_its_own_dtype(checkpoint):
  """Without a cache as with one, to the bit of what a cache would hold."""
  config = tiny_training.config(
    "data", checkpoint, noised={"sample_posterior": False}
  ).task
  config = tiny_training.replace(config, dtype="bfloat16", vae_dtype="float32")
  mesh = sharding.make_mesh(None)
  task = config.build(mesh)
  frozen = task.frozen(mesh)
  video = np.random.default_rng(0).integers(0, 256, (1, 9, 32, 32, 3), np.uint8)
  video = jnp.asarray(video)
  mean, _ = task.posterior(frozen, video)
  x0 = task._loss._latents(frozen, {"video": video}, None)
  np.testing.assert_array_equal(x0, task.model.pad_latents(mean))
  rough = tiny_training.replace(config, vae_dtype=None).build(mesh)
  other = rough._loss._latents(rough.frozen(mesh), {"video": video}, None)
  assert np.abs(other - x0).max() > 1e-3


def test_the_autoencoder_is_not_trained_along(checkpoint):
  config = tiny_training.config("data", checkpoint).task
  config = tiny_training.replace(config, train_along=("vae",))
  with pytest.raises(errors.InputError, match="gives vae no gradient"):
    config.build(sharding.make_mesh(None))
