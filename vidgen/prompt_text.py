"""The lines of .txt, .csv and .jsonl files of prompts, and of their records."""

import csv
import difflib
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from vidgen import errors

# The values of each line, or what is wrong with it.
Rows = Iterator[tuple[int, dict[str, Any] | errors.InputError]]


class Fields:
  """The fields that a line may set, and what other names a file has.

  Attributes:
    types: The type of each field.
    others: Names that are no fields, and where each stands first.
  """

  def __init__(self, types: Mapping[str, type]):
    self.types = types
    self.others: dict[str, str] = {}
    # Thousands of lines have the same names.
    self._known: dict[frozenset[str], set[str]] = {}

  def unknown(self, where: str, names: Iterable[str]) -> set[str]:
    """Returns which names of a line are no fields.

    Raises:
      InputError: One is probably meant to be a field that is not there.
    """
    names = frozenset(names)
    if names not in self._known:
      others = names - self.types.keys()
      missing = [field for field in self.types if field not in names]
      for name in sorted(others):
        if field := _meant(name, missing):
          raise errors.InputError(
            f"{where}: unknown field {name!r}. Did you mean {field}? "
            f"The fields are {', '.join(self.types)}."
          )
      self._known[names] = others
    for name in self._known[names]:
      self.others.setdefault(name, where)
    return self._known[names]

  def typed(self, name: str, text: str) -> Any:
    """Returns a cell as its field's type; as it is if it can't be."""
    try:
      return self.types[name](text)
    except ValueError:
      return text


def _meant(name: str, fields: Iterable[str]) -> str | None:
  """Returns the field that a name is probably meant to be."""
  plain = re.sub(r"[^a-z0-9]+", "_", name.lower())
  # `steps` is num_steps; `index`, which tables have, is not video.
  matches = difflib.get_close_matches(plain, list(fields), n=1, cutoff=0.7)
  return matches[0] if matches else None


def read(path: pathlib.Path, fields: Fields) -> Rows:
  """Returns what the lines of a file say, by their numbers.

  Raises:
    InputError: The file as a whole cannot be read.
  """
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
  return formats[path.suffix.lower()](path, _decode(path, data), fields)


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


def _read_txt(
  path: pathlib.Path, lines: list[str | errors.InputError], fields: Fields
) -> Rows:
  del path, fields
  for number, line in enumerate(lines, 1):
    if isinstance(line, errors.InputError):
      yield number, line
    elif line.strip():
      yield number, {"prompt": line.strip()}


def _read_csv(
  path: pathlib.Path, lines: list[str | errors.InputError], fields: Fields
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
          header = _header(where, row, fields)
          unknown = fields.unknown(where, header)
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
          yield number, {k: fields.typed(k, v) for k, v in known}
      number = reader.line_num + 1
  except csv.Error as error:
    if header is None:
      raise errors.InputError(f"{path}:{number}: {error}.") from error
    # Where the next row would begin nobody knows.
    text = f"{path}:{number}: {error}; what follows is not read."
    yield number, errors.InputError(text)


def _header(where: str, row: list[str], fields: Fields) -> list[str]:
  """Returns the names of the columns of a .csv."""
  names = [cell.strip() for cell in row]
  if "prompt" not in names and "image" not in names:
    raise errors.InputError(
      f"{where}: the header names no column `prompt`.{_like_prompt(names)}"
    )
  known = [name for name in names if name in fields.types]
  if len(set(known)) < len(known):
    raise errors.InputError(f"{where}: the header names a column twice.")
  return names


def _like_prompt(names: list[str]) -> str:
  matches = difflib.get_close_matches("prompt", names, n=1, cutoff=0.6)
  return f" Should {matches[0]!r} be it?" if matches else ""


def _read_jsonl(
  path: pathlib.Path, lines: list[str | errors.InputError], fields: Fields
) -> Rows:
  for number, line in enumerate(lines, 1):
    if isinstance(line, errors.InputError):
      yield number, line
    elif line.strip():
      yield number, _from_json(f"{path}:{number}", line, fields)


def from_record(
  where: str, data: bytes, fields: Fields
) -> dict[str, Any] | errors.InputError:
  """Returns what a record says: an object of JSON, or else a prompt."""
  try:
    text = data.decode("utf-8").strip()
  except UnicodeDecodeError:
    return errors.InputError(f"{where}: is not UTF-8.")
  if text.startswith("{"):
    return _from_json(where, text, fields)
  return {"prompt": text}


def _from_json(
  where: str, text: str, fields: Fields
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
    unknown = fields.unknown(where, values)
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
