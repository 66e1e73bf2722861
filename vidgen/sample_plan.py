"""What a sampling job is asked for: its config, and the clips that it makes."""

import dataclasses
import math
import os
import re
from typing import Any

from vidgen import clips, errors, layouts, prompts, video

DTYPES = ("bfloat16", "float16", "float32")
RESIDENCIES = ("all", "stage")


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
    shard: "2/8" makes the clips of part 2 of 8, counted from 0: every eighth.
    batch_size: Clips that are made at once; what is left over at the end is
      filled up, so that a clip's bits do not depend on its neighbours.
    image: An image, for checkpoints that start from one, or a folder of images,
      each of which makes a clip, in the order of their names.
    last_image: The last frame, for checkpoints that make what is between two.
    video: A video to change, by `strength` in (0, 1].
    videos_per_prompt: Clips for each prompt, each from noise of its own.
    tiling: Encode and decode in tiles: less memory, slightly other pixels.
    lora: A LoRA file in the published layout, merged with `lora_scale`; or
      several, each with a weight of its own.
    executables: A folder of `vidgen compile --save`, of the same job.
    formats: Some of mp4, gif, png (a folder of frames) and npz (latents).
    fps: The frame rate of the files, and what a model is told that can be; None
      is the model's own.
    out: The folder for the files; `clips.jsonl` in it says what became of each
      clip.
    options: What a family alone has, `{"dynamic_guidance": True}` for one.
  """

  checkpoint: str = "demo"
  revision: str | None = None
  dtype: str = "bfloat16"
  mesh: dict[str, int] | str = dataclasses.field(default_factory=dict)
  residency: str = "all"
  prompt: str | None = None
  prompts: str | None = None
  shard: str = "0/1"
  batch_size: int = 1
  negative_prompt: str = ""
  image: str | None = None
  last_image: str | None = None
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


@dataclasses.dataclass
class Failure:
  """A clip that was not made, or a line of which none can be.

  Attributes:
    where: The file and the line, "" without one.
    index: The number of the video in the job.
    error: What is wrong, in a line.
  """

  where: str
  index: int
  error: str


def plan(config: SampleConfig) -> list[clips.Clip]:
  """Returns the videos of a job, everything checked that needs no weights.

  Clip `c` of seed `s` is the same video in every job: a line that sets a seed
  counts its clips from 0; the others count on through the job.

  Raises:
    InputError: A bad config, prompt, image or video.
  """
  planned, failures = sift(config)
  for failure in failures:
    raise errors.InputError(failure.error)
  return planned


def sift(config: SampleConfig) -> tuple[list[clips.Clip], list[Failure]]:
  """Returns the videos of a job, and the lines of which none can be made.

  Such a line takes a number, as if it made videos: mended, it changes no other
  line's. Of several lines one may fail; what is wrong with all is an error.

  Raises:
    InputError: A bad config, or no line that is good.
  """
  check(config)
  planned, failures, seen, index = [], [], {}, 0
  for line in prompts.lines(config.prompt, config.prompts, config.image):
    try:
      if isinstance(line, prompts.Bad):
        raise errors.InputError(line.error)
      for name, probe in _PROBES.items():
        path = _pick(line, config, name)
        if path is not None:
          _once(seen, (name, path), line.where, probe)
      made = _clips(line, config, index)
      planned += made
      index += len(made)
    except errors.InputError as error:
      failures.append(Failure(line.where, index, str(error)))
      index += _pick(line, config, "videos_per_prompt")
  if not planned:
    raise errors.InputError(failures[0].error)
  changed = config.strength != SampleConfig.strength
  if changed and not any(clip.video for clip in planned):
    raise errors.InputError("config: strength needs a video; set --video=FILE.")
  return planned, failures


def _once(
  seen: dict[tuple[str, str], str | None],
  key: tuple[str, str],
  where: str,
  probe: Any,
) -> None:
  """Reads an image or a video that many lines may name, once."""
  if key not in seen:
    seen[key] = None
    try:
      probe(key[1])
    except errors.InputError as error:
      seen[key] = str(error)
  if seen[key] is not None:
    at = f"{where}: " if where and not seen[key].startswith(where) else ""
    raise errors.InputError(f"{at}{seen[key]}")


def with_line(where: str, function: Any, *args: Any, **kwargs: Any) -> Any:
  """Calls a function; a user's mistake in it is told with its line."""
  try:
    return function(*args, **kwargs)
  except errors.InputError as error:
    if not where or str(error).startswith(where):
      raise
    raise errors.InputError(f"{where}: {error}") from error


def check(config: SampleConfig) -> None:
  """Raises InputError unless each field makes sense by itself."""
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
  # Files of video would hold a smaller one as another, and a GIF has no longer
  # delay than eleven minutes.
  if config.fps is not None and not 0.01 <= config.fps <= 1000:
    raise errors.InputError(
      f"config: fps must be from 0.01 to 1000, not {config.fps}."
    )
  fields = {field.name for field in dataclasses.fields(config)}
  fields |= {"output", "clips", "progress", "latents"}
  if taken := sorted(fields & config.options.keys()):
    raise errors.InputError(
      f"config: {taken[0]!r} is no option of a family; set --config."
      f"{taken[0]} itself."
    )
  if config.batch_size < 1:
    raise errors.InputError(
      f"config: batch_size must be at least 1, not {config.batch_size}."
    )
  shard_of(config)
  data = (layouts.named(config.mesh) or {}).get("data", 1)
  if data != 1 and config.batch_size % data:
    raise errors.InputError(
      f"config: mesh.data={data} splits a batch, and the job makes "
      f"{config.batch_size} clips at a time; set batch_size to a multiple, or "
      "use cfg, fsdp, context or tensor."
    )
  if not math.isfinite(config.lora_scale):
    raise errors.InputError("config: lora_scale must be finite.")
  if config.lora is None and config.lora_scale != SampleConfig.lora_scale:
    raise errors.InputError("config: lora_scale needs a LoRA; set lora=FILE.")
  for path in lora_files(config.lora):
    if not os.path.isfile(path):
      raise errors.InputError(f"{path}: there is no such LoRA file.")


def shard_of(config: SampleConfig) -> tuple[int, int]:
  """Returns which part of a job this is, and of how many."""
  found = re.fullmatch(r"(\d+)/(\d+)", config.shard)
  if found is None or int(found[1]) >= int(found[2]):
    raise errors.InputError(
      f"config: shard must be i/n with i below n, 0/8 to 7/8 for one, not "
      f"{config.shard!r}."
    )
  return int(found[1]), int(found[2])


def lora_files(lora: dict[str, float] | str | None) -> list[str]:
  """Returns the files of a config's LoRAs."""
  return [lora] if isinstance(lora, str) else list(lora or ())


def config_formats(config: SampleConfig) -> tuple[str, ...]:
  """Returns the formats; `mp4,gif` on a command line is one string."""
  names = [name.strip() for item in config.formats for name in item.split(",")]
  if not any(names):
    raise errors.InputError("config: formats is empty; mp4 is the usual one.")
  return tuple(dict.fromkeys(names))


def _pick(
  line: prompts.Line | prompts.Bad, config: SampleConfig, name: str
) -> Any:
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
  if values["last_image"] is not None and values["image"] is None:
    raise errors.InputError(
      f"{line.where or 'config'}: last_image needs an image, the first frame."
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


# What of a line is a file, and how it is seen that it can be read.
_PROBES = {
  "image": video.read_image,
  "last_image": video.read_image,
  "video": _probe,
}
