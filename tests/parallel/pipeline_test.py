"""A pipeline on eight devices gives what one device gives."""

import jax
import numpy as np
import pytest

import vidgen
from tests import tiny_cogvideox

PROMPTS = ["a panda plays in the forest", "a red kite by the sea"]
MESHES = [
  {"data": 2},
  {"cfg": 2, "tensor": 2},
  {"fsdp": 4, "context": 2},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("5b")
  tiny_cogvideox.write(folder, "5b")
  return folder / "checkpoint"


@pytest.fixture(scope="module")
def want(folder):
  return sample(vidgen.load(folder, dtype="float32"))


def sample(pipeline):
  return pipeline.sample(
    PROMPTS, num_steps=3, sampler="dpmpp_2m_sde", output="float"
  )


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_equals_one_device(mesh, folder, want):
  pipeline = vidgen.load(folder, dtype="float32", mesh=mesh)
  leaves = jax.tree.leaves(pipeline.params)
  assert {len(leaf.sharding.device_set) for leaf in leaves} == {
    int(np.prod(list(mesh.values())))
  }
  if "tensor" in mesh or "fsdp" in mesh:
    assert any(not leaf.sharding.is_fully_replicated for leaf in leaves)
  got = sample(pipeline)
  assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)
