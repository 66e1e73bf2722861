"""First frames of videos as small JPEGs, which a page shows until it plays."""

import concurrent.futures
import contextlib
import errno
import os
import pathlib
import re
import secrets
from collections.abc import Iterable
from typing import NamedTuple

import av
import numpy as np
import PIL.Image
from jaxtyping import UInt8

from vidgen import errors, video

# The longer side, in pixels; smaller videos keep their size.
_SIDE = 320
_QUALITY = 85

_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.tmp")


class Facts(NamedTuple):
  """What a video's header says; `frames` and `fps` are None if it does not."""

  height: int
  width: int
  frames: int | None
  fps: float | None


def probe(path: pathlib.Path) -> Facts:
  """Returns what a video is, without decoding it.

  Raises:
    InputError: It is no video.
  """
  try:
    options = {"protocol_whitelist": "file"}
    with av.open(os.fspath(path), options=options) as file:
      stream = file.streams.video[0]
      rate = stream.average_rate
      return Facts(
        stream.height,
        stream.width,
        stream.frames or None,
        float(rate) if rate else None,
      )
  except (av.FFmpegError, OSError, IndexError) as error:
    raise errors.InputError(f"{path}: cannot be read as a video.") from error


def make(videos: Iterable[pathlib.Path], folder: pathlib.Path) -> set[str]:
  """Makes posters of videos in `folder`, and returns those that are there.

  `folder`/NAME.jpg is made if there is none or its video is newer. A video that
  cannot be decoded, or a folder that cannot be written to, has no poster.

  Raises:
    StorageError: The disk is full.
  """
  held = {}
  with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
    for entry in entries:
      with contextlib.suppress(FileNotFoundError):
        status = entry.stat()
        if status.st_size:
          held[entry.name] = status.st_mtime_ns
  names, todo = set(), []
  for path in videos:
    name = f"{path.stem}.jpg"
    if held.get(name, -1) >= path.stat().st_mtime_ns:
      names.add(name)
    else:
      todo.append(path)
  if not todo:
    return names
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    return _without(error, folder, names)
  # Decoding lets go of Python's lock.
  with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as p:
    try:
      names |= set(filter(None, p.map(lambda v: _poster(v, folder), todo)))
    except OSError as error:
      p.shutdown(cancel_futures=True)
      return _without(error, folder, names)
  return names


def write(path: pathlib.Path, frame: UInt8[np.ndarray, "H W 3"]) -> None:
  """Writes a frame as a poster; whoever has it at hand need not decode it.

  It is not flushed to the disk, for `make` makes an empty one anew.

  Raises:
    OSError: It could not be written; nothing of it is left.
  """
  image = PIL.Image.fromarray(frame)
  image.thumbnail((_SIDE, _SIDE))
  temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
  try:
    image.save(temporary, "JPEG", quality=_QUALITY, subsampling=0)
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


def sweep(folder: pathlib.Path) -> None:
  """Removes posters that killed processes left half written."""
  if folder.is_dir():
    for name in os.listdir(folder):
      if _TEMPORARY.fullmatch(name) and video.is_old(folder / name):
        (folder / name).unlink(missing_ok=True)


def _poster(path: pathlib.Path, folder: pathlib.Path) -> str | None:
  """Makes one poster and returns its name; None if there is no first frame."""
  name = f"{path.stem}.jpg"
  try:
    write(folder / name, video.read_video(path, limit=1)[0])
  except errors.InputError:
    return None
  return name


def _without(error: OSError, folder: pathlib.Path, names: set[str]) -> set[str]:
  """Goes without posters where they may not be written."""
  if isinstance(error, PermissionError) or error.errno == errno.EROFS:
    return names
  raise video.storage_error(folder, error) from error
