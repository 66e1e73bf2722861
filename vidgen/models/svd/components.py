"""The networks of a model, as the published layout has them in folders."""

import functools

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Key, PyTree

from vidgen.encoders import clip
from vidgen.models import base
from vidgen.models.svd import unet, unet_weights, vae, vae_weights
from vidgen.models.svd.config import Config


def components(config: Config) -> tuple[base.Component, ...]:
  """Returns the networks of a model; which encoders it has is its config's."""
  found = []
  if config.text_encoder is not None:
    found.append(
      base.Component(
        "text_encoder",
        functools.partial(_init_text_encoder, config.text_encoder),
        clip.TEXT_TABLE,
      )
    )
  if config.image_encoder is not None:
    found.append(
      base.Component(
        "image_encoder",
        functools.partial(_init_image_encoder, config.image_encoder),
        clip.VISION_TABLE,
      )
    )
  found.append(
    base.Component(
      "unet",
      functools.partial(_init_unet, config),
      unet_weights.IMAGE_TABLE if config.images else unet_weights.UNET_TABLE,
      takes_lora=True,
      grows_from=unet_weights.IMAGE_TABLE,
    )
  )
  found.append(
    base.Component(
      "vae",
      functools.partial(vae.init, config.vae),
      vae_weights.table(config.vae.temporal),
    )
  )
  return tuple(found)


def _init_unet(config: Config, key: Key[Array, ""]) -> PyTree:
  params = unet.init(config.unet, key, images=config.images)
  if config.conditioning.mask_size is None:
    return params
  # Frames that are not given start as latents of mean 0.
  shape = (*config.conditioning.mask_size, config.vae.latent_channels)
  box = nn.with_logical_partitioning(nn.initializers.zeros, (None,) * 3)
  return {**params, "mask": box(key, shape, jnp.float32)}


def _init_text_encoder(config: clip.TextConfig, key: Key[Array, ""]) -> PyTree:
  ids = jnp.zeros((1, 1), jnp.int32)
  return clip.TextTower(config).init(key, ids)["params"]


def _init_image_encoder(
  config: clip.VisionConfig, key: Key[Array, ""]
) -> PyTree:
  pixels = jnp.zeros((1, config.image_size, config.image_size, 3))
  return clip.VisionTower(config).init(key, pixels)["params"]
