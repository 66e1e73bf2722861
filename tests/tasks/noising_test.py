"""The diffusion loss: timesteps, closed forms, what is left out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vidgen import diffusion, errors
from vidgen.data import buckets, loader
from vidgen.models import base
from vidgen.tasks import noising

LEVELS = diffusion.trained(diffusion.zero_terminal_snr())


class Guess:
  """A model of two numbers: v = guess · (1 + text), with text as condition."""

  components, fps, latent_channels, heads = (), 8, 2, 1
  denoiser, takes_text, takes_fps = "transformer", True, False
  training = base.Training()
  # What a loss has no use for.
  plan = inputs = encode = decode = denoise = flops = len
  image_condition = published_configs = unconditional = len

  def __init__(self, guess=0.0, takes_image=False):
    self.guess, self.takes_image = guess, takes_image
    self.conditioners = (
      base.Conditioner("text", "text", ("ids",), False, False, self._text),
    )
    if takes_image:
      self.conditioners += (
        base.Conditioner("image", "vae", ("image",), True, False, self._image),
      )

  def levels(self):
    return LEVELS

  def clip_inputs(self, images, told, num_frames):
    return {}

  def target(self, x0, noise, level):
    return diffusion.v_from_x0_noise(x0, noise, level)

  def predict(self, params, x, level, condition):
    seen = condition["text"].reshape(-1, 1, 1, 1, 1)
    if "image" in condition:
      seen = seen + condition["image"].mean()
    return jnp.zeros_like(x) + self.guess * seen.astype(jnp.float32)

  def pad_latents(self, latents):
    return latents

  def _text(self, params, inputs, key, *, tiling):
    return {"text": inputs["ids"].astype(jnp.float32)}

  def _image(self, params, inputs, key, *, tiling):
    return {"image": inputs["image"]}


def batch_of(b, ids=1, **arrays):
  x0 = np.random.default_rng(0).standard_normal((b, 2, 4, 4, 2))
  return {
    "latents": jnp.asarray(x0, jnp.float32),
    "latents_std": jnp.zeros((b, 2, 4, 4, 2)),
    "ids": jnp.full((b, 1), ids),
    "index": jnp.arange(b),
    "count": jnp.full((b,), b),
    **arrays,
  }


def noiser(model, takes_image=False, **fields):
  config = noising.NoisingConfig(**fields)
  return noising.Noising(
    model, config, takes_image, {"ids": np.zeros((1, 1), np.int32)}
  )


PARAMS = {"text": {}, "vae": {}}


def test_loss_of_a_silent_network_is_the_target():
  """v has unit variance where x0 and noise have: E v² = alpha² + sigma²."""
  loss, _ = noiser(Guess())(PARAMS, batch_of(2000), jax.random.key(0))
  assert abs(float(loss) - 1) < 0.02


@pytest.mark.parametrize("timestep", [0, 500, 999])
def test_loss_at_a_level_in_closed_form(timestep):
  rng = np.random.default_rng(1)
  x0, noise = rng.standard_normal((2, 3, 2, 4, 4, 2)).astype(np.float32)
  got = noising.loss(
    Guess(0.5),
    PARAMS,
    jnp.asarray(x0),
    jnp.asarray(noise),
    jnp.full((3,), timestep),
    {"text": jnp.ones((3, 1))},
  )
  alpha, sigma = LEVELS.alpha[timestep], LEVELS.sigma[timestep]
  want = np.square(0.5 - (alpha * noise - sigma * x0)).mean((1, 2, 3, 4))
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_v_error_is_the_weighted_x0_error():
  """The released code weighs the x0 error by 1 / (1 - alpha²)."""
  rng = np.random.default_rng(2)
  x0, noise, v = jnp.asarray(rng.standard_normal((3, 1, 2, 4, 4, 2)))
  level = diffusion.NoiseLevel(*(np.float32(x[700]) for x in LEVELS))
  x = diffusion.add_noise(x0, noise, level)
  guess = diffusion.x0_from_v(x, v, level)
  ours = np.square(v - diffusion.v_from_x0_noise(x0, noise, level)).mean()
  theirs = np.square(guess - x0).mean() / (1 - level.alpha**2)
  np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def draw(config, b, seed=0):
  index, count = jnp.arange(b), jnp.full((b,), b)
  keys = noising.keys_of(jax.random.key(seed), index, 0)
  return np.asarray(noising.sample_timesteps(keys, index, count, config))


def test_each_sample_draws_in_its_own_interval():
  for seed in range(5):
    drawn = draw(noising.NoisingConfig(), 50, seed)
    assert (drawn // 20 == np.arange(50)).all()


def test_ranks_draw_in_their_intervals():
  """Section 3.3: n ranks, n intervals; here 4 ranks of 3 samples."""
  config = noising.NoisingConfig(timestep_intervals=4)
  seen = np.concatenate([draw(config, 12, seed) for seed in range(40)])
  rank = np.tile(np.arange(12) // 3, 40)
  assert (seen // 250 == rank).all()
  inside = np.unique(seen[rank == 0] // 50)
  assert len(inside) == 5, "uniform within the interval, not at one place"


@pytest.mark.parametrize(("b", "intervals"), [(4, 8), (6, 4), (20, 8)])
def test_intervals_that_do_not_divide_a_batch_are_as_likely(b, intervals):
  config = noising.NoisingConfig(timestep_intervals=intervals)
  seen = np.concatenate([draw(config, b, seed) for seed in range(400)])
  counts = np.bincount(seen * intervals // 1000, minlength=intervals)
  want = 400 * b / intervals
  assert np.abs(counts - want).max() < 4 * want**0.5


def test_density_in_pieces():
  pieces = ((0, 600, 0.15), (600, 1000, 0.85))
  config = noising.NoisingConfig(timesteps=pieces)
  drawn = draw(config, 4000)
  assert abs((drawn >= 600).mean() - 0.85) < 0.002
  low = drawn[drawn < 600]
  assert abs(low.mean() - 299.5) < 5
  assert drawn.max() == 999 and drawn.min() == 0


def test_density_may_leave_levels_out():
  config = noising.NoisingConfig(timesteps=((100, 200, 1.0), (900, 1000, 1.0)))
  drawn = draw(config, 1000)
  assert set(drawn // 100) == {1, 9}


@pytest.mark.parametrize(
  "fields",
  [
    {"timesteps": ((0, 1200, 1.0),)},
    {"timesteps": ((500, 400, 1.0),)},
    {"timesteps": ((0, 500, 1.0), (400, 1000, 1.0))},
    {"timesteps": ((0, 1000, 0.0),)},
    {"text_dropout": 1.5},
    {"text_dropout_by": "noise"},
    {"timestep_intervals": -1},
  ],
)
def test_bad_config(fields):
  with pytest.raises(errors.InputError, match="config:"):
    noising.check(noising.NoisingConfig(**fields), Guess())


def test_dropped_text_is_the_empty_prompt():
  """With guess 1 the prediction is the text: 1, or 0 where it was dropped."""
  seen = []

  class Spy(Guess):
    def predict(self, params, x, level, condition):
      seen.append(np.asarray(condition["text"]).ravel())
      return jnp.zeros_like(x)

  noiser(Spy(), text_dropout=0.25)(PARAMS, batch_of(2000), jax.random.key(0))
  assert set(seen[0]) == {0.0, 1.0}
  assert abs((seen[0] == 0).mean() - 0.25) < 0.03
  # Zeros take the place of the embedding, not of the tokens.
  drop = noiser(Spy(), text_dropout=1.0, text_dropout_by="zeros")
  drop(PARAMS, batch_of(4, ids=7), jax.random.key(0))
  assert set(seen[1]) == {0.0}
  noiser(Spy(), text_dropout=0.0)(PARAMS, batch_of(4), jax.random.key(0))
  assert set(seen[2]) == {1.0}


def test_image_is_noised_and_dropped():
  seen = []

  class Spy(Guess):
    def predict(self, params, x, level, condition):
      seen.append(np.asarray(condition["image"]))
      return jnp.zeros_like(x)

  b = 2000
  grey = jnp.full((b, 1, 4, 4, 3), 128, jnp.uint8)
  noise = noiser(Spy(takes_image=True), takes_image=True, image_dropout=0.2)
  noise(PARAMS, batch_of(b, image=grey), jax.random.key(3))
  image = seen[0] - (128 / 127.5 - 1) * (np.abs(seen[0]) > 0)
  dropped = (seen[0] == 0).all(axis=(1, 2, 3, 4))
  assert abs(dropped.mean() - 0.2) < 0.03
  log_sigma = np.log(image[~dropped].std(axis=(1, 2, 3, 4)))
  # ln of a standard deviation of 48 numbers is low by about 1 / 96.
  assert abs(log_sigma.mean() - -3.0) < 0.05
  assert abs(log_sigma.std() - 0.5) < 0.05


def test_posterior_is_sampled_or_not():
  seen = []

  class Spy(Guess):
    def target(self, x0, noise, level):
      seen.append(np.asarray(x0))
      return jnp.zeros_like(x0)

  batch = batch_of(4, latents_std=jnp.full((4, 2, 4, 4, 2), 0.3))
  noiser(Spy())(PARAMS, batch, jax.random.key(0))
  noiser(Spy(), sample_posterior=False)(PARAMS, batch, jax.random.key(0))
  np.testing.assert_array_equal(seen[1], batch["latents"])
  assert abs((seen[0] - seen[1]).std() - 0.3) < 0.03


def test_a_sample_does_not_depend_on_its_neighbours():
  """The loss of a batch is that of its parts: keys follow the index."""
  batch = batch_of(8)
  loss = noiser(Guess(0.3))
  whole, _ = loss(PARAMS, batch, jax.random.key(5))
  parts = []
  for part in (slice(0, 8, 2), slice(1, 8, 2)):
    some = jax.tree.map(lambda x, part=part: x[part], batch)
    parts.append(loss(PARAMS, some, jax.random.key(5))[0])
  np.testing.assert_allclose(np.mean(parts), whole, rtol=1e-6)


def test_samples_and_purposes_draw_apart():
  """The same clip four times is noised in four ways."""
  seen = []

  class Spy(Guess):
    def predict(self, params, x, level, condition):
      seen.append(np.asarray(x))
      return jnp.zeros_like(x)

  batch = batch_of(4)
  batch["latents"] = jnp.zeros_like(batch["latents"])
  noiser(Spy(), timesteps=((999, 1000, 1.0),))(PARAMS, batch, jax.random.key(0))
  rows = seen[0].reshape(4, -1)
  correlation = np.corrcoef(rows) - np.eye(4)
  assert np.abs(correlation).max() < 0.6
  keys = [noising.keys_of(jax.random.key(0), jnp.arange(2), p) for p in (0, 1)]
  data = np.concatenate([jax.random.key_data(k) for k in keys])
  assert len(np.unique(data, axis=0)) == 4


def test_scalars_tell_the_loss_by_level():
  _, scalars = noiser(Guess())(PARAMS, batch_of(8), jax.random.key(0))
  quarters = np.array([scalars[f"loss_quarter_{i}"] for i in (1, 2, 3, 4)])
  np.testing.assert_allclose(
    quarters[:, 0].sum() / 8, scalars["loss"], rtol=1e-5
  )
  assert quarters[:, 1].tolist() == [2, 2, 2, 2]


def test_long_captions_are_cut_without_a_warning():
  def inputs(prompts, images, plan):
    import warnings

    warnings.warn("too long", stacklevel=2)
    return [{"ids": np.full((1, 3), len(p))} for p in prompts]

  model = Guess()
  model.inputs = inputs
  plan = base.Plan.__new__(base.Plan)
  got = noising.tokens(model, ["a", "bb"], plan)
  assert got["ids"].tolist() == [[1, 1, 1], [2, 2, 2]]


def test_long_captions_are_counted():
  def inputs(prompts, images, plan):
    import warnings

    for prompt in prompts:
      if len(prompt) > 3:
        warnings.warn(f"{prompt}: too long", stacklevel=2)
    return [{"ids": np.full((1, 3), len(p))} for p in prompts]

  model = Guess()
  model.inputs = inputs
  plan = base.Plan.__new__(base.Plan)
  captions = ["a", "long one", "bb", "longer one", "c", "d", "e", "f"]
  bucket = buckets.Bucket(1, 4, 4, 8)
  video = np.zeros((8, 1, 4, 4, 3), np.uint8)
  given = loader.Batch(0, bucket, video, captions, captions)
  got = noising.host_batch(model, given, plan, takes_image=False)
  assert got[noising.CUT].tolist() == [0.25] * 8
  batch = batch_of(8) | {noising.CUT: got[noising.CUT]}
  _, scalars = noiser(Guess())(PARAMS, batch, jax.random.key(0))
  assert scalars[noising.CUT] == 0.25
