"""A run of the autoencoder task: samples, a critic, what is published."""

import dataclasses
import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn

from tests import tiny_training
from vidgen import checkpoint, errors, optimizers, sharding, train
from vidgen.data import buckets, loader
from vidgen.models import cogvideox
from vidgen.tasks import autoencoder, autoencoding


def small():
  """A demo model whose autoencoder is smaller still."""
  config = cogvideox.config_demo(171)
  return dataclasses.replace(
    config,
    vae=dataclasses.replace(
      config.vae,
      block_out_channels=(8, 8, 8, 8),
      latent_channels=4,
      norm_num_groups=2,
    ),
  )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  return tiny_training.shapes(tmp_path_factory.mktemp("data"))


def config_of(data_dir, **loss):
  # Metrics look at windows of 11 pixels.
  stage = tiny_training.stage(data_dir, 4, 2, shapes=((1, 32, 32),))
  stage.options = {"freeze_past_taps": True}
  samples = loader.DataConfig(
    data_dir=data_dir,
    split="validation",
    buckets=(buckets.Bucket(9, 32, 32, 2),),
  )
  return train.TrainConfig(
    task=autoencoding.AutoencoderTaskConfig(
      model=small(),
      init_past_taps="zeros",
      loss=autoencoder.AutoencoderLossConfig(lpips=0.0, **loss),
      samples=samples,
    ),
    stages=(stage,),
    optimizers={
      name: optimizers.OptimizerConfig("adam", {})
      for name in ("vae", "discriminator")[: 1 + bool(loss)]
    },
    log_every=1,
    sample_every=3,
    checkpoint_every=3,
  )


@pytest.mark.slow
def test_run_with_a_critic(data_dir, tmp_path):
  config = config_of(
    data_dir,
    adversarial=0.5,
    adversarial_start=2,
    discriminator_features=4,
    discriminator_layers=2,
  )
  published = train.run(config, tmp_path / "run")
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  rows = {row["step"]: row for row in map(json.loads, lines)}
  assert rows[2]["d_loss"] == 0, "steps count from 0: the third has index 2"
  assert rows[3]["d_loss"] > 0
  assert rows[1]["grad_norm"] > 0 == rows[1]["grad_norm_discriminator"]
  assert all(np.isfinite(row["psnr"]) for row in rows.values())
  home = tmp_path / "run" / "samples" / "000000003"
  metrics = json.loads((home / "metrics.json").read_text())
  assert set(metrics["000"]) == {"psnr", "ssim", "flicker", "flicker_original"}
  assert (home / "001.mp4").exists()

  theirs = diffusers.AutoencoderKLCogVideoX.from_pretrained(published / "vae")
  task = config.task.build(sharding.make_mesh(None))
  video = np.zeros((1, 9, 32, 32, 3), np.float32)
  video[:, :, 8:20, 8:20] = 1.0
  params = checkpoint.load_component(published, task._component)
  params = jax.tree.map(jnp.asarray, params)
  ours = task.model.encode(params, jnp.asarray(video)).mean
  with torch.no_grad():
    channels = torch.from_numpy(video.transpose(0, 4, 1, 2, 3).copy())
    want = theirs.encode(channels).latent_dist.mean.numpy()
  want = want.transpose(0, 2, 3, 4, 1)
  error = np.linalg.norm(ours - want) / np.linalg.norm(want)
  assert error < 1e-5


def test_unknown_option_of_a_stage(data_dir, tmp_path):
  config = config_of(data_dir)
  config.stages[0].options = {"adversarial": 1.0}
  with pytest.raises(errors.InputError, match="adversarial"):
    train.run(config, tmp_path / "run")


def test_zeros_for_the_past_need_random_weights(data_dir):
  config = config_of(data_dir)
  config.task.checkpoint = "somewhere"
  with pytest.raises(errors.InputError, match="init_past_taps"):
    config.task.build(sharding.make_mesh(None))


def test_remat_changes_nothing():
  config = small()
  key, video = jax.random.key(0), jnp.zeros((1, 1, 32, 32, 3))
  video = video.at[:, :, 8:20, 8:20].set(0.5)

  def gradients(remat):
    model = cogvideox.create_autoencoder(config, jnp.float32, remat=remat)
    params = nn.unbox(model.init(key))
    loss = lambda p: jnp.abs(model.decode(p, model.encode(p, video).mean)).sum()
    return jax.jit(jax.grad(loss))(params)

  kept, again = gradients(False), gradients(True)
  for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(again), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(a).max())
