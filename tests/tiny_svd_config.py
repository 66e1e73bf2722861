"""A config of Stable Video Diffusion that compiles in a second or two."""

import dataclasses
from typing import Any

from vidgen.models import svd
from vidgen.models.svd import unet


def one_level(config: svd.Config, **fields: Any) -> svd.Config:
  """Returns the config with a UNet of one level, and other fields of it."""
  config.unet = dataclasses.replace(
    config.unet,
    block_out_channels=(32,),
    down_block_types=(unet.CROSS_DOWN,),
    up_block_types=(unet.CROSS_UP,),
    num_attention_heads=(2,),
    **fields,
  )
  return config


def tiny(conditioning: svd.Conditioning | None = None) -> svd.Config:
  """A model of one level, three frames and 4x4 pixels, each a latent."""
  config = one_level(svd.config_small(3, conditioning))
  config.vae.block_out_channels = (32,)
  config.image_encoder.num_hidden_layers = 1
  return config
