"""One video of a sampling job: what it is, its name, its files."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from vidgen import ledger, video

FORMATS = ("mp4", "gif", "png", "npz")

# What the clips of a batch have in common.
SHARED = (
  "num_frames",
  "height",
  "width",
  "num_steps",
  "guidance_scale",
  "sampler",
)


# The fields of a clip that are files, read for what they hold.
READ = ("image", "last_image", "video")


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
  last_image: str | None
  video: str | None
  strength: float
  num_frames: int | None
  height: int | None
  width: int | None
  num_steps: int | None
  guidance_scale: float | None
  sampler: str | None


def file_name(stem: str, format: str) -> str:
  """Returns the name of a clip's file; a folder of frames has no suffix."""
  return stem if format == "png" else f"{stem}.{format}"


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
    path = stem.with_name(file_name(stem.name, name))
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


class Digests:
  """Says what makes the clips of a job what they are.

  Never where it runs or where its files lie: an image counts by its content,
  which is read once, however many lines name it.
  """

  def __init__(self, settings: Mapping[str, Any]):
    """Takes what the job adds for all its clips.

    Args:
      settings: A mark of the weights, `lora` (a file, or the weights of
        several), the dtype and so on.
    """
    self._known: dict[str, str] = {}
    self._settings = dict(settings)
    lora = settings["lora"]
    if isinstance(lora, Mapping):
      pairs = [(self._content(p), float(w)) for p, w in lora.items()]
      self._settings["lora"] = sorted(pairs)
    else:
      self._settings["lora"] = self._content(lora)

  def of(self, clip: Clip) -> str:
    """Returns 12 hexadecimal digits of a clip."""
    values = {f.name: getattr(clip, f.name) for f in dataclasses.fields(clip)}
    del values["where"], values["index"]
    values |= self._settings
    if clip.video is None:
      del values["strength"]  # It changes nothing.
    for name in READ:
      values[name] = self._content(values[name])
    if clip.last_image is None:
      del values["last_image"]  # As clips were named before there was one.
    text = json.dumps(values, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:12]

  def _content(self, path: str | None) -> str | None:
    """The SHA-256 of a file's content."""
    if path is None:
      return None
    if path not in self._known:
      with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
      self._known[path] = digest.hexdigest()
    return self._known[path]


def record(
  clip: Clip,
  name: str,
  files: list[str],
  frames: UInt8[np.ndarray, "F H W 3"] | None,
  fps: int | float,
) -> dict[str, Any]:
  """Returns a clip's line in the ledger; `files` are there, whole."""
  paths = [pathlib.Path(file) for file in files]
  raw = None
  if frames is not None:
    raw = hashlib.sha256(np.ascontiguousarray(frames).data).hexdigest()
  return {
    **about(clip, name),
    "status": ledger.DONE,
    "files": [path.name for path in paths],
    "bytes": {path.name: ledger.size_of(path) for path in paths},
    "sha256": {path.name: ledger.digest(path) for path in paths},
    "frames_sha256": raw,
    "size": None if frames is None else list(frames.shape[1:3]),
    "frames": None if frames is None else len(frames),
    "fps": fps,
  }


def about(clip: Clip, name: str | None) -> dict[str, Any]:
  """Returns what the ledger says of a clip, whatever became of it."""
  values = {"index": clip.index, "name": name}
  if clip.where:
    values["where"] = clip.where
  for field in ("prompt", "negative_prompt", "seed", "clip"):
    values[field] = getattr(clip, field)
  for field in ("num_steps", "guidance_scale", "sampler"):
    if getattr(clip, field) is not None:
      values[field] = getattr(clip, field)
  for field in READ:
    if getattr(clip, field) is not None:
      values[field] = os.path.basename(getattr(clip, field))
  return values


def batches(clips: list[Clip], size: int) -> list[list[Clip]]:
  """Returns clips in groups of at most `size` that one program makes.

  What makes programs differ is the same in a group, so that each is compiled
  once; a clip that changes a video, whose length nobody knows yet, is alone.
  """
  groups: dict[Any, list[Clip]] = {}
  for clip in clips:
    alone = clip.index if clip.video is not None else None
    shape = tuple(getattr(clip, name) for name in SHARED)
    key = (shape, clip.image is None, alone)
    groups.setdefault(key, []).append(clip)
  return [
    group[i : i + size]
    for group in groups.values()
    for i in range(0, len(group), size)
  ]
