"""What frozen encoders make of clips, kept in files for training to read.

A cache is a folder: array_record files of records, cache.json, which says what
they are of and what made them, index.safetensors, which says where each clip
is, and MANIFEST.json with the sizes of all files. It has two kinds of records.
One of `latents` is a window of a clip: mean and deviation of its scaled
latents, its captions, and for image-to-video models its first frame, as bytes,
since noise is added to that before it is encoded. One of `text` is the
embedding of a caption.

A loader takes random windows of clips; a cache holds at most K of each, spread
evenly, and training draws from them. Where K is at least as many as a clip has,
as it always is for clips as long as the bucket, training sees the same batches
as from the videos.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import threading
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy
from jaxtyping import Int

from vidgen import errors, manifest, tensorfile, tensorheader
from vidgen.data import buckets, records

VERSION = 1
NAME, INDEX = "cache.json", "index.safetensors"
DTYPES = ("float32", "bfloat16", "float16")
LATENTS, TEXT = "latents", "text"

# How every mismatch is mended.
_AGAIN = "encode it again with `vidgen encode`, or drop data.cache"


@dataclasses.dataclass(frozen=True)
class Encoders:
  """What made a cache, as hashes of weights and configs.

  Attributes:
    vae: Of the autoencoder.
    text: Of the text encoder and its tokenizer; None without embeddings.
    dtype: What they computed in.
    image: Whether first frames are kept, for image-to-video models.
    kept: What else is kept of clips, in words; mostly nothing.
    folder: The cache, for messages.
  """

  vae: str
  text: str | None
  dtype: str
  image: bool
  kept: str = ""
  folder: str = dataclasses.field(default="", compare=False)

  def facts(self) -> dict[str, Any]:
    """Returns what JSON says of them."""
    values = dataclasses.asdict(self)
    # As caches are that keep nothing else.
    left_out = {"folder"} if self.kept else {"folder", "kept"}
    return {n: x for n, x in values.items() if n not in left_out}


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
  """Records of one kind, of one split, and for latents of one size.

  Attributes:
    name: What its files begin with.
    kind: `LATENTS` or `TEXT`.
    split: Dataset and split, "moving_shapes/train".
    fingerprint: Of the split's content.
    fps: The rate at which frames are taken.
    size: Frames, height and width of a window; empty for text.
    clips: The numbers of the clips, rising.
    per_file: Clips of a file.
  """

  name: str
  kind: str
  split: str
  fingerprint: str
  fps: float | None
  size: tuple[int, ...]
  clips: Int[np.ndarray, " n"]
  per_file: int

  @property
  def files(self) -> list[str]:
    """Its files, in order."""
    count = -(-len(self.clips) // self.per_file)
    return [f"{self.name}-{i:05d}.array_record" for i in range(count)]

  def within(self, file: int) -> Int[np.ndarray, " m"]:
    """Returns the clips that are in a file."""
    return self.clips[file * self.per_file : (file + 1) * self.per_file]

  def facts(self) -> dict[str, Any]:
    """Returns what JSON says of it; the clips by their hash."""
    values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    digest = hashlib.sha256(self.clips.astype("<i8").tobytes()).hexdigest()
    return {**values, "size": list(self.size), "clips": digest}


class Row(NamedTuple):
  """A record: which clip it is of, its captions, its arrays."""

  id: str
  captions: list[str]
  arrays: dict[str, np.ndarray]


def facts(
  encoders: Encoders, groups: list[Group], dtype: str, windows: int
) -> dict[str, Any]:
  """Returns what cache.json holds; "key" is a hash of all else."""
  values = {
    "version": VERSION,
    "dtype": dtype,
    "windows": windows,
    "encoders": encoders.facts(),
    "groups": [group.facts() for group in groups],
  }
  text = json.dumps(values, sort_keys=True)
  return {"key": hashlib.sha256(text.encode()).hexdigest(), **values}


def rooms(
  index: records.Index,
  clips: Int[np.ndarray, " n"],
  num_frames: int,
  fps: float | None,
) -> Int[np.ndarray, " n"]:
  """Returns how many windows each clip has: the frames one can start at."""
  stride = buckets.strides(index.fps[clips], fps)
  last = np.floor((num_frames - 1) * stride + 0.5).astype(np.int64)
  return index.num_frames[clips] - last


def starts(room: int, windows: int) -> Int[np.ndarray, " k"]:
  """Returns where the kept windows of a clip start, `windows` at most.

  All of them if there are no more, else the middles of equal parts.
  """
  count = min(room, windows)
  return (2 * np.arange(count) + 1) * room // (2 * count)


def digest(folder: pathlib.Path, name: str) -> str:
  """Returns a hash of the weights of a component, in either layout.

  Raises:
    InputError: There are none.
  """
  home = folder / name
  if (home / "orbax").is_dir():
    # Whoever loads them verifies that they are as the manifest has them.
    listed = tensorheader.read_json(folder / manifest.NAME).get("files", {})
    files = {n: f for n, f in listed.items() if n.startswith(f"{name}/orbax/")}
    return _hash(files)
  paths = sorted(home.glob("*.safetensors"))
  if not paths:
    raise errors.InputError(f"{home}: holds no weights to tell a cache by.")
  return _hash({path.name: digest_file(path) for path in paths})


def digest_file(path: pathlib.Path) -> str:
  """Returns the SHA-256 of a file."""
  try:
    with path.open("rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as e:
    raise errors.StorageError(f"{path}: {e.strerror}.") from e


def _hash(value: Any) -> str:
  text = json.dumps(value, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def identity(*parts: Any) -> str:
  """Returns a hash of what JSON can hold."""
  return _hash(parts)


def check_encoders(there: Encoders, here: Encoders) -> None:
  """Raises InputError unless a run would encode as a cache was encoded.

  Args:
    there: What made it.
    here: What the run has; `text` is None where it does not read that.
  """
  names = []
  if there.vae != here.vae:
    names.append("model (vae)")
  if None not in (there.text, here.text) and there.text != here.text:
    names.append("model (text_encoder or tokenizer)")
  if here.image and not there.image:
    names.append("model (one without images)")
  elif here.kept != there.kept and (here.image or here.kept):
    names.append("model (one that reads other images, or no motion)")
  if there.dtype != here.dtype:
    names.append(f"dtype ({there.dtype} there, {here.dtype} here)")
  if names:
    raise errors.InputError(
      f"{there.folder}: is a cache of another {', another '.join(names)}; "
      f"{_AGAIN}."
    )


def pack(row: Row) -> bytes:
  """Returns a record as it is stored: in the format of safetensors."""
  # One entry: several would stand in another order each time.
  about = json.dumps([row.id, row.captions])
  return safetensors.numpy.save(row.arrays, metadata={"row": about})


def unpack(data: bytes, where: str) -> Row:
  """Returns a record; its arrays cannot be written to.

  Raises:
    CorruptError: It is none.
  """
  try:
    start = 8 + int.from_bytes(data[:8], "little")
    header = tensorheader.parse_json(data[8:start], where)
    id, captions = json.loads(header.pop("__metadata__")["row"])
    arrays = {}
    for name, entry in header.items():
      first, last = entry["data_offsets"]
      dtype = tensorheader.DTYPES[entry["dtype"]]
      flat = np.frombuffer(data[start + first : start + last], dtype)
      arrays[name] = flat.reshape(entry["shape"])
    return Row(id, captions, arrays)
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    if isinstance(error, errors.VidgenError):
      raise
    raise errors.CorruptError(
      f"{where}: a record is not as it was written; {_AGAIN}."
    ) from error


class Records:
  """The records of a group, by clip; may be sent to another process."""

  def __init__(self, folder: pathlib.Path, group: Group, counts: np.ndarray):
    self._folder, self.group = folder, group
    self._first = np.concatenate([[0], np.cumsum(counts)])
    self._readers: dict[int, Any] = {}
    self._lock = threading.Lock()

  def __getstate__(self) -> dict[str, Any]:
    """Returns what another process needs: no open files."""
    return {**self.__dict__, "_readers": {}, "_lock": None}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._lock = threading.Lock()

  def missing(self, clips: Int[np.ndarray, " m"]) -> int:
    """Returns how many of some clips it does not have."""
    return int((~np.isin(clips, self.group.clips)).sum())

  def read(self, clip: int, id: str, chance: float) -> Row:
    """Returns one of a clip's records: which, a number in [0, 1) decides.

    Args:
      clip: Its number.
      id: What the record has to be of.
      chance: Equal parts of [0, 1) stand for the records.

    Raises:
      CorruptError: Its file is broken, or holds another clip there.
    """
    place = int(np.searchsorted(self.group.clips, clip))
    first, last = self._first[place : place + 2]
    number = int(first) + int(chance * (last - first))
    file = place // self.group.per_file
    number -= int(self._first[file * self.group.per_file])
    path = self._folder / self.group.files[file]
    # A broken file is a RuntimeError, a number beyond its end an IndexError.
    try:
      (data,) = self._reader(file, path).read([number])
    except Exception as error:
      text = " ".join(str(error).split())[:200].rstrip(".")
      raise errors.CorruptError(
        f"{path}: record {number} cannot be read: {text}; {_AGAIN}."
      ) from error
    row = unpack(data, str(path))
    if row.id != id:
      raise errors.CorruptError(
        f"{path}: record {number} is of {row.id}, not of {id}; {_AGAIN}."
      )
    return row

  def _reader(self, file: int, path: pathlib.Path) -> Any:
    """Returns an open file; threads share it."""
    from array_record.python import array_record_module

    with self._lock:
      if file not in self._readers:
        self._readers[file] = array_record_module.ArrayRecordReader(
          os.fspath(path),
          options="readahead_buffer_size:0,max_parallelism:0",
          file_reader_buffer_size=2**15,
        )
      return self._readers[file]


class Cache:
  """A finished cache.

  Attributes:
    folder: Where it is.
    encoders: What made it.
    key: The hash of what it is.
  """

  def __init__(self, folder: str | os.PathLike):
    """Opens a cache.

    Raises:
      InputError: There is none, or it is of another version.
      CorruptError: A file is missing or not as it was written.
    """
    self.folder = pathlib.Path(folder).expanduser()
    if not (self.folder / NAME).is_file():
      raise errors.InputError(
        f"{self.folder}: holds no finished cache; run `vidgen encode "
        f"--config=FILE --out={folder}` first."
      )
    _check_files(self.folder)
    self.facts = tensorheader.read_json(self.folder / NAME)
    if self.facts.get("version") != VERSION:
      raise errors.InputError(
        f"{self.folder}: is a cache of version {self.facts.get('version')}, "
        f"not {VERSION}; {_AGAIN}."
      )
    index = tensorfile.open_file(self.folder / INDEX)
    try:
      self.key = self.facts["key"]
      made_by = Encoders(**self.facts["encoders"])
      self.encoders = dataclasses.replace(made_by, folder=str(self.folder))
      self._records = [self._open(index, g) for g in self.facts["groups"]]
    except (KeyError, TypeError) as error:
      raise errors.CorruptError(
        f"{self.folder / NAME}: is not as it was written; {_AGAIN}."
      ) from error

  def _open(self, index: tensorfile.TensorFiles, item: dict) -> Records:
    clips = index.read(f"{item['name']}.clips")
    counts = index.read(f"{item['name']}.counts")
    values = {**item, "clips": clips, "size": tuple(item["size"])}
    return Records(self.folder, Group(**values), counts)

  def latents(
    self,
    split: records.Split,
    bucket: buckets.Bucket,
    fps: float | None,
    clips: Int[np.ndarray, " n"],
  ) -> Records:
    """Returns the latents of a bucket, all of whose clips are there.

    Raises:
      InputError: They are not; the line says whether data or size differ.
    """
    held = self._of(LATENTS, split)
    size = (bucket.num_frames, bucket.height, bucket.width)
    sized = [r for r in held if r.group.size == size]
    if not sized:
      there = sorted({"x".join(map(str, r.group.size)) for r in held})
      raise errors.InputError(
        f"{self.folder}: is a cache of another size: {', '.join(there)}, not "
        f"{bucket}; {_AGAIN}."
      )
    for some in sized:
      if some.group.fps == fps:
        if count := some.missing(clips):
          raise errors.InputError(
            f"{self.folder}: is a cache of other data: of bucket {bucket} it "
            f"lacks {count} of {len(clips)} clips, which a filter had left "
            f"out; {_AGAIN}."
          )
        return some
    rates = ", ".join(str(r.group.fps) for r in sized)
    raise errors.InputError(
      f"{self.folder}: is a cache of other data: frames at fps={rates}, not "
      f"{fps}; {_AGAIN}."
    )

  def text(self, split: records.Split) -> Records | None:
    """Returns the embeddings of a split's captions, if it has such."""
    return self._of(TEXT, split)[0] if self.encoders.text else None

  def _of(self, kind: str, split: records.Split) -> list[Records]:
    """Returns the records of a kind and split."""
    held = [r for r in self._records if r.group.kind == kind]
    mark, name = records.fingerprint(split), f"{split.name}/{split.split}"
    found = [r for r in held if r.group.fingerprint == mark]
    if not found:
      there = sorted({r.group.split for r in held})
      what = f"{', '.join(there)}, not {name}"
      if name in there:
        what = f"{name} as it was before it was prepared anew"
      raise errors.InputError(
        f"{self.folder}: is a cache of other data: {what}; {_AGAIN}."
      )
    return found


def _check_files(folder: pathlib.Path) -> None:
  """Raises unless every file has the size that it was written with.

  What is in them is checked when it is read: each record has a hash.
  """
  path = folder / manifest.NAME
  if not path.is_file():
    raise errors.CorruptError(f"{path}: missing; {_AGAIN}.")
  files = tensorheader.read_json(path).get("files")
  if not isinstance(files, dict):
    raise errors.CorruptError(f"{path}: lists no files.")
  for name, item in files.items():
    if not tensorheader.is_plain(name) or not isinstance(item, dict):
      raise errors.CorruptError(f"{path}: {name!r} is no file of a cache.")
    if not (folder / name).is_file():
      raise errors.CorruptError(f"{folder / name}: missing; {_AGAIN}.")
    size = (folder / name).stat().st_size
    if size != item.get("size"):
      raise errors.CorruptError(
        f"{folder / name}: has {size} bytes, not as many as were written; "
        f"{_AGAIN}."
      )
