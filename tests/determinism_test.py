"""Which runs give which bits: same mesh, other mesh, other kind of device."""

import os
import pathlib
import platform
import subprocess
import sys

import jax
import numpy as np
import pytest

import vidgen
from tests import toy_sampling
from vidgen import evaluate, outputs, provenance, repro

PROMPT = "A large blue circle moves to the right on a white background."

COUNT = 3

# Of a pixel of 255; what one device and several may differ by in float32.
TOLERANCE = 2.0


def sampled(folder, mesh, dtype="float32", num_steps=4):
  """Samples the small model on a mesh, as a sampling job records it."""
  config = toy_sampling.ToyConfig("demo", str(folder), mesh=mesh)
  folder.mkdir()
  with provenance.recording(folder, "sample", config) as record:
    pipeline = vidgen.load("demo", dtype=dtype, mesh=mesh or None)
    record.mesh(pipeline.mesh)
    record.seeds(seed=0)
    record.outputs(lambda: outputs.of_clips(folder))
    for index in range(COUNT):
      (made,) = pipeline.sample(PROMPT, num_steps=num_steps, clips=[index])
      toy_sampling.line(folder, index, np.asarray(made), ("png",))
  return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
  return sampled(tmp_path_factory.mktemp("one") / "run", {})


def test_same_mesh_is_bit_equal(one, tmp_path):
  jax.clear_caches()
  report = repro.check(one, sampled(tmp_path / "again", {}))
  assert report.verdict == "identical", str(report)


@pytest.mark.parametrize(
  "mesh",
  [{"cfg": 2}, pytest.param({"context": 2}, marks=pytest.mark.slow)],
  ids=str,
)
@pytest.mark.usefixtures("compiled_fast_once")
def test_another_mesh_is_equal_to_rounding(one, tmp_path, mesh):
  other = sampled(tmp_path / "other", mesh)
  report = repro.check(one, other, TOLERANCE)
  assert report.verdict in ("identical", "equal to rounding"), str(report)
  assert {d.kind for d in report.differences} == {"mesh", "other"}
  if report.verdict != "identical":
    assert repro.check(one, other).verdict == "different"
    assert "; mesh: axes: {} in A, " in report.why


def sampled_without_fma(folder):
  """Samples in a process that computes as a CPU of 2008 does."""
  code = (
    "import pathlib, sys; from tests.determinism_test import sampled; "
    "sampled(pathlib.Path(sys.argv[1]), {})"
  )
  flags = {"XLA_FLAGS": "--xla_cpu_max_isa=SSE4_2", "JAX_NUM_CPU_DEVICES": "8"}
  subprocess.run(
    [sys.executable, "-c", code, os.fspath(folder)],
    env=os.environ | flags,
    cwd=pathlib.Path(__file__).parents[1],
    check=True,
  )
  return folder


def scored(folder):
  """Measures a run's clips; returns the manifest of it."""
  file = folder.with_suffix(".json")
  evaluate.record(evaluate.Options(os.fspath(folder)), file)
  return file.with_suffix(".manifest.json")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x86 has two kinds")
def test_another_kind_of_device_has_the_same_metrics(one, tmp_path):
  """Its bits are others: products and sums are rounded one by one."""
  other = sampled_without_fma(tmp_path / "other")
  assert repro.check(one, other).verdict == "different"
  close = repro.check(one, other, TOLERANCE)
  assert close.verdict == "equal to rounding", str(close)
  assert {d.kind for d in close.differences} == {"flags", "other"}
  report = repro.check(scored(one), scored(other), within_intervals=True)
  assert report.verdict == "equal within intervals", str(report)
