"""Measures the videos of sets one by one; tells which could not be, and why."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from vidgen import errors
from vidgen.metrics import sets

# Called with how many clips are done.
Told = Callable[[int], None]


class Skip(NamedTuple):
  """A clip that a metric leaves out."""

  clip: str
  reason: str


@dataclasses.dataclass
class Tally:
  """What a metric found.

  Attributes:
    values: Of each clip, by its name.
    skipped: The clips without a value.
    shapes: (frames, height, width) of the clips that have one.
    formats: What those were read from, "mp4"; of frames in a folder, "png".
  """

  values: dict[str, Any] = dataclasses.field(default_factory=dict)
  skipped: list[Skip] = dataclasses.field(default_factory=list)
  shapes: set[tuple[int, int, int]] = dataclasses.field(default_factory=set)
  formats: set[str] = dataclasses.field(default_factory=set)


@dataclasses.dataclass
class Source:
  """A set of videos, and what was read of it.

  Attributes:
    path: As the user wrote it.
    items: Its videos.
    read: The SHA-256 of each that was read, by name.
  """

  path: str
  items: Sequence[sets.Item]
  read: dict[str, str] = dataclasses.field(default_factory=dict)

  def video(self, item: sets.Item, limit: int | None = None) -> np.ndarray:
    """Returns the frames of an item; see `sets.read_video`."""
    found = sets.read_video(item, limit)
    self.read[item.name] = found.sha256
    return found.frames

  def files(self) -> tuple[pathlib.Path, dict[str, str]]:
    """Returns a folder, and of each file in it that was read the SHA-256."""
    home = pathlib.Path(self.path)
    if any(item.path == home for item in self.items):
      home = home.parent
    return home, {
      item.path.relative_to(home).as_posix(): self.read[item.name]
      for item in self.items
      if item.name in self.read
    }

  def digest(self) -> str:
    """Returns the SHA-256 of the names and hashes of what was read."""
    lines = [f"{name}\0{self.read[name]}\n" for name in sorted(self.read)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


# From the item and the videos, the generated one last, to a number.
Measure = Callable[..., float]


def each(
  rows: Iterable[Sequence[tuple[Source, sets.Item]]],
  measures: Mapping[str, Measure],
  n: int | None,
  told: Told = lambda done: None,
) -> dict[str, Tally]:
  """Returns the tally of each metric, over the first `n` clips it can measure.

  Args:
    rows: Of each clip, the videos to read; the generated one is the last.
    measures: The metrics.
    n: How many clips, or None for all.
    told: See `Told`.
  """
  tallies = {name: Tally() for name in measures}
  full = lambda tally: n is not None and len(tally.values) >= n
  for done, row in enumerate(rows):
    told(done)
    waiting = [name for name in measures if not full(tallies[name])]
    if not waiting:
      break
    item = row[-1][1]
    try:
      videos = [source.video(item) for source, item in row]
    except errors.InputError as error:
      for name in waiting:
        tallies[name].skipped.append(Skip(item.name, str(error)))
      continue
    for name in waiting:
      try:
        value = float(measures[name](item, *videos))
      except errors.InputError as error:
        tallies[name].skipped.append(Skip(item.name, str(error)))
        continue
      tallies[name].values[item.name] = value
      tallies[name].shapes.add(videos[-1].shape[:3])
      tallies[name].formats |= {sets.format_of(item) for _, item in row}
  return tallies


class Network(NamedTuple):
  """What gives features of clips.

  Attributes:
    name: In identities, "i3d400".
    size: Height and width that it takes.
    resize: From a clip's bytes to what it takes.
    run: From a batch of resized clips to features; clips come first.
  """

  name: str
  size: int
  resize: Callable[[Any], Any]
  run: Callable[[Any], Any]


def features(
  source: Source,
  network: Network,
  frames: int,
  n: int | None,
  batch_size: int,
  told: Told = lambda done: None,
) -> Tally:
  """Returns the features of the first `frames` frames of each clip.

  Each batch has the same size, the last is filled up: the numbers of a clip
  depend on no other clip. Shorter clips are skipped.

  Args:
    source: The set.
    network: See `Network`.
    frames: Frames of each clip.
    n: How many clips, or None for all.
    batch_size: Clips at once.
    told: See `Told`.
  """
  tally, waiting = Tally(), {}

  def flush() -> None:
    if not waiting:
      return
    shape = (batch_size, frames, network.size, network.size, 3)
    batch = np.zeros(shape, np.float32)
    batch[: len(waiting)] = list(waiting.values())
    found = np.asarray(network.run(batch))
    tally.values.update(zip(waiting, found, strict=False))
    waiting.clear()

  for done, item in enumerate(source.items):
    told(done)
    if n is not None and len(tally.values) + len(waiting) >= n:
      break
    try:
      video = source.video(item, frames)
    except errors.InputError as error:
      tally.skipped.append(Skip(item.name, str(error)))
      continue
    if len(video) < frames:
      reason = f"{item.name}: has {len(video)} frames of {frames}."
      tally.skipped.append(Skip(item.name, reason))
      continue
    tally.shapes.add(video.shape[:3])
    tally.formats.add(sets.format_of(item))
    waiting[item.name] = np.asarray(network.resize(jnp.asarray(video)))
    if len(waiting) == batch_size:
      flush()
  flush()
  return tally


def why(tally: Tally) -> str:
  """Returns what a message adds: the first skipped clip, and its reason."""
  if not tally.skipped:
    return ""
  first = tally.skipped[0].reason.rstrip(".")
  more = len(tally.skipped) - 1
  return f" ({first}{f'; and {more} more' if more else ''})"


def enough(name: str, tally: Tally, n: int | None, what: str = "clips") -> None:
  """Raises an InputError unless there are clips, and as many as asked for."""
  found = len(tally.values)
  if found and n in (None, found):
    return
  asked = "none" if not found else f"{found}, not {n},"
  raise errors.InputError(
    f"{name}: {asked} of the {what} could be measured{why(tally)}."
  )
