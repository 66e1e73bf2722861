"""One video of a sampling job: what it is, its name, its files."""

import dataclasses
import errno
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from vidgen import video

FORMATS = ("mp4", "gif", "png", "npz")


@dataclasses.dataclass
class Clip:
  """One video to make, its line's overrides applied.

  Attributes:
    where: The line of the file of prompts, for messages; "" without one.
    index: The number of the video in the job.
    clip: The number that picks the noise, given the seed.
    prompt: None for models that take no text.
  """

  where: str
  index: int
  clip: int
  prompt: str | None
  negative_prompt: str
  seed: int
  image: str | None
  video: str | None
  strength: float
  num_frames: int | None
  height: int | None
  width: int | None
  num_steps: int | None
  guidance_scale: float | None
  sampler: str | None


def write(
  stem: pathlib.Path,
  formats: tuple[str, ...],
  latents: Float[np.ndarray, "f h w c"] | None,
  frames: UInt8[np.ndarray, "F H W 3"] | None,
  fps: int | float,
) -> list[str]:
  """Writes a clip in each format; returns the files."""
  files = []
  for name in formats:
    # A folder of frames has no suffix.
    path = stem if name == "png" else stem.with_name(f"{stem.name}.{name}")
    if name == "mp4":
      video.write_mp4(path, frames, fps)
    elif name == "gif":
      video.write_gif(path, frames, fps)
    elif name == "png":
      video.write_png_frames(path, frames)
    else:
      video.write_latents(path, latents)
    files.append(os.fspath(path))
  return files


def digest(clip: Clip, settings: Mapping[str, Any]) -> str:
  """Returns 12 hexadecimal digits of what makes a clip what it is.

  Never of where it runs or of where its files lie: an image counts by its
  content.

  Args:
    clip: The clip.
    settings: What the job adds for all its clips: the checkpoint, `lora` (a
      file, or the weights of several), the dtype and so on.
  """
  values = dataclasses.asdict(clip)
  del values["where"], values["index"]
  values |= settings
  if clip.video is None:
    del values["strength"]  # It changes nothing.
  for name in ("image", "video"):
    values[name] = _content(values[name])
  lora = values["lora"]
  if isinstance(lora, Mapping):
    values["lora"] = sorted((_content(p), float(w)) for p, w in lora.items())
  else:
    values["lora"] = _content(lora)
  text = json.dumps(values, sort_keys=True, default=repr)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def _content(path: str | None) -> str | None:
  """Returns the SHA-256 of a file's content."""
  if path is None:
    return None
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def append(
  path: pathlib.Path,
  clip: Clip,
  files: list[str],
  frames: UInt8[np.ndarray, "F H W 3"] | None,
  fps: int | float,
) -> None:
  """Appends a clip's line to the list of clips, and flushes it to the disk."""
  record = {
    "index": clip.index,
    "prompt": clip.prompt,
    "negative_prompt": clip.negative_prompt,
    "seed": clip.seed,
    "clip": clip.clip,
    "files": [os.path.basename(file) for file in files],
    "size": None if frames is None else list(frames.shape[1:3]),
    "frames": None if frames is None else len(frames),
    "fps": fps,
  }
  if clip.image is not None:
    record["image"] = os.path.basename(clip.image)
  line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
  try:
    with open(path, "ab", buffering=0) as file:
      end = file.tell()
      try:
        if file.write(line) < len(line):
          raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
      except OSError:
        # Half a line would spoil the list for whoever reads it.
        os.truncate(path, end)
        raise
  except OSError as error:
    raise video.storage_error(path, error) from error
