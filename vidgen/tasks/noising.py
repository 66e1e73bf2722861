"""The loss of diffusion: noise is added, and a network tells what was added.

Yang et al., https://arxiv.org/abs/2408.06072, sections 2.2, 3.3 and appendix D,
and the released training code (zai-org/CogVideo, sat/). The loss is the mean
square error of what the network predicts, unweighted: for v with alpha² +
sigma² = 1 that is the released code's weighted error of x0.
"""

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, UInt8

from vidgen import diffusion, errors, samplers
from vidgen.data import loader
from vidgen.models import base

# One key a purpose: `fold_in(fold_in(key of the step, sample), purpose)`.
_TIMESTEP, _NOISE, _POSTERIOR, _TEXT, _IMAGE, _IMAGE_NOISE, _IMAGE_POSTERIOR = (
  range(7)
)
TEXT_DROPOUTS = ("empty", "zeros")
# The share of captions that are longer than the model's text, a metric.
CUT = "captions_cut"


@dataclasses.dataclass
class NoisingConfig:
  """How samples are noised and conditions left out.

  Attributes:
    timesteps: The density of training timesteps in pieces, each (from, to,
      weight), flat within a piece: `((0, 1000, 1.0),)` is uniform.
    timestep_intervals: Explicit uniform sampling: the density is cut into so
      many equal parts and a sample draws within its own. 0 is one for each
      sample of the global batch; the paper has one for each data-parallel rank.
    text_dropout: How often the prompt is left out.
    text_dropout_by: "empty" puts the empty prompt in its place, which is what
      the pipelines guide with; "zeros" an embedding of zeros, as the released
      training code does.
    image_dropout: How often the image of an image-to-video model is left out.
    image_noise: Mean and deviation of the logarithm of the noise on the image.
    sample_posterior: Whether latents are drawn from the autoencoder's
      posterior; else its mean is taken.
  """

  timesteps: tuple[tuple[int, int, float], ...] = ((0, 1000, 1.0),)
  timestep_intervals: int = 0
  text_dropout: float = 0.1
  text_dropout_by: str = "empty"
  image_dropout: float = 0.05
  image_noise: tuple[float, float] = (-3.0, 0.5)
  sample_posterior: bool = True


def check(config: NoisingConfig, levels: int) -> None:
  """Raises InputError where a config asks for what cannot be."""
  previous = 0
  for low, high, weight in config.timesteps:
    if not (previous <= low < high <= levels and weight > 0):
      raise errors.InputError(
        f"config: timesteps {config.timesteps}: each must be (from, to, "
        f"weight) with 0 <= from < to <= {levels}, in order, and weight > 0."
      )
    previous = high
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
  intervals = config.timestep_intervals or count
  own = (index * intervals) // count
  u = jax.vmap(jax.random.uniform)(keys)
  u = (own.astype(jnp.float32) + u) / jnp.asarray(intervals, jnp.float32)
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
    takes_image: Whether the first frame is a condition.
    empty: What the conditioners read of the empty prompt, b = 1.
  """

  model: base.Model
  config: NoisingConfig
  takes_image: bool
  empty: dict[str, np.ndarray]

  def __call__(
    self,
    params: dict[str, PyTree],
    batch: dict[str, Array],
    key: Key[Array, ""],
  ) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Returns the mean loss and scalars to tell."""
    index, count = batch["index"], batch["count"]
    keys = functools.partial(keys_of, key, index)
    x0 = self._latents(params, batch, keys(_POSTERIOR))
    noise = samplers.normal(keys(_NOISE), x0.shape[1:])
    timestep = sample_timesteps(keys(_TIMESTEP), index, count, self.config)
    condition = self._condition(params, batch, key)
    errors_ = loss(self.model, params, x0, noise, timestep, condition)
    mean = errors_.mean()
    # The loss of each quarter of the levels, for the eye: it differs a lot.
    quarter = timestep * 4 // len(self.model.levels().alpha)
    scalars = {"loss": mean}
    for i in range(4):
      inside = quarter == i
      total = jnp.maximum(inside.sum(), 1)
      name = f"loss_quarter_{i + 1}"
      scalars[name] = jnp.where(inside, errors_, 0).sum() / total
    if CUT in batch:
      scalars[CUT] = batch[CUT].mean()
    return mean, scalars

  def _latents(self, params, batch, keys):
    """Scaled latents, padded as the model wants them; without a gradient."""
    if "latents" in batch:
      x0 = batch["latents"].astype(jnp.float32)
      if self.config.sample_posterior:
        std = batch["latents_std"].astype(jnp.float32)
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
    if self.takes_image:
      inputs["image"] = self._image(batch, key)
    condition = dict(cached)
    for stage in self.model.conditioners:
      if not all(name in inputs for name in stage.needs):
        continue
      keys = keys_of(key, index, _IMAGE_POSTERIOR) if stage.draws else None
      condition |= stage.apply(
        params[stage.component], inputs, keys, tiling=False
      )
    if by_zeros:
      condition["text"] = _where(drop, 0.0, condition["text"])
    if self.takes_image:
      drop = _chance(key, index, _IMAGE, config.image_dropout)
      image = jax.lax.stop_gradient(condition["image"])
      condition["image"] = _where(drop, 0.0, image)
    return condition

  def _image(self, batch, key):
    """The first frame with noise of a size that is drawn too (appendix D)."""
    mean, deviation = self.config.image_noise
    frame = to_signed(batch["image"])
    keys = keys_of(key, batch["index"], _IMAGE_NOISE)

    def one(key, frame):
      size, noise = jax.random.split(key)
      sigma = jnp.exp(mean + deviation * jax.random.normal(size))
      return frame + sigma * jax.random.normal(noise, frame.shape)

    return jax.vmap(one)(keys, frame)


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
    takes_image: Whether the first frame is a condition.
    reads_text: Whether a cache's embeddings of captions are of use.
  """
  if batch.made_by is None:
    arrays = {"video": batch.video}
    if takes_image:
      arrays["image"] = batch.video[:, :1]
  else:
    skipped = set() if takes_image else {"image"}
    skipped |= set() if reads_text else {"text"}
    arrays = {n: x for n, x in batch.arrays.items() if n not in skipped}
  if "text" not in arrays:
    read, cut = _tokens(model, batch.captions, plan)
    share = cut / len(batch.captions)
    arrays |= read | {CUT: np.full(len(batch.captions), share, np.float32)}
  return arrays
