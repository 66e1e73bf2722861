"""What callers may write, made uniform: one value for each clip.

Each function names the argument that is wrong in one line of an InputError.
"""

import numbers
import operator
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from vidgen import errors, video
from vidgen.models.base import Image, Plan, Request

OUTPUTS = ("uint8", "float", "latents")

# Frames that are read of a video that nobody cut.
_MOST_FRAMES = 1000


def whole(name: str, value: Any) -> int | None:
  """Returns a whole number, or None as it is."""
  if value is None:
    return None
  if not isinstance(value, bool):
    try:
      return operator.index(value)
    except TypeError:
      pass
  raise errors.InputError(f"{name}: {value!r} is not a whole number.")


def number(name: str, value: Any) -> float | None:
  """Returns a number as a float, or None as it is."""
  if value is None:
    return None
  if isinstance(value, numbers.Real) and not isinstance(value, bool):
    return float(value)
  raise errors.InputError(f"{name}: {value!r} is not a number.")


def flags(**values: Any) -> dict[str, bool]:
  """Returns the values, each of which must be True or False."""
  for name, value in values.items():
    if not isinstance(value, bool | np.bool_):
      raise errors.InputError(f"{name}: {value!r} is not True or False.")
  return {name: bool(value) for name, value in values.items()}


def request(
  sizes: dict[str, Any],
  guidance_scale: Any,
  sampler: Any,
  strength: Any,
  image: Any,
  options: dict[str, Any],
  tiling: bool = False,
) -> Request:
  """Returns the request with its numbers checked.

  Args:
    sizes: num_frames, height, width and num_steps.
    guidance_scale: A number, or None.
    sampler: A name, or None.
    strength: A number with a video; None without.
    image: Whether there is one is all that counts.
    options: The family's own, which it checks itself.
    tiling: Whether frames are to be encoded and decoded in tiles.
  """
  if sampler is not None and not isinstance(sampler, str):
    raise errors.InputError(f"sampler: {sampler!r} is not a name.")
  return Request(
    **{name: whole(name, value) for name, value in sizes.items()},
    guidance_scale=number("guidance_scale", guidance_scale),
    sampler=sampler,
    strength=number("strength", strength),
    image=image is not None,
    tiling=tiling,
    options=options,
  )


def check_text(takes_text: bool, prompt: Any) -> None:
  """Raises InputError if there is a prompt where none is taken, or none."""
  if takes_text and prompt is None:
    raise errors.InputError(
      "prompt: this checkpoint makes a video from a text; give a prompt."
    )
  if not takes_text and prompt is not None:
    raise errors.InputError(
      "prompt: this checkpoint takes no text, only an image; leave it out."
    )


def check_negative_text(takes_text: bool, negative_prompt: Any) -> None:
  """Raises InputError for a negative prompt where no text is taken."""
  if negative_prompt and not takes_text:
    raise errors.InputError("negative_prompt: this checkpoint takes no text.")


def check_negative(is_guided: bool, negative_prompt: str | None) -> None:
  """Raises InputError for a negative prompt that nothing would read."""
  if negative_prompt and not is_guided:
    raise errors.InputError(
      "negative_prompt: has no effect at a guidance_scale of at most 1."
    )


def prompts(
  prompt: str | Sequence[str] | Any, negative_prompt: Any
) -> tuple[list[str], list[str]]:
  """Returns as many negative prompts as prompts; one serves all."""
  positives = _texts("prompt", prompt)
  if not positives:
    raise errors.InputError("prompt: give at least one.")
  # None is what diffusers calls the empty one.
  negative_prompt = "" if negative_prompt is None else negative_prompt
  negatives = _texts("negative_prompt", negative_prompt)
  if isinstance(negative_prompt, str):
    negatives *= len(positives)
  if len(negatives) != len(positives):
    raise errors.InputError(
      f"negative_prompt: {len(negatives)} for {len(positives)} prompts; give "
      "one, or one for each."
    )
  return positives, negatives


def _texts(name: str, value: Any) -> list[str]:
  texts = [value] if isinstance(value, str) else value
  if not isinstance(texts, list | tuple) or not all(
    isinstance(text, str) for text in texts
  ):
    raise errors.InputError(f"{name}: {value!r} is not text, nor a list of it.")
  return list(texts)


def check_output(output: Any) -> None:
  """Raises InputError unless `output` is one of `OUTPUTS`."""
  if output not in OUTPUTS:
    raise errors.InputError(
      f"output: {output!r} is unknown; it is one of {', '.join(OUTPUTS)}."
    )


def _each(name: str, values: list[Any], count: int) -> list[Any]:
  """Returns a value for each of `count` clips; a lone one serves all."""
  values = values * count if len(values) == 1 else values
  if len(values) != count:
    raise errors.InputError(
      f"{name}: {len(values)} for {count} prompts; give one, or one for each."
    )
  return values


def _several(image: Any) -> list[Any]:
  """Returns the images that a caller gives, one by one."""
  several = isinstance(image, list | tuple) or (
    isinstance(image, np.ndarray | jax.Array) and image.ndim == 4
  )
  return list(image) if several else [image]


def check_last_image(given: int, has_last: bool) -> None:
  """Raises InputError unless a clip has as many images as a model is given."""
  if given > 1 and not has_last:
    raise errors.InputError(
      "last_image: this checkpoint makes what is between two frames; give the "
      "last one, too."
    )
  if given == 1 and has_last:
    raise errors.InputError(
      "last_image: this checkpoint is given the first frame alone; drop it."
    )


def count_clips(image: Any, each: int) -> int:
  """Returns how many clips images make.

  Args:
    image: The images.
    each: How many of them a clip is made from.

  Raises:
    InputError: There are none, or some are left over.
  """
  count = 0 if image is None else len(_several(image))
  if not count:
    raise errors.InputError(
      "image: this checkpoint makes a video from an image; give one."
    )
  if count % each:
    raise errors.InputError(
      f"image: {count} images; this checkpoint makes a video from {each}: give "
      "as many for each clip, one after another."
    )
  return count // each


def images(image: Any, count: int, plan: Plan) -> list[Image]:
  """Returns an image for each clip, as it is and of the plan's size."""
  found = []
  for one in _several(image):
    read = video.read_image(one)
    fitted = video.fit(read, plan.height, plan.width)
    found.append(Image(fitted, np.asarray(read)))
  return _each("image", found, count)


def videos(value: Any, count: int, num_frames: int | None) -> list[np.ndarray]:
  """Returns the frames of a video for each clip, cut to `num_frames`."""
  if num_frames is not None and num_frames < 1:
    raise errors.InputError(f"num_frames: {num_frames} is less than 1.")
  is_array = isinstance(value, np.ndarray | jax.Array)
  if isinstance(value, list | tuple) and value:
    # A list of frames is one video; a list of videos is several.
    one = value[0]
    is_video = isinstance(one, str | os.PathLike | list | tuple)
    several = is_video or np.ndim(one) == 4
  else:
    several = is_array and value.ndim == 5
  read = [_frames(one, num_frames) for one in (value if several else [value])]
  if len({len(frames) for frames in read}) > 1:
    raise errors.InputError(
      "video: the videos differ in length; set num_frames to cut them."
    )
  return _each("video", read, count)


def _frames(value: Any, num_frames: int | None) -> np.ndarray:
  """Returns the frames `F H W 3` of one video."""
  most = _MOST_FRAMES if num_frames is None else num_frames
  if isinstance(value, str | os.PathLike):
    frames = video.read_video(value, limit=most + (num_frames is None))
  elif isinstance(value, list | tuple) and value:
    frames = [np.asarray(video.read_image(frame)) for frame in value[:most]]
    if len({frame.shape for frame in frames}) > 1:
      raise errors.InputError("video: its frames differ in size.")
    frames = np.stack(frames)
  elif isinstance(value, np.ndarray | jax.Array):
    frames = np.asarray(value)
    if frames.ndim != 4 or frames.shape[-1] not in (3, 4) or not frames.size:
      raise errors.InputError(
        f"video: an array must be (frames, height, width, 3), not "
        f"{frames.shape}."
      )
  else:
    raise errors.InputError(
      f"video: give a path, an array or a list of frames, not "
      f"{type(value).__name__}."
    )
  if num_frames is None and len(frames) > _MOST_FRAMES:
    raise errors.InputError(
      f"video: longer than {_MOST_FRAMES} frames; set num_frames to cut it."
    )
  if num_frames is not None and len(frames) < num_frames:
    raise errors.InputError(
      f"video: {len(frames)} frames, fewer than num_frames={num_frames}."
    )
  return frames[:num_frames]


def clips(
  clips: Sequence[int] | Any | None, count: int
) -> UInt32[np.ndarray, " b"]:
  """Returns the ids of the clips; 0, 1, ... by default."""
  if clips is None:
    return np.arange(count, dtype=np.uint32)
  try:
    ids = [operator.index(clip) for clip in clips]
  except TypeError:
    ids = []
  if len(ids) != count or not all(0 <= i < 2**32 for i in ids):
    raise errors.InputError(
      f"clips: give {count} whole numbers in [0, 2^32), one for each prompt."
    )
  return np.asarray(ids, np.uint32)


def seeds(value: Any, count: int) -> UInt32[np.ndarray, " b"]:
  """Returns the seed of each clip; one serves all.

  From 2^32 on jax.random.key would repeat itself.
  """
  several = isinstance(value, list | tuple) or np.ndim(value) == 1
  values = _each("seed", list(value) if several else [value], count)
  found = [whole("seed", one) for one in values]
  for one in found:
    if one is None or not 0 <= one < 2**32:
      raise errors.InputError(f"seed: {one} is not in [0, 2^32).")
  return np.array(found, np.uint32)


def latents(
  latents: Any, shape: tuple[int | None, ...]
) -> Float[Array, "b f h w c"]:
  """Returns latents of a shape, None in which is any size, as a new array."""
  array = floats("latents", latents)
  fits = array.ndim == len(shape) and all(
    want in (None, size) for size, want in zip(array.shape, shape, strict=True)
  )
  if not fits or not array.size:
    want = ", ".join("any" if size is None else str(size) for size in shape)
    raise errors.InputError(f"latents: shape {array.shape}, expected ({want}).")
  return array


def pixels(value: Any) -> Float[Array, "b F H W 3"]:
  """Returns a video in [-1, 1] as a new array."""
  array = floats("video", value)
  if array.ndim != 5 or array.shape[-1] != 3 or not array.size:
    raise errors.InputError(
      f"video: shape {array.shape}, expected (batch, frames, height, width, 3)."
    )
  if not jnp.abs(array).max() <= 1.01:
    raise errors.InputError(
      "video: values beyond [-1, 1]; bytes are 2 * (video / 255) - 1."
    )
  return array


def floats(name: str, value: Any) -> Array:
  """Returns a new float32 array of what is one of floats already."""
  if isinstance(value, np.ndarray | jax.Array) and jnp.issubdtype(
    value.dtype, jnp.floating
  ):
    return jnp.array(value, jnp.float32)
  kind = value.dtype if hasattr(value, "dtype") else type(value).__name__
  raise errors.InputError(f"{name}: give an array of floats, not {kind}.")
