"""Videos in a folder, captions beside them: which can be used, and why not.

A video `a.mp4` has its captions in `a.txt`, one a line, or in the one .csv
(columns file, caption) or .jsonl ({"file": ..., "caption": ...}) of the folder.
What cannot be used is quarantined, which is to say listed with a reason.
"""

import collections
import csv
import dataclasses
import hashlib
import io
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from vidgen import errors, tensorheader
from vidgen.data import codec, records

# What a record can hold: protobuf ends at 2 GiB.
MAX_BYTES = 2**30

# A cut clip is encoded anew: nobody sees the difference.
CRF = 12

_TABLES = (".csv", ".jsonl")
_CAPTIONS = ".txt"
# What lies in folders of videos and is none.
_PASSED_OVER = (".md", ".json", ".html", ".sha256", ".license")


@dataclasses.dataclass(frozen=True)
class Options:
  """What to make of a folder of videos.

  Attributes:
    source: The folder.
    validation_share: The share of the videos that training never shows.
    max_frames: Longer videos are cut into clips of so many frames; None keeps
      them whole.
    seed: Of the choice for validation.
  """

  source: str
  validation_share: float = 0.0
  max_frames: int | None = None
  seed: int = 0


class Video(NamedTuple):
  """A usable video: its file within the folder, and what it is."""

  file: str
  size: int
  sha256: str
  facts: codec.Facts
  captions: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
  """What becomes of a folder.

  Attributes:
    options: As they were given.
    splits: The videos of "train" and, unless it is empty, of "validation".
    quarantined: File to reason of what cannot be used.
  """

  options: Options
  splits: Mapping[str, list[Video]]
  quarantined: Mapping[str, str]


def scan(
  options: Options, progress: Callable[[int, int], None] = lambda *_: None
) -> Plan:
  """Decodes every video of a folder and returns what can be used.

  Args:
    options: The folder and what to make of it.
    progress: Is told how many videos of how many are done.

  Raises:
    InputError: There is no such folder, or nothing in it can be used.
  """
  folder = pathlib.Path(options.source).expanduser()
  if not folder.is_dir():
    raise errors.InputError(f"{folder}: there is no such folder of videos.")
  names = sorted(_files(folder))
  bad: dict[str, str] = {}
  captions = _captions(folder, names, bad)
  aside = (*_TABLES, _CAPTIONS, *_PASSED_OVER)
  files = [name for name in names if not name.lower().endswith(aside)]
  usable = []
  for number, name in enumerate(files, 1):
    try:
      if not _is_unicode(name):
        raise errors.InputError(f"{name}: its name is not UTF-8; rename it.")
      usable.append(_video(folder, name, captions.get(name, ()), options))
    except errors.InputError as error:
      bad[name] = str(error).removeprefix(f"{name}: ")
    progress(number, len(files))
  bad = {_shown(name): _shown(bad[name]) for name in sorted(bad)}
  if not usable:
    raise errors.InputError(_nothing(folder, names, bad))
  return Plan(options, _splits(usable, options), bad)


def clips(plan: Plan, files: list[Video]) -> Iterator[records.Record]:
  """Yields the records of some videos of the plan.

  Raises:
    InputError: A file is no longer as it was when the folder was scanned.
  """
  folder = pathlib.Path(plan.options.source).expanduser()
  for item in files:
    try:
      with open(folder / item.file, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != item.sha256:
          raise OSError(None, "is another one now")
        file.seek(0)
        limit = plan.options.max_frames
        if limit is None or item.facts.num_frames <= limit:
          yield records.Record(
            item.file, file.read(), item.facts, item.captions, {}
          )
        else:
          yield from _cut(item, file, limit)
    except OSError as error:
      if isinstance(error, errors.VidgenError):
        raise
      raise errors.InputError(
        f"{folder / item.file}: changed since the folder was scanned "
        f"({error.strerror}); prepare it again."
      ) from error


def _cut(item: Video, file: Any, limit: int) -> Iterator[records.Record]:
  """Yields a video in clips of `limit` frames; the last may be shorter."""
  frames = codec.frames(file, item.file)
  for number in itertools.count():
    first = next(frames, None)
    if first is None:
      return
    counted = _Counted(itertools.chain([first], frames), limit)
    content = codec.encode(counted, item.facts.fps, CRF)
    yield records.Record(
      f"{item.file}#{number:05d}",
      content,
      item.facts._replace(num_frames=counted.count),
      item.captions,
      {},
    )


class _Counted:
  """The first `limit` items of an iterator, counted as they are taken."""

  def __init__(self, items: Iterator[Any], limit: int):
    self.count = 0
    self._items = itertools.islice(items, limit)

  def __iter__(self) -> Iterator[Any]:
    for item in self._items:
      self.count += 1
      yield item


def _files(folder: pathlib.Path) -> Iterator[str]:
  """Yields the files in a folder and below, but the hidden ones."""

  def fail(error: OSError) -> None:
    raise errors.InputError(
      f"{error.filename}: cannot be listed: {error.strerror}."
    )

  for root, folders, names in os.walk(folder, onerror=fail):
    folders[:] = [name for name in folders if not name.startswith(".")]
    for name in names:
      if not name.startswith("."):
        path = pathlib.Path(root, name).relative_to(folder)
        yield path.as_posix()


def _video(
  folder: pathlib.Path,
  name: str,
  captions: tuple[str, ...],
  options: Options,
) -> Video:
  """Returns a video that was decoded whole, or raises why it is no use."""
  path = folder / name
  # A pipe could wait for ever.
  if not path.is_file():
    raise errors.InputError(f"{name}: is no file, or a link to nothing.")
  size = path.stat().st_size
  if not size:
    raise errors.InputError(f"{name}: is empty.")
  if size > MAX_BYTES and options.max_frames is None:
    raise errors.InputError(
      f"{name}: has {size} bytes, and a record holds {MAX_BYTES}; cut it with "
      "--max_frames."
    )
  if not captions:
    raise errors.InputError(f"{name}: has no caption.")
  try:
    # Opened, not named: FFmpeg would take names for patterns and addresses.
    with open(path, "rb") as file:
      digest = hashlib.file_digest(file, "sha256").hexdigest()
      file.seek(0)
      facts = codec.check(file, name)
  except OSError as error:
    if isinstance(error, errors.VidgenError):
      raise
    raise errors.InputError(
      f"{name}: cannot be read: {error.strerror}."
    ) from error
  return Video(name, size, digest, facts, captions)


def _captions(
  folder: pathlib.Path, names: list[str], bad: dict[str, str]
) -> dict[str, tuple[str, ...]]:
  """Returns the captions of each file that has some; adds to `bad`."""
  found = collections.defaultdict(list)
  known = set(names)
  for name, caption in _from_table(folder, names, bad):
    if name not in known:
      bad[name] = "has a caption, but there is no such file."
    else:
      found[name].append(caption)
  stems = collections.defaultdict(list)
  for name in names:
    if not name.lower().endswith((*_TABLES, _CAPTIONS, *_PASSED_OVER)):
      stems[_stem(name)].append(name)
  for name in names:
    if not name.lower().endswith(_CAPTIONS):
      continue
    videos = stems[_stem(name)]
    try:
      text = (folder / name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
      bad[name] = f"cannot be read as text: {error}."
      continue
    lines = [" ".join(line.split()) for line in text.splitlines()]
    if not videos:
      bad[name] = "is the caption of a video that is not there."
    elif not any(lines):
      bad[name] = "is a caption without a word."
    for video in videos:
      found[video] += filter(None, lines)
  return {name: tuple(captions) for name, captions in found.items()}


def _from_table(
  folder: pathlib.Path, names: list[str], bad: dict[str, str]
) -> Iterator[tuple[str, str]]:
  """Yields file and caption of each line of the table, if there is one."""
  tables = [n for n in names if n.endswith(_TABLES) and "/" not in n]
  if len(tables) > 1:
    raise errors.InputError(
      f"{folder}: {tensorheader.listed(tables)}: keep one table of captions."
    )
  for table in tables:
    try:
      text = (folder / table).read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeError) as error:
      raise errors.InputError(
        f"{folder / table}: cannot be read as text: {error}."
      ) from error
    rows = _csv_rows if table.endswith(".csv") else _jsonl_rows
    for number, row in rows(folder / table, text):
      where, values = f"{table}:{number}", (row.get("file"), row.get("caption"))
      if not all(isinstance(v, str) and v.strip() for v in values):
        bad[where] = "has not both a file and a caption."
      elif not _is_unicode(values[1]):
        bad[where] = "has a caption with half a character."
      else:
        file = pathlib.PurePosixPath(values[0].strip()).as_posix()
        yield file, " ".join(values[1].split())


def _csv_rows(
  path: pathlib.Path, text: str
) -> Iterator[tuple[int, Mapping[str, Any]]]:
  # A quoted caption may have lines of its own.
  reader = csv.DictReader(io.StringIO(text, newline=""))
  try:
    if not {"file", "caption"} <= set(reader.fieldnames or ()):
      raise errors.InputError(
        f"{path}: needs a first line with the columns file and caption."
      )
    for row in reader:
      yield reader.line_num, row
  except csv.Error as error:
    raise errors.InputError(f"{path}:{reader.line_num}: {error}.") from error


def _jsonl_rows(
  path: pathlib.Path, text: str
) -> Iterator[tuple[int, Mapping[str, Any]]]:
  del path
  # Not splitlines: JSON may hold other ends of lines within a caption.
  for number, line in enumerate(text.split("\n"), 1):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
    except (ValueError, RecursionError):
      row = None
    # What is no object has not both; the caller says so.
    yield number, row if isinstance(row, dict) else {}


def _stem(name: str) -> str:
  return pathlib.PurePosixPath(name).with_suffix("").as_posix()


def _is_unicode(text: str) -> bool:
  try:
    text.encode("utf-8")
  except UnicodeEncodeError:
    return False
  return True


def _shown(text: str) -> str:
  """Returns a text that any file and any terminal can hold."""
  return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _splits(videos: list[Video], options: Options) -> dict[str, list[Video]]:
  """Returns each split's videos; another one in the folder moves none."""

  def place(video: Video) -> float:
    text = f"{options.seed}/{video.file}".encode()
    return int(hashlib.sha256(text).hexdigest()[:13], 16) / 16**13

  share = options.validation_share
  held = [video for video in videos if place(video) < share]
  # A small folder may have none by chance, or nothing else.
  if share and not held:
    held = [min(videos, key=place)]
  if len(held) == len(videos) and share < 1:
    held.remove(max(held, key=place))
  kept = {video.file for video in held}
  splits = {
    "train": [video for video in videos if video.file not in kept],
    "validation": held,
  }
  return {name: files for name, files in splits.items() if files}


def _nothing(
  folder: pathlib.Path, names: list[str], bad: Mapping[str, str]
) -> str:
  """Returns the line on a folder of which nothing can be used."""
  if not names:
    return f"{folder}: is empty; put videos and their captions there."
  reasons = [f"{name} {reason.rstrip('.')}" for name, reason in bad.items()]
  return (
    f"{folder}: no video of it can be used; of {len(names)} files: "
    f"{tensorheader.listed(reasons, 5) or 'none is a video'}."
  )
