"""Training of Stable Video Diffusion: EDM's loss, conditions, one step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.tiny_svd_config import tiny
from vidgen import diffusion, errors, sharding, train_step
from vidgen.data import buckets, loader
from vidgen.models import svd
from vidgen.models.svd import numbers
from vidgen.tasks import diffusion as task_lib
from vidgen.tasks import facts, noising, sources

INTERPOLATION = svd.Conditioning(
  given=(0, -1), mask_size=(4, 4), noised="latents"
)
MULTIVIEW = svd.Conditioning(
  numbers=("fps", "motion", "noise_aug", "elevation")
)
POSES = svd.Conditioning(numbers=("noise_aug", "polar", "azimuth"), given=(-1,))
KEY = jax.random.key(0)
pytestmark = pytest.mark.usefixtures("compiled_fast")


def test_there_is_no_loop_to_unroll():
  with pytest.raises(errors.InputError, match="unroll=2: this model has no"):
    svd.create(tiny(), jnp.float32, unroll=2)


KINDS = {
  "image": None,
  "noisy latents": svd.Conditioning(noised="latents"),
  "interpolation": INTERPOLATION,
  "views": MULTIVIEW,
  "poses": POSES,
}


@functools.cache
def build(kind):
  """A task all of whose networks are new, and parameters of it."""
  task = task_lib.DiffusionTaskConfig(
    source=sources.Source(
      model=tiny(KINDS[kind]), scratch=("unet", "vae", "image_encoder")
    ),
    noising=noising.NoisingConfig(log_sigma=(0.0, 1.0)),
    train_along=("vae", "image_encoder"),
    dtype="float32",
  ).build(sharding.make_mesh(None))
  shapes, at = jax.tree.flatten(nn.unbox(jax.eval_shape(task.init, KEY)))
  rng = np.random.default_rng(0)
  draw = lambda x: jnp.asarray(rng.normal(0, 0.1, x.shape), jnp.float32)
  return task, jax.tree.unflatten(at, [draw(x) for x in shapes])


def batch_of(task, frames=3, b=2, **fields):
  rng = np.random.default_rng(0)
  video = rng.integers(0, 256, (b, frames, 4, 4, 3), np.uint8)
  bucket = buckets.Bucket(frames, 4, 4, b)
  labels = [{"elevation": 10.0 * (i + 1)} for i in range(b)]
  one = loader.Batch(
    0, bucket, video, [""] * b, [str(i) for i in range(b)],
    fps=np.full(b, 8.0), labels=labels, **fields
  )  # fmt: skip
  return one, train_step.place_batch(task.host_batch(one), task._mesh, 0, b)


@pytest.mark.parametrize("sigma", [0.01, 0.5, 3.0, 100.0])
def test_the_loss_is_edms(sigma):
  """Karras et al., table 1, with c_out of the other sign, sigma_data 1."""
  rng = np.random.default_rng(0)
  x0, eps, v = rng.standard_normal((3, 2, 3, 4, 4, 8))
  c_skip, c_out = 1 / (sigma**2 + 1), -sigma / np.sqrt(sigma**2 + 1)
  weight = (1 + sigma**2) / sigma**2
  assert weight * c_out**2 == pytest.approx(1)
  noisy = x0 + sigma * eps
  denoised = c_skip * noisy + c_out * v
  want = (weight * np.square(denoised - x0)).mean((1, 2, 3, 4))
  task = svd.create(tiny(), jnp.float32)

  class Net:
    target = staticmethod(task.target)

    def predict(self, params, x, level, condition):
      np.testing.assert_allclose(x, noisy / np.sqrt(1 + sigma**2), rtol=1e-4)
      np.testing.assert_allclose(level.timestep, np.log(sigma) / 4, rtol=1e-5)
      return jnp.asarray(v, jnp.float32)

  level = diffusion.edm_level(jnp.full(2, sigma, jnp.float32))
  as_jax = lambda x: jnp.asarray(x, jnp.float32)
  got = noising.loss_at.__wrapped__(
    Net(), {}, as_jax(x0), as_jax(eps), level, {}
  )
  np.testing.assert_allclose(got, want, rtol=2e-3)


def draw(count, **fields):
  config = noising.NoisingConfig(log_sigma=(0.7, 1.6), **fields)
  index = jnp.arange(count)
  keys = noising.keys_of(KEY, index, 0)
  counts = jnp.full(count, count)
  return np.asarray(noising.sample_log_sigma(keys, index, counts, config))


def test_noise_is_log_normal():
  drawn = draw(4000)
  assert abs(drawn.mean() - 0.7) < 0.01 and abs(drawn.std() - 1.6) < 0.02
  # Each draws within its own share.
  assert (np.diff(drawn[::40]) > 0).all()
  free = draw(4000, timestep_intervals=1)
  assert abs(free.mean() - 0.7) < 0.1 and abs(free.std() - 1.6) < 0.1
  assert np.isfinite(free).all() and not (np.diff(free[::40]) > 0).all()


@pytest.mark.parametrize(
  ("fields", "match"),
  [
    ({"log_sigma": None}, "set log_sigma"),
    ({"timesteps": ((0, 500, 1.0),)}, "no timesteps"),
    ({"log_sigma": (0.0, -1.0)}, "no mean and deviation"),
    ({"image_dropouts": (0.5, 0.5, 0.5)}, "image_dropouts"),
  ],
)
def test_configs_that_make_no_sense(fields, match):
  config = noising.NoisingConfig(**{"log_sigma": (0.0, 1.0), **fields})
  with pytest.raises(errors.InputError, match=match):
    noising.check(config, svd.create(tiny(), jnp.float32))


class Spy:
  """Keeps the conditions that a model is given."""

  def __init__(self, model):
    self.model, self.seen = model, {}

  def __getattr__(self, name):
    return getattr(self.model, name)

  def predict(self, params, x, level, condition):
    self.seen.update(condition)
    return x


def conditions(kind, b=2, frames=3, **fields):
  task, params = build(kind)
  # Of its own: the loss is made to look at another model.
  task = task.with_options({"text_dropout": 0.1, **fields})
  spy = Spy(task.model)
  task._loss.model = spy
  _, arrays = batch_of(task, frames, b)

  @jax.jit
  def run(params, arrays):
    loss, scalars = noising.Noising.__call__.__wrapped__(
      task._loss, params, arrays, KEY
    )
    return loss, scalars, spy.seen

  loss, scalars, seen = run(params, arrays)
  quarters = [scalars[f"loss_quarter_{i}"] for i in (1, 2, 3, 4)]
  assert np.isfinite(quarters).all() and np.isfinite(loss)
  return {name: np.asarray(x) for name, x in seen.items()}


@pytest.mark.slow
def test_ways_to_leave_the_image_out():
  seen = conditions("image", b=400, frames=1, image_dropouts=(0.2, 0.1, 0.3))
  zero = lambda x: (x == 0).all(axis=tuple(range(1, x.ndim)))
  embedding, latents = zero(seen["context"]), zero(seen["image"])
  both, first = embedding & latents, embedding & ~latents
  last = latents & ~embedding
  shares = [x.mean() for x in (first, both, last)]
  np.testing.assert_allclose(shares, [0.2, 0.1, 0.3], atol=0.06)
  # The rate less one, no motion in a frame, and how noisy the image is.
  assert (seen["numbers"][:, 0] == 7).all()
  assert (seen["numbers"][:, 1] == 0).all()
  drawn = np.log(seen["numbers"][:, 2])
  assert abs(drawn.mean() + 3) < 0.1 and abs(drawn.std() - 0.5) < 0.07
  assert seen["image_only"].all()


@pytest.mark.parametrize("kind", ["image", "noisy latents"])
def test_the_image_has_the_noise_that_is_told(kind):
  clean, noisy = (
    conditions(kind, image_dropouts=(0.0, 0.0, 0.0), image_noise=(size, 1e-6))
    for size in (-20.0, 0.0)
  )
  np.testing.assert_array_equal(clean["context"], noisy["context"])
  np.testing.assert_allclose(noisy["numbers"][:, 2], 1, rtol=1e-4)
  differ = np.std(noisy["image"] - clean["image"])
  if kind == "noisy latents":
    assert abs(differ - 1) < 0.1
  # Of pixels no more is left than a new autoencoder lets through.
  assert differ > 0.01


def test_a_clip_is_no_image():
  assert "image_only" not in conditions("image")


def test_between_two_frames():
  seen = conditions("interpolation", image_dropouts=(0.0, 0.0, 0.0))
  assert seen["context"].shape == (2, 2, 32)
  assert seen["image"].shape == (2, 2, 4, 4, 8)
  model = svd.create(tiny(INTERPOLATION), jnp.float32)
  rng = np.random.default_rng(0)
  missing = jnp.asarray(rng.standard_normal((4, 4, 8)), jnp.float32)
  latents, given = model._beside(
    {"mask": missing}, jnp.asarray(seen["image"]), 5
  )
  np.testing.assert_array_equal(latents[:, 0], seen["image"][:, 0])
  np.testing.assert_array_equal(latents[:, 4], seen["image"][:, 1])
  for frame in (1, 2, 3):
    np.testing.assert_array_equal(latents[1, frame], missing)
  assert given.shape == (2, 5, 4, 4, 1)
  np.testing.assert_array_equal(given[0, :, 0, 0, 0], [1, 0, 0, 0, 1])


def test_views_are_told_their_height():
  seen = conditions("views")
  np.testing.assert_array_equal(seen["numbers"][:, 3], [10, 20])


def test_views_are_told_their_poses():
  """SV3D: radians from the pole, and from the view that is given, the last."""
  seen = conditions("poses")
  assert seen["numbers"].shape == (2, 3, 3)
  np.testing.assert_allclose(
    np.degrees(seen["numbers"][:, :, 1]), [[80] * 3, [70] * 3], rtol=1e-5
  )
  np.testing.assert_allclose(
    np.degrees(seen["numbers"][0, :, 2]), [120, 240, 0], rtol=1e-5, atol=1e-5
  )
  assert (seen["numbers"][:, :, 0] > 0).all()
  width = numbers.width(POSES.numbers, 256)
  assert width == 1280
  told = jnp.asarray(seen["numbers"])
  assert numbers.embed(POSES.numbers, told, 256).shape == (2, 3, 1280)


def test_a_label_that_is_not_there():
  task, _ = build("views")
  one, _ = batch_of(task)
  with pytest.raises(errors.InputError, match="told elevation"):
    task.host_batch(one._replace(labels=[{}, {}]))


def test_how_much_moves():
  video = np.zeros((3, 4, 2, 2, 3), np.uint8)
  video[1, 1::2] = 16
  video[2, 1::2] = 255
  np.testing.assert_allclose(facts.motion(video), [0, 127.5, 255])
  assert (facts.motion(video[:, :1]) == 0).all()


@pytest.mark.slow
def test_a_step_moves_what_it_should():
  task, params = build("interpolation")
  _, arrays = batch_of(task)
  step = jnp.zeros((), jnp.int32)
  grads, scalars = jax.jit(task.gradients)(params, {}, arrays, KEY, step)
  assert np.isfinite(scalars["loss"])
  moved = lambda tree: any(np.any(x) for x in jax.tree.leaves(tree))
  assert moved(grads["unet"]["conv_in"])
  assert moved(grads["image_encoder"])
  # Latents are what they are.
  assert not moved(grads["vae"])
  assert moved(grads["unet"]["mask"])


@pytest.mark.slow
def test_single_frames_move_no_layer_over_time():
  task, params = build("image")
  _, arrays = batch_of(task, frames=1)
  step = jnp.zeros((), jnp.int32)
  grads, _ = jax.jit(task.gradients)(params, {}, arrays, KEY, step)
  flat = jax.tree_util.tree_flatten_with_path(grads["unet"])[0]
  for path, leaf in flat:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    over_time = any(t in name for t in ("temporal", "blend", "frames/"))
    if over_time:
      assert not np.any(leaf), name
