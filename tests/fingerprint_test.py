import dataclasses
import json
import math
import pathlib

import numpy as np
import pytest

from vidgen import fingerprint, sample, train


@dataclasses.dataclass
class Inner:
  threads: int = 1
  rate: float = 0.1
  cache: str | None = None


@dataclasses.dataclass
class Outer:
  parts: tuple[Inner, ...] = (Inner(),)
  out: str = "here"
  seed: int = 0
  options: dict = dataclasses.field(default_factory=dict)


def test_plain_is_json_and_stays_when_read_back():
  value = fingerprint.plain(
    Outer(
      options={
        3: np.float32(0.5),
        "set": {"b", "a"},
        "path": pathlib.Path("x"),
        "bad": [math.nan, math.inf],
        "kind": Inner,
        "thing": object(),
        "array": np.arange(3),
      }
    )
  )
  assert json.loads(json.dumps(value, allow_nan=False)) == value
  assert value["options"] == {
    "3": 0.5,
    "set": ["a", "b"],
    "path": "x",
    "bad": ["nan", "inf"],
    "kind": f"{Inner.__module__}.Inner",
    "thing": "builtins.object",
    "array": [0, 1, 2],
  }
  assert value["parts"] == [{"threads": 1, "rate": 0.1, "cache": None}]


def test_what_changes_the_fingerprint():
  mark = lambda idle=(), **fields: fingerprint.fingerprint(
    Outer(**fields), idle
  )
  assert mark() == mark()
  assert mark(out="there") == mark()
  assert mark(parts=(Inner(cache="x"),)) == mark()
  assert mark(seed=1) != mark()
  assert mark(parts=(Inner(rate=0.2),)) != mark()
  assert mark(parts=(Inner(threads=2),)) != mark()
  free = ("parts.*.threads",)
  assert mark(free, parts=(Inner(threads=2),)) == mark(free)
  assert mark(("parts.*",), parts=(Inner(rate=0.2),)) == mark(("parts.*",))


def test_order_of_keys_does_not_matter():
  one, other = {"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1}
  assert fingerprint.digest(one) == fingerprint.digest(other)
  assert fingerprint.canonical(one) == '{"a":1,"b":{"c":2,"d":3}}'


@pytest.mark.parametrize(
  ("field", "value", "counts"),
  [
    ("out", "elsewhere", False),
    ("prompts", "p.txt", False),
    ("image", "a.png", False),
    ("executables", "x", False),
    ("seed", 7, True),
    ("num_steps", 3, True),
    ("dtype", "float32", True),
    ("checkpoint", "a/b", True),
  ],
)
def test_fields_of_sampling(field, value, counts):
  usual = fingerprint.fingerprint(sample.SampleConfig())
  other = fingerprint.fingerprint(sample.SampleConfig(**{field: value}))
  assert (usual != other) == counts


def test_training_ignores_what_only_tells():
  assert fingerprint.is_idle("stages.0.data.threads", train.IDLE)
  assert fingerprint.is_idle("stages.0.data.data_dir", train.IDLE)
  assert fingerprint.is_idle("task.samples.prompts.0", train.IDLE)
  assert not fingerprint.is_idle("stages.0.num_steps", train.IDLE)
  assert not fingerprint.is_idle("num_steps", train.IDLE)
  assert not fingerprint.is_idle("mesh.data", train.IDLE)
