"""Small random Stable Video Diffusion checkpoints in the published layout.

diffusers and transformers make and save them, so that what is read is what
those libraries write.
"""

import pathlib

import diffusers
import torch
import transformers

from tests.tiny_cogvideox import randomize

CROSS_DIM = 32


# What is added to the residual stream, or is normed within a block.
_QUIET = (
  "conv_in.",
  "conv1.",
  "conv2.",
  "time_emb_proj.",
  "proj_in.",
  "proj_out.",
  "to_out.",
  "net.2.",
  "linear_2.",
)


def quiet(module: torch.nn.Module) -> torch.nn.Module:
  """Scales layers so that what norms see is small: their epsilon shows."""
  with torch.no_grad():
    for name, parameter in module.named_parameters():
      if any(part in name for part in _QUIET):
        parameter.mul_(0.01)
  return module


def unet(**fields) -> torch.nn.Module:
  """Returns a small spatio-temporal UNet of two levels."""
  config = {
    "block_out_channels": (32, 64),
    "down_block_types": (
      "CrossAttnDownBlockSpatioTemporal",
      "DownBlockSpatioTemporal",
    ),
    "up_block_types": (
      "UpBlockSpatioTemporal",
      "CrossAttnUpBlockSpatioTemporal",
    ),
    "num_attention_heads": (2, 4),
    "cross_attention_dim": CROSS_DIM,
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 96,
    "layers_per_block": 1,
    "sample_size": 8,
    "num_frames": 5,
    **fields,
  }
  return randomize(diffusers.UNetSpatioTemporalConditionModel(**config), 1)


def vae(**fields) -> torch.nn.Module:
  """Returns a small autoencoder with a temporal decoder."""
  config = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "layers_per_block": 2,
    "sample_size": 16,
    **fields,
  }
  return randomize(diffusers.AutoencoderKLTemporalDecoder(**config), 2)


def image_vae(**fields) -> torch.nn.Module:
  """Returns a small autoencoder of images."""
  config = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
    "layers_per_block": 1,
    "sample_size": 16,
    **fields,
  }
  return randomize(diffusers.AutoencoderKL(**config), 2)


def image_encoder(**fields) -> torch.nn.Module:
  """Returns a small CLIP vision tower; its images are as large as published."""
  config = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "patch_size": 14,
    "image_size": 224,
    "hidden_act": "gelu",
    "projection_dim": CROSS_DIM,
    **fields,
  }
  config = transformers.CLIPVisionConfig(**config)
  return randomize(transformers.CLIPVisionModelWithProjection(config), 3)


def text_encoder(vocab_size: int = 100, **fields) -> torch.nn.Module:
  """Returns a small CLIP text tower."""
  config = {
    "vocab_size": vocab_size,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "hidden_act": "gelu",
    "bos_token_id": vocab_size - 2,
    "eos_token_id": vocab_size - 1,
    "pad_token_id": 0,
    **fields,
  }
  config = transformers.CLIPTextConfig(**config)
  return randomize(transformers.CLIPTextModel(config), 4)


def write(
  folder: pathlib.Path, *, dtype: torch.dtype = torch.float32
) -> diffusers.StableVideoDiffusionPipeline:
  """Writes `folder`/checkpoint; returns its diffusers pipeline.

  Args:
    folder: An empty folder.
    dtype: Of the files; float16 ones have a variant's names, as published.
  """
  scheduler = diffusers.EulerDiscreteScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    interpolation_type="linear",
    num_train_timesteps=1000,
    prediction_type="v_prediction",
    sigma_max=700.0,
    sigma_min=0.002,
    steps_offset=1,
    timestep_spacing="leading",
    timestep_type="continuous",
    use_karras_sigmas=True,
  )
  pipeline = diffusers.StableVideoDiffusionPipeline(
    vae=vae(),
    image_encoder=image_encoder(),
    unet=unet(),
    scheduler=scheduler,
    feature_extractor=transformers.CLIPImageProcessor(),
  ).to(dtype)
  pipeline.set_progress_bar_config(disable=True)
  variant = "fp16" if dtype == torch.float16 else None
  pipeline.save_pretrained(folder / "checkpoint", variant=variant)
  return pipeline
