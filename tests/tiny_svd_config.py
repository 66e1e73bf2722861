"""A config of Stable Video Diffusion that compiles in a second or two."""

import dataclasses

from vidgen.models import svd
from vidgen.models.svd import unet


def tiny(conditioning: svd.Conditioning | None = None) -> svd.Config:
  """A model of one level, three frames and 4x4 pixels, each a latent."""
  config = svd.config_small(3, conditioning)
  config.unet = dataclasses.replace(
    config.unet,
    block_out_channels=(32,),
    down_block_types=(unet.CROSS_DOWN,),
    up_block_types=(unet.CROSS_UP,),
    num_attention_heads=(2,),
  )
  config.vae.block_out_channels = (32,)
  config.image_encoder.num_hidden_layers = 1
  return config
