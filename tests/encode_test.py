"""The encoding job: its cache trains as the videos do; it goes on; it checks."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy

from tests import tiny_training
from vidgen import encode, errors, preemption, prepare, sharding, train
from vidgen.data import cache, loader
from vidgen.tasks import autoencoding


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  return tiny_training.shapes(tmp_path_factory.mktemp("data"), 24)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return tiny_training.checkpoint(tmp_path_factory.mktemp("checkpoint"))


def from_cache(config, folder):
  """The config with the data of every stage from a cache."""
  stages = tuple(
    dataclasses.replace(
      stage, data=dataclasses.replace(stage.data, cache=str(folder))
    )
    for stage in config.stages
  )
  return dataclasses.replace(config, stages=stages)


def losses(config, workdir):
  train.run(config, workdir)
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line)["loss"] for line in lines]


def agree(config, tmp_path, windows=1, rtol=1e-5):
  """Four steps from the cache lose as much as four from the videos."""
  out = tmp_path / "cache"
  report = encode.run(config, out, encode.Options(windows=windows))
  want = losses(config, tmp_path / "videos")
  got = losses(from_cache(config, out), tmp_path / "cached")
  assert len(want) == 4
  np.testing.assert_allclose(got, want, rtol=rtol)
  return report


def config_of(data_dir, checkpoint, shapes=((17, 32, 32),), **fields):
  stage = tiny_training.stage(data_dir, 4, shapes=shapes)
  return tiny_training.config(data_dir, checkpoint, stages=(stage,), **fields)


def test_trains_as_from_videos(data_dir, checkpoint, tmp_path):
  """Of clips longer than the bucket too, where all windows are kept."""
  shapes = ((9, 32, 32), (1, 16, 16))
  config = config_of(data_dir, checkpoint, shapes, noised={"text_dropout": 0.4})
  report = agree(config, tmp_path, windows=17)
  assert report.records == {
    "latents 9x32x32": 9 * 24,
    "latents 1x16x16": 17 * 24,
    "text": 4 * 24,
  }
  assert not report.was_there


def test_trains_the_text_encoder_along(data_dir, checkpoint, tmp_path):
  config = config_of(data_dir, checkpoint, task={"train_text_encoder": True})
  report = agree(config, tmp_path)
  assert report.records == {"latents 17x32x32": 24}


@pytest.mark.parametrize("variant", ["1.5-5b-i2v"])
def test_trains_from_images(variant, data_dir, tmp_path):
  checkpoint = tiny_training.checkpoint(tmp_path, variant)
  noised = {"text_dropout_by": "zeros", "text_dropout": 0.4}
  config = config_of(data_dir, checkpoint, ((9, 32, 32),), noised=noised)
  agree(config, tmp_path, windows=9)
