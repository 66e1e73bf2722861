"""Safetensors files: read one tensor at a time, written atomically.

The library maps whole files into memory, and mapped pages count as resident;
this module reads and writes with plain calls.
"""

import contextlib
import json
import math
import os
import pathlib
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from vidgen import errors, tensorheader
from vidgen.tensorheader import Entry

STEMS = ("diffusion_pytorch_model", "model")
MAX_SHARD_BYTES = 5 * 10**9

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
# A variant, such as fp16, may stand before or after the number.
_SHARD = re.compile(r".*-\d{5}-of-\d{5}(\.\w+)?\.safetensors")


class TensorFiles(Mapping[str, Entry]):
  """The tensors of one file or of the shards of one component, by name."""

  def __init__(
    self,
    where: pathlib.Path,
    entries: dict[str, Entry],
    metadata: dict[str, str],
  ):
    self.where = where
    self.metadata = metadata
    self._entries = entries

  def __getitem__(self, name: str) -> Entry:
    return self._entries[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._entries)

  def __len__(self) -> int:
    return len(self._entries)

  def read(self, name: str) -> np.ndarray:
    """Returns the tensor `name`, and reads nothing else of its file.

    The memory is the caller's own: mapped pages would count as resident for as
    long as the file is open.
    """
    entry = self[name]
    array = empty(entry.shape, entry.dtype)
    data = _bytes(array)
    done = 0
    try:
      with entry.file.open("rb", buffering=0) as f:
        f.seek(entry.offset)
        while done < entry.size:
          count = f.readinto(data[done:])
          if not count:
            break
          done += count
    except OSError as e:
      raise errors.StorageError(f"{entry.file}: {e.strerror}.") from e
    if done < entry.size:
      raise errors.CorruptError(
        f"{entry.file}: ended while {name} was read; fetch the file again."
      )
    if array.dtype == np.bool_:
      array = array.view(np.uint8) != 0
    return array


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
  """Returns an uninitialised array that XLA:CPU can take without a copy."""
  size = math.prod(shape) * dtype.itemsize
  data = np.empty(size + 64, np.uint8)
  start = -data.ctypes.data % 64
  return data[start : start + size].view(dtype).reshape(shape)


def open_file(path: pathlib.Path) -> TensorFiles:
  """Opens one safetensors file.

  Raises:
    InputError: There is no such file.
    CorruptError: It breaks any rule of the format.
  """
  path = pathlib.Path(path)
  entries, metadata = tensorheader.read(path)
  return TensorFiles(path, entries, metadata)


def open_folder(folder: pathlib.Path) -> TensorFiles:
  """Opens the weights of one component in the published layout.

  They are one `*.safetensors`, or the shards that a
  `*.safetensors.index.json` names. Beside a variant, such as
  `*.fp16.safetensors`, those without are read.

  Raises:
    InputError: There are none, or more than one set of them.
    CorruptError: A file is corrupt, or index and shards disagree.
  """
  folder = pathlib.Path(folder)
  path = _choose(folder)
  if path.suffix != ".json":
    return open_file(path)
  index = tensorheader.read_json(path)
  where = index.get("weight_map")
  if not isinstance(where, dict) or not where:
    raise errors.CorruptError(f"{path}: has no weight_map.")
  shards = _shards(path, where)
  entries, metadata = {}, {}
  for shard in shards:
    held, extra = tensorheader.read(folder / shard)
    if known := held.keys() & entries.keys():
      raise errors.CorruptError(
        f"{folder / shard}: in another shard too: "
        f"{tensorheader.listed(sorted(known))}."
      )
    entries |= held
    metadata |= extra
  wrong = [
    name
    for name, shard in where.items()
    if name not in entries or entries[name].file.name != shard
  ]
  if wrong:
    raise errors.CorruptError(
      f"{path}: not in the shard it names: "
      f"{tensorheader.listed(map(tensorheader.short, wrong))}."
    )
  if unnamed := entries.keys() - where.keys():
    raise errors.CorruptError(
      f"{path}: does not name these, which its shards hold: "
      f"{tensorheader.listed(sorted(unnamed))}."
    )
  return TensorFiles(folder, entries, metadata)


def find_weights(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the single files and the indexes in `folder`, no shards."""
  return sorted(folder.glob("*.safetensors.index*.json")) + [
    f
    for f in sorted(folder.glob("*.safetensors"))
    if not _SHARD.fullmatch(f.name)
  ]


def _choose(folder: pathlib.Path) -> pathlib.Path:
  """Returns the file or the index that holds the weights of a component."""
  fetch = (
    "fetch it with `hf download ID --local-dir DIR` and give DIR as the "
    "checkpoint"
  )
  if not folder.is_dir():
    raise errors.InputError(
      f"{folder}: the component {folder.name} is missing; {fetch}."
    )
  found = find_weights(folder)
  # The published names win over variants such as model.fp16.safetensors.
  suffixes = (".safetensors", ".safetensors.index.json")
  usual = {stem + suffix for stem in STEMS for suffix in suffixes}
  found = [f for f in found if f.name in usual] or found
  if len(found) == 1:
    return found[0]
  if found:
    raise errors.InputError(
      f"{folder}: more than one set of weights: "
      f"{tensorheader.listed(f.name for f in found)}; leave one."
    )
  names = sorted(f.name for f in folder.iterdir())
  if shards := [name for name in names if _SHARD.fullmatch(name)]:
    raise errors.CorruptError(
      f"{folder}: the index of {tensorheader.listed(shards)} is missing "
      f"(*.safetensors.index.json); {fetch}."
    )
  if pickles := [name for name in names if name.endswith(_PICKLES)]:
    raise errors.InputError(
      f"{folder}: the component {folder.name} has only "
      f"{tensorheader.listed(pickles)}, and only safetensors are read; save "
      "the model again with save_pretrained(DIR, safe_serialization=True)."
    )
  raise errors.InputError(
    f"{folder}: the component {folder.name} has no *.safetensors; {fetch}."
  )


def _shards(path: pathlib.Path, where: dict[str, Any]) -> list[str]:
  """Returns the shards an index names, all of which are there."""
  shards = set()
  for shard in where.values():
    plain = isinstance(shard, str) and shard.isprintable() and shard[:1] != "."
    if not plain or set(shard) & set("/\\") or len(shard) > 255:
      raise errors.CorruptError(
        f"{path}: {tensorheader.short(str(shard))} is not the name of a file "
        "next to it."
      )
    shards.add(shard)
  missing = [s for s in sorted(shards) if not (path.parent / s).is_file()]
  if missing:
    raise errors.CorruptError(
      f"{path}: shards are missing: {tensorheader.listed(missing)}; fetch "
      "them again."
    )
  return sorted(shards)


def write(
  folder: pathlib.Path,
  stem: str,
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  tensors: Iterable[tuple[str, np.ndarray]],
  *,
  max_shard_bytes: int = MAX_SHARD_BYTES,
  metadata: Mapping[str, str] | None = None,
) -> list[pathlib.Path]:
  """Writes the weights of one component in the published layout.

  One file, or several and their index once they pass `max_shard_bytes`. All of
  it appears at the end, under its own names; on any failure nothing does.

  Args:
    folder: An existing folder without weights.
    stem: `STEMS[0]` for a diffusers model, `STEMS[1]` for a transformers one.
    shapes: Every tensor's shape and dtype; their order is that of the shards.
    tensors: The same tensors, in any order; one is held at a time.
    max_shard_bytes: Bytes of data in a shard; a larger tensor gets its own.
    metadata: Goes into the header of each file.

  Returns:
    The files.

  Raises:
    InputError: The folder holds weights.
    StorageError: The disk is full, or writing fails otherwise.
  """
  folder = pathlib.Path(folder)
  if found := find_weights(folder):
    raise errors.InputError(f"{found[0]}: exists; name an empty folder.")
  shards = _plan(shapes, max_shard_bytes)
  names = [f"{stem}.safetensors"]
  if len(shards) > 1:
    count = len(shards)
    names = [
      f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)
    ]
  finals = [folder / name for name in names]
  if len(shards) > 1:
    finals.append(folder / f"{stem}.safetensors.index.json")
  drafts = [
    f.with_name(f".{f.name}.tmp-{secrets.token_hex(8)}") for f in finals
  ]
  try:
    _write_shards(
      drafts[: len(shards)], shards, shapes, tensors, dict(metadata or {})
    )
    if len(shards) > 1:
      drafts[-1].write_text(_index(names, shards, shapes), encoding="utf-8")
      sync(drafts[-1])
    for draft, final in zip(drafts, finals, strict=True):
      draft.rename(final)
    sync(folder)
  except BaseException as e:
    for path in drafts + finals:
      path.unlink(missing_ok=True)
    if isinstance(e, OSError) and not isinstance(e, errors.VidgenError):
      raise errors.StorageError(
        f"{folder}: cannot write the weights: {e.strerror}."
      ) from e
    raise
  return finals


def sync(path: pathlib.Path) -> None:
  """Waits until a file or a folder is on the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _plan(
  shapes: Mapping[str, jax.ShapeDtypeStruct], max_shard_bytes: int
) -> list[list[str]]:
  """Returns the names of each shard, filled one after the other."""
  shards, size = [[]], 0
  for name, shape in shapes.items():
    count = _size(shape)
    if shards[-1] and size + count > max_shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(name)
    size += count
  return shards


def _write_shards(
  paths: list[pathlib.Path],
  shards: list[list[str]],
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  tensors: Iterable[tuple[str, np.ndarray]],
  metadata: dict[str, str],
) -> None:
  """Writes each tensor at its place in its shard, then waits for the disk."""
  with contextlib.ExitStack() as stack:
    places = {}
    for path, names in zip(paths, shards, strict=True):
      f = stack.enter_context(path.open("xb", buffering=0))
      header, offsets, size = _header(names, shapes, metadata)
      # A disk that is too small is found now, not after an hour.
      os.posix_fallocate(f.fileno(), 0, size)
      _write_at(f.fileno(), memoryview(header), 0)
      places |= {name: (f.fileno(), offset) for name, offset in offsets.items()}
    files = {descriptor for descriptor, _ in places.values()}
    for name, array in tensors:
      want = shapes[name]
      if array.shape != want.shape or array.dtype != want.dtype:
        raise ValueError(
          f"{name} is {array.dtype} {array.shape}, promised was {want}."
        )
      descriptor, offset = places.pop(name)
      _write_at(descriptor, _bytes(np.ascontiguousarray(array)), offset)
    if places:
      raise ValueError(f"Never came: {tensorheader.listed(places)}.")
    for descriptor in files:
      os.fsync(descriptor)


def _header(
  names: list[str],
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  metadata: dict[str, str],
) -> tuple[bytes, dict[str, int], int]:
  """Returns a shard's first bytes, its tensors' offsets and its size."""
  codes = {dtype: code for code, dtype in tensorheader.DTYPES.items()}
  header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
  offsets, end = {}, 0
  # Wide dtypes first, as the library has it: then every tensor is aligned.
  for name in sorted(names, key=lambda n: -shapes[n].dtype.itemsize):
    shape, begin = shapes[name], end
    end += _size(shape)
    offsets[name] = begin
    header[name] = {
      "dtype": codes[np.dtype(shape.dtype)],
      "shape": list(shape.shape),
      "data_offsets": [begin, end],
    }
  text = json.dumps(header, separators=(",", ":")).encode("utf-8")
  text += b" " * (-len(text) % 8)
  start = 8 + len(text)
  offsets = {name: start + offset for name, offset in offsets.items()}
  return len(text).to_bytes(8, "little") + text, offsets, start + end


def _index(
  names: list[str],
  shards: list[list[str]],
  shapes: Mapping[str, jax.ShapeDtypeStruct],
) -> str:
  """Returns the text of the index of shards."""
  where = {
    n: file for file, held in zip(names, shards, strict=True) for n in held
  }
  total = sum(map(_size, shapes.values()))
  index = {"metadata": {"total_size": total}, "weight_map": where}
  return json.dumps(index, indent=2, sort_keys=True) + "\n"


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
  """Writes all of `data`; the system takes 2 GiB at once at most."""
  while data:
    count = os.pwrite(descriptor, data, offset)
    data, offset = data[count:], offset + count


def _size(shape: jax.ShapeDtypeStruct) -> int:
  return math.prod(shape.shape) * shape.dtype.itemsize


def _bytes(array: np.ndarray) -> memoryview:
  """Returns the bytes of a contiguous array, without a copy."""
  return memoryview(array.reshape(-1).view(np.uint8))
