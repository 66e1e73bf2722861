"""What a run made, in so few words that two runs can be compared by them."""

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence, Set
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from vidgen import errors, fingerprint, ledger, statetree, tensorheader
from vidgen import manifest as manifest_lib

LEDGERS = "clips*.jsonl"
METRICS = "metrics.jsonl"
NO_NUMBERS = ("nan", "inf", "-inf")
# Numbers in it that tell of time, not of what was learnt.
_SPEED = ("seconds_per_step", "videos_per_second", "mfu", "time")


def of_clips(
  folder: pathlib.Path,
  names: Set[str] | None = None,
  failures: Set[int] = frozenset(),
) -> dict[str, Any]:
  """Returns what a sampling job has made, as its ledger tells.

  `digest` is of all clips' frames, or of the files' bytes where a job kept no
  frames.

  Args:
    folder: Of the job.
    names: The job's clips, for a folder may hold those of other jobs, too; None
      takes all.
    failures: The numbers of clips that failed before they had a name.
  """
  clips, failed = [], []
  for record in ledger.read(folder):
    name = record["name"]
    if names is not None and not (
      record["index"] in failures if name is None else name in names
    ):
      continue
    if record.get("status", "done") != "done":
      failed.append(
        {name: record.get(name) for name in ("index", "name", "error")}
      )
      continue
    files = record.get("files", [])
    name = record.get("name") or pathlib.Path(files[0]).stem if files else None
    clips.append(
      {
        "index": record["index"],
        "name": name,
        "frames_sha256": record.get("frames_sha256"),
        "shape": _shape(record),
        "sha256": record.get("sha256", {}),
      }
    )
  return _told(clips, failed)


def _shape(record: Mapping[str, Any]) -> list[int] | None:
  """The frames, height and width of a clip, where its ledger tells them."""
  frames, size = record.get("frames"), record.get("size")
  return [frames, *size] if frames and size else None


def together(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Returns what the shards of a job have made, of what each has."""
  clips, failed = (
    sorted((one for part in parts for one in part[kind]), key=_index)
    for kind in ("clips", "failed")
  )
  return _told(clips, failed)


def _index(clip: Mapping[str, Any]) -> int:
  return clip["index"]


def _told(
  clips: list[dict[str, Any]], failed: list[dict[str, Any]]
) -> dict[str, Any]:
  marks = [
    [clip["index"], clip["frames_sha256"] or clip["sha256"]] for clip in clips
  ]
  return {
    "kind": "clips",
    "done": len(clips),
    "failed": failed,
    "digest": fingerprint.digest(marks),
    "clips": clips,
  }


def state_digest(state: PyTree) -> str:
  """Returns a SHA-256 of the names, dtypes, shapes and bits of a state.

  It does not depend on the mesh that the state lies on, nor on what a
  checkpoint of it looks like: Orbax names its files at random. Every process
  calls this; one array at a time is brought to the host.
  """
  digest = hashlib.sha256()
  for name, leaf in sorted(statetree.named(state).items()):
    whole = _on_host(leaf)
    if jax.process_index() == 0:
      head = [name, whole.dtype.name, list(whole.shape)]
      digest.update(json.dumps(head).encode())
      digest.update(np.ascontiguousarray(whole).reshape(-1).view(np.uint8))
  return digest.hexdigest()


def _on_host(leaf: Any) -> np.ndarray:
  """Returns an array whole, whoever holds its parts."""
  if not isinstance(leaf, jax.Array):
    return np.asarray(leaf)
  if leaf.is_fully_addressable or leaf.is_fully_replicated:
    return statetree.on_host({"": leaf})[""]
  return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def of_training(
  workdir: pathlib.Path, checkpoint: pathlib.Path | None, state_sha256: str
) -> dict[str, Any]:
  """Returns what a training run has come to.

  Args:
    workdir: The run's folder.
    checkpoint: That of the last step, which is within.
    state_sha256: From `state_digest`.
  """
  step, listed = None, None
  if checkpoint is not None:
    step = int(checkpoint.name)
    path = checkpoint / manifest_lib.NAME
    listed = hashlib.sha256(path.read_bytes()).hexdigest()
  return {
    "kind": "state",
    "step": step,
    "state_sha256": state_sha256,
    "checkpoint_sha256": listed,
    "metrics": last_metrics(workdir / METRICS),
  }


def last_metrics(path: pathlib.Path) -> dict[str, int | float | str]:
  """Returns the numbers of the last whole line of metrics; {} without any."""
  try:
    lines = path.read_bytes().split(b"\n")
  except OSError:
    return {}
  for line in reversed(lines):
    try:
      record = json.loads(line)
    except ValueError:
      continue
    if isinstance(record, dict):
      return {k: v for k, v in numbers(record).items() if k not in _SPEED}
  return {}


def is_number(value: Any) -> bool:
  """Says whether JSON's value is a number, or the text of one of `NO_NUMBERS`.

  JSON has no word for those.
  """
  if isinstance(value, str):
    return value in NO_NUMBERS
  return isinstance(value, int | float) and not isinstance(value, bool)


def numbers(record: Mapping[str, Any]) -> dict[str, int | float | str]:
  """Returns the numbers of a record, by their dotted names; see `is_number`."""
  pairs = fingerprint.fields(fingerprint.plain(record))
  return {name: value for name, value in pairs if is_number(value)}


def of_metrics(record: Mapping[str, Any]) -> dict[str, Any]:
  """Returns what an evaluation has measured: the numbers of its record."""
  metrics = record.get("metrics", {})
  names = {name: one["name"] for name, one in metrics.items()}
  return {"kind": "metrics", "metrics": numbers(record), "identities": names}


def read_json(path: pathlib.Path, limit: int = 2**30) -> dict[str, Any]:
  """Returns the JSON object of a manifest, which lists many clips perhaps.

  Raises:
    InputError: There is no such file.
    CorruptError: It is no JSON object, or one of more than `limit` bytes.
  """
  if tensorheader.regular_size(path) > limit:
    raise errors.CorruptError(f"{path}: more than {limit} bytes.")
  try:
    return tensorheader.parse_json(path.read_bytes(), str(path))
  except OSError as error:
    raise errors.StorageError(f"{path}: {error.strerror}.") from error
