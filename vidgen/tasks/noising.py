"""The loss of diffusion: noise is added, and a network tells what was added.

Yang et al., https://arxiv.org/abs/2408.06072, sections 2.2, 3.3 and appendix D,
and the released training code (zai-org/CogVideo, sat/). The loss is the mean
square error of what the network predicts, unweighted: for v with alpha² +
sigma² = 1 that is the released code's weighted error of x0.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, UInt8

from vidgen import diffusion, errors, samplers
from vidgen.data import loader
from vidgen.models import base
from vidgen.tasks import facts

# One key a purpose: `fold_in(fold_in(key of the step, sample), purpose)`.
_TIMESTEP, _NOISE, _POSTERIOR, _TEXT, _IMAGE, _IMAGE_NOISE, _IMAGE_POSTERIOR = (
  range(7)
)
_IMAGE_NOISE_LEVEL = 7
# Inputs of the conditioners that are no text and no image, in a batch.
_OF_CLIP = "clip/"
TEXT_DROPOUTS = ("empty", "zeros")
# The share of captions that are longer than the model's text, a metric.
CUT = "captions_cut"
_UNIFORM = ((0, 1000, 1.0),)


@dataclasses.dataclass
class NoisingConfig:
  """How samples are noised and conditions left out.

  Attributes:
    timesteps: The density of training timesteps in pieces, each (from, to,
      weight), flat within a piece: `((0, 1000, 1.0),)` is uniform.
    log_sigma: Mean and deviation of ln(sigma), of EDM's sigma, for models whose
      levels are continuous; these have no `timesteps`.
    timestep_intervals: Explicit uniform sampling: the density is cut into so
      many equal parts and a sample draws within its own. 0 is one for each
      sample of the global batch; the paper has one for each data-parallel rank.
    text_dropout: How often the prompt is left out.
    text_dropout_by: "empty" puts the empty prompt in its place, which is what
      the pipelines guide with; "zeros" an embedding of zeros, as the released
      training code does.
    image_dropout: How often the image of an image-to-video model is left out.
    image_dropouts: The same for models that read an embedding of the image
      beside its latents: how often the embedding alone is left out, both, and
      the latents alone.
    image_noise: Mean and deviation of the logarithm of the noise on the image.
    sample_posterior: Whether latents are drawn from the autoencoder's
      posterior; else its mean is taken.
  """

  timesteps: tuple[tuple[int, int, float], ...] = _UNIFORM
  log_sigma: tuple[float, float] | None = None
  timestep_intervals: int = 0
  text_dropout: float = 0.1
  text_dropout_by: str = "empty"
  image_dropout: float = 0.05
  image_dropouts: tuple[float, float, float] = (0.1, 0.1, 0.1)
  image_noise: tuple[float, float] = (-3.0, 0.5)
  sample_posterior: bool = True


def check(config: NoisingConfig, model: base.Model) -> None:
  """Raises InputError where a config asks for what cannot be."""
  _check_levels(config, model)
  drops = config.image_dropouts
  if len(drops) != 3 or min(drops) < 0 or sum(drops) > 1:
    raise errors.InputError(
      f"config: image_dropouts {drops}: three shares of at most 1 in all."
    )
  for name in ("text_dropout", "image_dropout"):
    if not 0 <= getattr(config, name) <= 1:
      raise errors.InputError(f"config: {name} must be within [0, 1].")
  if config.text_dropout_by not in TEXT_DROPOUTS:
    raise errors.InputError(
      f"config: text_dropout_by {config.text_dropout_by!r} is unknown; known "
      f"are {', '.join(TEXT_DROPOUTS)}."
    )
  if config.timestep_intervals < 0:
    raise errors.InputError("config: timestep_intervals must be 0 or more.")


def _check_levels(config: NoisingConfig, model: base.Model) -> None:
  """Raises InputError unless the density is for the model's levels."""
  if model.training.continuous:
    if config.log_sigma is None or config.timesteps != _UNIFORM:
      raise errors.InputError(
        "config: this model's noise levels are continuous; set log_sigma, the "
        "mean and the deviation of ln(sigma), and no timesteps."
      )
    if not (np.isfinite(config.log_sigma).all() and config.log_sigma[1] > 0):
      raise errors.InputError(
        f"config: log_sigma {config.log_sigma} is no mean and deviation."
      )
    return
  if config.log_sigma is not None:
    raise errors.InputError(
      "config: this model's noise levels are counted; set timesteps, and no "
      "log_sigma."
    )
  previous, levels = 0, len(model.levels().alpha)
  for low, high, weight in config.timesteps:
    if not (previous <= low < high <= levels and weight > 0):
      raise errors.InputError(
        f"config: timesteps {config.timesteps}: each must be (from, to, "
        f"weight) with 0 <= from < to <= {levels}, in order, and weight > 0."
      )
    previous = high


def _stratified(
  keys: Key[Array, " b"],
  index: Int[Array, " b"],
  count: Int[Array, " b"],
  intervals: int,
) -> Float[Array, " b"]:
  """Draws a number in [0, 1] for each sample, each within its own interval.

  Where intervals do not divide the batch, which one is drawn, too: all are as
  likely, whatever the size of the batch.
  """
  own = index
  if intervals:
    among = jax.vmap(lambda k: jax.random.randint(k, (), 0, intervals))
    again = jax.vmap(lambda k: jax.random.fold_in(k, 1))(keys)
    own = (index * intervals + among(again)) // count
  intervals = intervals or count
  u = jax.vmap(jax.random.uniform)(keys)
  return (own.astype(jnp.float32) + u) / jnp.asarray(intervals, jnp.float32)


def sample_log_sigma(
  keys: Key[Array, " b"],
  index: Int[Array, " b"],
  count: Int[Array, " b"],
  config: NoisingConfig,
) -> Float[Array, " b"]:
  """Draws ln(sigma) for each sample of a batch, normally distributed.

  Karras et al., https://arxiv.org/abs/2206.00364, table 1. The arguments are
  those of `sample_timesteps`, and intervals have equal shares.
  """
  mean, deviation = config.log_sigma
  u = _stratified(keys, index, count, config.timestep_intervals)
  # The ends of [0, 1] are infinitely far out.
  u = jnp.clip(u, 2.0**-24, 1 - 2.0**-24)
  return mean + deviation * jax.scipy.special.ndtri(u)


def sample_timesteps(
  keys: Key[Array, " b"],
  index: Int[Array, " b"],
  count: Int[Array, " b"],
  config: NoisingConfig,
) -> Int[Array, " b"]:
  """Draws a timestep for each sample of a batch.

  Args:
    keys: A key for each sample.
    index: The sample's number in the global batch.
    count: The size of the global batch.
    config: The density and its intervals.
  """
  pieces = np.asarray(config.timesteps, np.float64)
  ends = np.concatenate([[0.0], np.cumsum(pieces[:, 2] / pieces[:, 2].sum())])
  u = _stratified(keys, index, count, config.timestep_intervals)
  piece = jnp.searchsorted(jnp.asarray(ends[1:-1], jnp.float32), u, "right")
  take = lambda x: jnp.asarray(x, jnp.float32)[piece]
  share = (u - take(ends[:-1])) / take(np.diff(ends))
  low, high = take(pieces[:, 0]), take(pieces[:, 1])
  timestep = jnp.floor(low + jnp.clip(share, 0, 1) * (high - low))
  return jnp.minimum(timestep, high - 1).astype(jnp.int32)


def level_at(
  levels: diffusion.NoiseLevel, timestep: Int[Array, " b"]
) -> diffusion.NoiseLevel:
  """Returns the noise level of each sample."""
  pick = lambda x: jnp.asarray(x, jnp.float32)[timestep]
  return diffusion.NoiseLevel(*(pick(x) for x in levels))


def loss(
  model: base.Model,
  params: dict[str, PyTree],
  x0: Float[Array, "b f h w c"],
  noise: Float[Array, "b f h w c"],
  timestep: Int[Array, " b"],
  condition: dict[str, Array],
) -> Float[Array, " b"]:
  """Returns the mean square error of each sample's prediction.

  Args:
    model: The model.
    params: Its parameters by component.
    x0: Clean latents.
    noise: Unit variance.
    timestep: The level that noise is added at.
    condition: The embeddings.
  """
  level = level_at(model.levels(), timestep)
  return loss_at(model, params, x0, noise, level, condition)


def loss_at(
  model: base.Model,
  params: dict[str, PyTree],
  x0: Float[Array, "b f h w c"],
  noise: Float[Array, "b f h w c"],
  level: diffusion.NoiseLevel,
  condition: dict[str, Array],
) -> Float[Array, " b"]:
  """As `loss`, at any level, one of each sample."""
  x = diffusion.add_noise(x0, noise, level)
  predicted = model.predict(params, x, level, condition)
  target = model.target(x0, noise, level)
  return jnp.mean(jnp.square(predicted - target), axis=(1, 2, 3, 4))


def keys_of(
  key: Key[Array, ""], index: Int[Array, " b"], purpose: int
) -> Key[Array, " b"]:
  """Returns each sample's key for one purpose."""
  fold = jax.random.fold_in
  return jax.vmap(lambda i: fold(fold(key, i), purpose))(index)


def _chance(
  key: Key[Array, ""], index: Int[Array, " b"], purpose: int, share: float
) -> Bool[Array, " b"]:
  """Says of each sample whether something happens to it."""
  draw = lambda k: jax.random.bernoulli(k, share)
  return jax.vmap(draw)(keys_of(key, index, purpose))


def to_signed(video: UInt8[Array, "b F H W 3"]) -> Float[Array, "b F H W 3"]:
  """Maps bytes to [-1, 1], as the released code does."""
  return video.astype(jnp.float32) / 127.5 - 1


@dataclasses.dataclass
class Noising:
  """The loss of a batch: encode, condition, leave out, noise, predict.

  Attributes:
    model: The model.
    config: How samples are noised.
    takes_image: Whether frames of the clip are a condition.
    empty: What the conditioners read of the empty prompt, b = 1; nothing where
      the model takes no text.
    posterior: The mean and the deviation of videos' scaled latents, of an
      autoencoder that computes in another dtype than the model; else None.
  """

  model: base.Model
  config: NoisingConfig
  takes_image: bool
  empty: dict[str, np.ndarray]
  posterior: Callable[..., tuple[Array, Array]] | None = None

  def __call__(
    self,
    params: dict[str, PyTree],
    batch: dict[str, Array],
    key: Key[Array, ""],
  ) -> tuple[Float[Array, ""], dict[str, PyTree]]:
    """Returns the mean loss and scalars to tell."""
    index, count = batch["index"], batch["count"]
    keys = functools.partial(keys_of, key, index)
    x0 = self._latents(params, batch, keys(_POSTERIOR))
    noise = samplers.normal(keys(_NOISE), x0.shape[1:])
    level, quarter = self._levels(keys(_TIMESTEP), index, count)
    condition = self._condition(params, batch, key)
    if self.model.training.image_switch and x0.shape[1] == 1:
      condition["image_only"] = jnp.ones(x0.shape[:2], bool)
    errors_ = loss_at(self.model, params, x0, noise, level, condition)
    mean = errors_.mean()
    # The loss of each quarter of the levels, for the eye: it differs a lot.
    scalars = {"loss": mean}
    for i in range(4):
      inside = quarter == i
      total, count = jnp.where(inside, errors_, 0).sum(), inside.sum()
      scalars[f"loss_quarter_{i + 1}"] = total, count.astype(jnp.float32)
    if CUT in batch:
      scalars[CUT] = batch[CUT].mean()
    return mean, scalars

  def _levels(self, keys, index, count):
    """Each sample's level, and which quarter of all levels that is in."""
    if self.model.training.continuous:
      drawn = sample_log_sigma(keys, index, count, self.config)
      level = diffusion.edm_level(jnp.exp(drawn))
      return level, jnp.clip(jnp.floor(4 * level.sigma), 0, 3)
    timestep = sample_timesteps(keys, index, count, self.config)
    levels = self.model.levels()
    quarter = timestep * 4 // len(levels.alpha)
    return level_at(levels, timestep), quarter

  def _latents(self, params, batch, keys):
    """Scaled latents, padded as the model wants them; without a gradient."""
    found = None
    if "latents" in batch:
      found = batch["latents"], batch["latents_std"]
    elif self.posterior is not None:
      found = self.posterior(params, batch["video"])
    if found is not None:
      x0, std = (x.astype(jnp.float32) for x in found)
      if self.config.sample_posterior:
        x0 = x0 + std * samplers.normal(keys, x0.shape[1:])
    else:
      keys = keys if self.config.sample_posterior else None
      video = to_signed(batch["video"])
      x0 = self.model.encode(params, video, keys, tiling=False, slicing=False)
    return jax.lax.stop_gradient(self.model.pad_latents(x0))

  def _condition(self, params, batch, key):
    """The embeddings, some of them left out."""
    config, index = self.config, batch["index"]
    drop = _chance(key, index, _TEXT, config.text_dropout)
    by_zeros = config.text_dropout_by == "zeros"
    inputs, cached = {}, {}
    for name, empty in self.empty.items():
      if name not in batch:
        # A cache has the embedding instead.
        continue
      given = batch[name]
      if not by_zeros:
        given = _where(drop, jnp.asarray(empty, given.dtype), given)
      inputs[name] = given
    if "text" in batch:
      cached["text"] = _where(drop, params["empty_text"], batch["text"])
    inputs |= {n: batch[n] for n in batch if n.startswith(_OF_CLIP)}
    inputs = {n.removeprefix(_OF_CLIP): x for n, x in inputs.items()}
    if self.takes_image:
      inputs |= self._image(batch, key)
    told = self.model.training.noises_image
    purpose = _IMAGE_NOISE if told else _IMAGE_POSTERIOR
    condition = dict(cached)
    for stage in self.model.conditioners:
      if not all(name in inputs for name in stage.needs):
        continue
      keys = keys_of(key, index, purpose) if stage.draws else None
      condition |= stage.apply(
        params[stage.component], inputs, keys, tiling=False
      )
    if by_zeros:
      condition["text"] = _where(drop, 0.0, condition["text"])
    if self.takes_image:
      condition |= self._without_images(condition, key, index)
    return condition

  def _without_images(self, condition, key, index):
    """The conditions of images, zeros in the place of some."""
    name = self.model.training.image_embedding
    image = jax.lax.stop_gradient(condition["image"])
    if name is None:
      drop = _chance(key, index, _IMAGE, self.config.image_dropout)
      return {"image": _where(drop, 0.0, image)}
    first, both, last = self.config.image_dropouts
    u = jax.vmap(jax.random.uniform)(keys_of(key, index, _IMAGE))
    no_embedding = u < first + both
    no_image = (u >= first) & (u < first + both + last)
    return {
      name: _where(no_embedding, 0.0, condition[name]),
      "image": _where(no_image, 0.0, image),
    }

  def _image(self, batch, key):
    """The given frames with noise of a size that is drawn too (appendix D)."""
    mean, deviation = self.config.image_noise
    frame = to_signed(batch["image"])
    if self.model.training.noises_image:
      keys = keys_of(key, batch["index"], _IMAGE_NOISE_LEVEL)
      draw = jax.vmap(jax.random.normal)(keys)
      return {"image": frame, "image_noise": jnp.exp(mean + deviation * draw)}
    keys = keys_of(key, batch["index"], _IMAGE_NOISE)

    def one(key, frame):
      size, noise = jax.random.split(key)
      sigma = jnp.exp(mean + deviation * jax.random.normal(size))
      return frame + sigma * jax.random.normal(noise, frame.shape)

    return {"image": jax.vmap(one)(keys, frame)}


def _where(drop: Array, instead: Any, given: Array) -> Array:
  """Takes `instead` for the samples that drop."""
  drop = drop.reshape(-1, *[1] * (given.ndim - 1))
  return jnp.where(drop, instead, given).astype(given.dtype)


def tokens(
  model: base.Model, captions: Sequence[str], plan: base.Plan
) -> dict[str, np.ndarray]:
  """Returns what conditioners read of captions; long ones are cut silently."""
  return _tokens(model, captions, plan)[0]


def _tokens(
  model: base.Model, captions: Sequence[str], plan: base.Plan
) -> tuple[dict[str, np.ndarray], int]:
  """Returns what conditioners read, and how many captions were cut."""
  with warnings.catch_warnings(record=True) as cuts:
    # A line for each caption would drown all else: they are counted.
    warnings.simplefilter("always", UserWarning)
    inputs = model.inputs(list(captions), None, plan)
  arrays = jax.tree.map(lambda *rows: np.concatenate(rows), *inputs)
  return arrays, len(cuts)


def host_batch(
  model: base.Model,
  batch: loader.Batch,
  plan: base.Plan,
  takes_image: bool,
  reads_text: bool = True,
) -> dict[str, np.ndarray]:
  """Returns what of a batch goes to the devices.

  Args:
    model: The model.
    batch: Of videos, or of what a cache has in their place.
    plan: Of the model.
    takes_image: Whether frames of the clip are a condition.
    reads_text: Whether a cache's embeddings of captions are of use.
  """
  if batch.made_by is None:
    arrays = {"video": batch.video}
    if takes_image:
      arrays["image"] = batch.video[:, list(model.training.image_frames)]
  else:
    skipped = set() if takes_image else {"image"}
    skipped |= set() if reads_text else {"text"}
    skipped |= {facts.MOTION}
    arrays = {n: x for n, x in batch.arrays.items() if n not in skipped}
  told = facts.numbers(model.training.numbers, batch)
  images = arrays.get("image", batch.video[:, :0])
  of_clip = model.clip_inputs(images, told, batch.bucket.num_frames)
  arrays |= {f"{_OF_CLIP}{name}": x for name, x in of_clip.items()}
  if model.takes_text and "text" not in arrays:
    read, cut = _tokens(model, batch.captions, plan)
    share = cut / len(batch.captions)
    arrays |= read | {CUT: np.full(len(batch.captions), share, np.float32)}
  return arrays
