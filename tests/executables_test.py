"""Programs that are compiled before they are called, here or elsewhere."""

import json
import shutil
from contextlib import nullcontext
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vidgen
from tests import tiny_cogvideox
from vidgen import (
  ahead,
  environment,
  errors,
  executables,
  loading,
  programs,
  sample,
)
from vidgen import compile as compiling
from vidgen.models import base, svd

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


def test_a_batch_is_compiled_while_weights_load(checkpoint):
  check = lambda model, folder: [model.plan(base.Request(**REQUEST))]
  pipeline = vidgen.load(checkpoint, dtype="float32", check=check, batch_size=2)
  assert len(pipeline.sample(["a panda", "a kite"], **REQUEST)) == 2
  assert compiled(pipeline) == 0


@pytest.fixture
def kept(tmp_path, monkeypatch):
  """Where programs are kept from one job to the next."""
  # Nothing is taken from what other tests compiled.
  monkeypatch.setattr(executables, "folder", tmp_path / "programs")
  with compiling._without_cache():
    yield tmp_path / "programs"


def sampled(checkpoint, **request):
  """The clip of a job, and how many programs its pipeline found ready."""
  plan = lambda model, folder: [model.plan(base.Request(**REQUEST, **request))]
  pipeline = vidgen.load(checkpoint, dtype="float32", check=plan)
  ready = len(pipeline.ready)
  got = pipeline.sample("a panda", **REQUEST, **request)
  assert compiled(pipeline) == 3 - ready
  return got, ready


def test_a_jobs_programs_are_kept_for_the_next(
  checkpoint, kept, want, monkeypatch
):
  got, ready = sampled(checkpoint)
  (folder,) = kept.iterdir()
  np.testing.assert_array_equal(got, want)
  assert ready == 3
  # Now nothing is traced.
  monkeypatch.setattr(ahead, "programs", None)
  got, ready = sampled(checkpoint)
  np.testing.assert_array_equal(got, want)
  assert ready == 3 and list(kept.iterdir()) == [folder]
  # What is damaged is compiled again, and forgotten.
  path = min(folder.glob("*.xla"))
  path.write_bytes(path.read_bytes()[:-1])
  got, ready = sampled(checkpoint)
  np.testing.assert_array_equal(got, want)
  assert ready == 0 and not folder.exists()


def test_one_that_cannot_run_is_compiled_again():
  """And forgotten; unless memory is short, or what it was given is gone."""
  x, calls = jnp.arange(4.0), []
  double = jax.jit(lambda x: 2 * x)

  def broken(text):
    def run(*args):
      calls.append(args)
      raise jax.errors.JaxRuntimeError(text)

    program = mock.Mock(spec=jax.stages.Compiled, side_effect=run)
    return {ahead.key("double", (x,), {}): program}

  ready, forgotten = ahead.Ready(), []
  forget = lambda: forgotten.append(len(calls))
  ready.add(broken("INTERNAL: Function region_0.1 not found"), forget)
  for _ in range(2):
    np.testing.assert_array_equal(ready.call("double", double, x), 2 * x)
  assert len(calls) == 1 and forgotten == [1]
  ready.add(broken("RESOURCE_EXHAUSTED: out of memory"), forget)
  with pytest.raises(jax.errors.JaxRuntimeError, match="memory"):
    ready.call("double", double, x)
  assert forgotten == [1]
  ready.add(broken("INTERNAL: was compiled by request"))
  with pytest.raises(jax.errors.JaxRuntimeError, match="by request"):
    ready.call("double", double, x)
  ready.add(broken("INTERNAL: ran half"), forget)
  x.delete()
  with pytest.raises(jax.errors.JaxRuntimeError, match="ran half"):
    ready.call("double", double, x)
  assert forgotten == [1, 4]


def test_another_job_keeps_its_own(checkpoint, kept, monkeypatch):
  model = vidgen.load(checkpoint, dtype="float32").model
  plan = lambda **request: model.plan(base.Request(**REQUEST, **request))
  identity = {"model": "x"}
  known = executables.kept(identity, [plan()], 1)
  assert known == executables.kept(identity, [plan()], 1)
  monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
  others = [
    executables.kept(identity, [plan()], 1),
    executables.kept({"model": "y"}, [plan()], 1),
    executables.kept(identity, [plan()], 2),
    executables.kept(identity, [plan(num_frames=1)], 1),
    executables.kept(identity, [plan(guidance_scale=1.0)], 1),
  ]
  monkeypatch.setattr(environment, "instructions", lambda: "sse")
  others.append(executables.kept(identity, [plan()], 1))
  assert len({known, *others}) == 7
  monkeypatch.setattr(executables, "folder", None)
  assert executables.kept(identity, [plan()], 1) is None


def test_what_the_persistent_cache_had_is_not_kept(
  checkpoint, tmp_path, monkeypatch
):
  """Read from there and saved, a program fails when it is called."""
  monkeypatch.setattr(executables, "folder", tmp_path / "programs")
  least = "jax_persistent_cache_min_compile_time_secs"
  before = getattr(jax.config, least)
  jax.config.update(least, 0.0)
  function = jax.jit(lambda x: jnp.tanh(x) @ x)
  x = jax.ShapeDtypeStruct((7, 7), jnp.float32)
  with executables.cached() as first:
    function.lower(x).compile()
  jax.clear_caches()
  with executables.cached() as again:
    function.lower(x).compile()
  jax.config.update(least, before)
  assert not first and len(again) == 1
  monkeypatch.setattr(loading.executables, "cached", lambda: nullcontext(["x"]))
  sampled(checkpoint)
  assert not (tmp_path / "programs").exists()


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


def test_all_of_a_config_may_be_in_a_program():
  """What SVD adds noise to has a name that diffusers passes over."""
  devices = jax.devices()[:1]
  told = [
    executables.identity(
      svd.create(
        svd.config_small(5, svd.Conditioning(noised=noised)), "float32"
      ),
      devices,
      {},
    )
    for noised in ("pixels", "latents", "latents")
  ]
  assert told[0] != told[1] == told[2]
