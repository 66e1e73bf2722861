"""The published layout of SVD: read, and written so that diffusers reads it."""

import json

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers

from tests import tiny_svd
from vidgen import errors, sharding, tensorfile, weights
from vidgen.models import base
from vidgen.models.svd import components, config


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  folder = tmp_path_factory.mktemp("svd")
  return tiny_svd.write(folder), folder / "checkpoint"


def test_every_tensor_goes_both_ways(written):
  pipeline, folder = written
  parts = components(config.read_config(folder))
  assert [part.name for part in parts] == ["image_encoder", "unet", "vae"]
  for part in parts:
    files = tensorfile.open_folder(folder / part.name)
    params = weights.load(files, part.table, base.shapes(part))
    state = getattr(pipeline, part.name).state_dict()
    exported = dict(weights.export(params, part.table))
    assert exported.keys() == state.keys()
    for name, array in exported.items():
      np.testing.assert_array_equal(array, state[name].numpy(), err_msg=name)


def test_every_parameter_has_a_place(written):
  """A logical axis that has no rule is an error."""
  mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2})
  for part in components(config.read_config(written[1])):
    boxed = part.shapes()
    places = jax.tree.leaves(sharding.shardings(boxed, mesh))
    split = sum(not place.is_fully_replicated for place in places)
    assert split > len(places) / 4, part.name


# diffusers' scheduler asks numpy for what it no longer has.
@pytest.mark.filterwarnings("ignore:__array__ implementation")
@pytest.mark.parametrize("make", [config.config_svd, config.config_svd_xt])
def test_published_configs(make, tmp_path):
  """What we write is read back, by us and by those libraries."""
  want = make()
  for path, content in config.published_configs(want).items():
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text(json.dumps(content))
  assert config.read_config(tmp_path) == want
  with torch.device("meta"):
    kind = diffusers.UNetSpatioTemporalConditionModel
    unet = kind.from_config(kind.load_config(tmp_path / "unet"))
    assert unet.num_parameters() == 1_524_623_082
    kind = diffusers.AutoencoderKLTemporalDecoder
    vae = kind.from_config(kind.load_config(tmp_path / "vae"))
    assert vae.num_parameters() == 97_742_847
  read = transformers.CLIPVisionConfig.from_pretrained
  assert read(tmp_path / "image_encoder").hidden_size == 1280
  kind = diffusers.EulerDiscreteScheduler
  scheduler = kind.from_pretrained(tmp_path / "scheduler")
  scheduler.set_timesteps(25)
  np.testing.assert_allclose(scheduler.sigmas[1], 545.729, rtol=1e-5)


@pytest.mark.parametrize(
  ("path", "content", "match"),
  [
    (
      "scheduler/scheduler_config.json",
      {"sigma_max": 700.0},
      "prediction_type",
    ),
    ("unet/config.json", None, "unet/ folder"),
    ("image_encoder/config.json", None, "image_encoder/ folder"),
  ],
)
def test_configs_that_are_not_read(path, content, match, tmp_path):
  files = config.published_configs(config.config_svd()) | {path: content}
  for name, value in files.items():
    if value is not None:
      (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
      (tmp_path / name).write_text(json.dumps(value))
  with pytest.raises(errors.InputError, match=match):
    config.read_config(tmp_path)
