"""The diffusion task: train a denoiser, whole or by LoRA, from raw videos."""

import dataclasses
import functools
import pathlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from vidgen import adapters, errors, publish, sharding
from vidgen.data import buckets, cache, loader
from vidgen.models import base
from vidgen.pipeline import Pipeline
from vidgen.tasks import facts, noising, sources
from vidgen.tasks.base import Sample
from vidgen.tasks.noising import NoisingConfig

VAE, TEXT_ENCODER = "vae", "text_encoder"


@dataclasses.dataclass
class SampleSettings:
  """The samples that a run makes now and then, always of the same noise.

  Attributes:
    prompts: What of; none makes no samples. None for models without text.
    images: First frames, for image-to-video models, one for each prompt; they
      alone say how many samples there are where a model takes no text.
    num_frames: Frames; None is the model's own default, as below.
    height: Pixels.
    width: Pixels.
    num_steps: Denoising steps.
    guidance_scale: Of classifier-free guidance.
    seed: Of the noise.
    options: What the family alone has.
  """

  prompts: tuple[str, ...] = ()
  images: tuple[str, ...] = ()
  num_frames: int | None = None
  height: int | None = None
  width: int | None = None
  num_steps: int | None = None
  guidance_scale: float | None = None
  seed: int = 0
  options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class DiffusionTaskConfig:
  """What a diffusion run trains.

  Attributes:
    source: The model, and where its weights come from.
    noising: How samples are noised and conditions left out.
    train_text_encoder: Whether the text encoder is trained along.
    train_along: Other components that are trained along, by name.
    lora: Trains low-rank updates of the denoiser alone; None trains all of it.
    dtype: What the networks compute in; weights in training are float32.
    vae_dtype: What the autoencoder encodes clips in, here and in a cache of
      latents; None is `dtype`, in which given images are encoded anyhow.
    remat: What of a block's activations is computed again in the backward
      pass, by name: "none", "full" or "dots".
    unroll: How many blocks one round of the loop over them runs: more compile
      for longer, and copy less of what the backward pass needs.
    samples: The samples that a run makes.
  """

  source: sources.Source
  noising: NoisingConfig = dataclasses.field(default_factory=NoisingConfig)
  train_text_encoder: bool = False
  train_along: tuple[str, ...] = ()
  lora: adapters.LoraConfig | None = None
  dtype: str = "bfloat16"
  vae_dtype: str | None = None
  remat: str = "none"
  unroll: int = 1
  samples: SampleSettings = dataclasses.field(default_factory=SampleSettings)

  def build(self, mesh: Mesh) -> "DiffusionTask":
    """Returns the task, everything checked that needs no weights."""
    for dtype in (self.dtype, self.vae_dtype or self.dtype):
      sources.check_dtype(dtype)
    opened = sources.Opened(self.source)
    if self.lora is not None and self.train_text_encoder:
      raise errors.InputError(
        "config: lora leaves the text encoder alone; drop train_text_encoder."
      )
    if self.lora is not None and self.train_along:
      raise errors.InputError(
        "config: lora leaves all components alone; drop train_along."
      )
    if unknown := set(self.train_along) - opened.components.keys():
      raise errors.InputError(
        f"config: train_along: no component {', '.join(sorted(unknown))}; the "
        f"model has {', '.join(opened.components)}."
      )
    if VAE in self.train_along and not opened.is_scratch(VAE):
      raise errors.InputError(
        "config: train_along: the loss gives vae no gradient, and weight decay "
        "would wear it down; train it by an autoencoder's run."
      )
    has_text = TEXT_ENCODER in opened.components
    words = opened.tokenizer_folder() if has_text else None
    if self.unroll < 1:
      raise errors.InputError(f"config: unroll={self.unroll}; give 1 or more.")
    model = opened.model(
      jnp.dtype(self.dtype), words, remat=self.remat, unroll=self.unroll
    )
    if self.lora is not None and opened.is_scratch(model.denoiser):
      raise errors.InputError(
        "config: a LoRA needs a trained model; take it out of scratch."
      )
    noising.check(self.noising, model)
    return DiffusionTask(self, opened, model, words, mesh)


class DiffusionTask:
  """See `tasks.base.Task`."""

  def __init__(
    self,
    config: DiffusionTaskConfig,
    opened: sources.Opened,
    model: base.Model,
    words: pathlib.Path | None,
    mesh: Mesh,
  ):
    self.config, self.model = config, model
    self.heads = model.heads
    self._opened, self._words, self._mesh = opened, words, mesh
    self._takes_image = model.takes_image
    with warnings.catch_warnings():
      # Nobody asked for anything yet that could be unwise.
      warnings.simplefilter("ignore")
      self._plan = model.plan(base.Request(image=self._takes_image))
    self._pipeline: Pipeline | None = None
    self._denoiser = opened.components[model.denoiser]
    lora = self._denoiser.lora_name
    trained = (model.denoiser,) if config.lora is None else (lora,)
    if config.train_text_encoder:
      trained += (TEXT_ENCODER,)
    trained += tuple(n for n in config.train_along if n not in trained)
    self.groups = self.averaged = trained
    self._frozen_names = tuple(
      name for name in opened.components if name not in trained
    )
    empty = {}
    if model.takes_text:
      empty = noising.tokens(model, [""], self._plan)
    is_own = self._dtype(VAE) != jnp.dtype(config.dtype)
    self._loss = noising.Noising(
      model,
      config.noising,
      self._takes_image,
      empty,
      self.posterior if is_own else None,
    )
    # Hashing weights takes seconds; every stage's task shares the answer.
    self._encoders = functools.cache(self._hash_encoders)

  def with_options(self, options: dict[str, Any]) -> "DiffusionTask":
    """Returns the task with other fields of `noising`."""
    if not options:
      return self
    fields = {f.name for f in dataclasses.fields(NoisingConfig)}
    if unknown := options.keys() - fields:
      raise errors.InputError(
        f"config: a stage's options {', '.join(sorted(unknown))} are unknown; "
        f"known are {', '.join(sorted(fields))}."
      )
    config = dataclasses.replace(self.config.noising, **options)
    noising.check(config, self.model)
    other = DiffusionTask.__new__(DiffusionTask)
    other.__dict__ |= self.__dict__
    other._loss = dataclasses.replace(self._loss, config=config)
    return other

  def init(self, key: Key[Array, ""]) -> dict[str, PyTree]:
    split = jax.random.split(key, len(self.groups))
    keys = dict(zip(self.groups, split, strict=True))
    components = self._opened.components
    params = {}
    for name in self.groups:
      if name == self._denoiser.lora_name:
        params[name] = adapters.init(
          self._denoiser, self.config.lora, keys[name]
        )
      else:
        params[name] = components[name].init(keys[name])
    return params

  def start(
    self, places: dict[str, PyTree], key: Key[Array, ""]
  ) -> dict[str, PyTree]:
    keys = jax.random.split(key, len(self.groups))
    return {
      name: self._opened.load(name, places[name], jnp.float32, one)
      for name, one in zip(self.groups, keys, strict=True)
      if name in self._opened.components and not self._opened.is_scratch(name)
    }

  def frozen(
    self, mesh: Mesh, *, cached: bool = False, sampled: bool = True
  ) -> dict[str, PyTree]:
    left_out = self._left_out(cached, sampled)
    params = {}
    if TEXT_ENCODER in self._frozen_names:
      # First: where it is left out, the rest gets its room.
      params = self._load_frozen((TEXT_ENCODER,), mesh)
      params["empty_text"] = self._empty_text(params)
      if TEXT_ENCODER in left_out:
        del params[TEXT_ENCODER]
    done = {TEXT_ENCODER, *left_out}
    names = tuple(name for name in self._frozen_names if name not in done)
    return params | self._load_frozen(names, mesh)

  def frozen_shapes(
    self, mesh: Mesh, *, cached: bool = False, sampled: bool = True
  ) -> dict[str, PyTree]:
    """Returns what `frozen` would, as shapes with shardings."""
    params = {}
    for name in self._frozen_names:
      params |= self._opened.frozen_shapes((name,), mesh, self._dtype(name))
    if TEXT_ENCODER in params:
      with sharding.use(mesh):
        text = jax.eval_shape(self.embed, params, self._loss.empty)
      place = sharding.shardings(text, mesh)
      params["empty_text"] = sharding.placed(text, place)
    left_out = self._left_out(cached, sampled)
    return {name: x for name, x in params.items() if name not in left_out}

  def _left_out(self, cached: bool, sampled: bool) -> tuple[str, ...]:
    """The frozen encoders that a run from caches never reads."""
    settings = self.config.samples
    if not cached or (sampled and (settings.prompts or settings.images)):
      return ()
    # A cache has embeddings of text and latents of clips, not of given images.
    names = (TEXT_ENCODER,) if self._takes_image else (VAE, TEXT_ENCODER)
    return tuple(
      name
      for name in names
      if name in self._frozen_names and self._opened.is_as_saved(name)
    )

  def _empty_text(self, params: dict[str, PyTree]) -> Array:
    """The embedding of the empty prompt, which takes a dropped one's place."""
    with sharding.use(self._mesh):
      return jax.jit(self.embed)(params, self._loss.empty)

  def frozen_encoders(self, mesh: Mesh) -> dict[str, PyTree]:
    """Returns the parameters of `posterior` and, unless trained, `embed`."""
    names = tuple(n for n in (VAE, TEXT_ENCODER) if n in self._frozen_names)
    return self._load_frozen(names, mesh)

  def _load_frozen(
    self, names: tuple[str, ...], mesh: Mesh
  ) -> dict[str, PyTree]:
    params = {}
    for name in names:
      params |= self._opened.frozen((name,), mesh, self._dtype(name))
    return params

  def _dtype(self, name: str) -> jnp.dtype:
    """What a component computes in."""
    is_vae = name == VAE and self.config.vae_dtype is not None
    return jnp.dtype(self.config.vae_dtype if is_vae else self.config.dtype)

  def posterior(
    self, params: dict[str, PyTree], video: UInt8[Array, "b F H W 3"]
  ) -> tuple[Float[Array, "b f h w c"], Float[Array, "b f h w c"]]:
    """Returns the mean and the deviation of the scaled latents of videos."""
    family, config = self._opened.family, self._opened.config
    encode = family.create_autoencoder(config, self._dtype(VAE)).encode
    mean, logvar = encode(params[VAE], noising.to_signed(video))
    published = self.model.published_configs()[f"{VAE}/config.json"]
    scale = published["scaling_factor"]
    return mean * scale, jnp.exp(logvar / 2) * scale

  def embed(
    self, params: dict[str, PyTree], inputs: dict[str, Array | np.ndarray]
  ) -> Float[Array, "b l e"]:
    """Returns the embeddings of captions, given their `tokens`."""
    for stage in self.model.conditioners:
      if stage.component == TEXT_ENCODER:
        apply = functools.partial(stage.apply, params[TEXT_ENCODER])
        return apply(inputs, None, tiling=False)["text"]
    raise ValueError("The model has no text encoder.")

  def reads(self) -> dict[str, pathlib.Path]:
    """Returns the folders of the components that have weights, and of words."""
    homes = {name: self._opened.home(name) for name in self._opened.components}
    found = {name: home / name for name, home in homes.items() if home}
    return found | ({"tokenizer": self._words} if self._words else {})

  def tokens(self, captions: list[str]) -> dict[str, np.ndarray]:
    """Returns what `embed` reads of captions."""
    return noising.tokens(self.model, captions, self._plan)

  def encoders(self) -> cache.Encoders:
    """Returns what encodes, by hashes; no text encoder if that is trained.

    Raises:
      InputError: An encoder starts from random weights.
    """
    return self._encoders()

  def _hash_encoders(self) -> cache.Encoders:
    text = None
    if TEXT_ENCODER in self._frozen_names:
      files = sorted(path for path in self._words.iterdir() if path.is_file())
      words = {path.name: cache.digest_file(path) for path in files}
      empty = {name: x.tolist() for name, x in self._loss.empty.items()}
      text = self._hash(TEXT_ENCODER, words, empty)
    training = self.model.training
    kept = ""
    if training.image_frames != (0,) or facts.MOTION in training.numbers:
      kept = f"frames {training.image_frames}, {training.numbers}"
    dtype, of_text = self._dtype(VAE).name, self._dtype(TEXT_ENCODER).name
    if text is not None and of_text != dtype:
      dtype = f"{dtype}, text {of_text}"
    return cache.Encoders(
      self._hash(VAE),
      text,
      dtype,
      self._takes_image,
      kept,
    )

  def kept(self, window: UInt8[np.ndarray, "F H W 3"]) -> dict[str, np.ndarray]:
    """Returns what a cache keeps of a window beside its latents."""
    training, arrays = self.model.training, {}
    if self._takes_image:
      arrays["image"] = window[list(training.image_frames)]
    if facts.MOTION in training.numbers:
      moved = facts.motion(window[None])[0]
      arrays[facts.MOTION] = np.asarray(moved, np.float32)
    return arrays

  def _hash(self, name: str, *parts: Any) -> str:
    """A hash of a component: its config, its weights, and what else is."""
    folder = self._opened.home(name)
    if folder is None:
      raise errors.InputError(
        f"config: {name} starts from random weights, of which a cache is of no "
        "use; train it first, or take it out of scratch."
      )
    config = self.model.published_configs()[f"{name}/config.json"]
    config = {k: v for k, v in config.items() if not k.startswith("_")}
    return cache.identity(config, cache.digest(folder, name), *parts)

  def host_batch(self, batch: loader.Batch) -> dict[str, np.ndarray]:
    reads_text = TEXT_ENCODER in self._frozen_names
    if batch.made_by is not None:
      cache.check_encoders(batch.made_by, self.encoders())
    return noising.host_batch(
      self.model, batch, self._plan, self._takes_image, reads_text
    )

  def cached_arrays(
    self, bucket: buckets.Bucket, frozen: dict[str, PyTree]
  ) -> dict[str, np.ndarray]:
    """Returns what `host_batch` has of a clip of a cache: for shapes.

    Args:
      bucket: Of the clip.
      frozen: As of `frozen_shapes`, nothing left out.
    """
    batch = loader.blank(bucket)
    shapes: dict[str, Any] = {}
    with sharding.use(self._mesh):
      found = jax.eval_shape(self.posterior, frozen, batch.video)
      shapes |= zip(("latents", "latents_std"), found, strict=True)
      if TEXT_ENCODER in self._frozen_names:
        shapes["text"] = jax.eval_shape(self.embed, frozen, self.tokens([""]))
    arrays = {n: np.zeros(x.shape, np.float32) for n, x in shapes.items()}
    arrays |= {n: x[None] for n, x in self.kept(batch.video[0]).items()}
    cached = batch._replace(
      video=batch.video[:, :0],
      arrays=arrays,
      made_by=cache.Encoders("", None, self.config.dtype, self._takes_image),
    )
    reads_text = TEXT_ENCODER in self._frozen_names
    return noising.host_batch(
      self.model, cached, self._plan, self._takes_image, reads_text
    )

  def gradients(
    self,
    params: dict[str, PyTree],
    frozen: dict[str, PyTree],
    batch: dict[str, Array],
    key: Key[Array, ""],
    step: Int[Array, ""],
  ) -> tuple[dict[str, PyTree], dict[str, PyTree]]:
    del step

    def loss(params):
      return self._loss(self._together(params, frozen), batch, key)

    grads, scalars = jax.grad(loss, has_aux=True)(params)
    return grads, scalars

  def _together(self, params, frozen):
    """The model's parameters: what is trained beside what is not."""
    every = {**frozen, **params}
    if self.config.lora is None:
      return every
    tree = every.pop(self._denoiser.lora_name)
    return adapters.attach(every, tree, self.config.lora, self._denoiser)

  def flops(self, bucket: buckets.Bucket) -> float | None:
    """Three times the denoiser's forward pass; the encoders are left out.

    Under a LoRA the weights take no gradients, a third of what they take part
    in; the LoRA's own operations are left out.
    """
    size = bucket.num_frames, bucket.height, bucket.width
    each = 3 * self.model.flops(*size)
    if self.config.lora is not None:
      each -= self.model.flops(*size, by_weights=True)
    return bucket.batch_size * each

  def samples(
    self, params: dict[str, PyTree], frozen: dict[str, PyTree]
  ) -> list[Sample]:
    settings = self.config.samples
    takes_text = self.model.takes_text
    named = settings.prompts if takes_text else settings.images
    if not named:
      return []
    pipeline = self._sampler(self._together(params, frozen))
    options = dataclasses.asdict(settings)
    options |= options.pop("options")
    prompts = list(options.pop("prompts"))
    prompts = prompts if takes_text else None
    images = list(options.pop("images")) or None
    videos = pipeline.sample(prompts, image=images, **options)
    return [
      Sample(f"{i:03d}", name, frames, float(pipeline.fps))
      for i, (name, frames) in enumerate(zip(named, videos, strict=True))
    ]

  def _sampler(self, params: dict[str, PyTree]) -> Pipeline:
    """A pipeline that keeps what it has compiled from call to call."""
    dtype = jnp.dtype(self.config.dtype)
    params = {n: tree for n, tree in params.items() if n != "empty_text"}
    cast = jax.tree.map(lambda x: x.astype(dtype), params)
    if self._pipeline is None:
      self._pipeline = Pipeline(self.model, cast, self._mesh)
    self._pipeline.replace(cast)
    return self._pipeline

  def publish(
    self,
    folder: pathlib.Path,
    params: dict[str, PyTree],
    frozen: dict[str, PyTree],
  ) -> None:
    """Writes the model, or the LoRA, as diffusers reads it."""
    if self.config.lora is not None:
      tree = params[self._denoiser.lora_name]
      adapters.export(folder, tree, self.config.lora, self._denoiser)
      return
    every = {**frozen, **params}
    # What `frozen` left out is as in its files, and goes by the host's memory.
    parts = {
      name: every[name]
      if name in every
      else self._opened.load(name, None, self._dtype(name))
      for name in self._opened.components
    }
    publish.publish(
      folder,
      self.model,
      parts,
      tokenizer=self._words,
      dtype={name: self._dtype(name) for name in parts},
    )
