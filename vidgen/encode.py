"""The encoding job: caches what frozen encoders make of a training run's clips.

See `data.cache` for what a cache is. It is written file by file in a draft
beside its folder: a run that was killed goes on after the last whole file, and
the folder appears at the end.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, PyTree

from vidgen import (
  checkpoint,
  errors,
  layouts,
  preemption,
  progress,
  sharding,
  tensorfile,
  train,
  video,
)
from vidgen.data import buckets, cache, draft, loader, records
from vidgen.tasks import diffusion

# Pixels of a file's windows, in bytes: a file is large enough to be read well,
# and small enough to be done again.
_FILE_PIXELS, _FILE_CLIPS, _FILE_TEXTS = 2**30, 512, 64


@dataclasses.dataclass(frozen=True)
class Options:
  """How a cache is made.

  Attributes:
    dtype: Of what is stored. bfloat16 halves the size, and rounds by 0.2 % at
      the most.
    windows: Windows of each clip, at the most; longer clips have others.
    batch_size: Clips that are encoded at once; None is as many as a step of
      their bucket has.
  """

  dtype: str = "float32"
  windows: int = 1
  batch_size: int | None = None


@dataclasses.dataclass(frozen=True)
class Report:
  """What was encoded.

  Attributes:
    folder: The cache.
    records: Records of each group: "latents 17x64x64", "text".
    size: Bytes.
    was_there: Whether it was there already, and the same.
  """

  folder: pathlib.Path
  records: dict[str, int]
  size: int
  was_there: bool

  def __str__(self) -> str:
    """Returns a line."""
    counts = ", ".join(f"{n} {name}" for name, n in self.records.items())
    state = "is already encoded" if self.was_there else "is encoded"
    return f"{self.folder} {state}: {counts}; {self.size / 2**20:.1f} MiB."


class Item(NamedTuple):
  """What becomes a record: of which file and clip, and what is encoded."""

  file: int
  clip: int
  id: str
  captions: list[str]
  given: Any


class Job(NamedTuple):
  """A group that is to be encoded, and how.

  Attributes:
    group: The group.
    read: Returns a clip's record, and what is encoded of it, one by one.
    collate: Puts several of those into arrays.
    encode: `(params, arrays) -> arrays`.
    batch_size: How many are encoded at once.
    threads: That read and decode.
    keeps: Returns what is kept of a window as it is, by name.
  """

  group: cache.Group
  read: Callable[[int], tuple[records.Clip, list[Any]]]
  collate: Callable[[list[Any]], dict[str, np.ndarray]]
  encode: Callable[..., dict[str, Array]]
  batch_size: int
  threads: int
  keeps: Callable[[np.ndarray], dict[str, np.ndarray]] = lambda window: {}


class _Wanted(NamedTuple):
  """Clips that a bucket of a stage reads."""

  split: records.Split
  mark: str
  fps: float | None
  bucket: buckets.Bucket
  clips: Int[np.ndarray, " n"]
  threads: int


def run(
  config: train.TrainConfig,
  out: str | os.PathLike,
  options: Options | None = None,
  told: progress.Progress | None = None,
) -> Report:
  """Encodes the clips of every stage and bucket of a training run.

  What stages share is encoded once. Captions are embedded unless the run trains
  the text encoder. `data.cache` of the config is passed over.

  Args:
    config: The run, of a diffusion task.
    out: The folder: new or empty, or this very cache.
    options: How.
    told: Is told how far it is.

  Raises:
    InputError: A wrong argument, nothing to encode, another run at work, or a
      folder that holds something else.
    CorruptError: A clip or a checkpoint is damaged.
    StorageError: The disk is full, or writing fails otherwise.
    PreemptedError: It was asked to stop; whole files are kept.
  """
  options, told = options or Options(), told or progress.Progress()
  _check(config, options)
  out = pathlib.Path(out).expanduser().absolute()
  if not (out / cache.NAME).exists():
    checkpoint.new_folder(out)
  writer = draft.Draft(out)
  sizes = layouts.named(config.mesh)
  # A clip needs no other: what is chosen for encoding is simple.
  sizes = {"data": -1} if sizes is None else sizes
  mesh = sharding.make_mesh(sizes or None)
  task = config.task.build(mesh)
  if not isinstance(task, diffusion.DiffusionTask):
    raise errors.InputError(
      "config: only a diffusion run reads latents; this one trains "
      f"{', '.join(task.groups)}."
    )
  with told.stage("plan"):
    encoders = task.encoders()
    jobs = _jobs(task, config.stages, encoders.text is not None, mesh, options)
  groups = [job.group for job in jobs]
  facts = cache.facts(encoders, groups, options.dtype, options.windows)
  if (out / cache.NAME).exists():
    draft.check_same(out, facts)
    writer.remove()
    return _report(out, was_there=True)
  try:
    with writer.locked(), preemption.Preemption() as stop:
      writer.begin(facts)
      with told.stage("load"):
        params = task.frozen_encoders(mesh)
      for job in jobs:
        with told.stage(_title(job.group.facts())):
          _encode(job, params, mesh, writer, told, stop)
      with told.stage("finish"):
        writer.finish(groups, facts)
  except OSError as error:
    if isinstance(error, errors.VidgenError):
      raise
    raise video.storage_error(out, error) from error
  return _report(out, was_there=False)


def _check(config: train.TrainConfig, options: Options) -> None:
  """Raises InputError where an argument makes no sense."""
  train.check(config)
  if options.dtype not in cache.DTYPES:
    raise errors.InputError(
      f"dtype: {options.dtype!r} is not one of {', '.join(cache.DTYPES)}."
    )
  for name in ("windows", "batch_size"):
    value = getattr(options, name)
    if value is not None and value < 1:
      raise errors.InputError(f"{name}: {value} is not positive.")
  if jax.process_count() > 1:
    raise errors.InputError("encode: runs in one process; start one alone.")


def _wanted(stages: tuple[train.Stage, ...]) -> Iterator[_Wanted]:
  """Yields what each bucket of each stage reads."""
  for stage in stages:
    data = dataclasses.replace(stage.data, cache=None)
    steps = loader.Steps(data, 0, 0, 0, 0, 1)
    mark = records.fingerprint(steps.split)
    for bucket, clips in zip(steps.buckets, steps.clips, strict=True):
      yield _Wanted(steps.split, mark, data.fps, bucket, clips, data.threads)


def _jobs(
  task: diffusion.DiffusionTask,
  stages: tuple[train.Stage, ...],
  with_text: bool,
  mesh: Mesh,
  options: Options,
) -> list[Job]:
  """Returns what is to be encoded: each clip once for each size and rate."""
  sized = collections.defaultdict(list)
  texts = collections.defaultdict(list)
  for one in _wanted(stages):
    bucket = one.bucket
    size = (bucket.num_frames, bucket.height, bucket.width)
    sized[one.mark, one.fps, size].append(one)
    texts[one.mark].append(one)
  jobs = []
  for (_, fps, size), found in sized.items():
    pixels = math.prod(size) * 3 * options.windows
    per_file = min(max(1, _FILE_PIXELS // pixels), _FILE_CLIPS)
    group = _group(cache.LATENTS, len(jobs), found, fps, size, per_file)
    jobs.append(_latents_job(task, group, found, mesh, options))
  for found in texts.values() if with_text else ():
    group = _group(cache.TEXT, len(jobs), found, None, (), _FILE_TEXTS)
    jobs.append(_text_job(task, group, found, mesh, options))
  return jobs


def _group(
  kind: str,
  number: int,
  found: list[_Wanted],
  fps: float | None,
  size: tuple[int, ...],
  per_file: int,
) -> cache.Group:
  split, mark = found[0].split, found[0].mark
  return cache.Group(
    name=f"{kind}-{number:02d}",
    kind=kind,
    split=f"{split.name}/{split.split}",
    fingerprint=mark,
    fps=fps,
    size=size,
    clips=functools.reduce(np.union1d, [one.clips for one in found]),
    per_file=per_file,
  )


def _at_once(found: list[_Wanted], mesh: Mesh, options: Options) -> int:
  """Returns how many are encoded at once: as a step does, over the mesh."""
  count = options.batch_size or min(one.bucket.batch_size for one in found)
  size = mesh.size
  parts = size // sharding.training_batch(mesh, size).shard_shape((size,))[0]
  return -(-count // parts) * parts


def _latents_job(
  task: diffusion.DiffusionTask,
  group: cache.Group,
  found: list[_Wanted],
  mesh: Mesh,
  options: Options,
) -> Job:
  def encode(params: PyTree, arrays: dict[str, Array]) -> dict[str, Array]:
    mean, deviation = task.posterior(params, arrays["video"])
    return {
      "latents": mean.astype(options.dtype),
      "latents_std": deviation.astype(options.dtype),
    }

  return Job(
    group,
    functools.partial(_windows, found[0].split, group, options.windows),
    lambda videos: {"video": np.stack(videos)},
    encode,
    _at_once(found, mesh, options),
    max(one.threads for one in found),
    task.kept,
  )


def _text_job(
  task: diffusion.DiffusionTask,
  group: cache.Group,
  found: list[_Wanted],
  mesh: Mesh,
  options: Options,
) -> Job:
  split = found[0].split

  def read(number: int) -> tuple[records.Clip, list[str]]:
    clip = split.read(number)
    return clip, list(clip.captions)

  def encode(params: PyTree, arrays: dict[str, Array]) -> dict[str, Array]:
    return {"text": task.embed(params, arrays).astype(options.dtype)}

  count = _at_once(found, mesh, options)
  threads = max(one.threads for one in found)
  return Job(group, read, task.tokens, encode, count, threads)


def _windows(
  split: records.Split, group: cache.Group, windows: int, number: int
) -> tuple[records.Clip, list[np.ndarray]]:
  """Returns a clip and the windows of it that are kept, decoded in one go."""
  clip, one = split.read(number), np.array([number])
  count, height, width = group.size
  stride = buckets.strides(split.index.fps[one], group.fps)
  frames = buckets.frames(count, float(stride[0]))
  (room,) = cache.rooms(split.index, one, count, group.fps)
  picked = cache.starts(int(room), windows)[:, None] + frames
  wanted, places = np.unique(picked, return_inverse=True)
  pixels = loader.pixels(split, clip, wanted, height, width)
  return clip, list(pixels[places.reshape(picked.shape)])


def _encode(
  job: Job,
  params: PyTree,
  mesh: Mesh,
  writer: draft.Draft,
  told: progress.Progress,
  stop: preemption.Preemption,
) -> None:
  """Writes the files of a group that are not there yet."""
  group, total = job.group, len(job.group.clips)
  todo = [i for i, name in enumerate(group.files) if not writer.holds(name)]
  done = total - sum(len(group.within(i)) for i in todo)
  with contextlib.closing(_rows(job, todo, params, mesh)) as rows:
    for file, some in itertools.groupby(rows, lambda row: row[0].file):
      name = group.files[file]
      counts: collections.Counter[int] = collections.Counter()
      with writer.writing(name) as write:
        for item, record in some:
          if stop.requested(done):
            raise errors.PreemptedError(
              f"{writer.out}: stopped at clip {done} of {total} of "
              f"{_title(group.facts())}; run the same command to go on."
            )
          write(record)
          if item.clip not in counts:
            done += 1
            told.step(done, total)
          counts[item.clip] += 1
        # Before the file itself, which says that both are there.
        listed = [counts[int(clip)] for clip in group.within(file)]
        writer.count(name, listed)


def _rows(
  job: Job, todo: list[int], params: PyTree, mesh: Mesh
) -> Iterator[tuple[Item, bytes]]:
  """Yields the records of some files, in order.

  While a batch is encoded, the next clips are decoded and the last batch's
  records written.
  """
  encode = jax.jit(job.encode)
  place = sharding.training_batch(mesh, job.batch_size)
  pending: collections.deque[tuple[list[Item], Any]] = collections.deque()
  with contextlib.closing(_items(job, todo)) as items:
    while True:
      some = list(itertools.islice(items, job.batch_size))
      if some:
        given = [item.given for item in some]
        # One size compiles once: the last batch is filled up.
        given += given[-1:] * (job.batch_size - len(given))
        arrays = jax.device_put(job.collate(given), place)
        with sharding.use(mesh):
          pending.append((some, encode(params, arrays)))
      if pending and (len(pending) > 1 or not some):
        yield from _packed(job, *pending.popleft())
      elif not some:
        return


def _packed(
  job: Job, items: list[Item], made: dict[str, Array]
) -> Iterator[tuple[Item, bytes]]:
  """Yields the records of a batch."""
  host = jax.device_get(made)
  for i, item in enumerate(items):
    arrays = {name: x[i] for name, x in host.items()}
    for name, x in arrays.items():
      if not np.isfinite(x.astype(np.float32)).all():
        raise errors.InputError(
          f"{item.id}: its {name} are not finite in {x.dtype}; choose "
          "--dtype=float32, or check the weights."
        )
    arrays |= job.keeps(item.given)
    yield item, cache.pack(cache.Row(item.id, item.captions, arrays))


def _items(job: Job, todo: list[int]) -> Iterator[Item]:
  """Yields what is to be encoded, in order; threads read ahead."""
  clips = ((file, int(n)) for file in todo for n in job.group.within(file))
  is_text = job.group.kind == cache.TEXT
  depth = 2 * job.batch_size + job.threads
  ahead: collections.deque[Any] = collections.deque()
  pool = futures.ThreadPoolExecutor(job.threads)
  try:
    while True:
      for file, n in itertools.islice(clips, depth - len(ahead)):
        ahead.append((file, n, pool.submit(job.read, n)))
      if not ahead:
        return
      file, n, future = ahead.popleft()
      clip, several = future.result()
      for given in several:
        captions = [given] if is_text else list(clip.captions)
        yield Item(file, n, clip.id, captions, given)
  finally:
    pool.shutdown(cancel_futures=True)


def _report(out: pathlib.Path, was_there: bool) -> Report:
  held = cache.Cache(out)
  counts: collections.Counter[str] = collections.Counter()
  index = tensorfile.open_file(out / cache.INDEX)
  for group in held.facts["groups"]:
    counts[_title(group)] += int(index.read(f"{group['name']}.counts").sum())
  size = sum(path.stat().st_size for path in out.iterdir())
  return Report(out, dict(counts), size, was_there)


def _title(group: Mapping[str, Any]) -> str:
  """Returns what a group is called: "latents 17x64x64"."""
  return " ".join([group["kind"], "x".join(map(str, group["size"]))]).strip()
