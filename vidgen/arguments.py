"""What callers may write, made uniform: one value for each clip."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from vidgen import errors, video
from vidgen.models.base import Plan

OUTPUTS = ("uint8", "float", "latents")


def prompts(
  prompt: str | Sequence[str], negative_prompt: str | Sequence[str]
) -> tuple[list[str], list[str]]:
  """Returns as many negative prompts as prompts; one serves all."""
  positives = [prompt] if isinstance(prompt, str) else list(prompt)
  if not positives:
    raise errors.InputError("prompt: give at least one.")
  negatives = (
    [negative_prompt] * len(positives)
    if isinstance(negative_prompt, str)
    else list(negative_prompt)
  )
  if len(negatives) != len(positives):
    raise errors.InputError(
      f"negative_prompt: {len(negatives)} for {len(positives)} prompts; give "
      "one, or one for each."
    )
  for text in positives + negatives:
    if not isinstance(text, str):
      raise errors.InputError(f"prompt: {text!r} is not text.")
  return positives, negatives


def check_output(output: str) -> None:
  """Raises InputError unless `output` is one of `OUTPUTS`."""
  if output not in OUTPUTS:
    raise errors.InputError(
      f"output: {output!r} is unknown; it is one of {', '.join(OUTPUTS)}."
    )


def _each(name: str, value: Any, ndim: int, count: int) -> list[Any]:
  """One value for each prompt; a lone one (an array of `ndim`) serves all."""
  several = isinstance(value, list | tuple) or (
    isinstance(value, np.ndarray | jax.Array) and value.ndim > ndim
  )
  values = list(value) if several else [value] * count
  if len(values) == 1:
    values *= count
  if len(values) != count:
    raise errors.InputError(
      f"{name}: {len(values)} for {count} prompts; give one, or one for each."
    )
  return values


def images(
  image: Any, count: int, plan: Plan
) -> list[Float[np.ndarray, "H W 3"]]:
  """Returns an image for each clip, of the plan's size, in [-1, 1]."""
  return [
    video.fit(one, plan.height, plan.width)
    for one in _each("image", image, 3, count)
  ]


def videos(value: Any, count: int, num_frames: int | None) -> list[np.ndarray]:
  """Returns the frames of a video for each clip, cut to `num_frames`."""
  # A list of frames is one video; a list of videos is several.
  if isinstance(value, list | tuple) and not isinstance(value[0], str):
    lone = np.ndim(value[0]) < 4
    value = np.stack(value)[None] if lone else value
  clips = []
  for one in _each("video", value, 4, count):
    is_path = not isinstance(one, np.ndarray | jax.Array)
    frames = video.read_video(one) if is_path else np.asarray(one)
    if num_frames is not None and len(frames) < num_frames:
      raise errors.InputError(
        f"video: {len(frames)} frames, fewer than num_frames={num_frames}."
      )
    clips.append(frames[:num_frames])
  if len({len(clip) for clip in clips}) > 1:
    raise errors.InputError(
      "video: the videos differ in length; set num_frames to cut them."
    )
  return clips


def clips(
  clips: Sequence[int] | None, count: int, seed: int
) -> UInt32[np.ndarray, " b"]:
  """Returns the ids of the clips; 0, 1, ... by default. Checks the seed too."""
  if not 0 <= seed < 2**32:
    raise errors.InputError(f"seed: {seed} is not in [0, 2^32).")
  clips = np.arange(count) if clips is None else np.asarray(clips)
  if clips.shape != (count,) or (clips < 0).any() or (clips >= 2**32).any():
    raise errors.InputError(
      f"clips: give {count} ids in [0, 2^32), one for each prompt."
    )
  return clips.astype(np.uint32)


def latents(
  latents: Any, count: int, plan: Plan
) -> Float[Array, "b f h w c"] | None:
  """Returns given initial noise, of the shape that the plan denoises."""
  if latents is None:
    return None
  latents = jnp.array(latents, jnp.float32)
  if latents.shape != (count, *plan.latents):
    raise errors.InputError(
      f"latents: shape {latents.shape}, expected {(count, *plan.latents)}."
    )
  return latents
