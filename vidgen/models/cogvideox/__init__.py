"""CogVideoX: text, image and video to video (https://arxiv.org/abs/2408.06072)."""

import pathlib

from jax.typing import DTypeLike

from vidgen.encoders import tokenizer
from vidgen.models.cogvideox.autoencoder import Autoencoder
from vidgen.models.cogvideox.config import (
  Config,
  config_1_5_5b,
  config_1_5_5b_i2v,
  config_2b,
  config_5b,
  config_5b_i2v,
  config_demo,
  published_configs,
  read_config,
)
from vidgen.models.cogvideox.model import CogVideoX, components

# The pipelines of the published layout that this family reads.
PIPELINES = (
  "CogVideoXPipeline",
  "CogVideoXImageToVideoPipeline",
  "CogVideoXVideoToVideoPipeline",
)

# The published checkpoints, by hub id.
PUBLISHED = {
  "THUDM/CogVideoX-2b": config_2b,
  "THUDM/CogVideoX-5b": config_5b,
  "THUDM/CogVideoX-5b-I2V": config_5b_i2v,
  "THUDM/CogVideoX1.5-5B": config_1_5_5b,
  "THUDM/CogVideoX1.5-5B-I2V": config_1_5_5b_i2v,
}


def open_model(folder: pathlib.Path, dtype: DTypeLike) -> CogVideoX:
  """Returns the model of a checkpoint; its parameters are loaded apart."""
  return create(read_config(folder), dtype, folder / "tokenizer")


def create(
  config: Config,
  dtype: DTypeLike,
  tokenizer_folder: pathlib.Path,
  *,
  remat: str = "none",
  unroll: int = 1,
) -> CogVideoX:
  """Returns a model of any config, to be trained from its first step on."""
  tokens = tokenizer.load(tokenizer_folder)
  return CogVideoX(config, dtype, tokens, remat, unroll)


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
  "CogVideoX",
  "Config",
  "components",
  "config_1_5_5b",
  "config_1_5_5b_i2v",
  "config_2b",
  "config_5b",
  "config_5b_i2v",
  "config_demo",
  "create",
  "create_autoencoder",
  "open_model",
  "published_configs",
  "read_config",
]
