"""What a run left in its folder, read for people to look at.

Everything here may come from elsewhere or be half written: a part that cannot
be read is left out or said to be bad, and never ends the reading.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from vidgen import errors, ledger, posters

# What a clip is shown by, the best first; a folder of frames has no suffix.
_SHOWN = ((".mp4", "video"), (".gif", "image"), ("", "frames"))

# A curve has more points than a screen has columns beyond this.
POINTS = 3000

# Longer lists and texts of a manifest are told by their length.
_LISTED, _TEXT, _FACTS = 32, 4000, 1500

# Not drawn as curves.
_NO_CURVE = ("step", "time")


@dataclasses.dataclass
class Clip:
  """One video that a run made, or should have made.

  Attributes:
    status: "done", "failed", or "missing": done, but its files are not there.
    source: The file it is played from, or the first frame of a folder; its
      place in the run's folder.
    kind: How that is played: "video", "image", "frames", or "" for not at all.
    step: The step of training it was made at; None for samples of a job.
    settings: What else was set for it, such as `num_steps`.
    metrics: What was measured on it, by name.
    hashes: SHA-256 by what follows the name in a file's name, and of the raw
      frames under "raw".
  """

  name: str
  status: str = "done"
  error: str = ""
  where: str = ""
  prompt: str = ""
  negative_prompt: str = ""
  index: int | None = None
  seed: int | None = None
  clip: int | None = None
  step: int | None = None
  source: str | None = None
  kind: str = ""
  height: int | None = None
  width: int | None = None
  frames: int | None = None
  fps: float | None = None
  seconds: float | None = None
  settings: dict[str, str] = dataclasses.field(default_factory=dict)
  metrics: dict[str, float] = dataclasses.field(default_factory=dict)
  hashes: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Run:
  """A run's folder.

  Attributes:
    facts: The manifest, or the config of a run without one, as flat fields.
    curves: Of each metric of training its steps and values; see `thin`.
    goodput: Where the time of training went, as `vidgen.goodput` keeps it.
    evaluations: The results of each file of `vidgen evaluate`, by metric.
    left: How many clips a sampling job has yet to make, where it is known.
    took: Seconds of all attempts, how many there were, and of how many the
      seconds are not known: they were killed, or are at work.
  """

  folder: pathlib.Path
  clips: list[Clip]
  facts: dict[str, str]
  curves: dict[str, Float[np.ndarray, "_k n"]]
  goodput: dict[str, Any]
  evaluations: dict[str, dict[str, Any]]
  left: int | None = None
  took: tuple[float, int, int] | None = None


def load(folder: pathlib.Path) -> Run:
  """Reads the folder of a sampling job or of a training run.

  Raises:
    InputError: There is no such folder, or nothing of a run is in it.
  """
  if not folder.is_dir():
    raise errors.InputError(f"{folder}: there is no such folder of a run.")
  sizes = _sizes(folder)
  clips = [_clip(record, folder, sizes) for record in ledger.read(folder)]
  run = Run(
    folder,
    clips + _samples(folder),
    _facts(folder),
    _curves(folder / "metrics.jsonl"),
    _object(folder / "goodput.json"),
    {
      path.stem: metrics
      for path in sorted(folder.glob("evaluate*.json"))
      if isinstance(metrics := _object(path).get("metrics"), dict)
    },
  )
  for evaluation in run.evaluations.values():
    _measure(run.clips, evaluation)
  run.left, run.took = _left(folder, clips), _took(folder)
  if not any((run.clips, run.facts, run.curves, run.evaluations)):
    raise errors.InputError(
      f"{folder}: holds no run: no clips.jsonl, metrics.jsonl, manifest.json "
      "or evaluate*.json; name the --out of a job or the --workdir of training."
    )
  return run


def thin(points: Float[np.ndarray, "2 n"]) -> Float[np.ndarray, "_k m"]:
  """Returns about `POINTS` points of a curve, with the extremes of each part.

  So that a spike of one step is seen whatever the length of the run. Of what
  was left out a third row tells the mean of each point's part, which is what
  can be smoothed: extremes lie to one side.
  """
  count = points.shape[1]
  if count <= POINTS:
    return points
  keep, means = {0, count - 1}, np.empty(count)
  for part in np.array_split(np.arange(count), POINTS // 2):
    values = points[1, part]
    keep |= {part[np.argmin(values)], part[np.argmax(values)]}
    means[part] = values.mean()
  return np.vstack([points, means])[:, sorted(keep)]


def _lines(path: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Yields the objects of a file of JSON lines; what is torn is left out."""
  with path.open("rb") as file:
    for line in file:
      try:
        value = json.loads(line)
      except (ValueError, RecursionError):
        continue
      if isinstance(value, dict):
        yield value


def _object(path: pathlib.Path) -> dict[str, Any]:
  """Returns the JSON object in a file; an empty one if there is none."""
  try:
    value = json.loads(path.read_bytes())
  except (OSError, ValueError, RecursionError):
    return {}
  return value if isinstance(value, dict) else {}


def _sizes(folder: pathlib.Path) -> dict[str, int]:
  """Returns the bytes of each file in a folder; of a folder in it, -1."""
  sizes = {}
  with os.scandir(folder) as entries:
    for entry in entries:
      if entry.is_dir():
        sizes[entry.name] = -1
      elif entry.is_file():
        # Another part of the job may rename what it has just written.
        with contextlib.suppress(FileNotFoundError):
          sizes[entry.name] = entry.stat().st_size
  return sizes


def _clip(
  record: Mapping[str, Any], folder: pathlib.Path, sizes: Mapping[str, int]
) -> Clip:
  """Returns what a line of the ledger says, and whether it is still so."""
  files = [f for f in _list(record.get("files")) if isinstance(f, str)]
  size = [number(x, int) for x in _list(record.get("size"))]
  name = record.get("name")
  if not isinstance(name, str):
    # Lines of an older make.
    name = re.sub(r"\.\w+$", "", files[0]) if files else "clip"
  clip = Clip(
    name=name,
    status="failed" if record.get("status") == "failed" else "done",
    error=_text(record.get("error")),
    where=_text(record.get("where")),
    prompt=_text(record.get("prompt")),
    negative_prompt=_text(record.get("negative_prompt")),
    index=number(record.get("index"), int),
    seed=number(record.get("seed"), int),
    clip=number(record.get("clip"), int),
    height=size[0] if len(size) == 2 else None,
    width=size[1] if len(size) == 2 else None,
    frames=number(record.get("frames"), int),
    fps=number(record.get("fps"), float),
    seconds=number(record.get("seconds"), float),
    settings={
      key: _text(record[key])
      for key in ("num_steps", "guidance_scale", "sampler", "image")
      if record.get(key) is not None
    },
    hashes=_hashes(record, name),
  )
  if clip.status == "done":
    counted = record.get("bytes")
    counted = counted if isinstance(counted, dict) else {}
    clip.error = _missing(files, counted, sizes)
    if clip.error:
      clip.status = "missing"
    clip.source, clip.kind = _source(folder, files, sizes)
  return clip


def _hashes(record: Mapping[str, Any], name: str) -> dict[str, str]:
  """Returns SHA-256 by suffix: files of two runs differ in their names."""
  listed = record.get("sha256")
  hashes = listed if isinstance(listed, dict) else {}
  hashes = {_text(k).removeprefix(name): _text(v) for k, v in hashes.items()}
  if frames := record.get("frames_sha256"):
    hashes["raw"] = _text(frames)
  return hashes


def _missing(
  files: list[str], counted: Mapping[str, Any], sizes: Mapping[str, int]
) -> str:
  """Says which of a clip's files is not as its line has it; "" if all are."""
  if not files:
    return "the ledger names no file"
  for file in files:
    # Names of the folder itself are plain: nothing leads out of it.
    if file not in sizes:
      return f"{file}: not there"
    want = number(counted.get(file), int)
    if sizes[file] >= 0 and want is not None and sizes[file] != want:
      return f"{file}: {sizes[file]} bytes, {want} when it was written"
  return ""


def _source(
  folder: pathlib.Path, files: list[str], sizes: Mapping[str, int]
) -> tuple[str | None, str]:
  """Returns the file that a clip is played from, and how it is played."""
  for suffix, kind in _SHOWN:
    for file in files:
      if os.path.splitext(file)[1] != suffix or file not in sizes:
        continue
      if kind != "frames":
        return file, kind
      if (folder / file / "000000.png").is_file():
        return f"{file}/000000.png", kind
  return None, ""


def _measure(clips: list[Clip], evaluation: dict[str, Any]) -> None:
  """Adds to each clip what an evaluation measured on it alone."""
  for metric, result in evaluation.items():
    values = _numbers(result.get("clips") if isinstance(result, dict) else None)
    for clip in clips if values else ():
      # Samples of training are measured as they are made.
      if clip.step is None and clip.name in values:
        clip.metrics[metric] = values[clip.name]


def _samples(folder: pathlib.Path) -> list[Clip]:
  """Returns the fixed samples of training, in order of step and name."""
  clips = []
  for home in sorted(folder.glob("samples/*/")):
    if not home.name.isdigit():
      continue
    metrics = _object(home / "metrics.json")
    for path in sorted(home.glob("*.mp4")):
      clip = Clip(
        name=path.stem,
        step=int(home.name),
        source=path.relative_to(folder).as_posix(),
        kind="video",
        metrics=_numbers(metrics.get(path.stem)),
      )
      try:
        facts = posters.probe(path)
        clip.height, clip.width, clip.frames, clip.fps = facts
      except errors.InputError as error:
        clip.status, clip.error = "missing", str(error)
      clips.append(clip)
  return clips


def _manifests(folder: pathlib.Path) -> list[str]:
  """Returns the names of the manifests there are, the one to show first."""
  # Shards of a job have one each, which differ in little.
  shards = sorted(path.name for path in folder.glob("manifest-*.json"))
  return [n for n in ("manifest.json", *shards) if (folder / n).exists()]


def _facts(folder: pathlib.Path) -> dict[str, str]:
  """Returns the manifest as flat fields, or else the config of training."""
  for name in (*_manifests(folder)[:1], "config.json"):
    if not (folder / name).exists():
      continue
    value = _object(folder / name)
    if not value:
      return {name: "cannot be read"}
    prefix = "config" if name == "config.json" else ""
    if isinstance(value.get("argv"), list):
      value["argv"] = shlex.join(map(_text, value["argv"]))
    facts = {}
    for key, text in _fields(value, prefix):
      facts[key] = text
      if len(facts) == _FACTS:
        facts["..."] = f"more is in {name}"
        break
    return facts
  return {}


def _left(folder: pathlib.Path, clips: list[Clip]) -> int | None:
  """Returns how many clips the last job in a folder has yet to make.

  Until it has ended, other jobs' clips of the same numbers pass for its own.
  """
  held = [_object(folder / name) for name in _manifests(folder)]
  held = [one for one in held if number(one.get("planned"), int) is not None]
  if not held:
    return None
  last = max(held, key=lambda one: _text(one.get("start")))
  settled = len({clip.index for clip in clips})
  made, config = last.get("outputs"), last.get("config")
  whole = isinstance(config, dict) and config.get("shard", "0/1") == "0/1"
  if whole and isinstance(made, dict) and isinstance(made.get("done"), int):
    settled = made["done"] + len(_list(made.get("failed")))
  return max(0, int(last["planned"]) - settled)


def _took(folder: pathlib.Path) -> tuple[float, int, int] | None:
  """Returns the time of all attempts; see `Run`."""
  for name in _manifests(folder)[:1]:
    attempts = _list(_object(folder / name).get("attempts"))
    attempts = [one for one in attempts if isinstance(one, dict)]
    known = [number(one.get("seconds"), float) for one in attempts]
    known = [seconds for seconds in known if seconds is not None]
    if known:
      return sum(known), len(attempts), len(attempts) - len(known)
  return None


def _fields(value: Any, name: str) -> Iterator[tuple[str, str]]:
  """Yields the fields of JSON, "config.seed" and the like, as text."""
  if isinstance(value, list):
    if len(value) > _LISTED:
      yield name, f"[{len(value)} entries]"
      return
    if not any(isinstance(x, dict | list) for x in value):
      yield name, ", ".join(_text(x) for x in value)
      return
    value = dict(enumerate(value))
  if isinstance(value, dict):
    if len(value) > 8 * _LISTED:
      yield name, f"{{{len(value)} entries}}"
      return
    for key, item in value.items():
      yield from _fields(item, f"{name}.{key}" if name else str(key))
    return
  text = _text(value)
  if len(text) > _TEXT:
    text = f"{text[:_TEXT]} ... ({len(text)} characters)"
  yield name, text


def _curves(path: pathlib.Path) -> dict[str, Float[np.ndarray, "_k n"]]:
  """Returns each metric's steps and values; those that are no number left out.

  A step that is there twice counts as it is there last.
  """
  values: dict[str, dict[float, float]] = {}
  for record in _lines(path) if path.exists() else ():
    step = number(record.get("step"), float)
    if step is None:
      continue
    for name, value in record.items():
      value = number(value, float)
      if name not in _NO_CURVE and value is not None:
        values.setdefault(name, {})[step] = value
  return {
    name: thin(np.asarray(sorted(points.items()), np.float64).T)
    for name, points in values.items()
  }


def _list(value: Any) -> list[Any]:
  return value if isinstance(value, list) else []


def _numbers(value: Any) -> dict[str, float]:
  """Returns the finite numbers of a JSON object."""
  items = value.items() if isinstance(value, dict) else ()
  numbers = {str(name): number(item, float) for name, item in items}
  return {name: item for name, item in numbers.items() if item is not None}


def _text(value: Any) -> str:
  """Returns JSON's value as text, a string as it is."""
  if value is None:
    return ""
  return value if isinstance(value, str) else json.dumps(value)


def number(value: Any, kind: Callable[[Any], Any]) -> Any:
  """Returns a finite number as `kind`; None for anything else."""
  if isinstance(value, bool) or not isinstance(value, int | float):
    return None
  # False for NaN; beyond this an int is no float, and JSON no number of JS's.
  return kind(value) if -1e300 < value < 1e300 else None
