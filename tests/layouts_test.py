"""Meshes by name, and the one that is chosen for a model."""

import math

import pytest

from vidgen import errors, layouts, sharding

GIB = 2**30


@pytest.mark.parametrize(
  "devices, heads, want",
  [
    (1, 48, {}),
    (2, 48, {"cfg": 2}),
    (8, 48, {"cfg": 2, "context": 4}),
    (8, 30, {"cfg": 2, "context": 4}),
    (32, 48, {"cfg": 2, "context": 16}),
    (64, 48, {"cfg": 2, "ring": 2, "context": 16}),
    (3, 30, {"context": 3}),
    (7, 30, {"context": 7}),
    (64, 30, {"cfg": 2, "ring": 2, "context": 16}),
  ],
)
def test_auto_samples(devices, heads, want):
  choice = layouts.auto(devices, layouts.Need(heads, guided=True))
  assert choice.sizes == want
  assert f"for {devices} devices" in choice.why and "\n" not in choice.why
  made_up = heads == 30 and devices in (8, 64)
  assert ("made up to 32" in choice.why) == made_up


def test_auto_splits_weights_that_are_too_large():
  need = layouts.Need(
    48, guided=True, stored_bytes=10 * GIB, device_bytes=16 * GIB
  )
  assert layouts.auto(8, need).sizes == {"cfg": 2, "fsdp": 4}
  roomy = layouts.Need(
    48, guided=True, stored_bytes=10 * GIB, device_bytes=32 * GIB
  )
  assert layouts.auto(8, roomy).sizes == {"cfg": 2, "context": 4}


def test_auto_takes_clips_apart_first():
  need = layouts.Need(48, batch=4, guided=True)
  assert layouts.auto(8, need).sizes == {"cfg": 2, "data": 4}


def test_auto_trains():
  need = layouts.Need(
    48, batch=64, stored_bytes=67 * GIB, device_bytes=16 * GIB, training=True
  )
  sizes = layouts.auto(256, need).sizes
  assert sizes == {"fsdp": 64, "context": 4}


@pytest.mark.parametrize("devices", range(1, 17))
@pytest.mark.parametrize("heads", [3, 30, 48])
def test_auto_takes_all_devices(devices, heads):
  choice = layouts.auto(devices, layouts.Need(heads, batch=3, guided=True))
  size = 1
  for part in choice.sizes.values():
    size *= part
  assert size == devices
  assert choice.sizes.get("context", 1) <= heads


def test_names():
  sizes = {"data": 2, "tensor": 4}

  def made(mesh, need=lambda: layouts.Need(1)):
    made, why = layouts.make(mesh, need)
    assert bool(why) == (mesh == "auto")
    return {axis: size for axis, size in made.shape.items() if size > 1}

  assert made(sizes) == sizes
  assert made(None) == made({}) == {}
  assert made("auto", lambda: layouts.Need(48)) == {"context": 8}
  assert made("cfg_context") == {"cfg": 2, "context": 4}
  for name in layouts.PRESETS:
    assert math.prod(made(name).values()) == 8
  with pytest.raises(errors.InputError, match=r"'best' is unknown.*auto"):
    layouts.make("best", lambda: layouts.Need(1))


def test_more_parts_than_heads_is_an_error():
  with (
    sharding.use(sharding.make_mesh({"context": 8})),
    pytest.raises(errors.InputError, match=r"5 heads 8 times.* is 5;"),
  ):
    layouts.check_heads(5, 1)
