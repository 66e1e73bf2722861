"""What an evaluation found: a table for people, JSON for programs."""

import dataclasses
import io
import json
from typing import Any, NamedTuple

import rich.box
import rich.console
import rich.table

from vidgen import fingerprint
from vidgen.metrics import collect, intervals

_NAMED = 10


class Result(NamedTuple):
  """One metric.

  Attributes:
    name: Its identity: what was measured, of what frames, of how many clips.
    estimate: The number and its 95 % interval.
    n: Clips that it is of.
    skipped: Clips that it could not be had of.
    clips: The number of each clip, where it has one.
  """

  name: str
  estimate: intervals.Estimate
  n: int
  skipped: list[collect.Skip]
  clips: dict[str, float]


@dataclasses.dataclass
class Report:
  """All metrics of an evaluation, and of what.

  Attributes:
    metrics: By their short names, "psnr".
    generated: The set that was measured.
    reference: What it was compared with.
    missing: Names that "reference" and "generated" lack of each other.
    versions: Of what can change a number.
    settings: The flags.
  """

  metrics: dict[str, Result]
  generated: collect.Source
  reference: collect.Source | None
  missing: dict[str, list[str]]
  versions: dict[str, str]
  settings: dict[str, Any]

  @property
  def left_out(self) -> int:
    """Returns how many clips that were asked for a metric could not be had of.

    Who asks for the first n has got them.
    """
    if self.settings.get("n") is not None:
      return 0
    skips = [skip for r in self.metrics.values() for skip in r.skipped]
    return len({skip.clip for skip in skips})

  def to_json(self) -> str:
    """Returns the report as JSON; what is not finite is text, "nan"."""
    metrics = {
      key: {
        "name": r.name,
        "value": r.estimate.value,
        "low": r.estimate.low,
        "high": r.estimate.high,
        "n": r.n,
        "skipped": len(r.skipped),
        "skips": [skip._asdict() for skip in r.skipped],
        "clips": r.clips,
      }
      for key, r in self.metrics.items()
    }
    content = {
      "metrics": metrics,
      "reference": self._set(self.reference, "reference"),
      "generated": self._set(self.generated, "generated"),
      "settings": self.settings,
      "versions": self.versions,
    }
    plain = fingerprint.plain(content)
    return json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False)

  def __str__(self) -> str:
    """Returns the table, and below it what was left out."""
    table = rich.table.Table(box=rich.box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("metric")
    for name in ("value", "95 % interval", "n", "skipped"):
      table.add_column(name, justify="right")
    table.add_column("identity", overflow="fold")
    for key, r in self.metrics.items():
      value, low, high = r.estimate
      interval = "-" if low is None else f"{_number(low)} .. {_number(high)}"
      row = (_number(value), interval, str(r.n), str(len(r.skipped)), r.name)
      table.add_row(key, *row)
    stream = io.StringIO()
    # Wide enough for every row: what reads it may be a file.
    rich.console.Console(file=stream, width=160, color_system=None).print(table)
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    lines = [line for line in lines if line]
    return "\n".join([*lines, *self._left_out()])

  def _left_out(self) -> list[str]:
    lines = []
    for side, names in self.missing.items():
      lines += _listed(f"not in the {side} set", names)
    reasons = {
      f"{skip.clip} ({skip.reason.rstrip('.')})": None
      for result in self.metrics.values()
      for skip in result.skipped
    }
    return lines + _listed("skipped", list(reasons))

  def _set(
    self, source: collect.Source | None, side: str
  ) -> dict[str, Any] | None:
    if source is None:
      return None
    return {
      "path": source.path,
      "clips": len(source.items),
      "read": len(source.read),
      "sha256": source.digest(),
      "missing": self.missing.get(side, []),
    }


def _listed(title: str, names: list[str]) -> list[str]:
  lines = [f"{title}: {len(names)}"] if names else []
  lines += [f"  {name}" for name in names[:_NAMED]]
  if len(names) > _NAMED:
    lines.append(f"  ... and {len(names) - _NAMED} more")
  return lines


def _number(value: float) -> str:
  return f"{value:.5g}"
