"""Files of prompts: .txt, .csv and .jsonl, with overrides per line."""

import csv
import dataclasses
import difflib
import json
import math
import os
import pathlib
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vidgen import errors, prompt_records, tensorheader

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
  others = _Others()
  if split and (pathlib.Path(folder) / "dataset_info.json").is_file():
    rows = prompt_records.read_dataset(pathlib.Path(folder), split)
  elif path.suffix.lower() == ".array_record":
    records = prompt_records.read_array_record(path)
    rows = (
      (n, _from_record(f"{path}:{n}", data, others)) for n, data in records
    )
  else:
    rows = _read_text(path, others)
  lines = [_line(path, number, values) for number, values in rows]
  if not lines:
    raise errors.InputError(f"{path}: holds no prompt.")
  if others.first:
    names = tensorheader.listed(
      map(tensorheader.short, sorted(others.first)), 8
    )
    where = next(iter(others.first.values()))
    warnings.warn(
      f"{where}: {names} are passed over; the fields are {', '.join(TYPES)}.",
      stacklevel=2,
    )
  return lines


class _Others:
  """Names in a file that are no fields.

  Attributes:
    first: Where each stands first.
  """

  def __init__(self):
    self.first: dict[str, str] = {}
    # Thousands of lines have the same names.
    self._known: dict[frozenset[str], set[str]] = {}

  def among(self, where: str, names: Iterable[str]) -> set[str]:
    """Returns those among the names of a line.

    Raises:
      InputError: One is probably meant to be a field.
    """
    names = frozenset(names)
    if names not in self._known:
      missing = [field for field in TYPES if field not in names]
      for name in sorted(names - TYPES.keys()):
        if field := _meant(name, missing):
          raise errors.InputError(
            f"{where}: unknown field {name!r}. Did you mean {field}? "
            f"The fields are {', '.join(TYPES)}."
          )
      self._known[names] = names - TYPES.keys()
    for name in self._known[names]:
      self.first.setdefault(name, where)
    return self._known[names]


def _meant(name: str, fields: Iterable[str]) -> str | None:
  """Returns the field that a name is probably meant to be."""
  plain = re.sub(r"[^a-z0-9]+", "_", name.lower())
  # `steps` is num_steps; `index`, which tables have, is not video.
  matches = difflib.get_close_matches(plain, list(fields), n=1, cutoff=0.7)
  return matches[0] if matches else None


def _read_text(path: pathlib.Path, others: _Others) -> "Rows":
  formats = {".txt": _read_txt, ".csv": _read_csv, ".jsonl": _read_jsonl}
  if path.suffix.lower() not in formats:
    raise errors.InputError(
      f"{path}: a file of prompts is a .txt, .csv, .jsonl or .array_record; "
      "of a TFDS data set give FOLDER:SPLIT, the folder with dataset_info.json."
    )
  try:
    data = path.read_bytes()
  except OSError as error:
    raise errors.InputError(
      f"{path}: cannot read the prompts: {error.strerror}."
    ) from error
  return formats[path.suffix.lower()](path, _decode(path, data), others)


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


def _decode(path: pathlib.Path, data: bytes) -> list[str | errors.InputError]:
  """Returns the lines; only a line feed, or CR LF, ends one."""
  if data.startswith((b"\xff\xfe", b"\xfe\xff")):
    raise errors.InputError(f"{path}:1: is UTF-16; save it as UTF-8.")
  start = 3 if data.startswith(b"\xef\xbb\xbf") else 0
  lines: list[str | errors.InputError] = []
  for number, line in enumerate(data[start:].split(b"\n"), 1):
    try:
      lines.append(line.removesuffix(b"\r").decode("utf-8"))
    except UnicodeDecodeError as error:
      lines.append(
        errors.InputError(
          f"{path}:{number}: is not UTF-8: byte 0x{line[error.start]:02x} at "
          f"offset {start + error.start} of the file; save it as UTF-8."
        )
      )
    start += len(line) + 1
  return lines


# The values of each line, or what is wrong with it.
Rows = Iterator[tuple[int, dict[str, Any] | errors.InputError]]


def _read_txt(
  path: pathlib.Path, lines: list[str | errors.InputError], others: _Others
) -> Rows:
  del path, others
  for number, line in enumerate(lines, 1):
    if isinstance(line, errors.InputError):
      yield number, line
    elif line.strip():
      yield number, {"prompt": line.strip()}


def _read_csv(
  path: pathlib.Path, lines: list[str | errors.InputError], others: _Others
) -> Rows:
  for line in lines:
    if isinstance(line, errors.InputError):
      # It may be part of any row.
      raise line
  # Quoted fields may hold line breaks, so a row can span several lines.
  reader = csv.reader((line + "\n" for line in lines), strict=True)
  header, number = None, 1
  try:
    for row in reader:
      where = f"{path}:{number}"
      if any(cell.strip() for cell in row):
        if header is None:
          header = _header(where, row)
          unknown = others.among(where, header)
        elif len(row) != len(header):
          yield (
            number,
            errors.InputError(
              f"{where}: has {len(row)} columns, the header has "
              f"{len(header)}; put text with commas in double quotes."
            ),
          )
        else:
          cells = zip(header, (cell.strip() for cell in row), strict=True)
          known = [(k, v) for k, v in cells if v and k not in unknown]
          yield number, {k: _number(k, v) for k, v in known}
      number = reader.line_num + 1
  except csv.Error as error:
    if header is None:
      raise errors.InputError(f"{path}:{number}: {error}.") from error
    # Where the next row would begin nobody knows.
    text = f"{path}:{number}: {error}; what follows is not read."
    yield number, errors.InputError(text)


def _header(where: str, row: list[str]) -> list[str]:
  """Returns the names of the columns of a .csv."""
  names = [cell.strip() for cell in row]
  if "prompt" not in names and "image" not in names:
    raise errors.InputError(
      f"{where}: the header names no column `prompt`.{_like_prompt(names)}"
    )
  fields = [name for name in names if name in TYPES]
  if len(set(fields)) < len(fields):
    raise errors.InputError(f"{where}: the header names a column twice.")
  return names


def _like_prompt(names: list[str]) -> str:
  matches = difflib.get_close_matches("prompt", names, n=1, cutoff=0.6)
  return f" Should {matches[0]!r} be it?" if matches else ""


def _number(name: str, text: str) -> Any:
  """Returns a cell as its field's type; as it is if it can't be (see check)."""
  kind = TYPES[name]
  try:
    return kind(text)
  except ValueError:
    return text


def _read_jsonl(
  path: pathlib.Path, lines: list[str | errors.InputError], others: _Others
) -> Rows:
  for number, line in enumerate(lines, 1):
    if isinstance(line, errors.InputError):
      yield number, line
    elif line.strip():
      yield number, _from_json(f"{path}:{number}", line, others)


def _from_record(
  where: str, data: bytes, others: _Others
) -> dict[str, Any] | errors.InputError:
  """Returns what a record says: an object of JSON, or else a prompt."""
  try:
    text = data.decode("utf-8").strip()
  except UnicodeDecodeError:
    return errors.InputError(f"{where}: is not UTF-8.")
  if text.startswith("{"):
    return _from_json(where, text, others)
  return {"prompt": text}


def _from_json(
  where: str, text: str, others: _Others
) -> dict[str, Any] | errors.InputError:
  """Returns what an object of JSON says."""
  try:
    values = json.loads(text, object_pairs_hook=_pairs)
  except json.JSONDecodeError as error:
    return errors.InputError(
      f"{where}: is not JSON: {error.msg} at column {error.colno}."
    )
  except (ValueError, RecursionError) as error:
    return errors.InputError(f"{where}: is not JSON: {error}.")
  if not isinstance(values, dict):
    return errors.InputError(
      f'{where}: must be an object such as {{"prompt": "A panda."}}.'
    )
  try:
    unknown = others.among(where, values)
  except errors.InputError as error:
    return error
  known = [(k, v) for k, v in values.items() if k not in unknown]
  return {k: v for k, v in known if v is not None}


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Refuses an object with a key twice: one of its values would get lost."""
  values = dict(pairs)
  if len(values) < len(pairs):
    raise ValueError("a key stands there twice")
  return values


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
  for name in ("image", "video"):
    if name in values:
      values[name] = os.fspath(path.parent / values[name])
  return Line(where=where, **values)
