"""The five published variants, and reading a checkpoint's own config."""

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np
from jaxtyping import Float

from vidgen import diffusion, errors, tensorheader
from vidgen.encoders import t5
from vidgen.models.cogvideox import transformer, vae


@dataclasses.dataclass
class SchedulerConfig:
  """The trained noise levels; names of the published scheduler_config.json."""

  num_train_timesteps: int = 1000
  beta_start: float = 0.00085
  beta_end: float = 0.012
  snr_shift_scale: float = 3.0

  def alpha2(self) -> Float[np.ndarray, " levels"]:
    """Returns alpha² of the trained levels."""
    return diffusion.zero_terminal_snr(
      levels=self.num_train_timesteps,
      beta_start=self.beta_start,
      beta_end=self.beta_end,
      snr_shift=self.snr_shift_scale,
    )


@dataclasses.dataclass
class Config:
  """A CogVideoX model.

  Attributes:
    transformer: The expert DiT.
    vae: The 3-D causal autoencoder.
    text_encoder: T5 v1.1.
    scheduler: Noise levels.
    sampler: The sampler of the published pipeline.
    fps: Frames a second of the training videos.
    num_steps: Denoising steps where none are asked for.
    guidance_scale: Likewise.
  """

  transformer: transformer.TransformerConfig
  vae: vae.VaeConfig
  text_encoder: t5.T5Config
  scheduler: SchedulerConfig
  sampler: str = "ddim"
  fps: int = 8
  num_steps: int = 50
  guidance_scale: float = 6.0

  @property
  def takes_image(self) -> bool:
    """Whether the transformer reads an image next to the latents."""
    return self.transformer.in_channels == 2 * self.vae.latent_channels


_5B = {
  "num_layers": 42,
  "num_attention_heads": 48,
  "use_rotary_positional_embeddings": True,
}
_1_5 = {
  **_5B,
  "patch_size_t": 2,
  "sample_height": 96,
  "sample_width": 170,
  "sample_frames": 81,
}


def _variant(transformer_fields, vae_fields, snr_shift_scale, fps=8) -> Config:
  return Config(
    transformer=transformer.TransformerConfig(**transformer_fields),
    vae=vae.VaeConfig(**vae_fields),
    text_encoder=t5.T5Config(),
    scheduler=SchedulerConfig(snr_shift_scale=snr_shift_scale),
    fps=fps,
  )


def config_2b() -> Config:
  """CogVideoX-2b: text to video, sincos positions."""
  return _variant({}, {"scaling_factor": 1.15258426}, 3.0)


def config_5b() -> Config:
  """CogVideoX-5b: text to video, rotary positions."""
  return _variant(_5B, {"scaling_factor": 0.7}, 1.0)


def config_5b_i2v() -> Config:
  """CogVideoX-5b-I2V: image to video, rotary and learned positions."""
  fields = {
    **_5B,
    "in_channels": 32,
    "use_learned_positional_embeddings": True,
  }
  return _variant(fields, {"scaling_factor": 0.7}, 1.0)


def config_1_5_5b() -> Config:
  """CogVideoX1.5-5B: text to video, patches of two latent frames."""
  vae_fields = {"scaling_factor": 0.7, "invert_scale_latents": True}
  return _variant(_1_5, vae_fields, 1.0, fps=16)


def config_1_5_5b_i2v() -> Config:
  """CogVideoX1.5-5B-I2V: image to video, with an offset embedding."""
  fields = {**_1_5, "in_channels": 32, "ofs_embed_dim": 512}
  vae_fields = {"scaling_factor": 0.7, "invert_scale_latents": True}
  return _variant(fields, vae_fields, 1.0, fps=16)


def config_demo(vocab_size: int, **fields: Any) -> Config:
  """A small text-to-video model of 17 frames of 64x64, to be trained here.

  Args:
    vocab_size: Of the tokenizer.
    **fields: Of the transformer, in place of the demo's.
  """
  dit = {
    "num_layers": 6,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "time_embed_dim": 128,
    "text_embed_dim": 128,
    "sample_height": 8,
    "sample_width": 8,
    "sample_frames": 17,
    "max_text_seq_length": 32,
    "use_rotary_positional_embeddings": True,
  }
  return Config(
    transformer=transformer.TransformerConfig(**{**dit, **fields}),
    vae=vae.VaeConfig(
      block_out_channels=(16, 16, 32, 64),
      layers_per_block=1,
      norm_num_groups=4,
      sample_height=64,
      sample_width=64,
      # Backgrounds are most of the latents' unit variance, and shapes a sixth:
      # noise would hide what motions are.
      scaling_factor=2.0,
    ),
    text_encoder=t5.T5Config(
      d_model=128,
      d_kv=32,
      num_heads=4,
      d_ff=256,
      num_layers=2,
      vocab_size=vocab_size,
    ),
    scheduler=SchedulerConfig(snr_shift_scale=1.0),
    # It follows prompts without; more bends what is straight.
    num_steps=25,
    guidance_scale=1.6,
  )


# What the networks fix; a checkpoint that says otherwise is not read.
_TRANSFORMER_FIXED = {
  "flip_sin_to_cos": True,
  "freq_shift": 0,
  "dropout": 0.0,
  "attention_bias": True,
  "activation_fn": "gelu-approximate",
  "timestep_activation_fn": "silu",
  "norm_elementwise_affine": True,
}
_SCHEDULER_FIXED = {
  "beta_schedule": "scaled_linear",
  "prediction_type": "v_prediction",
  "rescale_betas_zero_snr": True,
  "set_alpha_to_one": True,
  "timestep_spacing": "trailing",
  "trained_betas": None,
}
# diffusers' defaults for the keys that must be there to be what they should.
_SCHEDULER_DEFAULTS = {
  "prediction_type": "epsilon",
  "rescale_betas_zero_snr": False,
  "timestep_spacing": "leading",
}
_SAMPLERS = {
  "CogVideoXDDIMScheduler": "ddim",
  "CogVideoXDPMScheduler": "dpmpp_2m_sde",
}


# Written to model_index.json where they are not what published models have.
_OWN_DEFAULTS = {"num_steps": int, "guidance_scale": (int, float)}


def read_config(folder: pathlib.Path) -> Config:
  """Reads the config of a checkpoint in the published layout.

  Keys that an old file lacks take the defaults that diffusers gives them.

  Raises:
    InputError: A component's config is missing, or asks for what no published
      model has.
    CorruptError: A config is not JSON.
  """
  path = folder / "transformer" / "config.json"
  published = _read(path)
  fields = _pick(path, published, transformer.TransformerConfig)
  _check_fixed(path, published, _TRANSFORMER_FIXED)
  dit = transformer.TransformerConfig(**fields)
  if dit.use_learned_positional_embeddings and not (
    dit.use_rotary_positional_embeddings
  ):
    raise errors.InputError(
      f"{path}: learned positions without rotary ones are not supported."
    )
  if dit.patch_size_t is None and published.get("patch_bias", True) is False:
    raise errors.InputError(
      f"{path}: patch_bias=false without patch_size_t is not supported."
    )

  path = folder / "scheduler" / "scheduler_config.json"
  published = _read(path)
  name = published.get("_class_name", "CogVideoXDDIMScheduler")
  if name not in _SAMPLERS:
    raise errors.InputError(
      f"{path}: unknown scheduler {name}; known are {', '.join(_SAMPLERS)}."
    )
  _check_fixed(path, {**_SCHEDULER_DEFAULTS, **published}, _SCHEDULER_FIXED)
  return Config(
    transformer=dit,
    vae=vae.vae_config(_read(folder / "vae" / "config.json")),
    text_encoder=t5.t5_config(_read(folder / "text_encoder" / "config.json")),
    scheduler=SchedulerConfig(**_pick(path, published, SchedulerConfig)),
    sampler=_SAMPLERS[name],
    fps=8 if dit.patch_size_t is None else 16,
    **_defaults(folder / "model_index.json"),
  )


def _defaults(path: pathlib.Path) -> dict[str, Any]:
  """What a request that leaves it open gets, if a checkpoint has its own.

  diffusers leaves keys that begin so alone, and takes its own defaults.
  """
  index = tensorheader.read_json(path) if path.is_file() else {}
  values = {}
  for name, kinds in _OWN_DEFAULTS.items():
    if f"_{name}" in index:
      value = values[name] = index[f"_{name}"]
      right = isinstance(value, kinds) and not isinstance(value, bool)
      if not (right and 0 < value < math.inf):
        raise errors.InputError(
          f"{path}: _{name}={value!r} is not a number above 0."
        )
  return values


def _read(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    raise errors.InputError(
      f"{path}: missing; the checkpoint needs its {path.parent.name}/ folder."
    )
  return tensorheader.read_json(path)


def _pick(path, published: dict[str, Any], config: type) -> dict[str, Any]:
  """The fields of `config` that the file has, with their types checked."""
  fields = {}
  for field in dataclasses.fields(config):
    if field.name not in published:
      continue
    value = published[field.name]
    if field.type is float and type(value) is int:
      value = float(value)
    if not isinstance(value, field.type):
      raise errors.CorruptError(
        f"{path}: {field.name} is {value!r}, expected {field.type}."
      )
    fields[field.name] = value
  return fields


def _check_fixed(path, published: dict[str, Any], fixed: dict[str, Any]):
  for key, value in fixed.items():
    if published.get(key, value) != value:
      raise errors.InputError(
        f"{path}: {key}={published[key]!r} is not supported; every published "
        f"model has {value!r}."
      )


# The first diffusers that reads all five variants.
_VERSION = {"_diffusers_version": "0.32.0"}
_VAE_FIXED = {
  "act_fn": "silu",
  "force_upcast": True,
  "latents_mean": None,
  "latents_std": None,
  "shift_factor": None,
  "use_quant_conv": False,
  "use_post_quant_conv": False,
}
# What T5 v1.1's own config has besides sizes.
_T5_FIXED = {
  "architectures": ["T5EncoderModel"],
  "model_type": "t5",
  "feed_forward_proj": "gated-gelu",
  "is_encoder_decoder": True,
  "tie_word_embeddings": False,
  "dropout_rate": 0.1,
  "initializer_factor": 1.0,
  "decoder_start_token_id": 0,
  "pad_token_id": 0,
  "eos_token_id": 1,
  "use_cache": True,
}
_T5_RENAMED = {
  "num_buckets": "relative_attention_num_buckets",
  "max_distance": "relative_attention_max_distance",
  "eps": "layer_norm_epsilon",
}


def published_configs(config: Config) -> dict[str, dict[str, Any]]:
  """Returns the JSON files that `read_config` and diffusers read, by path."""
  pipeline = "ImageToVideoPipeline" if config.takes_image else "Pipeline"
  scheduler = {name: kind for kind, name in _SAMPLERS.items()}[config.sampler]
  kinds = {
    "scheduler": ("diffusers", scheduler),
    "text_encoder": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "T5Tokenizer"),
    "transformer": ("diffusers", "CogVideoXTransformer3DModel"),
    "vae": ("diffusers", "AutoencoderKLCogVideoX"),
  }
  blocks = len(config.vae.block_out_channels)
  head = lambda name: {"_class_name": kinds[name][1], **_VERSION}
  return {
    "model_index.json": {
      "_class_name": f"CogVideoX{pipeline}",
      **_VERSION,
      **{name: list(kind) for name, kind in kinds.items()},
      **{
        f"_{name}": value
        for name in _OWN_DEFAULTS
        if (value := getattr(config, name)) != getattr(Config, name)
      },
    },
    "scheduler/scheduler_config.json": {
      **head("scheduler"),
      **dataclasses.asdict(config.scheduler),
      **_SCHEDULER_FIXED,
      "clip_sample": False,
      "clip_sample_range": 1.0,
      "sample_max_value": 1.0,
      "steps_offset": 0,
    },
    "text_encoder/config.json": {
      _T5_RENAMED.get(key, key): value
      for key, value in dataclasses.asdict(config.text_encoder).items()
    }
    | {"num_decoder_layers": config.text_encoder.num_layers}
    | _T5_FIXED,
    "transformer/config.json": {
      **head("transformer"),
      **dataclasses.asdict(config.transformer),
      **_TRANSFORMER_FIXED,
      # As published for 1.5, whose projection has a bias all the same.
      "patch_bias": config.transformer.patch_size_t is None,
    },
    "vae/config.json": {
      **head("vae"),
      **dataclasses.asdict(config.vae),
      **_VAE_FIXED,
      "block_out_channels": list(config.vae.block_out_channels),
      "down_block_types": ["CogVideoXDownBlock3D"] * blocks,
      "up_block_types": ["CogVideoXUpBlock3D"] * blocks,
    },
  }
