"""Sets of videos: a job's folder, any folder, or a file; read one at a time."""

import hashlib
import io
import itertools
import os
import pathlib
import re
import zipfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from vidgen import errors, ledger, tensorheader, video
from vidgen.data import codec

VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".gif")
_ARRAYS = ".npz"

# Of several files of one clip, the first of these is read: those that lose
# nothing go first. A folder of frames has no suffix.
PREFERRED = ("", _ARRAYS, *VIDEOS)

_JOBS_NAME = re.compile(r"(\d{6,})_[0-9a-f]{12}")


class Item(NamedTuple):
  """One video of a set, not yet read.

  Attributes:
    name: Its file's, without the suffix, within the set.
    path: The file, or the folder of its frames; None if there is none.
    index: Its number in the job that made it.
    prompt: What it was made of.
    sha256: Of the file, as the job wrote it.
    problem: Why it cannot be read.
  """

  name: str
  path: pathlib.Path | None
  index: int | None = None
  prompt: str | None = None
  sha256: str | None = None
  problem: str | None = None


class Video(NamedTuple):
  """A video, and the SHA-256 of what it was read from."""

  frames: UInt8[np.ndarray, "F H W 3"]
  sha256: str


def find(
  path: str | os.PathLike, preferred: Sequence[str] = PREFERRED
) -> list[Item]:
  """Returns the videos of a job's folder, of any folder, or of one file.

  In order of the job's indices, or of the names. Clips that the job could not
  make are in the list, with their problem.

  Args:
    path: The folder or the file.
    preferred: Suffixes; of several files of one clip of a job, that of the
      first of these is taken.

  Raises:
    InputError: There is no such file or folder, or no video in it.
  """
  path = pathlib.Path(path)
  if path.is_file():
    return [_item(path.stem, path)]
  if not path.is_dir():
    raise errors.InputError(f"{path}: there is no such file or folder.")
  if any(path.glob("clips*.jsonl")):
    items = [_of_record(path, r, preferred) for r in ledger.read(path)]
  elif _frames_in(path):
    items = [_item(path.name, path)]
  else:
    items = _of_folder(path)
  if not items:
    raise errors.InputError(
      f"{path}: holds no video; give a folder of {', '.join(VIDEOS)}, or that "
      "of a sampling job."
    )
  return items


def read_video(item: Item, limit: int | None = None) -> Video:
  """Reads the first `limit` frames of a video, or all.

  The file is decoded whole, so that damage anywhere in it is found.

  Raises:
    InputError: It cannot be read, or is not the file that the job wrote.
  """
  if item.path is None or item.problem:
    raise errors.InputError(f"{item.name}: {item.problem}")
  if item.path.is_dir():
    return _read_frames(item.path, limit)
  try:
    data = item.path.read_bytes()
  except OSError as error:
    raise errors.InputError(f"{item.path}: {error.strerror}.") from error
  digest = hashlib.sha256(data).hexdigest()
  if item.sha256 not in (None, digest):
    raise errors.InputError(
      f"{item.path}: is not the file that the job wrote; its SHA-256 differs."
    )
  if item.path.suffix == _ARRAYS:
    return Video(_read_arrays(data, str(item.path))[:limit], digest)
  codec.check(data, str(item.path))
  frames = itertools.islice(codec.frames(data, str(item.path)), limit)
  return Video(np.stack(list(frames)), digest)


def format_of(item: Item) -> str:
  """Returns what an item is read from: "mp4", or "png" of a folder's frames."""
  return item.path.suffix.lower().lstrip(".") or "png"


def pair(
  reference: Sequence[Item], generated: Sequence[Item]
) -> tuple[list[tuple[Item, Item]], list[str], list[str]]:
  """Pairs videos by their jobs' indices, or else by their names.

  Two sets of one file each are a pair.

  Returns:
    The pairs, in order of the generated ones; the names that the reference
    lacks; those that the generated set lacks.
  """
  if len(reference) == len(generated) == 1:
    return [(reference[0], generated[0])], [], []
  indices = [{item.index for item in side} for side in (reference, generated)]
  # A folder may hold several jobs' clips of one index.
  by_index = all(None not in there for there in indices)
  by_index &= len(indices[0]) == len(reference)
  by_index &= len(indices[1]) == len(generated)
  key = lambda item: item.index if by_index else item.name
  wanted = {key(item): item for item in reference}
  pairs = [(wanted[key(g)], g) for g in generated if key(g) in wanted]
  there = {key(item) for item in generated}
  return (
    pairs,
    [item.name for item in generated if key(item) not in wanted],
    [item.name for item in reference if key(item) not in there],
  )


def _item(name: str, path: pathlib.Path) -> Item:
  match = _JOBS_NAME.fullmatch(name)
  return Item(name, path, int(match[1]) if match else None)


def _of_record(
  folder: pathlib.Path, record: dict[str, Any], preferred: Sequence[str]
) -> Item:
  """Returns the clip of a line of a job's list."""
  index, prompt = record["index"], record.get("prompt")
  files = [f for f in record.get("files", []) if tensorheader.is_plain(f)]
  stem = lambda f: pathlib.PurePath(f).stem
  name = record.get("name") or (stem(files[0]) if files else f"{index:06d}")
  item = Item(name, None, index, prompt)
  if record.get("status", "done") != "done":
    return item._replace(problem=f"failed: {record.get('error')}")
  suffix = lambda f: pathlib.PurePath(f).suffix
  known = [f for f in files if suffix(f) in preferred]
  known.sort(key=lambda f: preferred.index(suffix(f)))
  # The latents of a clip are no video, and stand beside one or not.
  known = [f for f in known if not f.endswith(_ARRAYS)] or known
  there = [f for f in known if (folder / f).exists()]
  if not there:
    return item._replace(problem="its file is not there.")
  path = folder / there[0]
  sums = record.get("sha256", {}) if path.is_file() else {}
  return item._replace(path=path, sha256=sums.get(there[0]))


def _of_folder(folder: pathlib.Path) -> list[Item]:
  """Returns the videos anywhere below a folder, and the folders of frames."""
  found: dict[str, pathlib.Path] = {}
  for path in sorted(folder.rglob("*")):
    place = path.relative_to(folder)
    if any(part.startswith(".") for part in place.parts):
      continue
    if path.is_dir():
      if not _frames_in(path):
        continue
    elif path.suffix.lower() not in PREFERRED[1:]:
      continue
    name = (
      place.as_posix() if path.is_dir() else place.with_suffix("").as_posix()
    )
    rank = lambda p: PREFERRED.index("" if p.is_dir() else p.suffix.lower())
    if name not in found or rank(path) < rank(found[name]):
      found[name] = path
  return [_item(name, found[name]) for name in sorted(found)]


def _frames_in(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the numbered frames of a folder, in the order of the numbers."""
  found = (p for p in folder.glob("*.png") if p.stem.isdecimal())
  return sorted(found, key=lambda p: (int(p.stem), p.name))


def _read_frames(folder: pathlib.Path, limit: int | None) -> Video:
  """Reads a folder of frames; its SHA-256 is of those of the frames' files."""
  frames, digest = [], hashlib.sha256()
  for i, path in enumerate(_frames_in(folder)):
    with open(path, "rb") as file:
      digest.update(hashlib.file_digest(file, "sha256").hexdigest().encode())
    if limit is None or i < limit:
      frames.append(np.asarray(video.read_image(path)))
  if not frames:
    raise errors.InputError(f"{folder}: holds no frame, 000000.png.")
  if len({frame.shape for frame in frames}) > 1:
    raise errors.InputError(f"{folder}: the frames change their size midway.")
  return Video(np.stack(frames), digest.hexdigest())


def _read_arrays(data: bytes, where: str) -> UInt8[np.ndarray, "F H W 3"]:
  """Returns the array `frames` of an .npz file."""
  try:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
      frames = arrays.get("frames")
  except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
    raise errors.InputError(f"{where}: is no .npz file.") from error
  if frames is None:
    raise errors.InputError(f"{where}: holds no array `frames`.")
  if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
    raise errors.InputError(
      f"{where}: its frames are not (frames, height, width, 3) of uint8."
    )
  if not frames.size:
    raise errors.InputError(f"{where}: holds no frame.")
  return frames
