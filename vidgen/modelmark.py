"""A mark of what a model computes with, found in seconds at any size."""

import hashlib
import json
import pathlib
from collections.abc import Iterable

import numpy as np

from vidgen import checkpoint, errors, manifest, tensorfile, tensorheader
from vidgen.models import base

# What is read of each tensor, from its middle. Weights that were trained on
# differ everywhere.
_BYTES = 64

# What says who wrote a config, not what it is.
_WRITERS = ("_diffusers_version", "_name_or_path", "transformers_version")
_INDEX = "model_index.json"

# Folders that decide what comes out, without weights.
_BESIDE = ("scheduler", "tokenizer", "tokenizer_2", "feature_extractor")
_SMALL = (".json", ".txt", ".model")


def of(folder: pathlib.Path, components: Iterable[base.Component]) -> str:
  """Returns 32 hexadecimal digits that tell a checkpoint's content.

  It is no proof against forgery: of each tensor a sample is read. A checkpoint
  of Orbax, whose manifest has the hashes of all its files, has another mark
  than the same weights in the published layout.

  Raises:
    InputError: A component is missing.
    CorruptError: A file is damaged.
  """
  digest = hashlib.sha256()
  for component in components:
    home = folder / component.name
    if (home / checkpoint.ORBAX).is_dir():
      files = tensorheader.read_json(folder / manifest.NAME)["files"]
      start = f"{component.name}/{checkpoint.ORBAX}/"
      held = {n: f for n, f in files.items() if n.startswith(start)}
      _add(digest, held)
    else:
      _add_tensors(digest, tensorfile.open_folder(home))
    if (home / "config.json").is_file():
      _add(digest, _config(home / "config.json"))
  if own := _own_defaults(folder / _INDEX):
    _add(digest, [_INDEX, own])
  for name in _BESIDE:
    for path in sorted((folder / name).glob("*")):
      if path.suffix == ".json":
        _add(digest, [name, path.name, _config(path)])
      elif path.suffix in _SMALL:
        held = hashlib.sha256(path.read_bytes()).hexdigest()
        _add(digest, [name, path.name, held])
  return digest.hexdigest()[:32]


def _add(digest, value) -> None:
  digest.update(json.dumps(value, sort_keys=True).encode() + b"\n")


def _config(path: pathlib.Path):
  """What a JSON file says, whoever wrote it."""
  value = tensorheader.read_json(path)
  return {k: v for k, v in value.items() if k not in _WRITERS}


def _own_defaults(path: pathlib.Path):
  """What a checkpoint says of its own sampling, as ours may; else nothing."""
  index = _config(path) if path.is_file() else {}
  is_own = lambda k: k.startswith("_") and k != "_class_name"
  return {k: v for k, v in index.items() if is_own(k)}


def _add_tensors(digest, files: tensorfile.TensorFiles) -> None:
  """Adds each tensor's name, shape and a sample, in the order of the names."""
  handles = {}
  try:
    for name in sorted(files):
      entry = files[name]
      _add(digest, [name, np.dtype(entry.dtype).name, list(entry.shape)])
      if entry.file not in handles:
        handles[entry.file] = entry.file.open("rb", buffering=0)
      handle = handles[entry.file]
      handle.seek(entry.offset + max(0, entry.size - _BYTES) // 2)
      digest.update(handle.read(min(_BYTES, entry.size)))
  except OSError as error:
    raise errors.StorageError(f"{files.where}: {error.strerror}.") from error
  finally:
    for handle in handles.values():
      handle.close()
