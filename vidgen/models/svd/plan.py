"""What a checkpoint of Stable Video Diffusion can be asked for."""

import math
import warnings
from typing import Any

import numpy as np
from jaxtyping import Float

from vidgen import diffusion, errors, samplers
from vidgen.models.base import Plan, Request
from vidgen.models.svd import numbers
from vidgen.models.svd.config import Config

# The size of the published samples. Published configs name another one, which
# no sample has: 96 latents, for 768 pixels.
_SIZE, _UNUSED = (576, 1024), 96
_NUM_STEPS, _MOST_STEPS = 25, 1000
_GUIDANCE_SCALE = 3.0
# What the published models were trained for.
_FPS, _MOST_MOTION = (5, 30), 255

# Each option's type and default; see `plan`.
_OPTIONS: dict[str, tuple[type, Any]] = {
  "fps": (float, None),
  "fps_id": (float, None),
  "motion_bucket_id": (float, 127.0),
  "noise_aug_strength": (float, 0.02),
  "elevation": (float, 10.0),
  "min_guidance_scale": (float, None),
  "decode_chunk": (int, None),
}


def plan(config: Config, request: Request) -> Plan:
  """Checks a request and fills in the model's defaults.

  The family's own options:
    fps: Frames a second that are asked for. The network is told fps - 1, as it
      was in training.
    fps_id: What the network is told of the rate, as it is; not beside fps.
    motion_bucket_id: How much moves, 0 to 255.
    noise_aug_strength: Deviation of the noise that is added to the image, whose
      values are in [-1, 1]; more of it strays further from the image.
    elevation: Of the camera above the horizon, in degrees, for models that go
      around what the image shows.
    min_guidance_scale: The guidance scale of the first frame, 1 by default. It
      grows evenly to guidance_scale, that of the last one.
    decode_chunk: Frames that are decoded at a time, all by default. Less take
      less memory; frames of different chunks do not see each other.

  Raises:
    InputError: A size, length or argument that the checkpoint cannot serve.
  """
  options = _options(config, request)
  _check_told(config, request)
  _check_inputs(config, request)
  height, width = _size(config, request)
  frames = config.unet.num_frames
  frames = frames if request.num_frames is None else request.num_frames
  if frames < 1:
    raise errors.InputError(f"num_frames: {frames} is less than 1.")
  if frames > config.unet.num_frames:
    warnings.warn(
      f"num_frames: {frames} are more than the {config.unet.num_frames} that "
      "this checkpoint was trained for.",
      stacklevel=2,
    )
  steps = _NUM_STEPS if request.num_steps is None else request.num_steps
  if not 1 <= steps <= _MOST_STEPS:
    raise errors.InputError(
      f"num_steps: {steps}; it must be 1 to {_MOST_STEPS}."
    )
  sampler = "euler" if request.sampler is None else request.sampler
  if sampler not in samplers.SAMPLERS:
    raise errors.InputError(
      f"sampler: {sampler!r} is unknown; known are "
      f"{', '.join(samplers.SAMPLERS)}."
    )
  levels = config.scheduler
  ratio = config.vae.spatial_compression_ratio
  fps = options["fps"]
  return Plan(
    num_frames=frames,
    height=height,
    width=width,
    latents=(
      frames,
      height // ratio,
      width // ratio,
      config.vae.latent_channels,
    ),
    padding=0,
    schedule=diffusion.karras(levels.sigma_min, levels.sigma_max, steps),
    sampler=sampler,
    guidance=_guidance(request, options, steps, frames),
    options=options,
    fps=fps if fps is not None else options["fps_id"] + 1,
    decode_chunk=options["decode_chunk"],
  )


def of_clip(options: dict[str, Any]) -> dict[str, Float[np.ndarray, " 1"]]:
  """Returns what the network is told of a clip, as `numbers.told` takes it.

  Args:
    options: Of a plan.
  """
  fps, fps_id = options["fps"], options["fps_id"]
  found = {
    numbers.FPS: fps_id + 1 if fps is None else fps,
    numbers.MOTION: options["motion_bucket_id"],
    numbers.NOISE: options["noise_aug_strength"],
    numbers.ELEVATION: options["elevation"],
  }
  return {name: np.array([value]) for name, value in found.items()}


def _guidance(request, options, steps, frames):
  """The scale of each frame, growing evenly, in each step; None without."""
  scale = request.guidance_scale
  scale = _GUIDANCE_SCALE if scale is None else float(scale)
  least = options["min_guidance_scale"]
  if not math.isfinite(scale):
    raise errors.InputError(f"guidance_scale: {scale} is not a number to use.")
  if scale <= 1:
    if least is not None:
      raise errors.InputError(
        "min_guidance_scale: has no effect at a guidance_scale of at most 1."
      )
    return None
  ramp = np.linspace(1.0 if least is None else least, scale, frames)
  return np.tile(ramp, (steps, 1))


def _options(config: Config, request: Request) -> dict[str, Any]:
  options = {name: default for name, (_, default) in _OPTIONS.items()}
  for name, value in request.options.items():
    if name not in _OPTIONS:
      raise errors.InputError(
        f"{name}: Stable Video Diffusion has no such option; its own are "
        f"{', '.join(_OPTIONS)}."
      )
    if value is not None:
      options[name] = _number(name, value)
  return _checked(options, config.fps)


def _number(name: str, value: Any) -> int | float:
  """Returns the value of an option as its type."""
  kind = _OPTIONS[name][0]
  is_number = isinstance(value, np.number | int | float)
  is_number &= not isinstance(value, bool)
  if not is_number or not math.isfinite(value):
    raise errors.InputError(f"{name}: {value!r} is not a number to use.")
  if kind is int and value != int(value):
    raise errors.InputError(f"{name}: {value!r} is not a whole number.")
  return kind(value)


def _checked(options: dict[str, Any], fps: int) -> dict[str, Any]:
  """Options whose values are what they can be; warns of untrained ones."""
  if options["fps"] is not None and options["fps_id"] is not None:
    raise errors.InputError(
      "fps_id: fps is given, too; give fps, of which the network is told "
      "fps - 1, or fps_id, which it is told as it is."
    )
  if options["fps_id"] is None and options["fps"] is None:
    options["fps"] = float(fps)
  own, fps = fps, options["fps"]
  fps = options["fps_id"] + 1 if fps is None else fps
  if fps <= 0:
    raise errors.InputError(f"fps: {fps:g} frames a second is none.")
  for name in ("motion_bucket_id", "noise_aug_strength"):
    if options[name] < 0:
      raise errors.InputError(f"{name}: {options[name]:g} is less than 0.")
  chunk = options["decode_chunk"]
  if chunk is not None and chunk < 1:
    raise errors.InputError(f"decode_chunk: {chunk} frames at a time is none.")
  least, most = _FPS
  if fps != own and not least <= fps <= most:
    warnings.warn(
      f"fps: {fps:g} is outside of {least} to {most}, which the published "
      "models were trained for.",
      stacklevel=4,
    )
  if options["motion_bucket_id"] > _MOST_MOTION:
    warnings.warn(
      f"motion_bucket_id: {options['motion_bucket_id']:g} is above "
      f"{_MOST_MOTION}, which the published models were trained for.",
      stacklevel=4,
    )
  return options


def _check_told(config: Config, request: Request) -> None:
  """Raises InputError for an option that the network is not told."""
  told = numbers.needed(config.conditioning.numbers)
  for option, name in (
    ("fps_id", numbers.FPS),
    ("motion_bucket_id", numbers.MOTION),
    ("elevation", numbers.ELEVATION),
  ):
    if option in request.options and name not in told:
      raise errors.InputError(f"{option}: this checkpoint is not told it.")


def _check_inputs(config: Config, request: Request) -> None:
  if request.strength is not None:
    raise errors.InputError(
      "video: this checkpoint takes no video, only an image."
    )
  if config.image_encoder is not None and not request.image:
    raise errors.InputError(
      "image: this checkpoint makes a video from an image; give one."
    )
  if request.image and config.image_encoder is None:
    raise errors.InputError("image: this checkpoint takes no image.")
  if request.tiling:
    raise errors.InputError(
      "tiling: this family's frames are decoded whole; decode_chunk, so many "
      "at a time, takes less memory."
    )


def _size(config: Config, request: Request) -> tuple[int, int]:
  multiple = config.vae.spatial_compression_ratio
  default = _SIZE
  if config.unet.sample_size != _UNUSED:
    default = (config.unet.sample_size * multiple,) * 2
  masked = config.conditioning.mask_size
  if masked is not None:
    default = masked[0] * multiple, masked[1] * multiple
  height = default[0] if request.height is None else request.height
  width = default[1] if request.width is None else request.width
  for name, size in (("height", height), ("width", width)):
    if size < multiple or size % multiple:
      near = max(multiple, round(size / multiple) * multiple)
      raise errors.InputError(
        f"{name}: {size} is not a multiple of {multiple}; the nearest is "
        f"{near}."
      )
  if masked is not None and (height, width) != default:
    raise errors.InputError(
      f"height, width: this checkpoint makes {default[0]}x{default[1]} alone, "
      f"not {height}x{width}: what stands for its missing frames is learned in "
      "that size."
    )
  return height, width
