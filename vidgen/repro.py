"""Whether two runs gave the same, and if not, what they did not share."""

import dataclasses
import fnmatch
import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from vidgen import (
  agreement,
  errors,
  fingerprint,
  likeness,
  outputs,
  provenance,
  video,
)
from vidgen.likeness import Likeness

# What decides numbers, in the order in which it is named as the cause.
CAUSES = (
  "command",
  "config",
  "seed",
  "weights",
  "tokenizer",
  "data",
  "inputs",
  "code",
  "versions",
  "device",
  "mesh",
  "flags",
  "attempts",
)
OTHER = "other"

# Fields of a config that only name weights and words, whose hashes tell more.
_NAMES = (
  "checkpoint",
  "*.checkpoint",
  "*.parts.*",
  "*.tokenizer",
  "lora",
  "lora.*",
)
# What a manifest must have, by type, to be compared.
_KEYS = {
  "command": str,
  "config": dict,
  "seeds": dict,
  "weights": dict,
  "tokenizer": dict,
  "data": dict,
  "inputs": dict,
  "code": dict,
  "versions": dict,
  "system": dict,
  "devices": dict,
  "flags": dict,
  "exit": dict,
  "attempts": list,
  "idle": list,
}


class Side(NamedTuple):
  """One of two runs.

  Attributes:
    name: As the user named it.
    folder: Where its files are.
    manifest: What it recorded.
  """

  name: str
  folder: pathlib.Path
  manifest: dict[str, Any]


class Difference(NamedTuple):
  """A field that two runs do not share.

  Attributes:
    kind: One of `CAUSES`, or "other": it should change no number.
    name: Of the field.
    first: Its value in the first run, as text; "-" where it has none.
    second: In the second.
  """

  kind: str
  name: str
  first: str
  second: str

  def __str__(self) -> str:
    return f"{self.name}: {_short(self.first)} in A, {_short(self.second)} in B"


@dataclasses.dataclass
class Report:
  """What `check` found."""

  first: str
  second: str
  differences: list[Difference]
  outputs: Likeness

  @property
  def verdict(self) -> str:
    """Returns one of those that `vidgen.likeness` names."""
    return self.outputs.verdict

  @property
  def why(self) -> str:
    """Returns the reason of the verdict, in a line.

    Where outputs differ it names the first recorded cause.
    """
    if self.verdict == likeness.IDENTICAL:
      return self.outputs.why
    causes = [d for d in self.differences if d.kind != OTHER]
    cause = (
      f"{causes[0].kind}: {causes[0]}"
      if causes
      else "nothing that is recorded differs"
    )
    return f"{self.outputs.why}; {cause}"

  def __str__(self) -> str:
    causes = [d for d in self.differences if d.kind != OTHER]
    others = [d for d in self.differences if d.kind == OTHER]
    lines = [f"A: {self.first}", f"B: {self.second}", "what decides numbers:"]
    lines += [f"  {d.kind}: {d}" for d in causes] or ["  no difference"]
    lines += ["what should not:"]
    lines += [f"  {d}" for d in others] or ["  no difference"]
    lines += ["outputs:"]
    lines += [f"  {line}" for line in self.outputs.lines]
    return "\n".join([*lines, f"{self.verdict}: {self.why}."])

  def as_dict(self) -> dict[str, Any]:
    """Returns all of it, for programs."""
    return {
      "first": self.first,
      "second": self.second,
      "verdict": self.verdict,
      "why": self.why,
      "differences": [d._asdict() for d in self.differences],
      "outputs": dataclasses.asdict(self.outputs),
    }


def check(
  first: str | pathlib.Path,
  second: str | pathlib.Path,
  tolerance: float | None = None,
  within_intervals: bool = False,
) -> Report:
  """Compares two runs, each a folder or a manifest in one.

  Args:
    first: One of them.
    second: The other.
    tolerance: The largest difference that counts as rounding: of a pixel, in
      units of 0 to 255, or of a metric, relative; None asks for equal bits.
    within_intervals: Compares two evaluations by their 95 % intervals.

  Raises:
    InputError: There is no manifest, or nothing that could be compared; or
      both a tolerance and intervals.
    CorruptError: A manifest is not as it was written.
  """
  if tolerance is not None and not tolerance >= 0:
    raise errors.InputError(f"--tolerance={tolerance}: give 0 or more.")
  if tolerance is not None and within_intervals:
    raise errors.InputError(
      "--within_intervals: has no --tolerance; the intervals are it."
    )
  sides = [read(first), read(second)]
  made = [likeness.outputs_of(s.manifest, s.folder, s.name) for s in sides]
  folders = (sides[0].folder, sides[1].folder)
  if within_intervals:
    like = agreement.compare(*made, folders)
  else:
    like = likeness.compare(*made, folders, tolerance)
  found = differences(sides[0].manifest, sides[1].manifest)
  return Report(sides[0].name, sides[1].name, found, like)


def read(path: str | pathlib.Path) -> Side:
  """Returns a run; shards of one job in a folder count as one.

  Raises:
    InputError: There is no manifest.
    CorruptError: It is not as it was written.
  """
  place = pathlib.Path(path).expanduser()
  if not place.is_dir():
    return Side(str(path), place.parent, _manifest(place))
  paths = sorted(place.glob(provenance.SHARDS))
  shards = [_manifest(shard) for shard in paths]
  if not shards and not (place / provenance.NAME).exists():
    raise errors.InputError(
      f"{place}: holds no {provenance.NAME}; name a folder that vidgen sample, "
      "train or evaluate has written."
    )
  began = lambda manifest: str(manifest.get("start"))
  if (place / provenance.NAME).exists():
    held = _manifest(place / provenance.NAME)
    # A job may have been split after it had begun.
    if all(began(held) >= began(shard) for shard in shards):
      return Side(str(path), place, held)
  whole = dict(max(shards, key=began))
  # Of a job that was split anew, the shards of the last time.
  newest = paths[shards.index(whole)].name.rpartition("-of-")[2]
  of = dict(zip([shard.name for shard in paths], shards, strict=True))
  job = {name: of[name] for name in of if name.endswith(f"-of-{newest}")}
  if "shard" in whole["config"]:
    whole["config"] = {**whole["config"], "shard": "0/1"}
  whole["attempts"] = [
    one for shard in job.values() for one in shard["attempts"]
  ]
  whole["inputs"] = _inputs(job.values())
  made = [shard["outputs"] for shard in job.values()]
  every = [f"manifest-{i:05d}-of-{len(job):05d}.json" for i in range(len(job))]
  # Each knows of its own clips; of one that has not ended, the ledger knows.
  whole["outputs"] = None
  if list(job) == every and all(map(_is_of_clips, made)):
    whole["outputs"] = outputs.together(made)
  return Side(str(path), place, whole)


def _inputs(shards: Iterable[dict[str, Any]]) -> dict[str, Any]:
  """Returns the inputs of all shards, each of which lists files of its own."""
  found: dict[str, Any] = {}
  for shard in shards:
    for name, item in shard["inputs"].items():
      there = found.setdefault(name, item)
      if there is not item and item.get("listed"):
        marks = [there["sha256"], item["sha256"]]
        mark = None if None in marks else marks[0] | marks[1]
        found[name] = {**there, "sha256": mark}
  return found


def _is_of_clips(made: Any) -> bool:
  return likeness.is_as_written(made) and made["kind"] == "clips"


def _manifest(path: pathlib.Path) -> dict[str, Any]:
  held = outputs.read_json(path)
  if held.get("format") != provenance.FORMAT:
    raise errors.CorruptError(
      f"{path}: is no manifest of a run, or of another version of vidgen."
    )
  for name, kind in _KEYS.items():
    if not isinstance(held.get(name), kind):
      raise errors.CorruptError(f"{path}: {name} is not as it was written.")
  return {"outputs": None, "mesh": None, **held}


def differences(
  first: dict[str, Any], second: dict[str, Any]
) -> list[Difference]:
  """Returns the fields in which two manifests differ, causes first."""
  idle = [*first["idle"], *second["idle"]]
  # The mesh itself is told where it is known; a config may say "auto".
  if None not in (first["mesh"], second["mesh"]):
    idle += ["mesh"]
  a, b = dict(_facts(first, idle)), dict(_facts(second, idle))
  names = dict.fromkeys([*a, *b])
  absent = object()
  differing = [n for n in names if a.get(n, absent) != b.get(n, absent)]
  same_weights = _known(first) == _known(second) != {}
  same_loras = _loras(first) == _loras(second)
  weighs = lambda name: name.startswith("lora.") and not same_loras
  same_code = first["code"].get("source") == second["code"].get("source")
  found = []
  for kind, name in differing:
    texts = [_text(side.get((kind, name))) for side in (a, b)]
    harmless = (
      (
        kind == "config"
        and same_weights
        and _is_name(name)
        and not weighs(name)
      )
      # Another commit of the same files.
      or (kind == "code" and same_code is True)
    )
    found.append(Difference(OTHER if harmless else kind, name, *texts))
  order = (*CAUSES, OTHER)
  return sorted(found, key=lambda d: order.index(d.kind))


def _facts(
  manifest: dict[str, Any], idle: list[str]
) -> Iterator[tuple[tuple[str, str], Any]]:
  """Yields what a manifest says, as ((kind, name), value)."""
  yield ("command", "command"), manifest["command"]
  for name, value in fingerprint.fields(manifest["config"]):
    yield (_kind_of(name, idle), name), value
  for name, value in manifest["seeds"].items():
    yield ("seed", name), value
  for kind in ("weights", "tokenizer", "inputs"):
    for name, item in manifest[kind].items():
      hashes = item["sha256"] or {"": None}
      for part, mark in hashes.items():
        yield (kind, f"{name}/{part}".rstrip("/")), mark
      yield (OTHER, f"{kind}.{name}.path"), item["path"]
  for kind in ("data", "code", "versions", "flags"):
    for name, value in fingerprint.fields(manifest[kind]):
      yield (kind, name), value
  yield from _machine(manifest)
  yield ("attempts", "conditions of its attempts"), _conditions(manifest)
  for name in ("argv", "config_file", "directory", "folder", "exit"):
    yield (OTHER, name), manifest.get(name)
  for name in ("start", "end", "seconds"):
    yield (OTHER, name), manifest.get(name)
  yield (OTHER, "attempts"), len(manifest["attempts"])


def _machine(
  manifest: dict[str, Any],
) -> Iterator[tuple[tuple[str, str], Any]]:
  """Yields what is said of the machine."""
  on_cpu = manifest["devices"].get("platform") == "cpu"
  for name, value in manifest["system"].items():
    decides = on_cpu and name in ("cpu", "machine")
    yield ("device" if decides else OTHER, name), value
  for name, value in manifest["devices"].items():
    # How many there are counts in the mesh alone.
    yield (OTHER if name == "count" else "device", f"devices.{name}"), value
  if manifest["mesh"] is not None:
    yield ("mesh", "axes"), manifest["mesh"].get("axes")
    yield ("mesh", "devices"), manifest["mesh"].get("devices")


def _kind_of(name: str, idle: list[str]) -> str:
  """Returns what kind of field of a config this is."""
  if fingerprint.is_idle(name, idle):
    return OTHER
  if name == "seed":
    return "seed"
  return "mesh" if name.split(".")[0] == "mesh" else "config"


def _conditions(manifest: dict[str, Any]) -> int:
  """Returns how many kinds of conditions its attempts had."""
  names = ("code", "versions", "devices", "flags", "mesh")
  met = set()
  for attempt in manifest["attempts"]:
    told = {name: attempt.get(name) for name in names}
    told["code"] = (told["code"] or {}).get("source")
    told["devices"] = {
      k: v for k, v in (told["devices"] or {}).items() if k != "count"
    }
    met.add(fingerprint.digest(told))
  return len(met)


def _known(manifest: dict[str, Any]) -> dict[str, Any]:
  """Returns the hashes of weights, where all of them are known."""
  found = {n: item["sha256"] for n, item in manifest["weights"].items()}
  return {} if None in found.values() else found


def _loras(manifest: dict[str, Any]) -> list[tuple[str, str]]:
  """Returns the weights of LoRAs, by the names of their files."""
  held = manifest["config"].get("lora")
  held = held if isinstance(held, dict) else {}
  return sorted((pathlib.Path(n).name, _text(w)) for n, w in held.items())


def _is_name(name: str) -> bool:
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in _NAMES)


def _text(value: Any) -> str:
  if value is None:
    return "-"
  return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def _short(text: str) -> str:
  """Returns text for a line; of long ones the end tells more."""
  text = " ".join(text.split())
  return text if len(text) <= 60 else f"{text[:27]}...{text[-30:]}"


def write_json(path: str | pathlib.Path, report: Report) -> None:
  """Writes a report for programs.

  Raises:
    StorageError: It could not be written.
  """
  with video.atomic(path) as temporary:
    plain = fingerprint.plain(report.as_dict())
    text = json.dumps(plain, indent=1, allow_nan=False) + "\n"
    temporary.write_text(text, encoding="utf-8")
