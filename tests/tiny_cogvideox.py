"""Small random CogVideoX checkpoints in the published layout.

diffusers and transformers make and save them, so that what is read is what
those libraries write.
"""

import pathlib

import diffusers
import torch
import transformers

from tests import tiny_tokenizer

_SCHEDULER = {
  "beta_start": 0.00085,
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "num_train_timesteps": 1000,
  "prediction_type": "v_prediction",
  "rescale_betas_zero_snr": True,
  "set_alpha_to_one": True,
  "timestep_spacing": "trailing",
  "clip_sample": False,
}

_1_0 = {"sample_frames": 9, "sample_height": 8, "sample_width": 12}
_5B = {**_1_0, "use_rotary_positional_embeddings": True}
_1_5 = {
  **_5B,
  "patch_size_t": 2,
  "patch_bias": False,
  "sample_height": 24,
  "sample_width": 24,
}

# The five published variants: fields of the transformer, and what goes along.
VARIANTS = {
  "2b": dict(_1_0),
  "5b": dict(_5B),
  "5b-i2v": {
    **_5B,
    "in_channels": 8,
    "use_learned_positional_embeddings": True,
  },
  "1.5-5b": dict(_1_5),
  "1.5-5b-i2v": {**_1_5, "in_channels": 8, "ofs_embed_dim": 32},
}


def randomize(module: torch.nn.Module, seed: int) -> torch.nn.Module:
  """Draws every parameter, so that none hides at zero or one."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for parameter in module.parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      if parameter.ndim == 1:
        parameter.add_(0.1 * noise)
      else:
        parameter.copy_(noise / parameter[0].numel() ** 0.5)
    for name, buffer in module.named_buffers():
      if name in module.state_dict():
        noise = torch.randn(buffer.shape, generator=generator)
        buffer.add_(0.1 * noise)
  return module.eval()


def transformer(variant: str, **fields) -> torch.nn.Module:
  """Returns a small expert DiT of a variant."""
  config = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 32,
    "text_embed_dim": 32,
    "num_layers": 2,
    "max_text_seq_length": 32,
    **VARIANTS[variant],
    **fields,
  }
  return randomize(diffusers.CogVideoXTransformer3DModel(**config), 1)


def vae(variant: str, **fields) -> torch.nn.Module:
  """Returns a small 3-D causal VAE."""
  config = {
    "block_out_channels": (8, 8, 8, 8),
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "sample_height": 96,
    "sample_width": 80,
    "scaling_factor": 1.15258426 if variant == "2b" else 0.7,
    "invert_scale_latents": variant.startswith("1.5"),
    **fields,
  }
  return randomize(diffusers.AutoencoderKLCogVideoX(**config), 2)


def text_encoder(vocab_size: int, **fields) -> torch.nn.Module:
  """Returns a small T5 v1.1 encoder."""
  config = {
    "d_model": 32,
    "d_kv": 8,
    "num_heads": 4,
    "d_ff": 64,
    "num_layers": 2,
    "vocab_size": vocab_size,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    **fields,
  }
  config = transformers.T5Config(**config)
  return randomize(transformers.T5EncoderModel(config), 3)


def scheduler(variant: str, name: str = "DDIM"):
  """Returns the variant's scheduler, "DDIM" or "DPM"."""
  kind = getattr(diffusers, f"CogVideoX{name}Scheduler")
  return kind(snr_shift_scale=3.0 if variant == "2b" else 1.0, **_SCHEDULER)


def write(
  folder: pathlib.Path,
  variant: str,
  *,
  dtype: torch.dtype = torch.float32,
  fields: dict[str, dict] | None = None,
) -> diffusers.DiffusionPipeline:
  """Writes `folder`/checkpoint; returns its diffusers pipeline.

  Args:
    folder: An empty folder.
    variant: One of `VARIANTS`.
    dtype: Of the files.
    fields: Fields of the configs, by component.
  """
  fields = fields or {}
  tiny_tokenizer.write(folder / "source")
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "source")
  kind = diffusers.CogVideoXPipeline
  if variant.endswith("i2v"):
    kind = diffusers.CogVideoXImageToVideoPipeline
  pipeline = kind(
    tokenizer=tokenizer,
    text_encoder=text_encoder(len(tokenizer)),
    vae=vae(variant, **fields.get("vae", {})),
    transformer=transformer(variant, **fields.get("transformer", {})),
    scheduler=scheduler(variant),
  )
  if dtype != torch.float32:
    pipeline = pipeline.to(dtype)
  pipeline.set_progress_bar_config(disable=True)
  pipeline.save_pretrained(folder / "checkpoint")
  return pipeline
