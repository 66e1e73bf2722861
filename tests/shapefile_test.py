"""Shapes that are read are those that tracing gives."""

import functools

import jax
import jax.numpy as jnp
import pytest

from vidgen import codehash, shapefile
from vidgen.models import cogvideox, svd


@pytest.fixture
def folder(tmp_path, monkeypatch):
  monkeypatch.setattr(shapefile, "folder", tmp_path / "shapes")
  return tmp_path / "shapes"


def parts():
  return (
    *cogvideox.components(cogvideox.config_demo(300)),
    *svd.create(svd.config_small(3), jnp.float32).components,
  )


def _never(*args):
  raise AssertionError("traced")


def test_read_as_traced(folder, monkeypatch):
  want = [jax.eval_shape(part.init, jax.random.key(0)) for part in parts()]
  assert [part.shapes() for part in parts()] == want
  assert len(list(folder.iterdir())) == len(want)
  with monkeypatch.context() as patch:
    patch.setattr(jax, "eval_shape", _never)
    got = [part.shapes() for part in parts()]
  assert got == want
  kinds = [jax.tree.map(type, tree) for tree in (got, want)]
  assert kinds[0] == kinds[1]


def _make(sizes, key):
  return {"x": jax.random.normal(key, sizes)}


def test_of_another_config_or_another_package(folder, monkeypatch):
  for sizes in ((2, 3), (3, 2), (2, 3)):
    assert shapefile.of(functools.partial(_make, sizes))["x"].shape == sizes
  assert len(list(folder.iterdir())) == 2
  monkeypatch.setattr(codehash, "of_package", lambda: "other")
  shapefile.of(functools.partial(_make, (2, 3)))
  assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"x": [[2], "no", null]}'])
def test_a_damaged_file_is_written_again(folder, text):
  init = functools.partial(_make, (2, 3))
  shapefile.of(init)
  (path,) = folder.iterdir()
  whole = path.read_text()
  # One that still reads as shapes, for one, but as others.
  for damaged in (text, whole.replace("[2, 3]", "[2, 7]")):
    assert damaged != whole
    path.write_text(damaged)
    assert shapefile.of(init)["x"].shape == (2, 3)
    assert path.read_text() == whole


def test_nothing_is_kept_of_what_has_no_name(folder, tmp_path, monkeypatch):
  assert shapefile.of(lambda key: _make((2,), key))["x"].shape == (2,)
  assert not folder.exists()
  # Nor where nothing can be written.
  (tmp_path / "file").write_text("")
  monkeypatch.setattr(shapefile, "folder", tmp_path / "file" / "shapes")
  assert shapefile.of(functools.partial(_make, (2,)))["x"].shape == (2,)
