"""CogVideoX: text, image and video to video (https://arxiv.org/abs/2408.06072)."""

import pathlib

from jax.typing import DTypeLike

from vidgen.encoders import tokenizer
from vidgen.models.cogvideox.config import (
  Config,
  config_1_5_5b,
  config_1_5_5b_i2v,
  config_2b,
  config_5b,
  config_5b_i2v,
  read_config,
)
from vidgen.models.cogvideox.model import CogVideoX, components

# The pipelines of the published layout that this family reads.
PIPELINES = (
  "CogVideoXPipeline",
  "CogVideoXImageToVideoPipeline",
  "CogVideoXVideoToVideoPipeline",
)


def open_model(folder: pathlib.Path, dtype: DTypeLike) -> CogVideoX:
  """Returns the model of a checkpoint; its parameters are loaded apart."""
  config = read_config(folder)
  return CogVideoX(config, dtype, tokenizer.load(folder / "tokenizer"))


__all__ = [
  "PIPELINES",
  "CogVideoX",
  "Config",
  "components",
  "config_1_5_5b",
  "config_1_5_5b_i2v",
  "config_2b",
  "config_5b",
  "config_5b_i2v",
  "open_model",
  "read_config",
]
