"""Prompts from array_record files and from data sets of TFDS."""

import os
import pathlib
from collections.abc import Iterator
from typing import Any

from vidgen import errors

# The features that may hold a prompt; the first that is there is taken.
_FEATURES = ("prompt", "caption", "captions", "text")


def read_array_record(path: pathlib.Path) -> Iterator[tuple[int, bytes]]:
  """Yields the records of a file, numbered from 1.

  Raises:
    InputError: There is no such file, or it is none.
  """
  # Takes a moment to import.
  from array_record.python import array_record_module

  if not path.is_file():
    raise errors.InputError(f"{path}: there is no such file of prompts.")
  try:
    reader = array_record_module.ArrayRecordReader(os.fspath(path))
    yield from enumerate(reader.read_all(), 1)
  except (RuntimeError, ValueError) as error:
    text = " ".join(str(error).split())[:200].rstrip(".")
    raise errors.InputError(
      f"{path}: cannot be read as an array_record: {text}."
    ) from error


def read_dataset(
  folder: pathlib.Path, split: str
) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields the prompt of each example of a split, numbered from 1.

  Raises:
    InputError: It has no such split, or no feature with prompts.
  """
  # Takes seconds to import.
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder_from_directory(os.fspath(folder))
    known = builder.info.splits
    features = builder.info.features
    name = next((n for n in _FEATURES if n in features), None)
    if split not in known or name is None:
      raise errors.InputError(
        f"{folder}: has the splits {', '.join(known)} and the features "
        f"{', '.join(features)}; prompts come from one split, and from one of "
        f"{', '.join(_FEATURES)}."
      )
    # Videos, of which only the captions are wanted, stay as they are.
    others = {n: tfds.decode.SkipDecoding() for n in features if n != name}
    source = builder.as_data_source(split, decoders=others)
  except (RuntimeError, ValueError, OSError) as error:
    if isinstance(error, errors.VidgenError):
      raise
    text = " ".join(str(error).split())[:200].rstrip(".")
    raise errors.InputError(
      f"{folder}: cannot be read as a data set of TFDS: {text}."
    ) from error
  for number, example in enumerate(source, 1):
    value = example[name]
    first = value if isinstance(value, bytes | str) else next(iter(value), b"")
    text = (
      first.decode("utf-8", "replace") if isinstance(first, bytes) else first
    )
    yield number, {"prompt": text}
