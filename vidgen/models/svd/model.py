"""Stable Video Diffusion as pure functions of one tree of parameters."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, PyTree, UInt8

from vidgen import diffusion, errors, samplers
from vidgen.encoders import clip, clip_image, clip_tokenizer
from vidgen.models import base
from vidgen.models.svd import flops, numbers, unet, vae
from vidgen.models.svd import plan as plan_lib
from vidgen.models.svd.components import components
from vidgen.models.svd.config import Config, published_configs
from vidgen.nn import layers, posterior

# Levels that stand for all of them, where training has no density of its own.
_LEVELS = 1000


def _same(x: Array) -> Array:
  return x


@dataclasses.dataclass
class StableVideoDiffusion:
  """A model of the family; see `base.Model`.

  What it is told, `condition`, has

    context: `b l e`, the embedding of each image that is given.
    text: `b l e`, that of a text, for models that read one in its place.
    numbers: `b k`, or `b f k` for each frame: see `numbers`.
    image: `b l h w c`, latents of the images, not scaled; the only one stands
      beside each frame, and two stand at both ends.
    image_only: `b f`, which frames are single images.

  Attributes:
    config: The architecture.
    dtype: What the networks compute in.
    tokenizer: The checkpoint's own, where it reads a text.
    remat: What of the UNet is kept for the backward pass; see `unet.Unet`.
    attention: The implementation of attention within frames; None is the
      fastest of the platform.
  """

  config: Config
  dtype: DTypeLike
  tokenizer: clip_tokenizer.Tokenizer | None = None
  remat: str = "none"
  attention: str | None = None

  # What the family is, whatever the checkpoint.
  denoiser: ClassVar[str] = "unet"

  def __post_init__(self):
    unet.check_remat(self.remat)

  @functools.cached_property
  def components(self) -> tuple[base.Component, ...]:
    return components(self.config)

  def published_configs(self) -> dict[str, dict[str, Any]]:
    return published_configs(self.config)

  @property
  def fps(self) -> int:
    return self.config.fps

  @property
  def latent_channels(self) -> int:
    return self.config.vae.latent_channels

  @property
  def heads(self) -> int:
    """Heads of the level that has the fewest, which a mesh may split."""
    return min(self.config.unet.num_attention_heads)

  @property
  def takes_image(self) -> bool:
    return self.config.image_encoder is not None

  @property
  def takes_text(self) -> bool:
    return self.config.text_encoder is not None

  @property
  def takes_fps(self) -> bool:
    return numbers.FPS in self.config.conditioning.numbers

  @property
  def training(self) -> base.Training:
    conditioning = self.config.conditioning
    return base.Training(
      continuous=True,
      image_frames=conditioning.given if self.takes_image else (),
      image_embedding="context" if self.takes_image else None,
      noises_image=True,
      image_switch=not self.config.images,
      numbers=numbers.needed(conditioning.numbers),
    )

  def flops(
    self, num_frames: int, height: int, width: int, by_weights: bool = False
  ) -> float:
    """Two for each multiplication of a matrix; norms and sums are left out."""
    ratio = self.config.vae.spatial_compression_ratio
    return flops.flops(
      self.config.unet,
      num_frames,
      height // ratio,
      width // ratio,
      images=self.config.images,
      by_weights=by_weights,
    )

  @property
  def conditioners(self) -> tuple[base.Conditioner, ...]:
    found = []
    stage = functools.partial(base.Conditioner, tiles=False)
    if self.takes_text:
      found.append(
        stage(
          "text",
          "text_encoder",
          needs=("ids", "numbers"),
          draws=False,
          apply=self._text,
        )
      )
    if self.takes_image:
      found.append(
        stage(
          "context",
          "image_encoder",
          needs=("pixels", "numbers"),
          draws=False,
          apply=self._context,
        )
      )
      found.append(
        stage(
          "image",
          "vae",
          needs=("image",),
          draws=True,
          apply=self._image,
          purpose=samplers.IMAGE,
        )
      )
    return tuple(found)

  def plan(self, request: base.Request) -> base.Plan:
    return plan_lib.plan(self.config, request)

  def inputs(
    self,
    prompts: list[str],
    images: list[base.Image] | None,
    plan: base.Plan,
  ) -> list[dict[str, np.ndarray]]:
    """CLIP sees the image as it was given, the autoencoder in its size."""
    of_clip = plan_lib.of_clip(plan.options)
    told = self._told(of_clip, plan.num_frames)
    inputs = [{"numbers": told} for _ in prompts]
    if self.takes_text:
      tokens = self.tokenizer(prompts)
      for one, ids in zip(inputs, tokens, strict=True):
        one["ids"] = ids[None]
    if images is None:
      return inputs
    count = len(self.config.conditioning.given)
    groups = [images[i : i + count] for i in range(0, len(images), count)]
    for one, group in zip(inputs, groups, strict=True):
      one["pixels"] = self._pixels([[image.original for image in group]])
      one["image"] = np.stack([image.pixels for image in group])[None]
      one["image_noise"] = of_clip[numbers.NOISE].astype(np.float32)
    return inputs

  def _told(self, of_clip, num_frames):
    conditioning = self.config.conditioning
    given = conditioning.given[0] if conditioning.given else 0
    return numbers.told(conditioning.numbers, of_clip, num_frames, given)

  def _pixels(self, clips):
    """What CLIP takes of the images of clips, `b n size size 3`."""
    size = self.config.image_encoder.image_size
    see = lambda image: clip_image.preprocess(image, size)
    return np.stack([np.stack([see(x) for x in images]) for images in clips])

  def clip_inputs(
    self,
    images: UInt8[np.ndarray, "b n H W 3"],
    told: dict[str, Float[np.ndarray, " b"]],
    num_frames: int,
  ) -> dict[str, np.ndarray]:
    inputs = {"numbers": np.zeros((len(images), 0), np.float32)}
    if self.config.conditioning.numbers:
      inputs["numbers"] = self._told(told, num_frames)
    if self.takes_image:
      inputs["pixels"] = self._pixels(images)
    return inputs

  def unconditional(
    self, condition: dict[str, Array], negative: dict[str, Array]
  ) -> dict[str, Array]:
    """No image: zeros. The numbers stay what they are."""
    zeros = {
      name: jnp.zeros_like(condition[name])
      for name in ("context", "image")
      if name in condition
    }
    return {**condition, **zeros, **negative}

  def _text(self, params, inputs, key, *, tiling):
    del key, tiling
    tower = clip.TextTower(self.config.text_encoder, dtype=self.dtype)
    text = tower.apply({"params": params}, inputs["ids"])
    return {"text": text, "numbers": jnp.asarray(inputs["numbers"])}

  def _context(self, params, inputs, key, *, tiling):
    del key, tiling
    pixels = jnp.asarray(inputs["pixels"])
    b, n = pixels.shape[:2]
    tower = clip.VisionTower(self.config.image_encoder, dtype=self.dtype)
    flat = pixels.reshape(b * n, *pixels.shape[2:])
    embedding = tower.apply({"params": params}, flat).reshape(b, n, -1)
    told = jnp.asarray(inputs["numbers"])
    names = self.config.conditioning.numbers
    if "image_noise" in inputs and numbers.NOISE in names:
      strength = jnp.asarray(inputs["image_noise"], told.dtype)
      strength = strength.reshape(-1, *[1] * (told.ndim - 2))
      told = told.at[..., names.index(numbers.NOISE)].set(strength)
    return {"context": embedding, "numbers": told}

  def _image(self, params, inputs, key, *, tiling):
    del tiling
    image = jnp.asarray(inputs["image"])
    params = {"vae": params}
    noisy = key is not None and "image_noise" in inputs

    def noised(x):
      if not noisy:
        return x
      strength = jnp.asarray(inputs["image_noise"]).reshape(-1, 1, 1, 1, 1)
      return x + strength * samplers.normal(key, x.shape[1:])

    if self.config.conditioning.noised == "pixels":
      return {"image": self.image_condition(params, noised(image))}
    # Among noisy latents, and so in their scale.
    scale = self.config.vae.scaling_factor
    return {"image": noised(self.image_condition(params, image, scale=scale))}

  def image_condition(
    self,
    params: PyTree,
    image: Float[Array, "b n H W 3"],
    key: Key[Array, " b"] | None = None,
    *,
    scale: float | Float[Array, ""] | np.floating | None = None,
    tiling: bool = False,
  ) -> Float[Array, "b n h w c"]:
    """The images' latents, to stand beside frames'; they stay unscaled."""
    del tiling
    latents = self._posterior(params["vae"], image, key)
    return latents if scale is None else latents * scale

  def pad_latents(
    self, latents: Float[Array, "b f h w c"]
  ) -> Float[Array, "b f h w c"]:
    return latents

  @property
  def _vae_dtype(self) -> DTypeLike:
    """float16 overflows within the published autoencoders."""
    narrow = jnp.dtype(self.dtype) == jnp.float16
    upcast = narrow and self.config.vae.force_upcast
    return jnp.float32 if upcast else self.dtype

  def _posterior(self, params, video, key):
    """The posterior's mean, or a sample where there are keys; not scaled."""
    found = vae.encode(params, self.config.vae, video, dtype=self._vae_dtype)
    if key is None:
      return found.mean
    noise = samplers.normal(key, found.mean.shape[1:])
    return posterior.sample(found, noise)

  def encode(
    self,
    params: PyTree,
    video: Float[Array, "b F H W 3"],
    key: Key[Array, " b"] | None = None,
    *,
    tiling: bool = False,
    slicing: bool = False,
  ) -> Float[Array, "b f h w c"]:
    run = lambda video, key: self._posterior(params["vae"], video, key)
    latents = _by_clip(run, slicing, video, key)
    _check_tiling(tiling)
    return latents * self.config.vae.scaling_factor

  def decode(
    self,
    params: PyTree,
    latents: Float[Array, "b f h w c"],
    post: Callable[[Array], Array] = _same,
    *,
    tiling: bool = False,
    slicing: bool = False,
    decode_chunk: int | None = None,
  ) -> Array:
    _check_tiling(tiling)
    run = lambda latents: vae.decode(
      params["vae"],
      self.config.vae,
      latents / self.config.vae.scaling_factor,
      dtype=self._vae_dtype,
      post=post,
      chunk=decode_chunk,
    )
    return _by_clip(run, slicing, latents)

  def denoise(
    self,
    params: PyTree,
    x: Float[Array, "b f h w c"],
    level: diffusion.NoiseLevel,
    condition: dict[str, Array],
  ) -> Float[Array, "b f h w c"]:
    v = self.predict(params, x, level, condition)
    return diffusion.x0_from_v(x, v, level)

  def levels(self) -> diffusion.NoiseLevel:
    """Some of the levels, evenly spaced in ln(sigma): they are continuous."""
    scheduler = self.config.scheduler
    ends = scheduler.sigma_min, scheduler.sigma_max
    return diffusion.edm_level(np.geomspace(*ends, _LEVELS))

  def target(
    self,
    x0: Float[Array, "b f h w c"],
    noise: Float[Array, "b f h w c"],
    level: diffusion.NoiseLevel,
  ) -> Float[Array, "b f h w c"]:
    return diffusion.v_from_x0_noise(x0, noise, level)

  def predict(
    self,
    params: PyTree,
    x: Float[Array, "b f h w c"],
    level: diffusion.NoiseLevel,
    condition: dict[str, Array],
  ) -> Float[Array, "b f h w c"]:
    """v, in float32."""
    config = self.config.unet
    module = unet.Unet(
      config,
      dtype=self.dtype,
      remat=self.remat,
      images=self.config.images,
      attention=self.attention,
    )
    inputs = x
    if "image" in condition:
      image = condition["image"].astype(x.dtype)
      beside = self._beside(params["unet"], image, x.shape[1])
      inputs = jnp.concatenate([x, *beside], axis=-1)
    vector = None
    if config.projection_class_embeddings_input_dim:
      told = condition["numbers"]
      told = told if told.ndim == 3 else told[:, None]
      names = self.config.conditioning.numbers
      vector = numbers.embed(names, told, config.addition_time_embed_dim)
    timestep = jnp.broadcast_to(level.timestep, x.shape[:1])
    variables = {"params": params["unet"]}
    if "unet_lora" in params:
      variables[layers.LORA] = params["unet_lora"]
    return module.apply(
      variables,
      inputs,
      timestep,
      condition["text" if self.takes_text else "context"],
      vector,
      image_only=condition.get("image_only"),
    )

  def _beside(self, params, image, frames):
    """What stands beside noisy latents: the image's, and which are given.

    Blattmann et al., appendix D.5.
    """
    conditioning = self.config.conditioning
    if conditioning.mask_size is None:
      return [jnp.broadcast_to(image, (len(image), frames, *image.shape[2:]))]
    missing = jnp.asarray(params["mask"], image.dtype)
    where = np.arange(frames)[list(conditioning.given)]
    shape = (len(image), frames, *image.shape[2:])
    latents = jnp.broadcast_to(missing, shape).at[:, where].set(image)
    given = jnp.zeros((*shape[:-1], 1), image.dtype).at[:, where].set(1)
    return [latents, given]


def _check_tiling(tiling: bool) -> None:
  if tiling:
    raise errors.InputError(
      "tiling: this family's frames are encoded and decoded whole; "
      "decode_chunk, so many at a time, takes less memory."
    )


def _by_clip(run: Callable[..., Array], slicing: bool, *args: Any) -> Array:
  """Applies `run` to all clips at once, or to one after another."""
  if not slicing:
    return run(*args)
  cut = lambda x, i: None if x is None else x[i : i + 1]
  parts = [run(*(cut(x, i) for x in args)) for i in range(len(args[0]))]
  return jnp.concatenate(parts)
