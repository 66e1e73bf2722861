"""The autoencoder task: its losses, its critic, and diffusers' gradients."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen as nn

from tests import tiny_cogvideox
from vidgen import errors, sharding, weights
from vidgen.data import moving_shapes
from vidgen.metrics import lpips, pixels
from vidgen.models.cogvideox import autoencoder as cogvideox
from vidgen.models.cogvideox import vae, vae_weights
from vidgen.nn import posterior
from vidgen.tasks import autoencoder, noising

# Compiles in half the time; the arithmetic is the same.
_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
_KEY = jax.random.key(5)
_PLAIN = dict(lpips=0.0, kl=0.0)
_CRITIC = dict(
  adversarial=0.5, discriminator_features=4, discriminator_layers=1
)


@dataclasses.dataclass
class _Linear:
  """Maps each pixel's colour to a latent and back by two matrices."""

  logvar: float = -1e4
  last_kernel: tuple[str, ...] = ("out",)

  def init(self, key):
    keys = jax.random.split(key)
    draw = lambda key: jnp.eye(3) + 0.3 * jax.random.normal(key, (3, 3))
    return {"in": draw(keys[0]), "out": draw(keys[1])}

  def encode(self, params, video):
    mean = video @ params["in"]
    return posterior.Posterior(mean, jnp.full_like(mean, self.logvar))

  def decode(self, params, latents):
    return latents @ params["out"]

  def drop_past(self, tree):
    return tree

  def normalise(self, params, mean, basis):
    change = jnp.linalg.inv(basis)
    return {"in": params["in"] @ change, "out": basis @ params["out"]}


_IDENTITY = {"vae": {"in": jnp.eye(3), "out": jnp.eye(3)}}


def _task(model=None, **fields):
  config = autoencoder.AutoencoderLossConfig(**_PLAIN | fields)
  return autoencoder.AutoencoderTask(model or _Linear(), config)


def _batch(frames=3, size=8, count=2, seed=0):
  rng = np.random.default_rng(seed)
  shape = (count, frames, size, size, 3)
  video = rng.integers(0, 256, shape, dtype=np.uint8)
  return {
    "video": jnp.asarray(video),
    "index": jnp.arange(count, dtype=jnp.int32),
  }


def _run(task, params, batch, step=0, frozen=None):
  step = jnp.asarray(step, jnp.int32)
  return _jit(task.gradients)(params, frozen or {}, batch, _KEY, step)


def _init(task, seed=0):
  return _jit(lambda key: nn.unbox(task.init(key)))(jax.random.key(seed))


def _close(got, want, rtol):
  """Compares trees, each leaf relative to its largest entry."""
  got, want = weights.flatten(got), weights.flatten(want)
  assert got.keys() == want.keys()
  for name, leaf in want.items():
    leaf = np.asarray(leaf)
    scale = np.abs(leaf).max() or 1.0
    np.testing.assert_allclose(
      got[name] / scale, leaf / scale, atol=rtol, rtol=0, err_msg=name
    )


# Closed forms.


def test_kl_by_hand():
  shape = (2, 3, 4, 4, 5)
  normal = lambda mean, var: posterior.Posterior(
    jnp.full(shape, mean), jnp.full(shape, np.log(var))
  )
  assert autoencoder.kl(normal(0.0, 1.0)) == 0
  np.testing.assert_allclose(autoencoder.kl(normal(3.0, 1.0)), 4.5, rtol=1e-6)
  want = (0.25 - 1 - np.log(0.25)) / 2
  np.testing.assert_allclose(autoencoder.kl(normal(0.0, 0.25)), want, rtol=1e-6)


def test_kl_is_torchs():
  keys = jax.random.split(_KEY)
  shape = (2, 3, 4, 4, 5)
  mean, logvar = (jax.random.normal(key, shape) for key in keys)
  both = [torch.from_numpy(np.array(x)) for x in (mean, logvar / 2)]
  normal = torch.distributions.Normal(both[0], both[1].exp())
  standard = torch.distributions.Normal(0.0, 1.0)
  want = torch.distributions.kl_divergence(normal, standard).mean().numpy()
  got = autoencoder.kl(posterior.Posterior(mean, logvar))
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_pixel_losses_by_hand():
  config = autoencoder.AutoencoderLossConfig(contrast=6.0)
  # Half of a frame is at 0.5 from its mean, each half at its own side.
  x = jnp.zeros((1, 1, 4, 4, 3)).at[:, :, :2].set(1.0)
  losses = autoencoder.pixel_losses(config, x, x + 0.1)
  np.testing.assert_allclose(losses["l1"], 0.1 * (1 + 6 * 0.5), rtol=1e-5)
  np.testing.assert_allclose(losses["mse"], 0.01 * (1 + 6 * 0.5), rtol=1e-5)
  np.testing.assert_allclose(losses["gradient"], 0.0, atol=1e-6)
  y = x.at[:, :, :, 0].add(0.3)
  losses = autoencoder.pixel_losses(config, x, y)
  np.testing.assert_allclose(losses["gradient"], 0.3 / 3, rtol=1e-5)


def test_no_loss_where_the_video_comes_back():
  task = _task(l1=1.0, mse=1.0, gradient=1.0, contrast=6.0)
  _, scalars = _run(task, _IDENTITY, _batch())
  assert scalars["loss"] == 0
  assert scalars["psnr"] == pixels.MAX_PSNR


def test_terms_add_up():
  fields = dict(l1=0.7, mse=0.2, gradient=0.4, kl=0.05)
  task = _task(_Linear(logvar=-2.0), **fields)
  _, scalars = _run(task, _init(task), _batch())
  want = sum(weight * scalars[name] for name, weight in fields.items())
  np.testing.assert_allclose(scalars["loss"], want, rtol=1e-6)


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("l1", -1.0),
    ("kl", float("nan")),
    ("lpips_net", "resnet"),
    ("adversarial_start", -1),
    ("discriminator_layers", 0),
  ],
)
def test_config_refuses_what_cannot_be(field, value):
  with pytest.raises(errors.InputError, match=field):
    _task(**{field: value})


# Randomness, and a batch in parts.


def test_noise_belongs_to_the_sample():
  task = _task(_Linear(logvar=0.0))
  batch = _batch(count=4)
  params = _init(task)
  whole, _ = _run(task, params, batch)
  order = jnp.array([2, 0, 3, 1])
  turned, _ = _run(task, params, {k: v[order] for k, v in batch.items()})
  _close(turned, whole, 1e-5)
  other, _ = _run(task, params, batch | {"index": batch["index"] + 4})
  assert np.abs(other["vae"]["out"] - whole["vae"]["out"]).max() > 1e-4


def _parts(task, params, batch):
  halves = [{k: v[i::2] for k, v in batch.items()} for i in range(2)]
  runs = [_run(task, params, half) for half in halves]
  return jax.tree.map(lambda a, b: (a + b) / 2, *runs)


def test_a_batch_in_parts_is_the_batch():
  fields = dict(mse=0.5, gradient=0.5, contrast=6.0, kl=0.1)
  task = _task(_Linear(logvar=-1.0), **fields)
  params, batch = _init(task), _batch(count=4)
  whole, parts = _run(task, params, batch), _parts(task, params, batch)
  _close(parts[0], whole[0], 1e-5)
  scalars = [dict(scalars) for _, scalars in (parts, whole)]
  # A mean of logarithms over samples.
  _close(*scalars, 1e-5)


def test_a_critic_at_a_fixed_weight_in_parts_too():
  task = _task(_Linear(logvar=-1.0), **_CRITIC, adaptive=False)
  params, batch = _init(task), _batch(count=4)
  whole, parts = _run(task, params, batch), _parts(task, params, batch)
  _close(parts[0], whole[0], 1e-5)


# The critic.


def _adversary(task, params, batch):
  """The losses of both sides, each written out by itself."""
  x = noising.to_signed(batch["video"])

  def fake(vae_params):
    posterior = task.model.encode(vae_params, x)
    noise = autoencoder.noise(_KEY, batch["index"], posterior.mean.shape[1:])
    latents = posterior.mean + jnp.exp(posterior.logvar / 2) * noise
    return task.model.decode(vae_params, latents)

  judge = lambda p, v: task._discriminator.apply({"params": p}, v)
  nll = lambda p: jnp.abs(fake(p) - x).mean()
  adversarial = lambda p: -judge(params["discriminator"], fake(p)).mean()

  def hinge(p):
    y = jax.lax.stop_gradient(fake(params["vae"]))
    real, made = judge(p, x), judge(p, y)
    return (
      jnp.maximum(1 - real, 0) + jnp.maximum(1 + made, 0).mean()
    ).mean() / 2

  return nll, adversarial, hinge


def test_both_sides_gradients_and_the_adaptive_weight():
  task = _task(_Linear(logvar=-1.0), **_CRITIC)
  params, batch = _init(task), _batch()
  # Logits on both sides of the hinge's corners.
  scale = lambda x: 40 * x
  params["discriminator"] = jax.tree.map(scale, params["discriminator"])
  nll, adversarial, hinge = _adversary(task, params, batch)
  rest, critic = (_jit(jax.grad(f))(params["vae"]) for f in (nll, adversarial))
  norm = lambda tree: np.linalg.norm(np.ravel(tree["out"]))
  ratio = norm(rest) / (norm(critic) + 1e-4)
  want = jax.tree.map(lambda a, b: a + 0.5 * ratio * b, rest, critic)
  grads, scalars = _run(task, params, batch)
  np.testing.assert_allclose(scalars["adaptive_weight"], ratio, rtol=1e-4)
  _close(grads["vae"], want, 1e-4)
  loss, own = _jit(jax.value_and_grad(hinge))(params["discriminator"])
  _close(grads["discriminator"], own, 1e-4)
  np.testing.assert_allclose(scalars["d_loss"], loss, rtol=1e-5)
  np.testing.assert_allclose(
    scalars["g_loss"], adversarial(params["vae"]), rtol=1e-5
  )
  assert 0 < loss != 1


def test_adaptive_weight_is_clamped():
  weight = autoencoder.adaptive_weight
  a, zero = jnp.full((3, 3), 2.0), jnp.zeros((3, 3))
  np.testing.assert_allclose(weight(a, a), 6 / 6.0001, rtol=1e-6)
  assert weight(a, zero) == 1e4
  assert weight(zero, a) == weight(zero, zero) == 0


def test_before_its_start_the_critic_is_not_there():
  alone = _task()
  task = _task(**_CRITIC, adversarial_start=3)
  params, batch = _init(task), _batch()
  want, _ = _run(alone, {"vae": params["vae"]}, batch)
  run = _jit(task.gradients)
  early, scalars = run(params, {}, batch, _KEY, jnp.int32(2))
  _close(early["vae"], want["vae"], 1e-6)
  assert not any(map(np.any, jax.tree.leaves(early["discriminator"])))
  for name in ("g_loss", "d_loss", "adaptive_weight"):
    assert scalars[name] == 0
  late, later = run(params, {}, batch, _KEY, jnp.int32(3))
  assert later["d_loss"] > 0 and later["adaptive_weight"] > 0
  assert any(map(np.any, jax.tree.leaves(late["discriminator"])))
  assert np.abs(late["vae"]["out"] - want["vae"]["out"]).max() > 1e-4
  # What is watched for spikes does not jump.
  np.testing.assert_allclose(later["loss"], scalars["loss"], rtol=1e-6)


def test_no_weight_no_critic():
  task = _task()
  assert task.groups == ("vae",) and _init(task).keys() == {"vae"}
  assert _task(**_CRITIC).groups == ("vae", "discriminator")


# Perception.


@pytest.fixture(scope="module")
def perception(tmp_path_factory):
  return lpips.load("alexnet", tmp_path_factory.mktemp("lpips"))


def test_lpips_looks_at_one_frame_of_each_video(perception):
  task = _task(l1=0.0, lpips=2.0, lpips_net="alexnet")
  batch, params = _batch(size=32), _init(task)
  grads, scalars = _run(task, params, batch, frozen={"lpips": perception})
  np.testing.assert_allclose(scalars["loss"], 2 * scalars["lpips"], rtol=1e-6)
  x = noising.to_signed(batch["video"])
  y = task.model.decode(params["vae"], task.model.encode(params["vae"], x).mean)
  distance = _jit(lambda a, b: lpips.distance(perception, "alexnet", a, b))
  each = np.stack([distance(x[:, i], y[:, i]) for i in range(3)])
  pairs = [(each[i, 0] + each[j, 1]) / 2 for i in range(3) for j in range(3)]
  assert np.isclose(scalars["lpips"], pairs, rtol=1e-5).any()
  assert np.isfinite(grads["vae"]["out"]).all() and np.any(grads["vae"]["out"])


def test_frozen_weights_are_on_every_device(perception, tmp_path):
  config = autoencoder.AutoencoderLossConfig(lpips_net="alexnet")
  task = autoencoder.AutoencoderTask(_Linear(), config, str(tmp_path))
  got = task.frozen(sharding.make_mesh({"data": 2}))["lpips"]
  assert got.keys() == perception.keys()
  assert all(x.sharding.is_fully_replicated for x in got.values())
  assert len(got["head_0"].sharding.device_set) == 2
  assert _task().frozen(None) == {}


# Pictures to look at.


def test_reconstruction_and_its_metrics(perception):
  task = _task(lpips_net="alexnet")
  video = _batch(size=32)["video"]
  run = _jit(task.reconstruct)
  same, metrics = run(_IDENTITY, {"lpips": perception}, video)
  np.testing.assert_array_equal(same, video)
  assert (metrics["psnr"] == pixels.MAX_PSNR).all()
  np.testing.assert_allclose(metrics["ssim"], 1, atol=1e-4)
  np.testing.assert_allclose(metrics["lpips"], 0, atol=1e-6)
  np.testing.assert_allclose(metrics["flicker"], metrics["flicker_original"])
  params = {"vae": {"in": jnp.eye(3), "out": 0.5 * jnp.eye(3)}}
  dull, metrics = run(params, {}, video)
  # Half the contrast around grey.
  want = np.round(127.5 + (np.float32(video) - 127.5) / 2)
  assert np.abs(dull - want).max() <= 1
  halved = metrics["flicker"] / metrics["flicker_original"]
  np.testing.assert_allclose(halved, 0.5, rtol=0.01)
  assert "lpips" not in metrics
  pair = autoencoder.side_by_side(np.asarray(video), np.asarray(dull))
  assert pair.shape == (2, 3, 32, 64, 3)
  np.testing.assert_array_equal(pair[..., :32, :], video)


# CogVideoX.


@functools.cache
def _small(**fields):
  config = vae.VaeConfig(
    block_out_channels=(8, 8),
    norm_num_groups=2,
    layers_per_block=0,
    latent_channels=4,
    temporal_compression_ratio=2,
  )
  return cogvideox.Autoencoder(config, **fields)


def _clips(count=2, frames=5, size=32):
  """Corners of moving shapes."""
  rng = np.random.default_rng(1)
  scenes = [moving_shapes.draw_scene(rng) for _ in range(count)]
  videos = np.stack([moving_shapes.render(scene) for scene in scenes])
  middle = (videos.shape[2] - size) // 2
  inside = slice(middle, middle + size)
  return videos[:, :frames, inside, inside]


@pytest.mark.slow
def test_overfits_a_batch():
  task = _task(_small(), mse=1.0, kl=1e-6)
  batch = _batch(count=2) | {"video": jnp.asarray(_clips(size=16))}
  params = _init(task)
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))

  @_jit
  def step(carry, i):
    params, opt = carry
    key = jax.random.fold_in(_KEY, i)
    grads, scalars = task.gradients(params, {}, batch, key, i)
    updates, opt = tx.update(grads, opt, params)
    return (optax.apply_updates(params, updates), opt), scalars

  carry, losses = (params, tx.init(params)), []
  for i in range(120):
    carry, scalars = step(carry, jnp.int32(i))
    losses.append(float(scalars["loss"]))
  assert np.mean(losses[-5:]) < 0.25 * losses[0]


def _causal(tree):
  return {k: v for k, v in tree.items() if v.ndim == 5 and len(v) == 3}


def test_images_leave_past_taps_alone():
  task = _task(_small(), freeze_past_taps=True)
  params, batch = _init(task), _batch(1)
  frozen, free = (
    weights.flatten(_run(t, params, batch)[0]["vae"])
    for t in (task, _task(_small()))
  )
  assert len(_causal(free)) > 8
  for name, leaf in free.items():
    want = np.array(leaf)
    if name in _causal(free):
      assert np.any(want[:2]), name
      want[:2] = 0
    scale = np.abs(want).max()
    assert scale, name
    np.testing.assert_allclose(frozen[name], want, atol=1e-5 * scale)


def test_videos_train_past_taps():
  model = _Linear()
  model.drop_past = functools.partial(jax.tree.map, jnp.zeros_like)
  task = _task(model, freeze_past_taps=True)
  params = _init(task)
  for frames, moves in ((1, False), (2, True)):
    grads, _ = _run(task, params, _batch(frames))
    assert np.any(grads["vae"]["out"]) == moves


def test_a_frozen_encoder_has_no_gradient():
  task = _task(_small(), freeze_encoder=True)
  params, batch = _init(task), _batch(1)
  frozen, free = (
    _run(t, params, batch)[0]["vae"] for t in (task, _task(_small()))
  )
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(frozen["encoder"]))
  decoders = (
    weights.flatten(frozen["decoder"]),
    weights.flatten(free["decoder"]),
  )
  for name, want in decoders[1].items():
    scale = np.abs(want).max()
    assert scale, name
    np.testing.assert_allclose(decoders[0][name], want, atol=1e-5 * scale)


def test_noise_on_latents_has_the_deviation_that_is_asked_for():
  """Uniform in [0, most]: the mean square is a third of the largest."""
  eps = autoencoder.latent_noise(_KEY, jnp.arange(4000), (2, 1, 1, 8), 0.3)
  level = np.sqrt(np.mean(np.square(eps), axis=(1, 2, 3, 4)))
  np.testing.assert_allclose(np.mean(np.square(eps)), 0.3**2 / 3, rtol=0.05)
  assert level.min() < 0.02 and 0.25 < level.max() < 0.65
  assert autoencoder.latent_noise(_KEY, jnp.arange(2), (1,), 0.0).any() == 0


def test_a_decoder_reads_noisy_latents():
  """The loss of a linear decoder grows by what the noise makes of it."""
  losses = []
  for most in (0.0, 0.3):
    task = _task(_small(), latent_noise=most)
    losses.append(float(_run(task, _init(task), _batch(1))[1]["loss"]))
  assert losses[0] != losses[1]


def test_past_taps_start_at_zero():
  model = _small(init_past_taps="zeros")
  boxed = _jit(model.init)(jax.random.key(0))
  kernel = boxed["decoder"]["conv_in"]["kernel"]
  assert kernel.names[-2:] == ("conv_in", "conv_out")
  params = nn.unbox(boxed)
  for leaf in _causal(weights.flatten(params)).values():
    assert not np.any(leaf[:2]) and np.any(leaf[2])
  with pytest.raises(errors.InputError, match="init_past_taps"):
    _small(init_past_taps="ones")


def test_a_length_that_does_not_come_back_is_an_error():
  task = _task(_small())
  params = jax.eval_shape(lambda key: nn.unbox(task.init(key)), _KEY)
  with pytest.raises(errors.InputError, match="2 frames of 8x8 come back as"):
    jax.eval_shape(task.gradients, params, {}, _batch(2), _KEY, jnp.int32(0))


def _parity():
  """Our task and diffusers' model, with one set of weights.

  Of three levels, not four: each takes seconds to compile.
  """
  theirs = tiny_cogvideox.vae(
    "2b",
    block_out_channels=(8,) * 3,
    down_block_types=("CogVideoXDownBlock3D",) * 3,
    up_block_types=("CogVideoXUpBlock3D",) * 3,
  )
  config = vae.vae_config(dict(theirs.config))
  shapes = nn.unbox(vae.shapes(config))
  return theirs, config, shapes


def _convert(tensors, shapes):
  """Published tensors, or their gradients, as our tree."""
  sizes = {k: v.shape for k, v in tensors.items()}
  targets = weights.match(sizes, vae_weights.VAE_TABLE, shapes)
  turn = lambda x, axes: np.transpose(x, axes) if axes else x
  leaves = {t.path: turn(tensors[k], t.axes) for k, t in targets.items()}
  return jax.tree.map(jnp.asarray, weights.unflatten(leaves, shapes))


def test_gradient_is_that_of_diffusers():
  """Over two chunks, and through what the first hands to the second."""
  frames = 17
  theirs, config, shapes = _parity()
  arrays = {k: v.detach().numpy() for k, v in theirs.named_parameters()}
  params = {"vae": _convert(arrays, shapes)}
  task = _task(cogvideox.Autoencoder(config), kl=0.3)
  batch = _batch(frames, size=16)
  grads, scalars = _run(task, params, batch)

  x = torch.from_numpy(np.array(batch["video"])).movedim(-1, 1) / 127.5 - 1
  posterior = theirs.encode(x).latent_dist
  shape = np.moveaxis(posterior.mean.detach().numpy(), 1, -1).shape[1:]
  noise = np.array(autoencoder.noise(_KEY, batch["index"], shape))
  noise = torch.from_numpy(noise).movedim(-1, 1)
  y = theirs.decode(posterior.mean + posterior.std * noise).sample
  divergence = (
    posterior.mean.square() + posterior.var - 1 - posterior.logvar
  ).mean() / 2
  loss = (y - x).abs().mean() + 0.3 * divergence
  loss.backward()
  np.testing.assert_allclose(scalars["loss"], loss.detach(), rtol=1e-5)
  np.testing.assert_allclose(scalars["kl"], divergence.detach(), rtol=1e-5)
  theirs = {k: v.grad.numpy() for k, v in theirs.named_parameters()}
  _close(grads["vae"], _convert(theirs, shapes), 1e-4)
