"""Programs that are compiled before they are called, here or elsewhere."""

import json
import shutil

import numpy as np
import pytest

import vidgen
from tests import tiny_cogvideox
from vidgen import compile as compiling
from vidgen import errors, executables, programs, sample
from vidgen.models import base

REQUEST = {"num_steps": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  folder = tmp_path_factory.mktemp("5b")
  tiny_cogvideox.write(folder, "5b")
  return str(folder / "checkpoint")


@pytest.fixture(scope="module")
def saved(checkpoint, tmp_path_factory):
  """A folder of the programs of a job on the first device."""
  folder = tmp_path_factory.mktemp("saved")
  config = sample.SampleConfig(
    checkpoint=checkpoint, dtype="float32", **REQUEST
  )
  job = programs.SampleJob(config, folder)
  assert compiling.run(job, "local", folder / "programs").fits
  return folder / "programs"


@pytest.fixture(scope="module")
def want(checkpoint):
  """What sampling gives without any of this."""
  pipeline = vidgen.load(checkpoint, dtype="float32")
  return pipeline.sample("a panda", **REQUEST)


def compiled(pipeline):
  """How many programs were compiled as they were called."""
  functions = [pipeline.denoise, pipeline.decoder]
  functions += [apply for _, apply in pipeline.conditioners]
  return sum(function._cache_size() for function in functions)


def test_saved_programs_are_not_compiled_again(checkpoint, saved, want):
  pipeline = vidgen.load(checkpoint, dtype="float32", executables=str(saved))
  got = pipeline.sample("a panda", **REQUEST)
  np.testing.assert_array_equal(got, want)
  assert compiled(pipeline) == 0
  # Another shape is none of theirs.
  pipeline.sample("a panda", num_frames=1, **REQUEST)
  assert compiled(pipeline) == 2


def test_what_a_plan_needs_is_compiled_while_weights_load(checkpoint, want):
  check = lambda model, folder: [model.plan(base.Request(**REQUEST))]
  pipeline = vidgen.load(checkpoint, dtype="float32", check=check)
  got = pipeline.sample("a panda", **REQUEST)
  np.testing.assert_array_equal(got, want)
  assert compiled(pipeline) == 0


def test_programs_of_another_model_are_refused(saved, tmp_path):
  """The shapes are the same: only a constant of the autoencoder differs."""
  tiny_cogvideox.write(tmp_path, "5b")
  path = tmp_path / "checkpoint" / "vae" / "config.json"
  config = json.loads(path.read_text())
  path.write_text(json.dumps(config | {"scaling_factor": 1.25}))
  with pytest.raises(errors.InputError, match="something else: model "):
    vidgen.load(path.parent.parent, dtype="float32", executables=str(saved))


@pytest.mark.parametrize(
  "field, value", [("jax", "0.1"), ("devices", 8), ("device_kind", "TPU v9")]
)
def test_programs_for_something_else_are_refused(
  field, value, checkpoint, saved, tmp_path
):
  folder = shutil.copytree(saved, tmp_path / "other")
  index = json.loads((folder / executables.INDEX).read_text())
  index["identity"][field] = value
  (folder / executables.INDEX).write_text(json.dumps(index))
  with pytest.raises(errors.InputError, match=f"something else: {field} "):
    vidgen.load(checkpoint, dtype="float32", executables=str(folder))


def test_another_mesh_is_refused(checkpoint, saved):
  with pytest.raises(errors.InputError, match="devices 1, here 2; mesh"):
    vidgen.load(
      checkpoint,
      dtype="float32",
      mesh={"tensor": 2},
      executables=str(saved),
    )


def test_a_changed_file_is_not_opened(checkpoint, saved, tmp_path):
  folder = shutil.copytree(saved, tmp_path / "changed")
  file = next(folder.glob("*.xla"))
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)
  with pytest.raises(errors.CorruptError, match="not what was written"):
    vidgen.load(checkpoint, dtype="float32", executables=str(folder))
  file.unlink()
  with pytest.raises(errors.CorruptError, match="cannot be read"):
    vidgen.load(checkpoint, dtype="float32", executables=str(folder))


def test_no_programs(checkpoint, tmp_path):
  with pytest.raises(errors.InputError, match="vidgen compile --save"):
    vidgen.load(checkpoint, executables=str(tmp_path))
