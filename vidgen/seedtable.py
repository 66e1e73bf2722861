"""What several runs of one experiment measured: means and their intervals."""

import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Float

from vidgen import errors, likeness, outputs, repro, tensorheader, video

_LEVEL = 0.95


class Row(NamedTuple):
  """One metric over all runs.

  Attributes:
    name: Of the metric.
    mean: Over the runs.
    low: Where the interval of the mean begins; NaN with one run.
    high: Where it ends.
    least: The smallest value of a run.
    most: The largest.
  """

  name: str
  mean: float
  low: float
  high: float
  least: float
  most: float


def interval(
  values: Float[np.ndarray, " n"], level: float = _LEVEL
) -> tuple[float, float]:
  """Returns Student's t interval of the mean of independent values.

  It has n - 1 degrees of freedom, and needs values that are about normal; NaN
  for one value, of which it says nothing.
  """
  n = len(values)
  if n < 2:
    return float("nan"), float("nan")
  half = scipy.stats.t.ppf((1 + level) / 2, n - 1)
  half *= values.std(ddof=1) / np.sqrt(n)
  mean = values.mean()
  return float(mean - half), float(mean + half)


def rows(metrics: Sequence[dict[str, Any]]) -> list[Row]:
  """Returns a row for each metric that all runs have.

  Raises:
    InputError: There is none.
  """
  shared = [n for n in metrics[0] if all(n in one for one in metrics)]
  if not shared:
    raise errors.InputError("the runs have no metric in common.")
  found = []
  for name in shared:
    values = np.array([float(one[name]) for one in metrics])
    ends = float(values.min()), float(values.max())
    # Of infinities that is NaN, of which numpy would warn.
    with np.errstate(invalid="ignore"):
      found.append(Row(name, float(values.mean()), *interval(values), *ends))
  return found


def make(paths: Sequence[str]) -> str:
  """Returns a table in Markdown of the metrics of runs.

  What the runs do not share, besides the seed, is listed below it: a mean over
  runs of two configs is seldom what is wanted.

  Args:
    paths: Folders of runs, with the evaluate.json that may be in them, or
      manifests, or JSON files of evaluations.

  Raises:
    InputError: A run without metrics, or none that all have.
    CorruptError: A file is not as it was written.
  """
  measured, manifests = [], []
  identities: dict[str, str] = {}
  for path in paths:
    metrics, names, manifest = _read(path)
    if not metrics:
      raise errors.InputError(f"{path}: has no metrics.")
    for metric, name in names.items():
      if identities.setdefault(metric, name) != name:
        raise errors.InputError(
          f"{path}: {metric} is {name}, that of others {identities[metric]}: "
          "they have no common mean; measure all alike."
        )
    measured.append(metrics)
    manifests.append(manifest)
  count, made = len(paths), rows(measured)
  lines = [
    f"| metric | mean | {_LEVEL:.0%} interval | lowest | highest |",
    "| --- | --- | --- | --- | --- |",
  ]
  for row in made:
    between = "-" if count < 2 else f"{row.low:.6g} to {row.high:.6g}"
    lines.append(
      f"| {_cell(row.name)} | {row.mean:.6g} | {between} | {row.least:.6g} | "
      f"{row.most:.6g} |"
    )
  known = [manifest for manifest in manifests if manifest is not None]
  # The seed of an evaluation is its bootstrap's.
  runs = [m for m in known if m["command"] != "evaluate"]
  seeds = [str(m["seeds"].get("seed", "-")) for m in runs]
  about = f"n = {count} runs; intervals of the mean by Student's t."
  if seeds:
    about += f" Seeds: {', '.join(seeds)}."
  if len(set(seeds)) < len(seeds):
    about += " A seed is there twice: these runs are not independent."
  lines += ["", about, *_unshared(known)]
  return "\n".join(lines) + "\n"


def write(path: str | pathlib.Path, text: str) -> None:
  """Writes a table.

  Raises:
    StorageError: It could not be written.
  """
  with video.atomic(path) as temporary:
    temporary.write_text(text, encoding="utf-8")


def _read(
  path: str,
) -> tuple[dict[str, Any], dict[str, str], dict[str, Any] | None]:
  """Returns a run's metrics, their identities, and its manifest, if any."""
  place = pathlib.Path(path).expanduser()
  if not place.is_dir():
    held = outputs.read_json(place)
    if "format" not in held and isinstance(held.get("metrics"), dict):
      return _values(held["metrics"]), _identities(held["metrics"]), None
  side = repro.read(place)
  values, names, measured = {}, {}, place / "evaluate.json"
  if measured.exists():
    found = outputs.read_json(measured).get("metrics")
    values, names = _values(found), _identities(found)
  # Training has metrics of its own; of clips there are no others.
  if values and side.manifest["command"] != "train":
    return values, names, side.manifest
  made = likeness.outputs_of(side.manifest, side.folder, side.name)
  return dict(made.get("metrics", {})) | values, names, side.manifest


def _values(metrics: Any) -> dict[str, Any]:
  """Returns the values of an evaluation alone: bounds and counts are none."""
  if not isinstance(metrics, dict):
    return {}
  return outputs.numbers(
    {
      name: item.get("value") if isinstance(item, dict) else item
      for name, item in metrics.items()
    }
  )


def _identities(metrics: Any) -> dict[str, str]:
  """Returns the identity of each metric of an evaluation that has one."""
  items = metrics.items() if isinstance(metrics, dict) else ()
  names = {n: i.get("name") for n, i in items if isinstance(i, dict)}
  return {n: name for n, name in names.items() if isinstance(name, str)}


def _unshared(manifests: list[dict[str, Any]]) -> list[str]:
  """Returns lines on what decides numbers and is not the same in all runs."""
  names = {
    f"{difference.kind} {difference.name}".strip()
    for manifest in manifests[1:]
    for difference in repro.differences(manifests[0], manifest)
    if difference.kind not in ("seed", repro.OTHER)
  }
  if not names:
    return []
  listed = tensorheader.listed(sorted(names))
  return ["", f"Besides the seed the runs differ in: {listed}."]


def _cell(text: str) -> str:
  return text.replace("|", "\\|").replace("\n", " ")
