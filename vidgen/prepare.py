"""Prepares a dataset: clips, captions and an index, for training to read."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import shutil
import warnings
from typing import Any

from vidgen import (
  errors,
  filelock,
  manifest,
  progress,
  tensorfile,
  tensorheader,
  video,
)
from vidgen.data import records, workers

OPTIONS = "options.json"
QUARANTINE = "quarantine.jsonl"

# Held-out and validation clips: one for so many of the training split.
_ONE_IN = 20


@dataclasses.dataclass
class PrepareConfig:
  """What to prepare, and where.

  Attributes:
    dataset: "moving_shapes", "orbiting_solids" or "video_folder".
    data_dir: The folder of all datasets; each has one of its own in it.
    source: The folder of videos and captions. For video_folder.
    num_clips: Of the training split; a twentieth of it, and at least one, is
      made for validation and held_out each. For moving_shapes and
      orbiting_solids.
    two_share: The share of clips that show two things. For moving_shapes.
    num_frames: Views of an orbit. For orbiting_solids.
    validation_share: The share of videos held from training. For video_folder.
    max_frames: Cuts longer videos; None keeps them. For video_folder.
    seed: Of all that is drawn.
    workers: Processes that make clips; the clips are the same. For
      moving_shapes and orbiting_solids.
  """

  dataset: str = "moving_shapes"
  data_dir: str = "data"
  source: str | None = None
  num_clips: int | None = None
  two_share: float | None = None
  num_frames: int | None = None
  validation_share: float | None = None
  max_frames: int | None = None
  seed: int = 0
  workers: int = 1


# The fields that one dataset alone has, and their defaults.
_OWN: dict[str, dict[str, Any]] = {
  "moving_shapes": {"num_clips": 1000, "two_share": 0.25},
  "orbiting_solids": {"num_clips": 1000, "num_frames": 21},
  "video_folder": {
    "source": None,
    "validation_share": 0.0,
    "max_frames": None,
  },
}


@dataclasses.dataclass(frozen=True)
class Report:
  """What was prepared.

  Attributes:
    folder: Where it is.
    clips: Records of each split.
    quarantined: How many files were left out.
    was_there: Whether it was there already, of the same options.
  """

  folder: pathlib.Path
  clips: dict[str, int]
  quarantined: int
  was_there: bool

  def __str__(self) -> str:
    """Returns a line."""
    counts = ", ".join(f"{name} {count}" for name, count in self.clips.items())
    state = "is already prepared" if self.was_there else "is prepared"
    left_out = f"; {self.quarantined} left out" if self.quarantined else ""
    return f"{self.folder} {state}: {counts}{left_out}."


def run(config: PrepareConfig, told: progress.Progress | None = None) -> Report:
  """Prepares a dataset, unless it is there.

  It appears whole, at the end. What a killed run left is removed.

  Raises:
    InputError: A wrong argument, another run at the same folder, a folder with
      a dataset of other options, or videos of which none can be used.
    StorageError: The disk is full, or writing fails otherwise.
  """
  options = _checked(config)
  told = told or progress.Progress()
  home = pathlib.Path(config.data_dir).expanduser() / config.dataset
  made = [path for path in (home, *home.parents) if not path.exists()]
  target = home / records.VERSION
  if target.exists():
    return _report(target, options)
  try:
    with filelock.folder(home, "another run is preparing it"):
      if target.exists():
        return _report(target, options)
      draft = home / ".draft"
      try:
        shutil.rmtree(draft, ignore_errors=True)
        with workers.mapping(config.workers) as each:
          folder = _build(draft, config.dataset, options, told, each)
        _write_json(folder / OPTIONS, options)
        manifest.write(folder)
        for path in [*folder.rglob("*"), folder]:
          tensorfile.sync(path)
        folder.rename(target)
        tensorfile.sync(home)
      finally:
        shutil.rmtree(draft, ignore_errors=True)
  except OSError as error:
    if isinstance(error, errors.VidgenError):
      raise
    raise video.storage_error(target, error) from error
  finally:
    # Only an empty folder goes.
    for path in made:
      with contextlib.suppress(OSError):
        path.rmdir()
  report = dataclasses.replace(_report(target, options), was_there=False)
  if report.quarantined:
    warnings.warn(
      f"{report.quarantined} files of {config.source} cannot be used; "
      f"{target / QUARANTINE} has the reasons.",
      stacklevel=2,
    )
  return report


def _checked(config: PrepareConfig) -> dict[str, Any]:
  """Returns the options that make the dataset what it is."""
  if config.dataset not in _OWN:
    raise errors.InputError(
      f"dataset: {config.dataset!r} is not one of {tuple(_OWN)}."
    )
  own = _OWN[config.dataset]
  for other, fields in _OWN.items():
    for name in fields:
      if name not in own and getattr(config, name) is not None:
        raise errors.InputError(f"{name}: is for {other} only; drop it.")
  options: dict[str, Any] = {"dataset": config.dataset, "seed": config.seed}
  for name, default in own.items():
    value = getattr(config, name)
    options[name] = default if value is None else value
  _check_numbers(options)
  if config.workers < 1:
    raise errors.InputError(f"workers: {config.workers} is not positive.")
  if config.workers > 1 and config.dataset == "video_folder":
    raise errors.InputError("workers: is for clips that are made; drop it.")
  if config.dataset == "video_folder":
    if not config.source:
      raise errors.InputError("source: name the folder of videos.")
    options["source"] = os.path.abspath(os.path.expanduser(config.source))
  return options


def _check_numbers(options: dict[str, Any]) -> None:
  for name in ("num_clips", "num_frames", "max_frames"):
    if options.get(name) is not None and options[name] < 1:
      raise errors.InputError(f"{name}: {options[name]} is not positive.")
  for name in ("two_share", "validation_share"):
    # The comparison is false for a NaN too.
    if name in options and not 0 <= options[name] <= 1:
      raise errors.InputError(f"{name}: {options[name]} is not in [0, 1].")
  if options["seed"] < 0:
    raise errors.InputError(f"seed: {options['seed']} is negative.")


def _build(
  draft: pathlib.Path,
  dataset: str,
  options: dict[str, Any],
  told: progress.Progress,
  each: workers.Map,
) -> pathlib.Path:
  """Writes a dataset below `draft` and returns its folder."""
  # Takes a second to import.
  from vidgen.data import builders, video_folder

  kept = {k: v for k, v in options.items() if k != "dataset"}
  quarantined = {}
  if "num_clips" in kept:
    few = max(1, kept["num_clips"] // _ONE_IN)
    kept |= {"num_validation": few, "num_held_out": few}
  if dataset == "moving_shapes":
    builder = builders.MovingShapes(
      data_dir=draft,
      options=builders.MovingShapesOptions(**kept),
      each=each,
    )
  elif dataset == "orbiting_solids":
    builder = builders.OrbitingSolids(
      data_dir=draft,
      options=builders.OrbitingSolidsOptions(**kept),
      each=each,
    )
  else:
    with told.stage("scan"):
      plan = video_folder.scan(video_folder.Options(**kept), told.step)
    builder = builders.VideoFolder(data_dir=draft, plan=plan)
    quarantined = plan.quarantined
  with told.stage("write"), contextlib.redirect_stdout(io.StringIO()):
    # It praises what it writes.
    builder.download_and_prepare()
  folder = pathlib.Path(builder.data_dir)
  if quarantined:
    lines = [
      json.dumps({"file": file, "reason": reason}, ensure_ascii=False) + "\n"
      for file, reason in quarantined.items()
    ]
    (folder / QUARANTINE).write_text("".join(lines), encoding="utf-8")
  return folder


def _report(folder: pathlib.Path, options: dict[str, Any]) -> Report:
  """Returns what a prepared dataset holds, if it is of these options."""
  written = tensorheader.read_json(folder / OPTIONS)
  for name, value in options.items():
    if written.get(name) != value:
      raise errors.InputError(
        f"{folder}: is prepared with {name}={written.get(name)}, not {value}; "
        "remove it, or name another data_dir."
      )
  clips = {
    path.stem.removeprefix("index-"): _count_lines(path)
    for path in sorted(folder.glob("index-*.jsonl"))
  }
  quarantined = folder / QUARANTINE
  left_out = _count_lines(quarantined) if quarantined.exists() else 0
  return Report(folder, clips, left_out, was_there=True)


def _count_lines(path: pathlib.Path) -> int:
  with open(path, "rb") as file:
    return sum(1 for _ in file)


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
  path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
