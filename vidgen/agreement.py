"""Whether two evaluations agree as far as their intervals tell.

Two kinds of device never give the same bits; what they have in common are the
metrics of what was sampled.
"""

import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from vidgen import errors, likeness, tensorheader
from vidgen.likeness import Likeness


class Estimate(NamedTuple):
  """A metric of an evaluation.

  Attributes:
    identity: What was measured, of what; None where it was not recorded.
    n: Clips that it is of.
    value: The number.
    low: The lower end of its 95 % interval; None where it has none.
    high: The upper end.
  """

  identity: str | None
  n: int | None
  value: float
  low: float | None
  high: float | None

  def __str__(self) -> str:
    ends = "-"
    if self.low is not None and self.high is not None:
      ends = f"{self.low:.5g} .. {self.high:.5g}"
    return f"{self.value:.5g} ({ends})"


def compare(
  first: Mapping[str, Any],
  second: Mapping[str, Any],
  folders: tuple[pathlib.Path, pathlib.Path],
) -> Likeness:
  """Compares the metrics that two manifests have as "outputs".

  They agree where each number lies within the other's 95 % interval, and is of
  the same thing: as many clips, and the same features, frames and size.

  Args:
    first: Of one evaluation.
    second: Of the other.
    folders: Where they lie.

  Raises:
    InputError: One is no evaluation.
  """
  a, b = (estimates(side) for side in (first, second))
  for found, folder in zip((a, b), folders, strict=True):
    if not found:
      raise errors.InputError(
        f"{folder}: holds no metrics with intervals; measure both runs, vidgen "
        "evaluate --json=FILE, and name the manifests beside those files."
      )
  if a.keys() != b.keys():
    names = tensorheader.listed(sorted(a.keys() ^ b.keys()))
    return Likeness(likeness.DIFFERENT, f"metrics of one of them: {names}")
  if first["metrics"] == second["metrics"] and a == b:
    return Likeness(likeness.IDENTICAL, f"all {len(a)} metrics are equal")
  apart = {name: _apart(a[name], b[name]) for name in a}
  lines = [
    f"{name}: {a[name]} in A, {b[name]} in B; {apart[name] or 'agrees'}"
    for name in a
  ]
  worst = max(likeness.relative(a[name].value, b[name].value) for name in a)
  for name, why in apart.items():
    if why:
      return Likeness(likeness.DIFFERENT, f"{name}: {why}", lines, worst)
  why = f"each of {len(a)} metrics is within the other's 95 % interval"
  return Likeness(likeness.INTERVALS, why, lines, worst)


def estimates(made: Mapping[str, Any]) -> dict[str, Estimate]:
  """Returns the metrics of an evaluation by name; {}: it is none.

  A number that is not finite, which JSON has as text, is nan here.
  """
  if made["kind"] != "metrics":
    return {}
  held, identities, found = made["metrics"], made.get("identities", {}), {}
  for key in held:
    if match := re.fullmatch(r"metrics\.(\w+)\.value", key):
      name = match[1]
      numbers = [
        math.nan if isinstance(number, str) else number
        for part in ("n", "value", "low", "high")
        for number in [held.get(f"metrics.{name}.{part}")]
      ]
      found[name] = Estimate(identities.get(name), *numbers)
  return found


def _apart(a: Estimate, b: Estimate) -> str | None:
  """Returns why two estimates do not agree; None: they do."""
  if a.identity != b.identity:
    return f"is {a.identity} in A, {b.identity} in B"
  if a.n != b.n:
    return f"is of {a.n} clips in A, {b.n} in B"
  if None in (a.low, a.high, b.low, b.high):
    return "has no interval, being of too few clips"
  if a.low <= b.value <= a.high and b.low <= a.value <= b.high:
    return None
  return "one is outside the other's interval"
