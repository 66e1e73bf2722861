"""Clips of SVD on a mesh are what one device makes of the same images."""

import jax
import numpy as np
import pytest

import vidgen
from tests import tiny_svd
from tests.parallel import equality

LAYOUTS = {
  "data": {"data": 2},
  "cfg": {"cfg": 2},
  "fsdp": {"fsdp": 4},
  "tensor": {"tensor": 2},
  "context": {"context": 2},
  "cfg x context x fsdp": {"cfg": 2, "context": 2, "fsdp": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("svd")
  tiny_svd.write(folder)
  return folder / "checkpoint"


@pytest.fixture(scope="module")
def want(folder):
  return sample(vidgen.load(folder, dtype="float32"))


def sample(pipeline):
  pixels = np.random.default_rng(1).integers(0, 256, (2, 20, 30, 3), np.uint8)
  size = {"num_frames": 3, "height": 16, "width": 16}
  latents = pipeline.sample(image=pixels, num_steps=2, output="latents", **size)
  return {"latents": latents, "frames": pipeline.decode(latents, "float")}


@pytest.mark.parametrize(
  "layout",
  [
    # All axes but one at once; apart they take as long each.
    name
    if name == "cfg x context x fsdp"
    else pytest.param(name, marks=pytest.mark.slow)
    for name in LAYOUTS
  ],
)
def test_equals_one_device(layout, folder, want):
  pipeline = vidgen.load(folder, dtype="float32", mesh=LAYOUTS[layout])
  split = [
    not leaf.sharding.is_fully_replicated
    for leaf in jax.tree.leaves(pipeline.params)
  ]
  assert any(split) == ("fsdp" in layout or "tensor" in layout)
  assert equality.apart(sample(pipeline), want) <= equality.TOLERANCE
