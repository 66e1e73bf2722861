"""Where the model of a task comes from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny_training
from vidgen import errors, sharding, weights
from vidgen.tasks import sources


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return tiny_training.checkpoint(tmp_path_factory.mktemp("checkpoint"))


def load(checkpoint, name, key=None, **fields):
  opened = sources.Opened(sources.Source(checkpoint=checkpoint, **fields))
  mesh = sharding.make_mesh(None)
  places = sharding.shardings(opened.components[name].shapes(), mesh)
  return weights.flatten(opened.load(name, places, jnp.float32, key))


def test_a_part_of_a_network_starts_from_scratch(checkpoint):
  part = "blocks/attention"
  before = load(checkpoint, "text_encoder")
  after = load(checkpoint, "text_encoder", scratch=(f"text_encoder/{part}",))
  same = {path for path in before if np.array_equal(before[path], after[path])}
  assert same == {path for path in before if not path.startswith(f"{part}/")}
  other = load(checkpoint, "vae", scratch=(f"text_encoder/{part}",))
  for path, leaf in load(checkpoint, "vae").items():
    np.testing.assert_array_equal(other[path], leaf)


def test_the_key_decides_what_is_learnt_anew_alone(checkpoint):
  part = "blocks/attention"
  one, other = (
    load(
      checkpoint,
      "text_encoder",
      jax.random.key(seed),
      scratch=(f"text_encoder/{part}",),
    )
    for seed in (0, 1)
  )
  kernels = {p for p in one if p.startswith(f"{part}/") and "kernel" in p}
  assert kernels
  for path in one:
    same = np.array_equal(one[path], other[path])
    assert not (same and path in kernels)
    assert same or path.startswith(f"{part}/")


@pytest.mark.parametrize(
  "fields, word",
  [
    ({"scratch": ("unet",)}, "no component unet; the model has"),
    ({"scratch": ("unet/blocks",)}, "no component unet; the model has"),
    ({"parts": {"clip": "folder"}}, "no component clip"),
    ({"scratch": ("vae/middle",)}, "vae has no middle; it has decoder"),
  ],
)
def test_what_the_model_lacks_is_named(checkpoint, fields, word):
  with pytest.raises(errors.InputError, match=word):
    load(checkpoint, "vae", **fields)
