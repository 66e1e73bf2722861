"""The published checkpoints, and reading a checkpoint's own config."""

import dataclasses
import pathlib
from typing import Any

from vidgen import errors, tensorheader
from vidgen.encoders import clip
from vidgen.models.svd import numbers, unet, vae


@dataclasses.dataclass
class SchedulerConfig:
  """The noise levels; names of the published scheduler_config.json.

  Sampling goes through Karras' levels from `sigma_max` to `sigma_min`, rho 7:
  https://arxiv.org/abs/2206.00364, equation 5.
  """

  sigma_min: float = 0.002
  sigma_max: float = 700.0


@dataclasses.dataclass
class Conditioning:
  """What a model is told besides; the defaults are the published models'.

  Attributes:
    numbers: What it is told in numbers, in order: see `numbers.NAMES`.
    given: Frames that are given as images: the first, (0,), for image-to-video
      and multi-view models; both ends, (0, -1), for interpolation.
    mask_size: Height and width of the learned latents that stand where no frame
      is given, for interpolation; the given frames and a channel that says
      which they are stand among them. None puts the one image beside every
      frame.
    noised: What noise is added to, "pixels" or "latents".
  """

  numbers: tuple[str, ...] = (numbers.FPS, numbers.MOTION, numbers.NOISE)
  given: tuple[int, ...] = (0,)
  mask_size: tuple[int, int] | None = None
  noised: str = "pixels"


@dataclasses.dataclass
class Config:
  """A model of the family.

  Attributes:
    unet: The spatio-temporal UNet.
    vae: The autoencoder.
    image_encoder: CLIP's vision tower, where the model reads an image.
    text_encoder: CLIP's text tower, where it reads a text.
    scheduler: Noise levels.
    fps: Frames a second that are asked for where nobody says.
    conditioning: What it is told besides.
    images: An image model: the UNet has no layers over time.
  """

  unet: unet.UnetConfig
  vae: vae.VaeConfig
  image_encoder: clip.VisionConfig | None
  text_encoder: clip.TextConfig | None
  scheduler: SchedulerConfig
  fps: int = 7
  conditioning: Conditioning = dataclasses.field(default_factory=Conditioning)
  images: bool = False


def config_svd() -> Config:
  """Stable Video Diffusion: 14 frames from an image."""
  return Config(
    unet=unet.UnetConfig(num_frames=14),
    vae=vae.VaeConfig(),
    image_encoder=clip.VisionConfig(),
    text_encoder=None,
    scheduler=SchedulerConfig(),
  )


def config_svd_xt() -> Config:
  """Stable Video Diffusion XT and XT 1.1: 25 frames from an image."""
  config = config_svd()
  config.unet.num_frames = 25
  return config


# What is done with the levels; a checkpoint that says otherwise is not read.
_SCHEDULER_FIXED = {
  "_class_name": "EulerDiscreteScheduler",
  "prediction_type": "v_prediction",
  "timestep_type": "continuous",
  "timestep_spacing": "leading",
  "use_karras_sigmas": True,
}
# diffusers' defaults for the keys that must be there to be what they should.
_SCHEDULER_DEFAULTS = {
  "prediction_type": "epsilon",
  "timestep_type": "discrete",
  "timestep_spacing": "linspace",
  "use_karras_sigmas": False,
}


def read_config(folder: pathlib.Path) -> Config:
  """Reads the config of a checkpoint in the published layout.

  Raises:
    InputError: A component's config is missing, or asks for what no published
      model has.
    CorruptError: A config is not JSON.
  """
  path = folder / "scheduler" / "scheduler_config.json"
  published = _read(path)
  for key, want in _SCHEDULER_FIXED.items():
    have = published.get(key, _SCHEDULER_DEFAULTS.get(key, want))
    if have != want:
      raise errors.InputError(
        f"{path}: {key}={have!r} is not supported; every published model has "
        f"{want!r}."
      )
  scheduler = SchedulerConfig()
  for field in dataclasses.fields(scheduler):
    value = published.get(field.name)
    value = getattr(scheduler, field.name) if value is None else value
    if type(value) not in (int, float) or value <= 0:
      raise errors.InputError(
        f"{path}: {field.name} must be a positive number, not {value!r}."
      )
    setattr(scheduler, field.name, float(value))
  config = Config(
    unet=unet.unet_config(_read(folder / "unet" / "config.json")),
    vae=vae.vae_config(_read(folder / "vae" / "config.json")),
    image_encoder=None,
    text_encoder=None,
    scheduler=scheduler,
  )
  image, text = (
    folder / name / "config.json" for name in ("image_encoder", "text_encoder")
  )
  if image.is_file():
    config.image_encoder = clip.vision_config(_read(image))
  if text.is_file():
    config.text_encoder = clip.text_config(_read(text))
  index = folder / "model_index.json"
  if index.is_file():
    config.conditioning = _conditioning(index)
    config.fps = _fps(index)
  if not (image.is_file() or text.is_file()):
    raise errors.InputError(
      f"{image}: missing; the checkpoint needs its image_encoder/ folder."
    )
  return config


def _conditioning(path: pathlib.Path) -> Conditioning:
  """What a model is told; no word of it is that of the published models."""
  fields = tensorheader.read_json(path).get(_CONDITIONING, {})
  config = Conditioning()
  known = {field.name for field in dataclasses.fields(config)}
  if not isinstance(fields, dict) or not fields.keys() <= known:
    raise errors.InputError(
      f"{path}: {_CONDITIONING} has other fields than {', '.join(known)}."
    )
  for name, value in fields.items():
    value = tuple(value) if isinstance(value, list) else value
    setattr(config, name, value)
  if unknown := set(config.numbers) - set(numbers.NAMES):
    raise errors.InputError(
      f"{path}: {_CONDITIONING} tells {', '.join(sorted(unknown))}; known are "
      f"{', '.join(numbers.NAMES)}."
    )
  return config


def _fps(path: pathlib.Path) -> int:
  """The rate where nobody says; no word of it is that of the published."""
  fps = tensorheader.read_json(path).get(_FPS, Config.fps)
  if type(fps) is not int or fps < 1:
    raise errors.InputError(f"{path}: {_FPS} is {fps!r}, not a whole rate.")
  return fps


def _read(path: pathlib.Path) -> dict[str, Any]:
  if not path.is_file():
    raise errors.InputError(
      f"{path}: missing; the checkpoint needs its {path.parent.name}/ folder."
    )
  return tensorheader.read_json(path)


# Where model_index.json says what models are told that are not published ones;
# diffusers passes over names that begin so.
_CONDITIONING, _FPS = "_conditioning", "_fps"
# The first diffusers that reads this family.
_VERSION = {"_diffusers_version": "0.24.0"}
_SCHEDULER = {
  **_SCHEDULER_FIXED,
  **_VERSION,
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "beta_start": 0.00085,
  "clip_sample": False,
  "interpolation_type": "linear",
  "num_train_timesteps": 1000,
  "set_alpha_to_one": False,
  "skip_prk_steps": True,
  "steps_offset": 1,
  "trained_betas": None,
}
_FEATURE_EXTRACTOR = {
  "image_processor_type": "CLIPImageProcessor",
  "feature_extractor_type": "CLIPFeatureExtractor",
  "crop_size": {"height": 224, "width": 224},
  "do_center_crop": True,
  "do_convert_rgb": True,
  "do_normalize": True,
  "do_rescale": True,
  "do_resize": True,
  "image_mean": [0.48145466, 0.4578275, 0.40821073],
  "image_std": [0.26862954, 0.26130258, 0.27577711],
  "resample": 3,
  "rescale_factor": 1 / 255,
  "size": {"shortest_edge": 224},
}


def published_configs(config: Config) -> dict[str, dict[str, Any]]:
  """Returns the JSON files that `read_config` and diffusers read, by path."""
  temporal = config.vae.temporal
  vae_kind = "AutoencoderKLTemporalDecoder" if temporal else "AutoencoderKL"
  kinds = {
    "scheduler": ("diffusers", "EulerDiscreteScheduler"),
    "unet": ("diffusers", "UNetSpatioTemporalConditionModel"),
    "vae": ("diffusers", vae_kind),
  }
  unet_fields = dataclasses.asdict(config.unet)
  del unet_fields["norms"]
  if config.images:
    kinds["unet"] = ("diffusers", "UNet2DConditionModel")
    unet_fields = _image_unet(config.unet)
  vae_fields = dataclasses.asdict(config.vae)
  del vae_fields["temporal"]
  levels = len(config.vae.block_out_channels)
  vae_fields["down_block_types"] = ["DownEncoderBlock2D"] * levels
  if not temporal:
    vae_fields["up_block_types"] = ["UpDecoderBlock2D"] * levels
  head = lambda name: {"_class_name": kinds[name][1], **_VERSION}
  files = {
    "scheduler/scheduler_config.json": {
      **_SCHEDULER,
      **dataclasses.asdict(config.scheduler),
    },
    "unet/config.json": {**head("unet"), **_lists(unet_fields)},
    "vae/config.json": {**head("vae"), **_lists(vae_fields)},
  }
  if config.image_encoder is not None:
    kinds["image_encoder"] = ("transformers", "CLIPVisionModelWithProjection")
    kinds["feature_extractor"] = ("transformers", "CLIPImageProcessor")
    files["feature_extractor/preprocessor_config.json"] = _FEATURE_EXTRACTOR
    files["image_encoder/config.json"] = {
      "architectures": ["CLIPVisionModelWithProjection"],
      "model_type": "clip_vision_model",
      "num_channels": 3,
      **dataclasses.asdict(config.image_encoder),
    }
  if config.text_encoder is not None:
    kinds["text_encoder"] = ("transformers", "CLIPTextModel")
    kinds["tokenizer"] = ("transformers", "CLIPTokenizer")
    files["text_encoder/config.json"] = {
      "architectures": ["CLIPTextModel"],
      "model_type": "clip_text_model",
      **dataclasses.asdict(config.text_encoder),
    }
  files["model_index.json"] = {
    "_class_name": "StableVideoDiffusionPipeline",
    **_VERSION,
    **{name: list(kind) for name, kind in kinds.items()},
  }
  if config.images:
    files["model_index.json"]["_class_name"] = "StableDiffusionPipeline"
  elif config.conditioning != Conditioning():
    told = _lists(dataclasses.asdict(config.conditioning))
    files["model_index.json"][_CONDITIONING] = told
  if config.fps != Config.fps:
    files["model_index.json"][_FPS] = config.fps
  return files


def _image_unet(config: unet.UnetConfig) -> dict[str, Any]:
  """An image model's config, as Stable Diffusion 2 publishes it."""
  kinds = {
    unet.CROSS_DOWN: "CrossAttnDownBlock2D",
    unet.DOWN: "DownBlock2D",
    unet.CROSS_UP: "CrossAttnUpBlock2D",
    unet.UP: "UpBlock2D",
  }
  return {
    "sample_size": config.sample_size,
    "in_channels": config.in_channels,
    "out_channels": config.out_channels,
    "down_block_types": [kinds[kind] for kind in config.down_block_types],
    "up_block_types": [kinds[kind] for kind in config.up_block_types],
    "block_out_channels": config.block_out_channels,
    "layers_per_block": config.layers_per_block,
    "cross_attention_dim": config.cross_attention_dim,
    "attention_head_dim": config.num_attention_heads,
    "use_linear_projection": True,
  }


def _lists(fields: dict[str, Any]) -> dict[str, Any]:
  """Tuples as JSON has them."""
  return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
