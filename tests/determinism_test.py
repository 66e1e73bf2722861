"""Which runs give which bits: same mesh, other mesh.

Another kind of device cannot be had here.
"""

import jax
import numpy as np
import pytest

import vidgen
from tests import toy_sampling
from vidgen import outputs, provenance, repro

PROMPT = "A large blue circle moves to the right on a white background."

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
    for index in range(2):
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
