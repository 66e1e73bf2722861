"""What a CogVideoX checkpoint can be asked for."""

import math
from typing import Any

import numpy as np

from vidgen import diffusion, errors, samplers
from vidgen.models.base import Plan, Request
from vidgen.models.cogvideox.config import Config

# The recommended size of CogVideoX 1.5. Some revisions of its config name the
# size of the rotary table instead, 2400 x 2400 pixels, which nobody asks for.
_SIZE_1_5 = (768, 1360)

# Each option's type and default; see `plan`.
_OPTIONS: dict[str, tuple[type, Any]] = {
  "dynamic_guidance": (bool, False),
  "image_latent_scale": (float, None),
  "max_text_length": (int, None),
}


def plan(config: Config, request: Request) -> Plan:
  """Checks a request and fills in the model's defaults.

  The family's own options:
    dynamic_guidance: The guidance scale follows the published cosine.
    image_latent_scale: The factor of the image's latents, for an image-to-video
      model; by default diffusers' (see the README on 1.5).
    max_text_length: Text tokens; 226 by default.

  Raises:
    InputError: A size, length or argument that the checkpoint cannot serve.
  """
  options = _options(config, request)
  _check_inputs(config, request)
  height, width = _size(config, request)
  frames = request.num_frames
  if frames is None:
    frames = config.transformer.sample_frames
  _check_frames(config, request, frames)
  latents, padding = _latents(config, frames, height, width)

  schedule = _schedule(config, request)
  scale = request.guidance_scale
  scale = config.guidance_scale if scale is None else float(scale)
  if not math.isfinite(scale):
    raise errors.InputError(f"guidance_scale: {scale} is not a number to use.")
  if scale <= 1 and options["dynamic_guidance"]:
    raise errors.InputError(
      "dynamic_guidance: has no effect at a guidance_scale of at most 1."
    )
  guidance = None
  if scale > 1:
    guidance = np.full(len(schedule), scale)
    if options["dynamic_guidance"]:
      guidance = dynamic_guidance(scale, schedule)
  sampler = config.sampler if request.sampler is None else request.sampler
  if sampler not in samplers.SAMPLERS:
    raise errors.InputError(
      f"sampler: {sampler!r} is unknown; known are "
      f"{', '.join(samplers.SAMPLERS)}."
    )
  return Plan(
    num_frames=frames,
    height=height,
    width=width,
    latents=latents,
    padding=padding,
    schedule=schedule,
    sampler=sampler,
    guidance=guidance,
    options=options,
    fps=config.fps,
  )


def dynamic_guidance(scale: float, schedule: diffusion.Schedule) -> np.ndarray:
  """The guidance of each step, as upstream computes it.

  1 + s · (1 - cos(π ((N - t) / N)^5)) / 2, with t the *timestep* (999 …) where
  a step index is meant, so that the scale jumps about in [1, 1 + s]; the
  published samples were made so (diffusers' pipeline_cogvideox.py).
  """
  steps = len(schedule)
  ramp = [((steps - t) / steps) ** 5.0 for t in schedule.now.timestep.tolist()]
  return np.array([1 + scale * ((1 - math.cos(math.pi * r)) / 2) for r in ramp])


def _options(config: Config, request: Request) -> dict[str, Any]:
  options = {name: default for name, (_, default) in _OPTIONS.items()}
  for name, value in request.options.items():
    if name not in _OPTIONS:
      raise errors.InputError(
        f"{name}: CogVideoX has no such option; its own are "
        f"{', '.join(_OPTIONS)}."
      )
    kind = _OPTIONS[name][0]
    if kind is not bool and isinstance(value, np.number | int | float):
      exact = kind is float or value == int(value)
      value = kind(value) if exact and not isinstance(value, bool) else value
    if type(value) is not kind and value is not None:
      raise errors.InputError(f"{name}: {value!r} is not a {kind.__name__}.")
    options[name] = value
  scale = options["image_latent_scale"]
  if scale is not None and not math.isfinite(scale):
    raise errors.InputError(f"image_latent_scale: {scale} is no number to use.")
  dit = config.transformer
  length = options["max_text_length"]
  if length is None:
    options["max_text_length"] = dit.max_text_seq_length
  elif not 2 <= length <= dit.max_text_seq_length or (
    length != dit.max_text_seq_length and dit.use_learned_positional_embeddings
  ):
    raise errors.InputError(
      f"max_text_length: {length}; this checkpoint reads "
      f"{dit.max_text_seq_length} tokens."
    )
  if options["image_latent_scale"] is not None and not config.takes_image:
    raise errors.InputError(
      "image_latent_scale: this checkpoint takes no image."
    )
  return options


def _check_inputs(config: Config, request: Request) -> None:
  if request.strength is not None and config.takes_image:
    raise errors.InputError(
      "video: this checkpoint takes no video; use a text-to-video checkpoint."
    )
  if config.takes_image and not request.image:
    raise errors.InputError(
      "image: this checkpoint makes a video from an image; give one, or use a "
      "text-to-video checkpoint."
    )
  if request.image and not config.takes_image:
    raise errors.InputError(
      "image: this checkpoint takes no image; use an I2V checkpoint."
    )


def _size(config: Config, request: Request) -> tuple[int, int]:
  dit = config.transformer
  scale = 2 ** (len(config.vae.block_out_channels) - 1)
  default = (dit.sample_height * scale, dit.sample_width * scale)
  if dit.patch_size_t is not None:
    default = tuple(min(a, b) for a, b in zip(default, _SIZE_1_5, strict=True))
  height = default[0] if request.height is None else request.height
  width = default[1] if request.width is None else request.width
  multiple = scale * dit.patch_size
  for name, size in (("height", height), ("width", width)):
    if size < multiple or size % multiple:
      near = max(multiple, round(size / multiple) * multiple)
      raise errors.InputError(
        f"{name}: {size} is not a multiple of {multiple}; the nearest is "
        f"{near}."
      )
  trained = (dit.sample_height * scale, dit.sample_width * scale)
  if dit.use_learned_positional_embeddings and (height, width) != trained:
    raise errors.InputError(
      f"height, width: {height} x {width}; this checkpoint has learned "
      f"positions for {trained[0]} x {trained[1]} alone."
    )
  if dit.patch_size_t is not None and (
    height > trained[0] or width > trained[1]
  ):
    raise errors.InputError(
      f"height, width: {height} x {width}; this checkpoint's positions end at "
      f"{trained[0]} x {trained[1]}."
    )
  return height, width


def _check_frames(config: Config, request: Request, frames: int) -> None:
  dit, ratio = config.transformer, config.vae.temporal_compression_ratio
  # 1.5 was trained at 5 and 10 seconds, and its config names the shorter.
  most = dit.sample_frames
  if dit.patch_size_t is not None:
    most = 2 * (dit.sample_frames - 1) + 1
  name, cut = "num_frames", ""
  if request.strength is not None:
    name, cut = "video", "; set num_frames to cut it"
  if frames < 1 or frames > most:
    raise errors.InputError(
      f"{name}: {frames} frames; this checkpoint makes 1 to {most}{cut}."
    )
  # An even number of latents decodes to more frames than were asked for. For
  # videos upstream's 1.5 takes no others, so there they are let through.
  multiple = 2 * ratio
  if request.strength is not None and dit.patch_size_t is not None:
    multiple = ratio
  if frames % multiple != 1:
    near = (frames - 1 + multiple // 2) // multiple * multiple + 1
    near = near if near <= most else near - multiple
    if cut:
      near = (frames - 1) // multiple * multiple + 1
    raise errors.InputError(
      f"{name}: {frames} frames are not {multiple}k + 1; the nearest is "
      f"{near}{cut}."
    )


def _latents(config, frames, height, width):
  """The shape that is denoised, and how many leading latents pad it."""
  ratio = config.vae.temporal_compression_ratio
  scale = 2 ** (len(config.vae.block_out_channels) - 1)
  f = (frames - 1) // ratio + 1
  padding = -f % (config.transformer.patch_size_t or 1)
  shape = (f + padding, height // scale, width // scale)
  return (*shape, config.vae.latent_channels), padding


def _schedule(config: Config, request: Request) -> diffusion.Schedule:
  trained = config.scheduler
  steps = config.num_steps if request.num_steps is None else request.num_steps
  if not 1 <= steps <= trained.num_train_timesteps:
    raise errors.InputError(
      f"num_steps: {steps}; it must be 1 to {trained.num_train_timesteps}."
    )
  schedule = diffusion.trailing(trained.alpha2(), steps)
  if request.strength is None:
    return schedule
  if not 0 < request.strength <= 1:
    raise errors.InputError(f"strength: {request.strength} is not in (0, 1].")
  kept = min(int(steps * request.strength), steps)
  if kept < 1:
    raise errors.InputError(
      f"strength: {request.strength} of {steps} steps leaves none; raise "
      "strength or num_steps."
    )
  return schedule.tail(kept)
