"""CogVideoX as pure functions of one tree of parameters."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, PyTree, UInt8

from vidgen import diffusion, errors, samplers
from vidgen.encoders import t5, tokenizer
from vidgen.models import base
from vidgen.models.cogvideox import (
  chunks,
  plan,
  transformer,
  transformer_weights,
  vae,
  vae_weights,
)
from vidgen.models.cogvideox.config import Config, published_configs
from vidgen.nn import layers, posterior


def components(config: Config) -> tuple[base.Component, ...]:
  """Returns the three networks of a CogVideoX model."""
  temporal_patches = config.transformer.patch_size_t is not None
  return (
    base.Component(
      "text_encoder",
      functools.partial(_init_text_encoder, config.text_encoder),
      t5.T5_TABLE,
    ),
    base.Component(
      "transformer",
      functools.partial(transformer.init, config.transformer),
      transformer_weights.table(temporal_patches),
      takes_lora=True,
    ),
    base.Component(
      "vae",
      functools.partial(vae.init, config.vae),
      vae_weights.VAE_TABLE,
    ),
  )


def _init_text_encoder(config: t5.T5Config, key: Key[Array, ""]) -> PyTree:
  ids = jnp.zeros((1, 1), jnp.int32)
  return t5.T5Encoder(config).init(key, ids)["params"]


@dataclasses.dataclass
class CogVideoX:
  """A model of the family; see `base.Model`.

  Attributes:
    config: The architecture.
    dtype: What the networks compute in.
    tokenizer: The checkpoint's own.
    remat: What of the transformer is kept for the backward pass; see
      `transformer.Transformer`.
    unroll: As of `transformer.Transformer`.
    attention: The implementation of the transformer's attention; None is the
      fastest of the platform.
  """

  config: Config
  dtype: DTypeLike
  tokenizer: tokenizer.Tokenizer
  remat: str = "none"
  unroll: int = 1
  attention: str | None = None

  # What the family is, whatever the checkpoint.
  denoiser: ClassVar[str] = "transformer"
  takes_text: ClassVar[bool] = True
  takes_fps: ClassVar[bool] = False
  training: ClassVar[base.Training] = base.Training()

  def __post_init__(self):
    transformer.check_remat(self.remat)

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
    """Heads of the transformer's attention, which a mesh may split."""
    return self.config.transformer.num_attention_heads

  @property
  def takes_image(self) -> bool:
    return self.config.takes_image

  def flops(
    self, num_frames: int, height: int, width: int, by_weights: bool = False
  ) -> float:
    """Two for each multiplication of a matrix; norms and sums are left out."""
    config = self.config.transformer
    scale = self.config.vae.spatial_compression_ratio * config.patch_size
    latents = (num_frames - 1) // config.temporal_compression_ratio + 1
    frames = -(-latents // (config.patch_size_t or 1))
    video = frames * (height // scale) * (width // scale)
    tokens = config.max_text_seq_length + video
    # Four projections, two attention products, and four times wide twice.
    dense = 12 * tokens * config.dim**2
    block = dense + (0 if by_weights else 2 * tokens**2 * config.dim)
    return 2.0 * config.num_layers * block

  @property
  def conditioners(self) -> tuple[base.Conditioner, ...]:
    return (
      base.Conditioner(
        "text",
        "text_encoder",
        needs=("ids",),
        draws=False,
        tiles=False,
        apply=self._text,
      ),
      base.Conditioner(
        "image",
        "vae",
        needs=("image",),
        draws=True,
        tiles=True,
        apply=self._image,
      ),
    )

  def plan(self, request: base.Request) -> base.Plan:
    return plan.plan(self.config, request)

  def inputs(
    self,
    prompts: list[str],
    images: list[base.Image] | None,
    plan: base.Plan,
  ) -> list[dict[str, np.ndarray]]:
    length = plan.options["max_text_length"]
    tokens = self.tokenizer(prompts, length)
    for prompt, cut in zip(prompts, tokens.truncated, strict=True):
      if cut is not None:
        warnings.warn(
          f"prompt {prompt[:40]!r}...: longer than {length} tokens; the model "
          f"does not read its end: {cut!r}",
          stacklevel=2,
        )
    inputs = [{"ids": ids[None]} for ids in tokens.ids]
    scale = plan.options["image_latent_scale"]
    for one, image in zip(inputs, images or [], strict=images is not None):
      one["image"] = image.pixels[None, None]
      if scale is not None:
        one["image_latent_scale"] = np.float32(scale)
    return inputs

  def clip_inputs(
    self,
    images: UInt8[np.ndarray, "b n H W 3"],
    told: dict[str, Float[np.ndarray, " b"]],
    num_frames: int,
  ) -> dict[str, np.ndarray]:
    """Nothing: the image alone is a condition."""
    del images, told, num_frames
    return {}

  def unconditional(
    self, condition: dict[str, Array], negative: dict[str, Array]
  ) -> dict[str, Array]:
    """The branches differ in the text alone."""
    return {**condition, **negative}

  def _text(self, params, inputs, key, *, tiling):
    del key, tiling
    encoder = t5.T5Encoder(self.config.text_encoder, dtype=self.dtype)
    return {"text": encoder.apply({"params": params}, inputs["ids"])}

  def _image(self, params, inputs, key, *, tiling):
    latents = self.image_condition(
      {"vae": params},
      jnp.asarray(inputs["image"]),
      key,
      scale=inputs.get("image_latent_scale"),
      tiling=tiling,
    )
    return {"image": latents}

  def image_condition(
    self,
    params: PyTree,
    image: Float[Array, "b 1 H W 3"],
    key: Key[Array, " b"] | None,
    *,
    scale: float | Float[Array, ""] | np.floating | None = None,
    tiling: bool = False,
  ) -> Float[Array, "b 1 h w c"]:
    """The image's latents, to stand in frame 0 of the transformer's input."""
    config = self.config.vae
    latents = self._posterior(params["vae"], image, key, tiling)
    if scale is None:
      # diffusers divides for 1.5, where training forgot to multiply.
      scale = config.scaling_factor
      scale = 1 / scale if config.invert_scale_latents else scale
    return latents * scale

  def pad_latents(
    self, latents: Float[Array, "b f h w c"]
  ) -> Float[Array, "b f_padded h w c"]:
    """Copies the first latent to the front where 1.5's patches need it.

    CogVideo's finetune/models/cogvideox_t2v/lora_trainer.py; sampling drops
    the copy again.
    """
    missing = -latents.shape[1] % (self.config.transformer.patch_size_t or 1)
    return jnp.concatenate([latents[:, :1]] * missing + [latents], axis=1)

  def _posterior(self, params, video, key, tiling=False, slicing=False):
    """The posterior's mean, or a sample where there are keys; not scaled."""
    found = vae.encode(
      params,
      self.config.vae,
      video,
      dtype=self.dtype,
      tiling=self._tiles() if tiling else None,
      slicing=slicing,
    )
    if key is None:
      return found.mean
    noise = samplers.normal(key, found.mean.shape[1:])
    return posterior.sample(found, noise)

  def _tiles(self) -> chunks.Tiling:
    config = self.config.vae
    return chunks.default_tiling(config.sample_height, config.sample_width)

  def encode(
    self,
    params: PyTree,
    video: Float[Array, "b F H W 3"],
    key: Key[Array, " b"] | None = None,
    *,
    tiling: bool = False,
    slicing: bool = False,
  ) -> Float[Array, "b f h w c"]:
    latents = self._posterior(params["vae"], video, key, tiling, slicing)
    return latents * self.config.vae.scaling_factor

  def decode(
    self,
    params: PyTree,
    latents: Float[Array, "b f h w c"],
    post: Callable[[Array], Array] = chunks.identity,
    *,
    tiling: bool = False,
    slicing: bool = False,
    decode_chunk: int | None = None,
  ) -> Array:
    if decode_chunk is not None:
      raise errors.InputError(
        "decode_chunk: CogVideoX decodes in chunks of its own; use tiling."
      )
    return vae.decode(
      params["vae"],
      self.config.vae,
      latents / self.config.vae.scaling_factor,
      dtype=self.dtype,
      post=post,
      tiling=self._tiles() if tiling else None,
      slicing=slicing,
    )

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
    return diffusion.trained(self.config.scheduler.alpha2())

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
    transformer.check_attention(self.attention)
    module = transformer.Transformer(
      self.config.transformer,
      dtype=self.dtype,
      remat=self.remat,
      unroll=self.unroll,
      attention=self.attention,
    )
    inputs = x
    if "image" in condition:
      image = condition["image"].astype(x.dtype)
      rest = [(0, 0), (0, x.shape[1] - image.shape[1]), *[(0, 0)] * 3]
      inputs = jnp.concatenate([x, jnp.pad(image, rest)], axis=-1)
    timestep = jnp.broadcast_to(level.timestep, x.shape[:1])
    variables = {"params": params["transformer"]}
    if "transformer_lora" in params:
      variables[layers.LORA] = params["transformer_lora"]
    return module.apply(variables, inputs, condition["text"], timestep)
