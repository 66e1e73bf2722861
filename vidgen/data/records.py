"""Prepared clips: what a record holds, a split's index, and reading both.

A prepared dataset is a folder that TFDS reads, DIR/NAME/VERSION: array_record
files and their description. Beside them stand an index for each split, so that
nobody reads a video to know how long it is, and the sizes of all files.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vidgen import errors, manifest, tensorheader
from vidgen.data import codec

NAMES = ("moving_shapes", "orbiting_solids", "video_folder")
VERSION = "1.1.0"


class Record(NamedTuple):
  """A clip as it is stored.

  Attributes:
    id: Tells it from all others of its dataset.
    video: The content of a video file.
    facts: What that holds.
    captions: At least one.
    labels: What is known of it besides, for filters: strings, numbers, or
      lists of them.
  """

  id: str
  video: bytes
  facts: codec.Facts
  captions: tuple[str, ...]
  labels: Mapping[str, Any]


class Clip(NamedTuple):
  """A clip as it is read: the content of a video file, and its captions."""

  id: str
  video: bytes
  captions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Index:
  """What each record of a split is, without its video.

  Attributes:
    ids: Of the records, in their order.
    num_frames: Frames of each.
    height: Of each, in pixels.
    width: Of each, in pixels.
    fps: Frames per second of each.
    digests: Hashes of what each holds.
    labels: Of each.
  """

  ids: list[str]
  num_frames: Int[np.ndarray, " n"]
  height: Int[np.ndarray, " n"]
  width: Int[np.ndarray, " n"]
  fps: Float[np.ndarray, " n"]
  digests: list[str]
  labels: list[Mapping[str, Any]]


def features() -> Any:
  """Returns the features of TFDS that every dataset of clips has."""
  # Takes a second to import.
  import tensorflow_datasets as tfds

  text = tfds.features.Text()
  return tfds.features.FeaturesDict(
    {
      "id": text,
      "video": tfds.features.Tensor(shape=(), dtype=np.object_),
      "captions": tfds.features.Sequence(text),
      "labels": text,
      "num_frames": np.int64,
      "height": np.int64,
      "width": np.int64,
      "fps": np.float64,
    }
  )


def example(record: Record) -> dict[str, Any]:
  """Returns a record as TFDS takes it."""
  return {
    "id": record.id,
    "video": record.video,
    "captions": list(record.captions),
    "labels": json.dumps(record.labels, sort_keys=True),
    **record.facts._asdict(),
  }


def index_line(record: Record) -> str:
  """Returns a record's line of the index."""
  digest = hashlib.sha256(record.video)
  digest.update(json.dumps([record.captions, record.labels]).encode())
  row = {
    "id": record.id,
    **record.facts._asdict(),
    "size": len(record.video),
    "digest": digest.hexdigest()[:16],
    "labels": record.labels,
  }
  return json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n"


def index_path(folder: pathlib.Path, split: str) -> pathlib.Path:
  """Returns where the index of a split is."""
  return folder / f"index-{split}.jsonl"


def find(name: str, data_dir: str) -> pathlib.Path:
  """Returns the folder of a prepared dataset.

  Raises:
    InputError: There is none.
  """
  if name not in NAMES:
    raise errors.InputError(f"dataset: {name!r} is not one of {NAMES}.")
  folder = pathlib.Path(data_dir).expanduser() / name / VERSION
  if not folder.is_dir():
    source = " --source=FOLDER" if name == "video_folder" else ""
    raise errors.InputError(
      f"{folder}: there is no prepared dataset; run `vidgen prepare "
      f"--dataset={name} --data_dir={data_dir}{source}` first."
    )
  return folder


class Split:
  """A split of a prepared dataset; its records are read by their number.

  It may be sent to another process, which opens the files anew.
  """

  def __init__(self, name: str, data_dir: str, split: str):
    """Opens a split.

    Args:
      name: Of the dataset.
      data_dir: Where `vidgen prepare` put it.
      split: "train", "validation", or what else the dataset has.

    Raises:
      InputError: There is no such dataset, or no such split.
      CorruptError: A file of it is missing or not as it was written.
    """
    self.name, self.split = name, split
    self.folder = find(name, data_dir)
    _check_files(self.folder)
    paths = sorted(self.folder.glob("index-*.jsonl"))
    splits = [path.stem.removeprefix("index-") for path in paths]
    if split not in splits:
      raise errors.InputError(
        f"split: {self.folder} has no split {split!r}; it has "
        f"{', '.join(splits)}."
      )
    self.index = _read_index(index_path(self.folder, split))
    count = sum(length for _, length in self._shards)
    if count != len(self.index.ids):
      raise errors.CorruptError(
        f"{index_path(self.folder, split)}: has {len(self.index.ids)} lines "
        f"for {count} records; prepare the dataset anew."
      )

  def __getstate__(self) -> dict[str, Any]:
    """Returns what another process needs: no open files."""
    state = dict(self.__dict__)
    for name in ("_source", "_shards", "_builder"):
      state.pop(name, None)
    return state

  def __len__(self) -> int:
    return len(self.index.ids)

  def read(self, number: int) -> Clip:
    """Returns a record.

    Raises:
      CorruptError: Its file is broken, or it is not the one in the index.
    """
    # A broken file is a RuntimeError of array_record, a ValueError of its
    # positions, or a DecodeError of protobuf, each of its own kind.
    try:
      item = self._source[number]
      clip = Clip(
        item["id"].decode(),
        item["video"],
        tuple(caption.decode() for caption in item["captions"]),
      )
    except Exception as error:
      raise errors.CorruptError(
        f"{self._file(number)}: record {self.index.ids[number]} cannot be "
        f"read: {_line(error)}; prepare the dataset anew."
      ) from error
    if clip.id != self.index.ids[number]:
      raise errors.CorruptError(
        f"{self._file(number)}: holds record {clip.id} where the index has "
        f"{self.index.ids[number]}; prepare the dataset anew."
      )
    return clip

  @functools.cached_property
  def _builder(self) -> Any:
    import tensorflow_datasets as tfds

    try:
      return tfds.builder_from_directory(self.folder)
    # A broken description fails in as many ways as there are fields.
    except Exception as error:
      raise errors.CorruptError(
        f"{self.folder}: is not as TFDS wrote it: {_line(error)}; prepare the "
        "dataset anew."
      ) from error

  @functools.cached_property
  def _source(self) -> Any:
    return self._builder.as_data_source(self.split)

  @functools.cached_property
  def _shards(self) -> list[tuple[str, int]]:
    """The files of the split, and how many records each holds."""
    splits = self._builder.info.splits
    if self.split not in splits:
      raise errors.CorruptError(
        f"{self.folder / 'dataset_info.json'}: does not know the split "
        f"{self.split}; prepare the dataset anew."
      )
    instructions = splits[self.split].file_instructions
    return [(item.filename, item.take) for item in instructions]

  def _file(self, number: int) -> str:
    """Returns the file that a record is in."""
    for name, length in self._shards:
      if number < length:
        return name
      number -= length
    raise errors.InputError(f"{self.folder}: has no record {number}.")


def select(
  index: Index, where: Mapping[str, Any], name: str
) -> Int[np.ndarray, " m"]:
  """Returns the numbers of the records whose labels pass a filter.

  Args:
    index: Of the split.
    where: Label to what it may be: one value or several. A label that is a
      list passes if all its items may be.
    name: What a message calls the split.

  Raises:
    InputError: No record has such a label or such a value, or none passes.
  """
  passed = np.ones(len(index.ids), bool)
  for label, allowed in where.items():
    several = isinstance(allowed, list | tuple | set | frozenset)
    wanted = set(allowed) if several else {allowed}
    values = [_values(labels.get(label)) for labels in index.labels]
    known = {value for items in values for value in items}
    if not known:
      names = sorted({label for labels in index.labels for label in labels})
      raise errors.InputError(
        f"where: no record of {name} has a label {label!r}; there are "
        f"{tensorheader.listed(names) or 'none'}."
      )
    if unknown := wanted - known:
      raise errors.InputError(
        f"where: no record of {name} has {label} {sorted(unknown, key=str)}; "
        f"there are {tensorheader.listed(map(str, sorted(known, key=str)))}."
      )
    passed &= np.array([bool(v) and set(v) <= wanted for v in values], bool)
  if not passed.any():
    raise errors.InputError(f"where: no record of {name} passes {where}.")
  return np.flatnonzero(passed)


def fingerprint(split: Split) -> str:
  """Returns 32 hexadecimal digits that tell the content of a split.

  They depend on the dataset's name, its version, and on what each record
  holds, in order; never on where it lies.
  """
  index = split.index
  digest = hashlib.sha256()
  head = [split.name, VERSION, split.split, len(index.ids)]
  digest.update(json.dumps(head).encode())
  for id_, content in zip(index.ids, index.digests, strict=True):
    digest.update(json.dumps([id_, content]).encode())
  return digest.hexdigest()[:32]


def _values(value: Any) -> list[Any]:
  if value is None:
    return []
  return value if isinstance(value, list) else [value]


def _check_files(folder: pathlib.Path) -> None:
  """Raises unless every file has the size that it was written with.

  What is in them is checked when it is read: each record has a hash.
  """
  path = folder / manifest.NAME
  if not path.is_file():
    raise errors.CorruptError(f"{path}: missing; prepare the dataset anew.")
  files = tensorheader.read_json(path).get("files", {})
  if not isinstance(files, dict):
    raise errors.CorruptError(f"{path}: lists no files.")
  for name, item in files.items():
    if not tensorheader.is_plain(name):
      raise errors.CorruptError(f"{path}: {name!r} is no file of a dataset.")
    if not (folder / name).is_file():
      raise errors.CorruptError(
        f"{folder / name}: missing; prepare the dataset anew."
      )
    size = (folder / name).stat().st_size
    if not isinstance(item, dict) or size != item.get("size"):
      raise errors.CorruptError(
        f"{folder / name}: has {size} bytes, not as many as were written; "
        "prepare the dataset anew."
      )


def _read_index(path: pathlib.Path) -> Index:
  rows = list(_rows(path))
  column = lambda name, kind: np.array([row[name] for row in rows], kind)
  try:
    return Index(
      [row["id"] for row in rows],
      column("num_frames", np.int32),
      column("height", np.int32),
      column("width", np.int32),
      column("fps", np.float64),
      [row["digest"] for row in rows],
      [row["labels"] for row in rows],
    )
  except (KeyError, TypeError, ValueError) as error:
    raise errors.CorruptError(
      f"{path}: a line is not as it was written: {error!r}."
    ) from error


def _rows(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  with open(path, encoding="utf-8") as file:
    yield from _parsed(file, path)


def _parsed(lines: Iterable[str], path: pathlib.Path) -> Iterator[Any]:
  try:
    for line in lines:
      yield json.loads(line)
  except ValueError as error:
    raise errors.CorruptError(f"{path}: is not JSON lines: {error}.") from error


def _line(error: Exception) -> str:
  text = " ".join(str(error).split()) or type(error).__name__
  return text[:200].rstrip(".")
