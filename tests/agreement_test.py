"""Two evaluations compared by their intervals."""

import json

import numpy as np
import pytest

from tests import toy_sampling
from vidgen import errors, evaluate, repro
from vidgen.cli import main

COUNT = 4


def scored(folder, count=COUNT, change=lambda index, made: made, **options):
  """Makes clips and measures them; returns the evaluation's manifest."""
  toy_sampling.run(folder, count, change, formats=("png",))
  options = evaluate.Options(str(folder), resamples=100, **options)
  evaluate.record(options, folder / "scores.json")
  return folder / "scores.manifest.json"


def shaken(by):
  """Another rounding: pixels of all clips differ by so much, some of them."""

  def change(index, made):
    draw = np.random.default_rng(index)
    return made + draw.integers(0, by + 1, made.shape).astype(np.uint8)

  return change


@pytest.fixture(scope="module")
def one(tmp_path_factory):
  return scored(tmp_path_factory.mktemp("one"))


def checked(one, other):
  return repro.check(one, other, within_intervals=True)


def test_the_same_numbers_are_identical(one, tmp_path):
  report = checked(one, scored(tmp_path))
  assert report.verdict == "identical"
  assert report.why == "all 2 metrics are equal"


def test_other_bits_are_equal_within_intervals(one, tmp_path):
  other = scored(tmp_path, change=shaken(1))
  assert repro.check(one, other).verdict == "different"
  report = checked(one, other)
  assert report.verdict == "equal within intervals"
  assert "each of 2 metrics is within the other's 95 % interval" in report.why
  (line,) = [ln for ln in report.outputs.lines if ln.startswith("flicker")]
  assert line.endswith("; agrees")
  held = json.loads(one.read_text())["outputs"]["metrics"]
  assert f"{held['metrics.flicker.low']:.5g} .. " in line


def test_metrics_outside_are_different(one, tmp_path, capsys):
  other = scored(tmp_path, change=lambda index, made: made // 4)
  argv = ["repro", "check", str(one), str(other), "--within_intervals"]
  assert main.main(argv) == 1
  out = capsys.readouterr().out
  assert "flicker: one is outside the other's interval" in out.splitlines()[-1]


def test_both_must_be_within_the_other(one, tmp_path):
  """A wide interval holds much; that it is held by none counts too."""
  other = scored(tmp_path)
  held = json.loads(other.read_text())
  metrics = held["outputs"]["metrics"]
  metrics["metrics.flicker.value"] *= 1.5
  metrics["metrics.flicker.low"] = 0.0
  metrics["metrics.flicker.high"] = 255.0
  other.write_text(json.dumps(held))
  for pair in ((one, other), (other, one)):
    assert checked(*pair).verdict == "different"


@pytest.mark.parametrize(
  ("options", "why"),
  [
    ({"count": 3}, "flicker: is flicker-rgb255-png-3f-32x32-n4-v1 in A, "),
    ({"metrics": ("flicker",)}, "metrics of one of them: temporal_flickering"),
  ],
  ids=str,
)
def test_what_is_not_of_the_same_is_different(one, tmp_path, options, why):
  report = checked(one, scored(tmp_path, **options))
  assert report.verdict == "different"
  assert why in report.why


def test_one_clip_has_no_interval(tmp_path):
  one = scored(tmp_path / "a", count=1)
  report = checked(one, scored(tmp_path / "b", 1, shaken(1)))
  assert report.verdict == "different"
  assert "has no interval" in report.why


def test_what_is_not_finite_agrees_with_nothing(one, tmp_path):
  other = scored(tmp_path)
  held = json.loads(other.read_text())
  held["outputs"]["metrics"]["metrics.flicker.value"] = "nan"
  other.write_text(json.dumps(held))
  for pair in ((one, other), (other, one)):
    assert checked(*pair).verdict == "different"


def test_runs_without_metrics_are_refused(one):
  with pytest.raises(errors.InputError, match="measure both runs"):
    checked(one, one.parent)
