"""Models of the family that nobody has published, and small ones.

Blattmann et al., https://arxiv.org/abs/2311.15127, section 4 and appendix D.
"""

import dataclasses

from vidgen.encoders import clip
from vidgen.models.svd import numbers, unet, vae
from vidgen.models.svd.config import (
  Conditioning,
  Config,
  SchedulerConfig,
  config_svd_xt,
)


def config_image() -> Config:
  """The image model of the first stage: Stable Diffusion 2.1's networks."""
  return Config(
    unet=dataclasses.replace(
      unet.UnetConfig(in_channels=4, num_frames=1),
      projection_class_embeddings_input_dim=0,
    ),
    vae=vae.VaeConfig(temporal=False),
    image_encoder=None,
    text_encoder=clip.TextConfig(),
    scheduler=SchedulerConfig(),
    conditioning=Conditioning(numbers=(), given=()),
    images=True,
  )


def config_text_to_video(num_frames: int = 14) -> Config:
  """The text-to-video model, told the rate of frames and how much moves."""
  config = config_image()
  config.images = False
  told = (numbers.FPS, numbers.MOTION)
  config.conditioning = Conditioning(numbers=told, given=())
  config.unet.num_frames = num_frames
  _tell(config)
  return config


def config_interpolation() -> Config:
  """Five frames, of which both ends are given: 4 times the rate."""
  config = config_svd_xt()
  config.conditioning = Conditioning(
    given=(0, -1), mask_size=(72, 128), noised="latents"
  )
  config.unet.num_frames, config.unet.in_channels = 5, 9
  return config


def config_multiview() -> Config:
  """An orbit of 21 views, 576x576, told the camera's elevation."""
  config = config_svd_xt()
  told = (*config.conditioning.numbers, numbers.ELEVATION)
  config.conditioning = Conditioning(numbers=told)
  config.unet.num_frames, config.unet.sample_size = 21, 72
  _tell(config)
  return config


def config_multiview_poses() -> Config:
  """SV3D's conditions: the noise, and the pose of each view.

  https://arxiv.org/abs/2403.12008; the last view is the one that is given, and
  there is no rate of frames.
  """
  config = config_multiview()
  told = (numbers.NOISE, numbers.POLAR, numbers.AZIMUTH)
  config.conditioning = Conditioning(numbers=told, given=(-1,))
  _tell(config)
  return config


def _tell(config: Config) -> None:
  """Makes the UNet read as many numbers as it is told."""
  config.unet.projection_class_embeddings_input_dim = numbers.width(
    config.conditioning.numbers, config.unet.addition_time_embed_dim
  )


def config_small(
  num_frames: int, conditioning: Conditioning | None = None
) -> Config:
  """A model of 32x32 pixels that two cores train in minutes.

  Args:
    num_frames: That it makes.
    conditioning: What it is told; the published models' by default.
  """
  conditioning = conditioning or Conditioning()
  channels, width = 8, 32
  beside = channels + (conditioning.mask_size is not None)
  config = Config(
    unet=unet.UnetConfig(
      sample_size=8,
      in_channels=channels + beside,
      out_channels=channels,
      down_block_types=(unet.CROSS_DOWN, unet.CROSS_DOWN),
      up_block_types=(unet.CROSS_UP, unet.CROSS_UP),
      # There are 32 groups in each norm: of one channel it would lose the mean.
      block_out_channels=(64, 64),
      addition_time_embed_dim=width,
      layers_per_block=1,
      cross_attention_dim=width,
      num_attention_heads=(2, 2),
      num_frames=num_frames,
    ),
    vae=vae.VaeConfig(
      block_out_channels=(32, 32, 64),
      latent_channels=channels,
      layers_per_block=1,
      # Half the work; the UNet keeps frames alike.
      temporal=False,
      sample_size=32,
      # Its autoencoders are normalised.
      scaling_factor=1.0,
    ),
    image_encoder=clip.VisionConfig(
      hidden_size=64,
      intermediate_size=128,
      num_hidden_layers=2,
      num_attention_heads=2,
      patch_size=8,
      image_size=32,
      projection_dim=width,
    ),
    text_encoder=None,
    # So few latents are all noise long before 700.
    scheduler=SchedulerConfig(sigma_min=0.01, sigma_max=80.0),
    fps=4,
    conditioning=conditioning,
  )
  _tell(config)
  return config
