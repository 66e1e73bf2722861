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
from vidgen.models import cogvideox, svd
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_normalised_start_and_its_frozen_encoder(data_dir, tmp_path):
  config = config_of(data_dir)
  config.task.samples = None
  config = dataclasses.replace(config, num_steps=1, sample_every=0)
  first = train.run(config, tmp_path / "first")
  stage = tiny_training.stage(data_dir, 2, 2, shapes=((1, 32, 32),))
  again = dataclasses.replace(
    config.task,
    checkpoint=str(first),
    init_past_taps="random",
    normalise=stage.data,
    loss=autoencoder.AutoencoderLossConfig(
      lpips=0.0, kl=0.0, freeze_encoder=True
    ),
  )
  config = dataclasses.replace(
    config, task=again, stages=(stage,), num_steps=2, ema_decay=0.5
  )
  second = train.run(config, tmp_path / "second")
  encode = lambda folder: np.asarray(
    diffusers.AutoencoderKLCogVideoX.from_pretrained(folder, subfolder="vae")
    .encode(frames_of(stage.data))
    .latent_dist.mean.detach()
  )
  before, after = encode(first), encode(second)
  axes = (0, 2, 3, 4)
  np.testing.assert_allclose(after.mean(axes), 0, atol=0.3)
  np.testing.assert_allclose(after.std(axes), 1, atol=0.3)
  # The same latents but for a scale and a shift: training moved neither.
  for old, new in zip(before.swapaxes(0, 1), after.swapaxes(0, 1), strict=True):
    slope, shift = np.polyfit(old.ravel(), new.ravel(), 1)
    np.testing.assert_allclose(new, slope * old + shift, atol=2e-4)


def frames_of(data):
  """Single frames as torch has them, `b 3 1 H W` in [-1, 1]."""
  batches = list(loader.batches(data, seed=3, start=0, stop=64))
  video = np.concatenate([batch.video for batch in batches])
  return torch.from_numpy(video).permute(0, 4, 1, 2, 3) / 127.5 - 1


@pytest.mark.parametrize("whiten", [0.0, 0.5, 1.0])
def test_a_normal_basis(whiten):
  rng = np.random.default_rng(0)
  mix = rng.normal(size=(3, 3)) * [1, 0.1, 0.01]
  latents = (rng.normal(size=(500, 3)) @ mix.T + 2).astype(np.float32)
  mean, basis = autoencoding.normal_basis(latents, whiten)
  normal = (latents - mean) @ np.linalg.inv(basis)
  np.testing.assert_allclose(normal.mean(0), 0, atol=1e-2)
  covariance = np.cov(normal.T)
  np.testing.assert_allclose(np.diag(covariance), 1, rtol=1e-2)
  spread = np.linalg.cond(covariance)
  if whiten == 0:
    np.testing.assert_allclose(basis, np.diag(latents.std(0)), 1e-2, 1e-6)
  if whiten == 1:
    np.testing.assert_allclose(covariance, np.eye(3), atol=2e-2)
  # Half the way takes the square root of the spread, but for the scaling.
  before = np.linalg.cond(np.corrcoef(latents.T))
  assert spread < 2 * before ** (1 - whiten)


def autoencoder_of(name):
  """A small autoencoder of a family: its image decoder or its temporal one."""
  if name == "cogvideox":
    return cogvideox.create_autoencoder(small(), jnp.float32)
  config = svd.config_small(2)
  fields = {"temporal": name == "svd temporal", "block_out_channels": (32, 32)}
  vae = dataclasses.replace(config.vae, **fields)
  return svd.create_autoencoder(
    dataclasses.replace(config, vae=vae), jnp.float32
  )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cogvideox", "svd image", "svd temporal"])
@pytest.mark.parametrize("turned", [False, True])
def test_the_decoder_undoes_what_normalising_does(name, turned):
  model = autoencoder_of(name)
  params = nn.unbox(model.init(jax.random.key(0)))
  rng = np.random.default_rng(0)
  video = jnp.asarray(rng.uniform(-1, 1, (1, 9, 32, 32, 3)), jnp.float32)
  before = model.encode(params, video)
  want = model.decode(params, before.mean)
  channels = before.mean.shape[-1]
  std = rng.uniform(0.5, 2, channels).astype(np.float32)
  basis = np.diag(std)
  if turned:
    turn = np.linalg.qr(rng.normal(size=(channels, channels)))[0]
    basis = basis @ turn.astype(np.float32)
  change = np.linalg.inv(basis)
  normal = model.normalise(params, np.zeros(channels, np.float32), basis)
  after = model.encode(normal, video)
  np.testing.assert_allclose(after.mean, before.mean @ change, atol=1e-5)
  if not turned:
    logvar = before.logvar - 2 * np.log(std)
    np.testing.assert_allclose(after.logvar, logvar, atol=1e-4)
  got = model.decode(normal, after.mean)
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_whitening_is_of_normalised_latents(data_dir):
  config = config_of(data_dir)
  config.task.whiten = 0.5
  with pytest.raises(errors.InputError, match="with normalise"):
    config.task.build(sharding.make_mesh(None))


def test_only_a_checkpoint_is_normalised(data_dir):
  config = config_of(data_dir)
  config.task.normalise = config.stages[0].data
  with pytest.raises(errors.InputError, match="normalise is for a checkpoint"):
    config.task.build(sharding.make_mesh(None))
