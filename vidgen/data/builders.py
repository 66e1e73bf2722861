"""The datasets as TFDS builders: array_record, without TensorFlow.

All have the features of `records`, so that one reader serves all.
"""

import abc
import dataclasses
import functools
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module

from vidgen import errors, video
from vidgen.data import (
  codec,
  moving_shapes,
  orbiting_solids,
  records,
  video_folder,
  workers,
)

Generator = Callable[[], Iterator[records.Record]]

# Records of a file: TFDS holds as many in memory while it writes one.
_SHARD_RECORDS = 1024
_SHARD_BYTES = 2**26


class ClipBuilder(tfds.core.ShardBasedBuilder):
  """Writes records in their order, and an index of each split beside them.

  TFDS's other builders shuffle what is larger than a gigabyte with TensorFlow.
  """

  VERSION = tfds.core.Version(records.VERSION)
  # There are no lists of downloads beside the code, and to look for them TFDS
  # wants a package that it does not install.
  code_path = None

  def __init__(self, *, data_dir: str | os.PathLike, **kwargs: Any):
    kwargs["file_format"] = "array_record"
    super().__init__(data_dir=os.fspath(data_dir), **kwargs)

  @abc.abstractmethod
  def shards(self) -> Mapping[str, Sequence[Generator]]:
    """Returns the records of each split, a generator for each of its files."""

  def _info(self) -> tfds.core.DatasetInfo:
    return _Info(
      builder=self, features=records.features(), disable_shuffling=True
    )

  def _shard_iterators_per_split(self, dl_manager: Any) -> Mapping[str, Any]:
    del dl_manager
    return {
      split: [functools.partial(self._examples, split, g) for g in generators]
      for split, generators in self.shards().items()
    }

  def _examples(
    self, split: str, generator: Generator
  ) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the records of a file, and appends them to the index."""
    folder = pathlib.Path(self.data_dir)
    path = records.index_path(folder, split)
    with open(path, "a", encoding="utf-8") as index:
      for record in generator():
        index.write(records.index_line(record))
        yield record.id, records.example(record)

  def _example_writer(self) -> Any:
    return _Writer(file_format=self.info.file_format)


class _Info(tfds.core.DatasetInfo):
  """Asks no server what it knows of the dataset."""

  def initialize_from_bucket(self) -> None:
    """Does nothing."""


class _Writer(tfds.core.writer.ExampleWriter):
  """Writes array_record; a write that fails is ours to tell."""

  def write(self, path: Any, examples: Iterable[tuple[Any, bytes]]) -> None:
    """Writes a file.

    Raises:
      StorageError: The disk is full, or writing fails otherwise.
    """
    path, count = os.fspath(path), 0
    # A group of one: records are read one by one, in any order.
    writer = _told(path, array_record_module.ArrayRecordWriter, path, _OPTIONS)
    for _, serialized in examples:
      _told(path, writer.write, serialized)
      count += 1
    _told(path, writer.close)
    reader = _told(path, array_record_module.ArrayRecordReader, path)
    if reader.num_records() != count:
      raise errors.StorageError(f"{path}: could not be written whole.")
    reader.close()


_OPTIONS = "group_size:1"


def _told(path: str, function: Callable[..., Any], *args: Any) -> Any:
  """Calls a function of array_record, which tells all in RuntimeErrors."""
  try:
    return function(*args)
  except OSError as error:
    raise video.storage_error(path, error) from error
  except RuntimeError as error:
    text = " ".join(str(error).split())
    raise errors.StorageError(f"{path}: cannot write: {text}.") from error


@dataclasses.dataclass(frozen=True)
class MovingShapesOptions:
  """How many clips of moving shapes to make, and of what.

  Attributes:
    num_clips: Of the training split.
    num_validation: Clips of the same combinations that training never shows.
    num_held_out: Clips of combinations that training never shows.
    num_captions: Captions of each clip.
    two_share: The share of clips that show two things.
    seed: Each clip depends on it, its split and its number alone.
  """

  num_clips: int = 1000
  num_validation: int = 50
  num_held_out: int = 50
  num_captions: int = 4
  two_share: float = 0.25
  seed: int = 0


class MovingShapes(ClipBuilder):
  """Moving shapes with captions: train, validation, held_out."""

  name = "moving_shapes"

  def __init__(
    self,
    *,
    data_dir: str | os.PathLike,
    options: MovingShapesOptions | None = None,
    each: workers.Map = map,
    **kwargs: Any,
  ):
    self.options = options or MovingShapesOptions()
    self._each = each
    super().__init__(data_dir=data_dir, **kwargs)

  def shards(self) -> Mapping[str, Sequence[Generator]]:
    """Returns the clips of each split."""
    return _made(self.options, moving_shapes_record, self._each)


def _made(
  options: "MovingShapesOptions | OrbitingSolidsOptions",
  record: Callable[[Any, str, int], records.Record],
  each: workers.Map,
) -> Mapping[str, Sequence[Generator]]:
  """Returns the records of each split, which `record` makes one by one."""

  def clips(split: str, start: int, count: int) -> Iterator[records.Record]:
    numbers = range(start, min(start + _SHARD_RECORDS, count))
    yield from each(functools.partial(record, options, split), numbers)

  counts = {
    "train": options.num_clips,
    "validation": options.num_validation,
    "held_out": options.num_held_out,
  }
  return {
    split: [
      functools.partial(clips, split, start, count)
      for start in range(0, count, _SHARD_RECORDS)
    ]
    for split, count in counts.items()
    if count
  }


def moving_shapes_scene(
  options: MovingShapesOptions, split: str, index: int
) -> tuple[moving_shapes.Scene, tuple[str, ...]]:
  """Returns what a clip of the dataset shows, and its captions."""
  seed = [options.seed, zlib.crc32(split.encode()), index]
  rng = np.random.default_rng(seed)
  scene = moving_shapes.draw_scene(
    rng,
    held_out=split == "held_out",
    two=bool(rng.random() < options.two_share),
  )
  captions = [
    moving_shapes.caption(rng, scene, vague=True)
    for _ in range(options.num_captions)
  ]
  return scene, tuple(captions)


def moving_shapes_record(
  options: MovingShapesOptions, split: str, index: int
) -> records.Record:
  """Returns a record of the dataset; its video loses nothing."""
  scene, captions = moving_shapes_scene(options, split, index)
  frames = moving_shapes.render(scene)
  labels = {
    "background": scene.background,
    "things": len(scene.things),
    "shapes": [thing.shape for thing in scene.things],
    "colours": [thing.colour for thing in scene.things],
    "sizes": [thing.size for thing in scene.things],
    "motions": [thing.motion for thing in scene.things],
  }
  return records.Record(
    f"{split}-{index:08d}",
    codec.encode(frames, moving_shapes.FPS),
    codec.Facts(*frames.shape[:3], float(moving_shapes.FPS)),
    captions,
    labels,
  )


@dataclasses.dataclass(frozen=True)
class OrbitingSolidsOptions:
  """How many orbits around solids to make, and of what.

  Attributes:
    num_clips: Of the training split.
    num_validation: Clips of the same combinations that training never shows.
    num_held_out: Clips of combinations that training never shows.
    num_frames: Views of an orbit, evenly spaced.
    num_captions: Captions of each clip.
    seed: Each clip depends on it, its split and its number alone.
  """

  num_clips: int = 1000
  num_validation: int = 50
  num_held_out: int = 50
  num_frames: int = orbiting_solids.NUM_FRAMES
  num_captions: int = 2
  seed: int = 0


class OrbitingSolids(ClipBuilder):
  """Orbits around solids with captions: train, validation, held_out."""

  name = "orbiting_solids"

  def __init__(
    self,
    *,
    data_dir: str | os.PathLike,
    options: OrbitingSolidsOptions | None = None,
    each: workers.Map = map,
    **kwargs: Any,
  ):
    self.options = options or OrbitingSolidsOptions()
    self._each = each
    super().__init__(data_dir=data_dir, **kwargs)

  def shards(self) -> Mapping[str, Sequence[Generator]]:
    """Returns the clips of each split."""
    return _made(self.options, orbiting_solids_record, self._each)


def orbiting_solids_scene(
  options: OrbitingSolidsOptions, split: str, index: int
) -> tuple[orbiting_solids.Scene, tuple[str, ...]]:
  """Returns what a clip of the dataset shows, and its captions."""
  seed = [options.seed, zlib.crc32(split.encode()), index]
  rng = np.random.default_rng(seed)
  scene = orbiting_solids.draw_scene(rng, held_out=split == "held_out")
  captions = [
    orbiting_solids.caption(rng, scene) for _ in range(options.num_captions)
  ]
  return scene, tuple(captions)


def orbiting_solids_record(
  options: OrbitingSolidsOptions, split: str, index: int
) -> records.Record:
  """Returns a record of the dataset; its video loses nothing."""
  scene, captions = orbiting_solids_scene(options, split, index)
  frames = orbiting_solids.render(scene, options.num_frames)
  fps = float(orbiting_solids.FPS)
  return records.Record(
    f"{split}-{index:08d}",
    codec.encode(frames, fps),
    codec.Facts(*frames.shape[:3], fps),
    captions,
    dataclasses.asdict(scene) | {"colours": list(scene.colours)},
  )


class VideoFolder(ClipBuilder):
  """The usable videos of a folder: train and, for a share, validation."""

  name = "video_folder"

  def __init__(
    self,
    *,
    data_dir: str | os.PathLike,
    plan: video_folder.Plan,
    **kwargs: Any,
  ):
    self.plan = plan
    super().__init__(data_dir=data_dir, **kwargs)

  def shards(self) -> Mapping[str, Sequence[Generator]]:
    """Returns the videos of each split."""
    return {
      split: [
        functools.partial(video_folder.clips, self.plan, shard)
        for shard in _filled(files)
      ]
      for split, files in self.plan.splits.items()
    }


def _filled(
  files: Sequence[video_folder.Video],
) -> list[list[video_folder.Video]]:
  """Returns the videos file by file, each as full as it may get."""
  shards, size = [], 0
  for file in files:
    full = shards and len(shards[-1]) == _SHARD_RECORDS
    if not shards or full or size + file.size > _SHARD_BYTES:
      shards.append([])
      size = 0
    shards[-1].append(file)
    size += file.size
  return shards
