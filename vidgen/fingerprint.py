"""What a config says, as JSON has it, and a fingerprint of what counts."""

import dataclasses
import fnmatch
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np

# Fields that name where things lie: they change no number. What files hold is
# recorded by its hash.
PLACES = (
  "*cache",
  "*data_dir",
  "executables",
  "image",
  "out",
  "prompts",
  "shard",
  "verify",
  "video",
  "workdir",
)


def plain(value: Any) -> Any:
  """Returns a value as JSON has it; a config becomes a dict of its fields.

  A number that is not finite, for which JSON has no word, becomes text.
  """
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    names = [field.name for field in dataclasses.fields(value)]
    return {name: plain(getattr(value, name)) for name in names}
  if isinstance(value, Mapping):
    return {str(key): plain(item) for key, item in value.items()}
  if isinstance(value, Set):
    return sorted((plain(item) for item in value), key=canonical)
  if isinstance(value, Sequence) and not isinstance(value, str | bytes):
    return [plain(item) for item in value]
  if isinstance(value, np.generic | np.ndarray):
    return plain(value.tolist())
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  if value is None or isinstance(value, str | bool | int | float):
    return value
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  # Its own text may hold an address in memory.
  kind = value if isinstance(value, type) else type(value)
  return f"{kind.__module__}.{kind.__qualname__}"


def canonical(value: Any) -> str:
  """Returns the one JSON text of a value: keys in order, no spaces."""
  return json.dumps(
    value, sort_keys=True, separators=(",", ":"), allow_nan=False
  )


def digest(value: Any) -> str:
  """Returns the SHA-256 of a value's canonical JSON."""
  return hashlib.sha256(canonical(value).encode()).hexdigest()


def fields(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
  """Yields the fields of what `plain` gives: ("stages.0.num_steps", 6)."""
  if isinstance(value, dict | list) and (value or not name):
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in pairs:
      yield from fields(item, f"{name}.{key}" if name else str(key))
  else:
    yield name, value


def is_idle(name: str, idle: Sequence[str] = ()) -> bool:
  """Says whether a field changes no number: a place, or one of `idle`.

  Args:
    name: As `fields` has it. What is said of a field is true of those in it.
    idle: Patterns, "stages.*.data.threads".
  """
  parts = name.split(".")
  heads = [".".join(parts[: i + 1]) for i in range(len(parts))]
  return any(
    fnmatch.fnmatchcase(head, pattern)
    for pattern in (*PLACES, *idle)
    for head in heads
  )


def fingerprint(config: Any, idle: Sequence[str] = ()) -> str:
  """Returns the SHA-256 of what of a config decides numbers.

  Args:
    config: Of a job: a dataclass, or what `plain` made of it.
    idle: Patterns of its fields that change no number, besides `PLACES`.
  """
  pairs = fields(plain(config))
  return digest({k: v for k, v in pairs if not is_idle(k, idle)})
