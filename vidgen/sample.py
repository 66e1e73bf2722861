"""The batch sampling job: prompts in, files of videos out."""

import contextlib
import dataclasses
import math
import os
import pathlib
import tempfile
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

import vidgen
from vidgen import arguments, clips, errors, layouts, prompts, video
from vidgen import progress as progress_lib
from vidgen.models import base

DTYPES = ("bfloat16", "float16", "float32")
RESIDENCIES = ("all", "stage")

# What the pixels of every clip depend on, besides what a `Clip` says.
_SETTINGS = (
  "checkpoint",
  "revision",
  "dtype",
  "lora",
  "lora_scale",
  "tiling",
  "options",
)


@dataclasses.dataclass
class SampleConfig:
  """What a sampling job does. None leaves a field to the checkpoint.

  Attributes:
    checkpoint: A folder in either layout, a hub id, or "demo", the small model
      that the package carries.
    revision: The hub revision.
    dtype: What the networks compute in.
    mesh: Mesh axis to size; empty is one device. "auto" chooses for the model
      and all devices, and names of `layouts.PRESETS` stand for theirs.
    residency: "stage" keeps a network's weights on the device only while they
      are needed, "all" keeps all.
    prompt: One prompt, or
    prompts: a file of them: see `vidgen.prompts`. Checkpoints that take no text
      need neither.
    image: An image, for checkpoints that start from one, or a folder of images,
      each of which makes a clip, in the order of their names.
    video: A video to change, by `strength` in (0, 1].
    videos_per_prompt: Clips for each prompt, each from noise of its own.
    tiling: Encode and decode in tiles: less memory, slightly other pixels.
    lora: A LoRA file in the published layout, merged with `lora_scale`; or
      several, each with a weight of its own.
    executables: A folder of `vidgen compile --save`, of the same job.
    formats: Some of mp4, gif, png (a folder of frames) and npz (latents).
    fps: The frame rate of the files, and what a model is told that can be; None
      is the model's own.
    out: The folder for the files; `clips.jsonl` in it lists them.
    options: What a family alone has, `{"dynamic_guidance": True}` for one.
  """

  checkpoint: str = "demo"
  revision: str | None = None
  dtype: str = "bfloat16"
  mesh: dict[str, int] | str = dataclasses.field(default_factory=dict)
  residency: str = "all"
  prompt: str | None = None
  prompts: str | None = None
  negative_prompt: str = ""
  image: str | None = None
  video: str | None = None
  strength: float = 0.8
  num_frames: int | None = None
  height: int | None = None
  width: int | None = None
  num_steps: int | None = None
  guidance_scale: float | None = None
  sampler: str | None = None
  seed: int = 0
  videos_per_prompt: int = 1
  tiling: bool = False
  lora: dict[str, float] | str | None = None
  lora_scale: float = 1.0
  executables: str | None = None
  formats: tuple[str, ...] = ("mp4",)
  fps: float | None = None
  out: str = "samples"
  options: dict[str, Any] = dataclasses.field(default_factory=dict)


def run(
  config: SampleConfig, progress: progress_lib.Progress | None = None
) -> progress_lib.Summary:
  """Makes every video of the job, one after another.

  What is cheap to check is checked before the weights are read. An error ends
  the job; the videos made before it stay.

  Raises:
    InputError: A bad config, prompt, image or video.
    CorruptError: A bad checkpoint.
    StorageError: A folder that cannot be written, or a full disk.
  """
  planned = plan(config)
  was_there = pathlib.Path(config.out).exists()
  out = _make_folder(config.out)
  progress = progress_lib.Progress() if progress is None else progress
  files = []
  try:
    with progress:
      with progress.stage("load"):
        pipeline = load(config, planned)
        if pipeline.why_mesh:
          progress.say(pipeline.why_mesh)
      for done, clip in enumerate(planned, 1):
        progress.clip(done, len(planned))
        files += _make(pipeline, clip, config, out, progress)
  finally:
    # A job that made nothing leaves no empty folder of its own behind.
    if not was_there:
      with contextlib.suppress(OSError):
        out.rmdir()
  peak_bytes, peak_of = progress_lib.peak_memory()
  return progress_lib.Summary(
    out=config.out,
    files=files,
    clips=len(planned),
    seconds=progress.seconds,
    compile_seconds=progress.compile_seconds,
    peak_bytes=peak_bytes,
    peak_of=peak_of,
  )


def load(
  config: SampleConfig,
  planned: list[clips.Clip],
  default_prompt: str | None = None,
) -> Any:
  """Returns the pipeline that a config names.

  The model is asked for every clip before its weights are read: line 900 of a
  file should not fail after a night of sampling.

  Args:
    config: Of the job.
    planned: Its clips.
    default_prompt: Of clips without one, where the model takes text.
  """

  def check(model: Any) -> list[Any]:
    given = [prompted(model, clip, default_prompt) for clip in planned]
    plans = [
      with_line(clip.where, _check_clip, model, clip, config) for clip in given
    ]
    # Other sizes are compiled when they come up; tiles always are.
    return [p for p in plans[:1] if p is not None and not config.tiling]

  return vidgen.load(
    config.checkpoint,
    dtype=config.dtype,
    mesh=config.mesh or None,
    revision=config.revision,
    residency=config.residency,
    lora=config.lora,
    lora_scale=config.lora_scale,
    check=check,
    executables=config.executables,
  )


def prompted(model: Any, clip: clips.Clip, prompt: str | None) -> clips.Clip:
  """Returns a clip with a prompt, if it has none and the model takes one."""
  if clip.prompt is None and model.takes_text:
    return dataclasses.replace(clip, prompt=prompt)
  return clip


def plan(config: SampleConfig) -> list[clips.Clip]:
  """Returns the videos of a job, everything checked that needs no weights.

  Clip `c` of seed `s` is the same video in every job: a line that sets a seed
  counts its clips from 0; the others count on through the job.

  Raises:
    InputError: A bad config, prompt, image or video.
  """
  _check_config(config)
  planned, seen = [], set()
  lines = prompts.lines(config.prompt, config.prompts, config.image)
  for line in lines:
    for name, check in (("image", video.read_image), ("video", _probe)):
      path = _pick(line, config, name)
      if path is not None and path not in seen:
        with_line(line.where, check, path)
        seen.add(path)
    planned += _clips(line, config, len(planned))
  changed = config.strength != SampleConfig.strength
  if changed and not any(clip.video for clip in planned):
    raise errors.InputError("config: strength needs a video; set --video=FILE.")
  return planned


def with_line(where: str, function: Any, *args: Any, **kwargs: Any) -> Any:
  """Calls a function; a user's mistake in it is told with its line."""
  try:
    return function(*args, **kwargs)
  except errors.InputError as error:
    if not where or str(error).startswith(where):
      raise
    raise errors.InputError(f"{where}: {error}") from error


def _check_config(config: SampleConfig) -> None:
  """Checks each field by itself."""
  for name in prompts.TYPES:
    value = getattr(config, name)
    if value is not None:
      prompts.check(name, value, "config")
  choices = {"dtype": DTYPES, "residency": RESIDENCIES}
  for name, allowed in choices.items():
    value = getattr(config, name)
    if value not in allowed:
      raise errors.InputError(
        f"config: {name} must be one of {', '.join(allowed)}, not {value!r}."
        f"{prompts.closest(value, allowed)}"
      )
  for name in config_formats(config):
    if name not in clips.FORMATS:
      raise errors.InputError(
        f"config: formats may hold {', '.join(clips.FORMATS)}, not {name!r}."
        f"{prompts.closest(name, clips.FORMATS)}"
      )
  if config.fps is not None and not 0 < config.fps <= 1000:
    raise errors.InputError(
      f"config: fps must be above 0 and at most 1000, not {config.fps}."
    )
  fields = {field.name for field in dataclasses.fields(config)}
  fields |= {"output", "clips", "progress", "latents"}
  if taken := sorted(fields & config.options.keys()):
    raise errors.InputError(
      f"config: {taken[0]!r} is no option of a family; set --config."
      f"{taken[0]} itself."
    )
  if (layouts.named(config.mesh) or {}).get("data", 1) != 1:
    raise errors.InputError(
      "config: mesh.data splits a batch, and the job makes one clip at a time; "
      "use cfg, fsdp, context or tensor."
    )
  if not math.isfinite(config.lora_scale):
    raise errors.InputError("config: lora_scale must be finite.")
  if config.lora is None and config.lora_scale != SampleConfig.lora_scale:
    raise errors.InputError("config: lora_scale needs a LoRA; set lora=FILE.")
  for path in _lora_files(config.lora):
    if not os.path.isfile(path):
      raise errors.InputError(f"{path}: there is no such LoRA file.")


def _lora_files(lora: dict[str, float] | str | None) -> list[str]:
  """Returns the files of a config's LoRAs."""
  return [lora] if isinstance(lora, str) else list(lora or ())


def config_formats(config: SampleConfig) -> tuple[str, ...]:
  """Returns the formats; `mp4,gif` on a command line is one string."""
  names = [name.strip() for item in config.formats for name in item.split(",")]
  if not any(names):
    raise errors.InputError("config: formats is empty; mp4 is the usual one.")
  return tuple(dict.fromkeys(names))


def _pick(line: prompts.Line, config: SampleConfig, name: str) -> Any:
  """Returns a field of a line, or the job's if the line leaves it out."""
  value = getattr(line, name)
  return getattr(config, name) if value is None else value


def _clips(
  line: prompts.Line, config: SampleConfig, index: int
) -> list[clips.Clip]:
  """Returns the clips of a line; `index` is the number of the first."""
  names = {field.name for field in dataclasses.fields(clips.Clip)}
  names -= {"where", "index", "clip", "prompt"}
  values = {name: _pick(line, config, name) for name in names}
  for name in names & prompts.TYPES.keys():
    if values[name] is not None:
      # A whole number stands for a number: guidance_scale=6.
      values[name] = prompts.check(name, values[name], "config")
  if values["image"] is not None and values["video"] is not None:
    raise errors.InputError(
      f"{line.where or 'config'}: image and video exclude each other."
    )
  if line.strength is not None and values["video"] is None:
    raise errors.InputError(
      f"{line.where}: strength needs a video that it can change."
    )
  first = index if line.seed is None else 0
  return [
    clips.Clip(
      where=line.where,
      index=index + j,
      clip=first + j,
      prompt=line.prompt,
      **values,
    )
    for j in range(_pick(line, config, "videos_per_prompt"))
  ]


def _probe(path: str) -> None:
  """Checks that a video can be read, by its first frame."""
  video.read_video(path, limit=1)


def _make_folder(out: str) -> pathlib.Path:
  """Makes the folder, and finds out now whether it can be written."""
  folder = pathlib.Path(out)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as error:
    raise video.storage_error(folder, error) from error
  return folder


def _check_clip(
  model: Any, clip: clips.Clip, config: SampleConfig
) -> base.Plan | None:
  """Asks the model how it will make a clip; None where that is not known."""
  arguments.check_text(model.takes_text, clip.prompt)
  if clip.video is not None:
    return None  # Its length is not known until all of it is read.
  names = [
    "num_frames",
    "height",
    "width",
    "num_steps",
    "guidance_scale",
    "sampler",
  ]
  planned = model.plan(
    base.Request(
      **{name: getattr(clip, name) for name in names},
      image=clip.image is not None,
      tiling=config.tiling,
      options=_options(model, config),
    )
  )
  is_guided = planned is None or planned.guidance is not None
  arguments.check_negative(is_guided, clip.negative_prompt)
  return planned


def _options(model: Any, config: SampleConfig) -> dict[str, Any]:
  """Returns the family's options; of some the rate of the files is one."""
  if model.takes_fps and config.fps is not None:
    return {**config.options, "fps": config.fps}
  return dict(config.options)


def _make(
  pipeline: Any,
  clip: clips.Clip,
  config: SampleConfig,
  out: pathlib.Path,
  progress: progress_lib.Progress,
) -> list[str]:
  """Makes one clip, writes it, lists it and returns its files."""
  formats = config_formats(config)
  latents, frames = with_line(
    clip.where, make, pipeline, clip, config, progress
  )
  settings = {name: getattr(config, name) for name in _SETTINGS}
  settings["options"] = _options(pipeline.model, config)
  stem = out / f"{clip.index:06d}_{clips.digest(clip, settings)}"
  planned = _check_clip(pipeline.model, clip, config)
  fps = pipeline.fps if planned is None else planned.fps
  fps = fps if config.fps is None else config.fps
  with progress.stage("write"):
    files = clips.write(stem, formats, latents, frames, fps)
    clips.append(out / "clips.jsonl", clip, files, frames, fps)
  progress.say(" ".join(files))
  return files


def make(
  pipeline: Any,
  clip: clips.Clip,
  config: SampleConfig,
  progress: progress_lib.Progress,
) -> tuple[
  Float[np.ndarray, "f h w c"] | None, UInt8[np.ndarray, "F H W 3"] | None
]:
  """Makes one clip: its latents and its frames, None if nobody wants them."""
  formats = config_formats(config)
  arguments = {
    name: getattr(clip, name)
    for name in [
      "negative_prompt",
      "image",
      "video",
      "num_frames",
      "height",
      "width",
      "num_steps",
      "guidance_scale",
      "sampler",
      "seed",
    ]
  }
  if clip.video is not None:
    arguments["strength"] = clip.strength
  memory = {"tiling": config.tiling}
  options = _options(pipeline.model, config)
  result = pipeline.sample(
    clip.prompt,
    output="latents" if "npz" in formats else "uint8",
    clips=[clip.clip],
    progress=progress,
    **arguments,
    **memory,
    **options,
  )
  if "npz" not in formats:
    return None, np.asarray(result[0])
  if formats == ("npz",):
    return np.asarray(result[0]), None
  planned = _check_clip(pipeline.model, clip, config)
  if planned is not None and planned.decode_chunk is not None:
    memory["decode_chunk"] = planned.decode_chunk
  with progress.stage("decode"):
    frames = pipeline.decode(result, output="uint8", **memory)
  return np.asarray(result[0]), np.asarray(frames[0])
