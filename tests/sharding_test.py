"""Meshes, and what of an array goes where."""

import types

import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from vidgen import errors, sharding


@pytest.mark.parametrize(
  "mesh, reason",
  [
    ({"dta": 2}, "unknown axes.*data"),
    ({"data": 9}, "needs 9 devices"),
    ({"data": 0}, "positive"),
    ({"data": -1, "cfg": -1}, "one may be -1"),
    ({"data": 2.0}, "whole numbers"),
    (
      {"data": -1, "tensor": 3},
      "does not divide the 8.*nearest that does is 2",
    ),
    ({"cfg": 3}, "cfg=3, but guidance has 2 branches"),
    ({"cfg": -1}, "cfg=8, but guidance has 2 branches"),
    ("auto", "does not map"),
  ],
)
def test_bad_meshes_are_errors(mesh, reason):
  with pytest.raises(errors.InputError, match=reason):
    sharding.make_mesh(mesh)


def test_tpus_are_taken_one_or_all():
  """Their compiler dies of less, and of a mesh of some there is none."""
  devices = [types.SimpleNamespace(platform="tpu")] * 8
  with pytest.raises(errors.InputError, match="takes 6 of 8 devices, but TPUs"):
    sharding.make_mesh({"cfg": 2, "context": 3}, devices)


def test_minus_one_takes_the_rest():
  mesh = sharding.make_mesh({"tensor": 2, "data": -1})
  assert mesh.shape["data"] == 4


def test_a_misspelled_axis_is_an_error():
  with (
    sharding.use(sharding.make_mesh({"data": 2})),
    pytest.raises(ValueError, match="bacth"),
  ):
    sharding.constrain(jnp.zeros((2, 2)), "bacth", None)


def test_what_does_not_divide_is_left_to_the_next_axis():
  """One clip of two branches on a mesh for four: the branches are split."""
  sizes = {"cfg": 2, "data": 4, "fsdp": 1}
  spec = sharding._spec((2, 5), ("batch", None), sizes, sharding.RULES)
  assert spec == PartitionSpec("cfg", None)


def test_fsdp_takes_tokens_that_no_batch_needs():
  with sharding.use(sharding.make_mesh({"cfg": 2, "fsdp": 4})):
    assert sharding.parts(8, "tokens") == 1
    assert sharding.parts(2, "tokens") == sharding.trades(2) == 4
  assert sharding.parts(2, "tokens") == 1


@pytest.mark.parametrize(
  "batch, size, want",
  [
    (1, (60, 90), (4, 2)),
    (2, (60, 90), (2, 2)),
    (1, (96, 170), (4, 2)),
    # Smaller than a window: whole.
    (1, (2, 4), (1, 4)),
    (1, (2, 2), (1, 1)),
  ],
)
def test_frames_are_split_in_a_grid(batch, size, want):
  with sharding.use(sharding.make_mesh({"cfg": 2, "context": 4})):
    with sharding.frames(batch, *size):
      assert sharding.grid() == want
    assert sharding.grid() == (1, 1)


def test_a_grid_takes_one_axis_apart():
  with (
    sharding.use(sharding.make_mesh({"context": 8})),
    sharding.frames(1, 60, 90),
  ):
    assert sharding.grid() == (4, 2)
