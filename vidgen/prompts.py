"""Files of prompts: .txt, .csv and .jsonl, with overrides per line."""

import dataclasses
import difflib
import math
import os
import pathlib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from vidgen import errors, prompt_records, prompt_text, tensorheader

# What a line may set, and the type of each. `sample.SampleConfig` has fields
# of the same names.
TYPES: Mapping[str, type] = {
  "prompt": str,
  "negative_prompt": str,
  "seed": int,
  "num_frames": int,
  "height": int,
  "width": int,
  "num_steps": int,
  "guidance_scale": float,
  "sampler": str,
  "image": str,
  "last_image": str,
  "video": str,
  "strength": float,
  "videos_per_prompt": int,
}

SAMPLERS = ("ddim", "dpmpp_2m_sde")

_COUNTS = ("num_frames", "height", "width", "num_steps", "videos_per_prompt")

# What the names of images in a folder end with.
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

# A Threefry key drops what is above 32 bits: larger seeds would repeat.
MAX_SEED = 2**32 - 1


@dataclasses.dataclass
class Line:
  """One video of a file; None is what the line leaves to the job.

  Attributes:
    where: The file and the line, for messages.
  """

  where: str
  prompt: str | None = None
  negative_prompt: str | None = None
  seed: int | None = None
  num_frames: int | None = None
  height: int | None = None
  width: int | None = None
  num_steps: int | None = None
  guidance_scale: float | None = None
  sampler: str | None = None
  image: str | None = None
  last_image: str | None = None
  video: str | None = None
  strength: float | None = None
  videos_per_prompt: int | None = None


@dataclasses.dataclass
class Bad:
  """A line of which nothing can be made.

  Attributes:
    where: The file and the line.
    error: What is wrong with it, with `where` in front.
    videos_per_prompt: How many videos it asks for, if that is legal.
  """

  where: str
  error: str
  videos_per_prompt: int | None = None


def lines(
  prompt: str | None, file: str | None, image: str | None
) -> list[Line | Bad]:
  """Returns what is to be made of a prompt, of a file of them, or of images.

  Args:
    prompt: One prompt, or
    file: a file of them, or neither, for models that take no text.
    image: An image, or a folder: each image in it makes a video of its own.

  Raises:
    InputError: Nothing, or too much, is given, or a bad file.
  """
  given = (prompt is not None) + (file is not None)
  if given > 1 or (not given and image is None):
    raise errors.InputError(
      "prompt: give either --prompt=TEXT or --prompts=FILE; where a checkpoint "
      "takes no text, --image=FILE alone."
    )
  if prompt is not None and not prompt.strip():
    raise errors.InputError("prompt: is empty.")
  folder = image is not None and os.path.isdir(image)
  if folder and file is not None:
    raise errors.InputError(
      f"image: {image} is a folder, which goes with one prompt or none; let "
      "the file of prompts name an image in each line."
    )
  if file is not None:
    return sift(file)
  if not folder:
    return [Line(where="", prompt=prompt)]
  paths = _images_in(image)
  return [Line(where=path, prompt=prompt, image=path) for path in paths]


def _images_in(folder: str) -> list[str]:
  """Returns the images of a folder, in the order of their names."""
  found = [
    os.path.join(folder, name)
    for name in sorted(os.listdir(folder))
    if name.lower().endswith(_IMAGES) and not name.startswith(".")
  ]
  if not found:
    raise errors.InputError(
      f"{folder}: has no images; they end with {', '.join(_IMAGES)}."
    )
  return found


def read(path: str | os.PathLike) -> list[Line]:
  """Returns the lines of a file, all of which are good; see `sift`.

  Raises:
    InputError: What is wrong, with file:line.
  """
  lines = sift(path)
  for line in lines:
    if isinstance(line, Bad):
      raise errors.InputError(line.error)
  return lines


def sift(path: str | os.PathLike) -> list[Line | Bad]:
  """Reads a file of prompts; its suffix tells the format.

  A .txt has a prompt a line; a .csv a header with the column `prompt`, and any
  other names of `TYPES`; a .jsonl an object a line. Blank lines are skipped. A
  line with an image needs no prompt, for models that take none. An
  .array_record has what a line of a .jsonl or of a .txt has in each record, and
  DIR:SPLIT is a split of a data set of TFDS, of which the captions are taken.
  Paths of images and videos are relative to the file's folder.

  Columns and keys of other names are passed over, with one warning that names
  them. One that is all but the name of a field, which is not there beside it,
  is an error: of the whole .csv, or of its line.

  Raises:
    InputError: The file as a whole cannot be read.
  """
  name, path = os.fspath(path), pathlib.Path(path)
  folder, _, split = name.rpartition(":")
  fields = prompt_text.Fields(TYPES)
  if split and (pathlib.Path(folder) / "dataset_info.json").is_file():
    rows = prompt_records.read_dataset(pathlib.Path(folder), split)
  elif path.suffix.lower() == ".array_record":
    records = prompt_records.read_array_record(path)
    rows = (
      (n, prompt_text.from_record(f"{path}:{n}", data, fields))
      for n, data in records
    )
  else:
    rows = prompt_text.read(path, fields)
  lines = [_line(path, number, values) for number, values in rows]
  if not lines:
    raise errors.InputError(f"{path}: holds no prompt.")
  if fields.others:
    names = tensorheader.listed(
      map(tensorheader.short, sorted(fields.others)), 8
    )
    where = next(iter(fields.others.values()))
    warnings.warn(
      f"{where}: {names} are passed over; the fields are {', '.join(TYPES)}.",
      stacklevel=2,
    )
  return lines


def check(name: str, value: Any, where: str) -> Any:
  """Returns `value` as the type of the field `name`, if it is legal.

  Raises:
    InputError: Another type, or out of range.
  """
  kind = TYPES[name]
  if kind is float and type(value) is int and abs(value) < 2**63:
    value = float(value)
  if type(value) is not kind:
    names = {str: "text", int: "a whole number", float: "a number"}
    raise errors.InputError(
      f"{where}: {name} must be {names[kind]}, not {value!r}."
    )
  if problem := _problem(name, value):
    raise errors.InputError(f"{where}: {name} {problem}, not {value!r}.")
  return value


def closest(name: str, names: Iterable[str]) -> str:
  """Returns a question that names what was probably meant, or nothing."""
  matches = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
  return f" Did you mean {matches[0]}?" if matches else ""


def _problem(name: str, value: Any) -> str | None:
  """Returns why a value of the right type is not legal, if it isn't."""
  if name in _COUNTS:
    if value < 1:
      return "must be at least 1"
  elif name == "seed":
    if not 0 <= value <= MAX_SEED:
      return f"must be from 0 to {MAX_SEED}"
  elif name == "strength":
    if not 0 < value <= 1:
      return "must be above 0 and at most 1"
  elif name == "guidance_scale":
    if not math.isfinite(value):
      return "must be finite"
  elif name == "sampler" and value not in SAMPLERS:
    return f"must be one of {', '.join(SAMPLERS)}"
  elif TYPES[name] is str and not _is_unicode(value):
    # JSON can spell half a character, which no file can hold.
    return "must be valid Unicode"
  return None


def _is_unicode(text: str) -> bool:
  return not any("\ud800" <= character <= "\udfff" for character in text)


def _count(values: dict[str, Any] | errors.InputError) -> int | None:
  """Returns how many videos a bad line asks for, if it says so."""
  if isinstance(values, errors.InputError):
    return None
  value = values.get("videos_per_prompt")
  return value if type(value) is int and value > 0 else None


def _line(
  path: pathlib.Path, number: int, values: dict[str, Any] | errors.InputError
) -> Line | Bad:
  """Checks the values of a line."""
  where = f"{path}:{number}"
  try:
    if isinstance(values, errors.InputError):
      raise values
    values = {name: check(name, v, where) for name, v in values.items()}
    if "prompt" in values and not values["prompt"].strip():
      raise errors.InputError(f"{where}: has no prompt.")
    if not {"prompt", "image"} & values.keys():
      raise errors.InputError(f"{where}: has no prompt.")
  except errors.InputError as error:
    return Bad(where, str(error), _count(values))
  for name in ("image", "last_image", "video"):
    if name in values:
      values[name] = os.fspath(path.parent / values[name])
  return Line(where=where, **values)
