"""Stable Video Diffusion: image to video (https://arxiv.org/abs/2311.15127)."""

import pathlib

from jax.typing import DTypeLike

from vidgen import errors
from vidgen.encoders import clip_tokenizer
from vidgen.models.svd.autoencoder import Autoencoder
from vidgen.models.svd.components import components
from vidgen.models.svd.config import (
  Conditioning,
  Config,
  config_svd,
  config_svd_xt,
  published_configs,
  read_config,
)
from vidgen.models.svd.model import StableVideoDiffusion
from vidgen.models.svd.variants import (
  config_image,
  config_interpolation,
  config_multiview,
  config_multiview_poses,
  config_small,
  config_text_to_video,
)

# The pipelines of the published layout that this family reads.
PIPELINES = ("StableVideoDiffusionPipeline",)

# The published checkpoints, by hub id.
PUBLISHED = {
  "stabilityai/stable-video-diffusion-img2vid": config_svd,
  "stabilityai/stable-video-diffusion-img2vid-xt": config_svd_xt,
  "stabilityai/stable-video-diffusion-img2vid-xt-1-1": config_svd_xt,
}


def open_model(folder: pathlib.Path, dtype: DTypeLike) -> StableVideoDiffusion:
  """Returns the model of a checkpoint; its parameters are loaded apart."""
  return create(read_config(folder), dtype, folder / "tokenizer")


def create(
  config: Config,
  dtype: DTypeLike,
  tokenizer_folder: pathlib.Path | None = None,
  *,
  remat: str = "none",
  unroll: int = 1,
) -> StableVideoDiffusion:
  """Returns a model of any config, to be trained from its first step on.

  Args:
    config: The architecture.
    dtype: What the networks compute in.
    tokenizer_folder: Where its tokenizer is, if it reads a text.
    remat: As of `StableVideoDiffusion`.
    unroll: 1: there is no loop over blocks.

  Raises:
    InputError: Another `unroll`.
  """
  if unroll != 1:
    raise errors.InputError(
      f"config: unroll={unroll}: this model has no loop over blocks; leave it "
      "at 1."
    )
  tokenizer = None
  if config.text_encoder is not None:
    length = config.text_encoder.max_position_embeddings
    tokenizer = clip_tokenizer.load(tokenizer_folder, length)
  return StableVideoDiffusion(config, dtype, tokenizer, remat)


def create_autoencoder(
  config: Config,
  dtype: DTypeLike,
  init_past_taps: str = "random",
  *,
  remat: bool = False,
) -> Autoencoder:
  """Returns the autoencoder of a config, as its training takes it."""
  return Autoencoder(config.vae, dtype, init_past_taps, remat)


__all__ = [
  "PIPELINES",
  "PUBLISHED",
  "Autoencoder",
  "Conditioning",
  "Config",
  "StableVideoDiffusion",
  "components",
  "config_image",
  "config_interpolation",
  "config_multiview",
  "config_multiview_poses",
  "config_small",
  "config_svd",
  "config_svd_xt",
  "config_text_to_video",
  "create",
  "create_autoencoder",
  "open_model",
  "published_configs",
  "read_config",
]
