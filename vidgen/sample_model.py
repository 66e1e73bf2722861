"""What a sampling job asks of a model: to load, to plan, to make clips."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

import vidgen
from vidgen import arguments, clips, errors, sample_plan
from vidgen.models import base


def load(
  config: sample_plan.SampleConfig,
  planned: list[clips.Clip],
  default_prompt: str | None = None,
  refused: Callable[[clips.Clip, errors.InputError], None] | None = None,
  left: Callable[[Any, pathlib.Path], list[clips.Clip]] | None = None,
) -> Any:
  """Returns the pipeline that a config names.

  The model is asked for every clip before its weights are read: line 900 of a
  file should not fail after a night of sampling.

  Args:
    config: Of the job.
    planned: Its clips.
    default_prompt: Of clips without one, where the model takes text.
    refused: Takes the clips that the model cannot make, with the error; without
      it, or where it can make none of them, the error is raised.
    left: Says of the model and its folder which clips are to be made.
  """

  def check(model: Any, folder: pathlib.Path) -> list[Any]:
    good, errors_of = {}, {}
    for clip in planned:
      given = prompted(model, clip, default_prompt)
      try:
        made = sample_plan.with_line(
          clip.where, check_clip, model, given, config
        )
        good[clip.index] = made
      except errors.InputError as error:
        if refused is None:
          raise
        errors_of[clip.index] = (clip, error)
    if errors_of and not good:
      raise next(iter(errors_of.values()))[1]
    for clip, error in errors_of.values():
      refused(clip, error)
    todo = planned if left is None else left(model, folder)
    # Other sizes are compiled when they come up; tiles always are.
    ahead = [] if config.tiling else [good[clip.index] for clip in todo[:1]]
    return [one for one in ahead if one is not None]

  return vidgen.load(
    config.checkpoint,
    dtype=config.dtype,
    mesh=config.mesh or None,
    revision=config.revision,
    residency=config.residency,
    lora=config.lora,
    lora_scale=config.lora_scale,
    check=check,
    batch_size=config.batch_size,
    executables=config.executables,
  )


def prompted(model: Any, clip: clips.Clip, prompt: str | None) -> clips.Clip:
  """Returns a clip with a prompt, if it has none and the model takes one."""
  if clip.prompt is None and model.takes_text:
    return dataclasses.replace(clip, prompt=prompt)
  return clip


def check_clip(
  model: Any, clip: clips.Clip, config: sample_plan.SampleConfig
) -> base.Plan | None:
  """Asks the model how it will make a clip; None where that is not known."""
  arguments.check_text(model.takes_text, clip.prompt)
  arguments.check_negative_text(model.takes_text, clip.negative_prompt)
  if clip.image is not None and model.takes_image:
    given = len(model.training.image_frames)
    arguments.check_last_image(given, clip.last_image is not None)
  if clip.video is not None:
    return None  # Its length is not known until all of it is read.
  planned = model.plan(
    base.Request(
      **{name: getattr(clip, name) for name in clips.SHARED},
      image=clip.image is not None,
      tiling=config.tiling,
      options=options_of(model, config),
    )
  )
  is_guided = planned is None or planned.guidance is not None
  arguments.check_negative(is_guided, clip.negative_prompt)
  return planned


def fps_of(
  model: Any, clip: clips.Clip, config: sample_plan.SampleConfig
) -> int | float:
  """Returns the frame rate of a clip's files."""
  if config.fps is not None:
    return config.fps
  planned = check_clip(model, clip, config)
  return model.fps if planned is None else planned.fps


def options_of(model: Any, config: sample_plan.SampleConfig) -> dict[str, Any]:
  """Returns the family's options; of some the rate of the files is one."""
  if model.takes_fps and config.fps is not None:
    return {**config.options, "fps": config.fps}
  return dict(config.options)


def make(
  pipeline: Any,
  batch: list[clips.Clip],
  config: sample_plan.SampleConfig,
  progress: Any,
) -> list[
  tuple[
    Float[np.ndarray, "f h w c"] | None, UInt8[np.ndarray, "F H W 3"] | None
  ]
]:
  """Makes clips that one program makes, filled up to the job's batch size.

  Returns:
    Of each its latents and its frames, None if nobody wants them.
  """
  formats = sample_plan.config_formats(config)
  first = batch[0]
  given = {name: getattr(first, name) for name in clips.SHARED}
  given |= {"video": first.video, **_of_each(batch, config.batch_size)}
  if first.video is not None:
    given["strength"] = first.strength
  memory = {"tiling": config.tiling}
  options = options_of(pipeline.model, config)
  result = pipeline.sample(
    output="latents" if "npz" in formats else "uint8",
    progress=progress,
    **given,
    **memory,
    **options,
  )
  if "npz" not in formats:
    return [(None, np.asarray(frames)) for frames in result[: len(batch)]]
  if formats == ("npz",):
    return [(np.asarray(latents), None) for latents in result[: len(batch)]]
  planned = check_clip(pipeline.model, first, config)
  if planned is not None and planned.decode_chunk is not None:
    memory["decode_chunk"] = planned.decode_chunk
  with progress.stage("decode"):
    frames = pipeline.decode(result, output="uint8", **memory)
  pairs = zip(result, frames, strict=True)
  return [(np.asarray(a), np.asarray(b)) for a, b in pairs][: len(batch)]


def _of_each(batch: list[clips.Clip], size: int) -> dict[str, Any]:
  """Returns the arguments that differ from clip to clip.

  Clips that change a video are alone: they are not filled up.
  """
  if batch[0].video is None:
    batch = batch + batch[-1:] * (size - len(batch))
  names = ("prompt", "negative_prompt", "seed")
  values = {name: [getattr(clip, name) for clip in batch] for name in names}
  if len(batch) == 1:
    values = {name: value[0] for name, value in values.items()}
  images = [path for clip in batch for path in (clip.image, clip.last_image)]
  images = [path for path in images if path is not None]
  values["image"] = images if len(images) > 1 else next(iter(images), None)
  if batch[0].prompt is None:
    values |= {"prompt": None, "negative_prompt": batch[0].negative_prompt}
  return {**values, "clips": [clip.clip for clip in batch]}
