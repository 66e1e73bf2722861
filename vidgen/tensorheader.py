"""The header of a safetensors file, read with suspicion.

The format: 8 bytes of header length, little endian; a JSON object of that many
bytes that maps each name to its dtype, shape and place; then the data. See
https://github.com/huggingface/safetensors. That library accepts duplicate keys
and any name; here they are errors.
"""

import json
import math
import pathlib
import stat
from collections.abc import Iterable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from vidgen import errors

# The library takes headers up to 100 MB, which cost many seconds and a gigabyte
# to parse. The largest model has 0.2 MB; this leaves room for 25,000 tensors.
HEADER_LIMIT = 4 * 2**20

_MAX_RANK = 32
_MAX_NAME = 512

DTYPES = {
  "BOOL": np.dtype(np.bool_),
  "U8": np.dtype(np.uint8),
  "I8": np.dtype(np.int8),
  "U16": np.dtype(np.uint16),
  "I16": np.dtype(np.int16),
  "U32": np.dtype(np.uint32),
  "I32": np.dtype(np.int32),
  "U64": np.dtype(np.uint64),
  "I64": np.dtype(np.int64),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "F32": np.dtype(np.float32),
  "F64": np.dtype(np.float64),
}


class Entry(NamedTuple):
  """Where a tensor is.

  Attributes:
    file: The file that holds it.
    dtype: Its dtype in the file.
    shape: Its shape in the file.
    offset: Its first byte, counted from the start of the file.
    size: Its bytes.
  """

  file: pathlib.Path
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int
  size: int


def listed(names: Iterable[str], limit: int = 20) -> str:
  """Returns the first `limit` names, joined, and how many more there are."""
  names = list(names)
  more = f" and {len(names) - limit} more" if len(names) > limit else ""
  return ", ".join(names[:limit]) + more


def parse_json(data: bytes, where: str) -> dict[str, Any]:
  """Returns the JSON object in `data`: UTF-8, no key twice, no NaN.

  Raises:
    CorruptError: It is anything else.
  """

  def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    known = {}
    for key, value in pairs:
      if key in known:
        raise errors.CorruptError(f"{where}: the key {key[:80]!r} is twice.")
      known[key] = value
    return known

  def refuse(constant: str) -> None:
    raise errors.CorruptError(f"{where}: {constant} is no JSON.")

  try:
    value = json.loads(
      data.decode("utf-8"), object_pairs_hook=to_dict, parse_constant=refuse
    )
  except errors.CorruptError:
    raise
  except RecursionError as e:
    raise errors.CorruptError(f"{where}: JSON nested too deeply.") from e
  except ValueError as e:
    raise errors.CorruptError(f"{where}: not JSON in UTF-8 ({e}).") from e
  if not isinstance(value, dict):
    raise errors.CorruptError(f"{where}: not a JSON object.")
  return value


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Returns the JSON object in the file `path`, under `parse_json`'s rules."""
  size = regular_size(path)
  if size > HEADER_LIMIT:
    raise errors.CorruptError(f"{path}: {size} bytes are too many for JSON.")
  try:
    return parse_json(path.read_bytes(), str(path))
  except OSError as e:
    raise errors.StorageError(f"{path}: {e.strerror}.") from e


def regular_size(path: pathlib.Path) -> int:
  """Returns the size of a regular file; opening a pipe could wait for ever."""
  try:
    status = path.stat()
  except (FileNotFoundError, NotADirectoryError) as e:
    raise errors.InputError(f"{path}: no such file.") from e
  except (OSError, ValueError) as e:
    raise errors.StorageError(f"{path}: cannot be opened ({e}).") from e
  if not stat.S_ISREG(status.st_mode):
    raise errors.InputError(f"{path}: not a regular file.")
  return status.st_size


def refuse_pickle(path: pathlib.Path, start: bytes) -> None:
  """Raises if a file that starts with `start` is a pickle, or a zip of one.

  A safetensors file may start with the same bytes, if its header is 128 bytes
  long, but then its ninth byte opens a JSON object.
  """
  is_tensors = start[4:9] == b"\0\0\0\0{"
  if start.startswith((b"\x80", b"PK")) and not is_tensors:
    raise errors.CorruptError(
      f"{path}: holds a pickle or a zip, which can run code and is not "
      "opened; only safetensors are read. Save the model again with "
      "save_pretrained(DIR, safe_serialization=True)."
    )


def read(
  path: pathlib.Path,
) -> tuple[dict[str, Entry], dict[str, str]]:
  """Returns the tensors and the metadata of a file, all of it checked."""
  size = regular_size(path)
  try:
    with path.open("rb") as f:
      start = f.read(9)
      refuse_pickle(path, start)
      length = int.from_bytes(start[:8], "little")
      if len(start) < 9 or length > size - 8:
        raise errors.CorruptError(
          f"{path}: truncated, or no safetensors file: it has {size} bytes; "
          "fetch it again."
        )
      if length > HEADER_LIMIT:
        raise errors.CorruptError(
          f"{path}: its header of {length} bytes is over the limit of "
          f"{HEADER_LIMIT}."
        )
      f.seek(8)
      data = f.read(length)
  except OSError as e:
    raise errors.StorageError(f"{path}: {e.strerror}.") from e
  if data[:1] != b"{":
    raise errors.CorruptError(f"{path}: its header is not a JSON object.")
  header = parse_json(data, str(path))
  metadata = header.pop("__metadata__", {})
  if not isinstance(metadata, dict) or not all(
    isinstance(value, str) for value in metadata.values()
  ):
    raise errors.CorruptError(f"{path}: __metadata__ is not text by name.")
  entries = {
    name: _entry(path, name, item, 8 + length) for name, item in header.items()
  }
  _check_places(path, entries, 8 + length, size)
  return entries, metadata


def _entry(path: pathlib.Path, name: str, item: Any, start: int) -> Entry:
  """Returns one checked entry of a header whose data begin at `start`."""
  place = f"{path}: {short(name)}"
  if not is_plain(name):
    raise errors.CorruptError(f"{place} is not allowed as a tensor's name.")
  keys = {"dtype", "shape", "data_offsets"}
  if not isinstance(item, dict) or item.keys() != keys:
    raise errors.CorruptError(f"{place} needs dtype, shape and data_offsets.")
  dtype, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
  if not isinstance(dtype, str) or dtype not in DTYPES:
    raise errors.CorruptError(f"{place} has unknown dtype {short(str(dtype))}")
  if not _is_sizes(shape) or len(shape) > _MAX_RANK:
    raise errors.CorruptError(
      f"{place} has a shape that is not {_MAX_RANK} sizes at most."
    )
  if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
    raise errors.CorruptError(f"{place} has data_offsets that are no range.")
  itemsize = DTYPES[dtype].itemsize
  # Zeros do not count: numpy refuses a shape of [0, 2**62] too.
  if math.prod(n or 1 for n in shape) * itemsize >= 2**63:
    raise errors.CorruptError(f"{place} has a shape that overflows.")
  begin, end = offsets
  if math.prod(shape) * itemsize != end - begin:
    raise errors.CorruptError(
      f"{place} has {end - begin} bytes, its {dtype} of shape {shape} needs "
      f"{math.prod(shape) * itemsize}."
    )
  return Entry(path, DTYPES[dtype], tuple(shape), start + begin, end - begin)


def _check_places(
  path: pathlib.Path, entries: dict[str, Entry], start: int, size: int
) -> None:
  """Raises unless the tensors fill the bytes from `start` to `size`."""
  end = start
  places = ((e.offset, e.size, name) for name, e in entries.items())
  for offset, count, name in sorted(places):
    if offset != end:
      what = "overlaps another tensor" if offset < end else "follows a hole"
      raise errors.CorruptError(f"{path}: {name} {what}.")
    end = offset + count
    if end > size:
      raise errors.CorruptError(
        f"{path}: truncated: {name} ends at byte {end} of {size}; fetch it "
        "again."
      )
  if end != size:
    raise errors.CorruptError(
      f"{path}: {size - end} bytes follow the last tensor."
    )


def _is_sizes(value: Any) -> bool:
  """Whether `value` is a list of non-negative integers; a bool is none."""
  return isinstance(value, list) and all(
    type(n) is int and n >= 0 for n in value
  )


def is_plain(name: str) -> bool:
  """Whether a name may go into messages, file names and paths of ours."""
  return (
    0 < len(name) <= _MAX_NAME
    and name.isprintable()
    and not name.startswith("/")
    and "\\" not in name
    and ".." not in name
  )


def short(text: str) -> str:
  """Returns `text` in quotes on one line, cut where it is long."""
  return ascii(text if len(text) <= 80 else text[:77] + "...")
