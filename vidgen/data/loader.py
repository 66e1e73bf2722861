"""Batches for training, in an order that is a function of (seed, step) alone.

Grain reads them ahead. A batch does not depend on how many hosts share it, on
the step a run started from, or on threads and workers.
"""

import collections
import dataclasses
import functools
import gc
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from jaxtyping import Float, Int, UInt8, UInt32, UInt64

from vidgen import errors
from vidgen.data import buckets, cache, codec, records
from vidgen.data.buckets import Bucket

# What random numbers are for: no two purposes share a stream.
_SCHEDULE, _ORDER, _CHOICE = range(3)

_NO_ARRAYS: dict[str, np.ndarray] = {}
_NO_RATES = np.zeros(0)


@dataclasses.dataclass
class DataConfig:
  """What to train on.

  Attributes:
    dataset: One of `records.NAMES`.
    data_dir: Where `vidgen prepare` put it.
    split: "train", "validation", ...
    fps: Frames per second at which frames are taken; None takes every frame.
    buckets: The shapes of batches.
    token_budget: Latent tokens of a batch, for buckets whose batch size is 0.
    token_frames: Frames of a latent token.
    token_pixels: Pixels of a latent token, along height and along width.
    batch_multiple: What a batch size from the budget is a multiple of.
    where: A filter: label to what it may be, one value or several; see
      `records.select`.
    prefer: A regular expression: of a clip's captions only those are drawn in
      which it is found, if there are any.
    threads: That read ahead, in this process.
    workers: Processes that read ahead, each with threads of its own; 0 reads
      in this one.
    prefetch: Batches that are held ready, by each process.
    cache: A folder of `vidgen encode`, from which batches come instead of
      from the videos; the dataset itself has to be there all the same.
  """

  dataset: str = "moving_shapes"
  data_dir: str = "data"
  split: str = "train"
  fps: float | None = None
  buckets: tuple[Bucket, ...] = ()
  token_budget: int = 0
  token_frames: int = 4
  token_pixels: int = 16
  batch_multiple: int = 1
  where: dict[str, Any] = dataclasses.field(default_factory=dict)
  prefer: str | None = None
  threads: int = 2
  workers: int = 0
  prefetch: int = 4
  cache: str | None = None


class Batch(NamedTuple):
  """This host's rows of a step's batch.

  Attributes:
    step: Counted from 0 over the whole run.
    bucket: The same on every host.
    video: Pixels in [0, 255]; no frames where there are arrays instead.
    captions: One of each clip's own.
    ids: Of the records.
    arrays: What a cache has of each clip; see `data.cache`.
    made_by: What made the arrays; None without a cache.
    fps: Frames per second of each clip, as they were taken.
    labels: What is known of each clip besides.
  """

  step: int
  bucket: Bucket
  video: UInt8[np.ndarray, "b F H W 3"]
  captions: list[str]
  ids: list[str]
  arrays: dict[str, np.ndarray] = _NO_ARRAYS
  made_by: cache.Encoders | None = None
  fps: Float[np.ndarray, " _b"] = _NO_RATES
  labels: Sequence[Mapping[str, Any]] = ()


def blank(bucket: Bucket) -> Batch:
  """Returns a batch of one black clip, whose labels are all 0: for shapes."""
  shape = (1, bucket.num_frames, bucket.height, bucket.width, 3)
  labels = [collections.defaultdict(float)]
  video = np.zeros(shape, np.uint8)
  return Batch(0, bucket, video, [""], [""], fps=np.ones(1), labels=labels)


def batches(
  config: DataConfig,
  *,
  seed: int,
  start: int,
  stop: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[Batch]:
  """Returns the batches of the steps from `start` up to `stop`.

  Host p of P has the rows from p / P to (p + 1) / P of each. Whatever is wrong
  with the config or the dataset is told before the first one.

  Args:
    config: What to read.
    seed: Of the order, and of what is taken of each clip.
    start: The first step.
    stop: The step after the last.
    process_index: Which host this is.
    process_count: How many hosts share each batch.

  Raises:
    InputError: A wrong argument, no such dataset, a bucket without clips, or a
      batch size that the hosts cannot share evenly.
    CorruptError: The dataset is damaged; a damaged record ends the iteration
      at its step.
  """
  # Takes a second to import.
  import grain

  steps = Steps(config, seed, start, stop, process_index, process_count)
  dataset = grain.MapDataset.source(steps).to_iter_dataset(
    grain.ReadOptions(
      num_threads=config.threads, prefetch_buffer_size=config.prefetch
    )
  )
  if config.workers:
    if not flags.FLAGS.is_parsed():
      # Grain reads flags of its own, whose defaults are right.
      flags.FLAGS.mark_as_parsed()
    dataset = dataset.mp_prefetch(
      grain.MultiprocessingOptions(
        num_workers=config.workers, per_worker_buffer_size=config.prefetch
      )
    )
  return _told(dataset, config.workers > 0) if len(steps) else iter(())


def dataset_fingerprint(config: DataConfig) -> str:
  """Returns 32 hexadecimal digits that tell a split's content.

  The filter, the buckets and all else of the config change nothing: they only
  choose from it.

  Raises:
    InputError: There is no such dataset.
    CorruptError: It is damaged.
  """
  split = records.Split(config.dataset, config.data_dir, config.split)
  return records.fingerprint(split)


class Steps:
  """The batches of a run by their number: what Grain reads from.

  An element may be an error instead, which whoever iterates raises: it crosses
  from a worker whole.
  """

  def __init__(
    self,
    config: DataConfig,
    seed: int,
    start: int,
    stop: int,
    process_index: int,
    process_count: int,
  ):
    _check(config, seed, start, stop, process_index, process_count)
    self.buckets = sized(config)
    for bucket in self.buckets:
      if bucket.batch_size % process_count:
        raise errors.InputError(
          f"bucket {bucket}: {process_count} hosts cannot share a batch of "
          f"{bucket.batch_size} evenly."
        )
    self.split = records.Split(config.dataset, config.data_dir, config.split)
    index = self.split.index
    name = f"{config.dataset}/{config.split}"
    numbers = records.select(index, config.where, name)
    self.clips = buckets.assign(self.buckets, index, numbers, config.fps, name)
    self._strides = buckets.strides(index.fps, config.fps)
    self._cache = None
    if config.cache is not None:
      self._cache = cache.Cache(config.cache)
      self._latents = [
        self._cache.latents(self.split, bucket, config.fps, clips)
        for bucket, clips in zip(self.buckets, self.clips, strict=True)
      ]
      self._text = self._cache.text(self.split)
    self._prefer = re.compile(config.prefer) if config.prefer else None
    self._seed, self._start = seed, start
    self._process = process_index, process_count
    weights = np.array([bucket.weight for bucket in self.buckets])
    self._schedule, self._ranks = _schedule(weights, seed, start, stop)

  def __len__(self) -> int:
    return len(self._schedule)

  def __getitem__(self, number: int) -> Batch | errors.VidgenError:
    try:
      return self.batch(self._start + number)
    except errors.VidgenError as error:
      return error

  def batch(self, step: int) -> Batch:
    """Returns this host's rows of a step's batch.

    Raises:
      CorruptError: A record of it is damaged.
    """
    which = int(self._schedule[step - self._start])
    rank = int(self._ranks[step - self._start])
    bucket, clips = self.buckets[which], self.clips[which]
    host, hosts = self._process
    mine = range(
      host * bucket.batch_size // hosts, (host + 1) * bucket.batch_size // hosts
    )
    chances = _uniform(
      _bits(self._seed, (_CHOICE, step), 2 * bucket.batch_size)
    ).reshape(-1, 2)
    read = self._clip if self._cache is None else self._row
    items, numbers = [], []
    for row in mine:
      epoch, place = divmod(rank * bucket.batch_size + row, len(clips))
      order = _permutation(self._seed, which, epoch, len(clips))
      numbers.append(int(clips[order[place]]))
      items.append(read(numbers[-1], which, chances[row]))
    rows, captions, ids = zip(*items, strict=True)
    index = self.split.index
    # A single frame may be of a clip that is too slow for the rate.
    strides = np.maximum(self._strides[numbers], 1)
    facts = {
      "fps": index.fps[numbers] / strides,
      "labels": [index.labels[number] for number in numbers],
    }
    if self._cache is None:
      video = np.stack(rows)
      return Batch(step, bucket, video, list(captions), list(ids), **facts)
    video = np.zeros((len(ids), 0, bucket.height, bucket.width, 3), np.uint8)
    arrays = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    made_by = self._cache.encoders
    return Batch(
      step, bucket, video, list(captions), list(ids), arrays, made_by, **facts
    )

  def _clip(
    self, number: int, which: int, chances: Float[np.ndarray, " 2"]
  ) -> tuple[UInt8[np.ndarray, "F H W 3"], str, str]:
    """Returns a window of a clip, one of its captions, and its id."""
    bucket, clip = self.buckets[which], self.split.read(number)
    frames = buckets.frames(bucket.num_frames, float(self._strides[number]))
    room = int(self.split.index.num_frames[number]) - int(frames[-1])
    frames += int(chances[0] * room)
    video = pixels(self.split, clip, frames, bucket.height, bucket.width)
    chosen = _chosen(clip.captions, chances[1], self._prefer)
    return video, clip.captions[chosen], clip.id

  def _row(
    self, number: int, which: int, chances: Float[np.ndarray, " 2"]
  ) -> tuple[dict[str, np.ndarray], str, str]:
    """Returns what the cache has of a clip: the same, but for the window."""
    id_ = self.split.index.ids[number]
    row = self._latents[which].read(number, id_, chances[0])
    arrays = dict(row.arrays)
    chosen = _chosen(row.captions, chances[1], self._prefer)
    if self._text is not None:
      # A record for each caption, in their order.
      chance = (chosen + 0.5) / len(row.captions)
      arrays |= self._text.read(number, id_, chance).arrays
    return arrays, row.captions[chosen], id_


def _chosen(
  captions: Sequence[str], chance: float, prefer: re.Pattern | None
) -> int:
  """Returns which of a clip's captions a number in [0, 1) stands for."""
  numbers = range(len(captions))
  if prefer is not None:
    numbers = [i for i in numbers if prefer.search(captions[i])] or numbers
  return numbers[int(chance * len(numbers))]


def pixels(
  split: records.Split,
  clip: records.Clip,
  frames: Int[np.ndarray, " F"],
  height: int,
  width: int,
) -> UInt8[np.ndarray, "F h w 3"]:
  """Returns some frames of a clip, which cover a size.

  Raises:
    CorruptError: It cannot be decoded.
  """
  try:
    video = codec.read(clip.video, frames, clip.id)
  except errors.InputError as error:
    raise errors.CorruptError(
      f"{split.folder}: record {error} Prepare the dataset anew."
    ) from error
  return codec.cover(video, height, width)


def _check(
  config: DataConfig,
  seed: int,
  start: int,
  stop: int,
  process_index: int,
  process_count: int,
) -> None:
  """Raises unless the numbers make sense."""
  if seed < 0:
    raise errors.InputError(f"seed: {seed} is negative.")
  if not 0 <= start <= stop:
    raise errors.InputError(f"steps: no run goes from {start} to {stop}.")
  if not 0 <= process_index < process_count:
    raise errors.InputError(
      f"process_index: {process_index} is none of {process_count} hosts."
    )
  if config.fps is not None and not 0 < config.fps < float("inf"):
    raise errors.InputError(f"fps: {config.fps} is not positive.")
  try:
    re.compile(config.prefer or "")
  except re.error as error:
    raise errors.InputError(
      f"prefer: {config.prefer!r} is no regular expression: {error}."
    ) from error
  for name, least in (("threads", 1), ("workers", 0), ("prefetch", 1)):
    if getattr(config, name) < least:
      raise errors.InputError(
        f"{name}: {getattr(config, name)} is less than {least}."
      )


def sized(config: DataConfig) -> tuple[Bucket, ...]:
  """Returns the buckets, each with its batch size."""
  result = []
  for bucket in config.buckets:
    if bucket.batch_size == 0:
      if config.token_budget < 1:
        raise errors.InputError(
          f"bucket {bucket}: set its batch_size, or the token_budget."
        )
      size = buckets.token_budget(
        bucket.num_frames,
        bucket.height,
        bucket.width,
        config.token_budget,
        temporal=config.token_frames,
        spatial=config.token_pixels,
        multiple=config.batch_multiple,
      )
      bucket = dataclasses.replace(bucket, batch_size=size)
    result.append(bucket)
  buckets.check(tuple(result))
  return tuple(result)


def _told(dataset: Any, copy: bool) -> Iterator[Batch]:
  """Yields the batches; an error among them is raised."""
  iterator, item = iter(dataset), None
  try:
    for item in iterator:
      if isinstance(item, errors.VidgenError):
        raise item
      yield _copied(item) if copy else item
  finally:
    # Threads and workers end with whoever iterated.
    iterator.close()
    if copy:
      # In cycles hang the last batch of each worker, and its shared memory,
      # which Grain frees in a thread of its own.
      item = iterator = dataset = None
      gc.collect()
      time.sleep(0.2)


def _copied(batch: Batch) -> Batch:
  """Copies the arrays of a batch.

  What a worker sent lies in shared memory, which would leak if the last batch
  outlived the process's clean-up.
  """
  arrays = {name: np.array(x) for name, x in batch.arrays.items()}
  fps = np.array(batch.fps)
  return batch._replace(video=np.array(batch.video), arrays=arrays, fps=fps)


def _schedule(
  weights: Float[np.ndarray, " k"], seed: int, start: int, stop: int
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
  """Returns each step's bucket, and how often it was taken before."""
  edges = np.cumsum(weights) / weights.sum()
  draws = _uniform(_bits(seed, (_SCHEDULE,), stop))
  which = np.searchsorted(edges[:-1], draws, side="right").astype(np.int16)
  ranks = np.zeros(stop - start, np.int64)
  for bucket in range(len(weights)):
    taken = which == bucket
    before = int(taken[:start].sum())
    here = taken[start:]
    ranks[here] = before + np.arange(int(here.sum()))
  return which[start:], ranks


@functools.lru_cache(maxsize=32)
def _permutation(
  seed: int, bucket: int, epoch: int, count: int
) -> UInt32[np.ndarray, " n"]:
  """Returns the order of a bucket's clips in an epoch."""
  bits = _bits(seed, (_ORDER, bucket, epoch), count)
  return np.argsort(bits, kind="stable").astype(np.uint32)


def _bits(
  seed: int, path: tuple[int, ...], count: int
) -> UInt64[np.ndarray, " n"]:
  """Returns random bits of a purpose.

  numpy keeps the stream of a bit generator for ever, but not what its
  `Generator` makes of it: a run goes on the same under the next numpy.
  """
  sequence = np.random.SeedSequence(seed, spawn_key=path)
  return np.random.Philox(sequence).random_raw(count)


def _uniform(bits: UInt64[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
  """Returns numbers in [0, 1)."""
  return (bits >> np.uint64(11)) * 2.0**-53
