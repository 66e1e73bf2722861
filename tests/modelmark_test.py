"""Marks of checkpoints."""

import json

import pytest

from tests import tiny_cogvideox
from vidgen import modelmark
from vidgen.models import base


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  folder = tmp_path_factory.mktemp("2b")
  tiny_cogvideox.write(folder, "2b")
  return folder / "checkpoint"


def mark(folder, **own):
  path = folder / "model_index.json"
  before = path.read_text()
  path.write_text(json.dumps(json.loads(before) | own))
  try:
    model = base.find_family(folder).open_model(folder, "float32")
    return modelmark.of(folder, model.components)
  finally:
    path.write_text(before)


def test_what_a_checkpoint_says_of_its_sampling_counts(checkpoint):
  """Names of clips hold it: other defaults make other clips."""
  plain = mark(checkpoint)
  six = mark(checkpoint, _guidance_scale=6.0)
  assert len({plain, six, mark(checkpoint, _guidance_scale=3.0)}) == 3


def test_who_wrote_it_does_not(checkpoint):
  plain = mark(checkpoint)
  assert plain == mark(checkpoint, _diffusers_version="9.9", _name_or_path="x")
