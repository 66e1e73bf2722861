"""Jobs compiled for TPUs that are not here."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from tests import tiny_cogvideox, tiny_training
from vidgen import compile as compiling
from vidgen import errors, programs, sample, topology
from vidgen.cli import main
from vidgen.models import base

TOPOLOGY = "v5e:2x2"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  folder = tmp_path_factory.mktemp("5b")
  tiny_cogvideox.write(folder, "5b")
  return folder / "checkpoint"


@pytest.fixture(scope="module")
def report(checkpoint, tmp_path_factory):
  """Of sampling on four devices, as the command writes it."""
  folder = tmp_path_factory.mktemp("job")
  (folder / "config.py").write_text(f"""
from vidgen import sample

def get_config():
  return sample.SampleConfig(
    checkpoint={str(checkpoint)!r},
    mesh={{"context": 2, "fsdp": 2}},
    num_steps=3,
  )
""")
  code = main.main(
    [
      "compile",
      f"--config={folder / 'config.py'}",
      f"--topology={TOPOLOGY}",
      f"--json={folder / 'report.json'}",
    ]
  )
  assert code == 0
  return json.loads((folder / "report.json").read_text())


def test_the_report_has_its_keys(report):
  keys = {
    "fits",
    "hbm_bytes",
    "hbm_limit_bytes",
    "collectives",
    "model_flops",
    "bound_seconds",
    "compile_seconds",
  }
  assert keys <= report.keys()
  assert report["fits"] is True
  assert 0 < report["hbm_bytes"] < report["hbm_limit_bytes"] == 15.75 * 2**30
  assert set(report["bound_seconds"]) == {"compute", "memory", "interconnect"}
  assert all(second > 0 for second in report["bound_seconds"].values())


def test_each_stage_is_compiled(report):
  names = [program["name"] for program in report["programs"]]
  assert names == ["text", "denoise step", "decode"]
  step = report["programs"][1]
  assert step["runs"] == 3 and step["model_flops"] > 0
  assert step["collectives"]["all-to-all"]["count"] > 0
  for program in report["programs"]:
    parts = ("argument", "temporary", "output", "code", "resident")
    total = sum(program[f"{part}_bytes"] for part in parts)
    assert program["hbm_bytes"] == total


def test_weights_of_others_are_counted_where_they_stay(checkpoint, tmp_path):
  config = sample.SampleConfig(checkpoint=str(checkpoint))
  devices = topology.find(TOPOLOGY).devices
  resident = {}
  for residency in ("all", "stage"):
    config.residency = residency
    _, every = programs.SampleJob(config, tmp_path).programs(devices)
    resident[residency] = {one.name: one.resident_bytes for one in every}
  assert set(resident["stage"].values()) == {0}
  # Each program leaves out its own component, of three.
  model = base.find_family(checkpoint).open_model(checkpoint, "bfloat16")
  weights = sum(2 * base.count(part) for part in model.components)
  assert sum(resident["all"].values()) == 2 * weights


def told(config, tmp_path, devices=None):
  """The programs of a sampling job, by name."""
  devices = devices or topology.find(TOPOLOGY).devices[:1]
  _, every = programs.SampleJob(config, tmp_path).programs(devices)
  return {one.name: one for one in every}


def test_a_batch_is_compiled_as_a_batch(checkpoint, tmp_path):
  one = told(sample.SampleConfig(checkpoint=str(checkpoint)), tmp_path)
  config = sample.SampleConfig(checkpoint=str(checkpoint), batch_size=4)
  four = told(config, tmp_path)
  flops = {name: program.model_flops for name, program in one.items()}
  assert four["denoise step"].model_flops == 4 * flops["denoise step"] > 0
  # Texts are embedded clip by clip.
  assert four["text"].key == one["text"].key
  for name in ("denoise step", "decode"):
    assert four[name].key != one[name].key
  shape = four["decode"].lower().out_info.shape
  assert shape == (4, *one["decode"].lower().out_info.shape[1:])


def test_a_video_is_encoded_first(checkpoint, tmp_path):
  config = sample.SampleConfig(checkpoint=str(checkpoint), video="a.mp4")
  every = told(config, tmp_path)
  assert list(every) == ["text", "encode", "denoise step", "decode"]
  (_, *_, channels) = every["encode"].lower().out_info.shape
  assert channels == 4
  steps = told(sample.SampleConfig(checkpoint=str(checkpoint)), tmp_path)
  assert every["denoise step"].runs < steps["denoise step"].runs


def test_tiles_are_refused(checkpoint, tmp_path):
  config = sample.SampleConfig(checkpoint=str(checkpoint), tiling=True)
  with pytest.raises(errors.InputError, match="tiles compile one by one"):
    told(config, tmp_path)


def test_what_a_program_does_not_read_stays_there():
  here = topology.find("local")
  given = [jax.ShapeDtypeStruct((n,), jnp.float32) for n in (1000, 3000)]
  program = compiling.Program(
    "one of two",
    lambda: jax.jit(lambda x, y: x + 1).lower(*given),
    given_bytes=programs.bytes_of(given),
  )
  assert program.given_bytes == 16_000
  found = compiling.measure(program, here, 1)
  assert (found.argument_bytes, found.resident_bytes) == (4000, 12_000)
  assert found.hbm_bytes >= 16_000


def test_stages_that_train_other_parts_are_told_apart(checkpoint, tmp_path):
  stage = tiny_training.stage("data", batch_size=1)
  part = dataclasses.replace(stage, trainable=("query",))
  data = dataclasses.replace(stage.data, cache="runs/cache")
  cached = dataclasses.replace(stage, data=data)
  config = tiny_training.config(
    "data", str(checkpoint), stages=(part, stage, cached, stage)
  )
  devices = topology.find(TOPOLOGY).devices[:1]
  _, every = programs.TrainJob(config, tmp_path).programs(devices)
  name = "train step 9x32x32, 1 clips"
  assert [one.name for one in every] == [name, name, f"{name}, cached"]
  # A cache has latents in place of videos.
  batches = [one.lower().args_info[0][2] for one in every[1:]]
  assert "video" in batches[0] and "latents" not in batches[0]
  assert {"latents", "latents_std", "text"} <= batches[1].keys()
  assert "video" not in batches[1]


@pytest.mark.slow
def test_a_training_step(checkpoint, tmp_path):
  stage = tiny_training.stage("data", batch_size=4)
  config = tiny_training.config(
    "data", str(checkpoint), stages=(stage, stage), mesh={"fsdp": 4}
  )
  found = compiling.run(programs.TrainJob(config, tmp_path), TOPOLOGY)
  (step,) = found.programs
  assert found.fits and step.name == "train step 9x32x32, 4 clips"
  assert step.model_flops > 0 and step.collectives
  # What comes out is written over what went in.
  assert step.output_bytes < step.argument_bytes / 10
  assert "It fits." in str(found)


def test_a_training_step_is_not_kept(checkpoint, tmp_path):
  config = tiny_training.config("data", str(checkpoint))
  job = programs.TrainJob(config, tmp_path)
  with pytest.raises(errors.InputError, match="only vidgen sample reads"):
    compiling.run(job, TOPOLOGY, tmp_path / "programs")
  assert not (tmp_path / "programs").exists()


@pytest.mark.slow
def test_a_mesh_is_chosen(checkpoint, tmp_path):
  """Of four chips two make a branch, and two have two of the four heads."""
  config = sample.SampleConfig(checkpoint=str(checkpoint), mesh="auto")
  found = compiling.run(programs.SampleJob(config, tmp_path), TOPOLOGY)
  assert found.mesh == {"cfg": 2, "context": 2}
  assert "\nmesh: auto chose cfg=2, context=2 for 4 devices:" in str(found)


class Jobs:
  """A job too large for a device, that fits once it is halved."""

  def __init__(self, gib, halves=True):
    self.gib, self.halves, self.why_mesh = gib, halves, ""

  def programs(self, devices, device_bytes):
    assert 2**33 < device_bytes < 2**36
    from vidgen import sharding

    mesh = sharding.make_mesh(None, devices)
    place = sharding.batch_sharding(mesh, 1)
    x = jax.ShapeDtypeStruct((self.gib, 2**28), jnp.float32, sharding=place)
    lower = lambda: jax.jit(lambda x: jnp.sort(x, axis=0)).lower(x)
    return mesh, [compiling.Program("sort", lower)]

  def alternatives(self):
    yield "nothing else", Jobs(self.gib, False)
    if self.halves:
      yield "half of it", Jobs(self.gib // 8, False)


def test_what_does_not_fit_says_what_would():
  found = compiling.run(Jobs(16), TOPOLOGY)
  assert not found.fits and found.programs[0].hbm_bytes > found.hbm_limit_bytes
  assert found.advice == "It would with half of it."
  assert not found.as_json()["fits"]
  lost = compiling.run(Jobs(16, halves=False), TOPOLOGY)
  assert lost.advice == "Nor would it with any of: nothing else."


def test_only_what_nearly_fits_is_compiled_with_full_effort(monkeypatch):
  (far,) = compiling.run(Jobs(2), TOPOLOGY).programs
  assert far.fits and far.effort == "least"
  monkeypatch.setattr(compiling, "_DOUBT", 1.0)
  (near,) = compiling.run(Jobs(2), TOPOLOGY).programs
  assert near.effort == "full"
  assert abs(near.hbm_bytes / far.hbm_bytes - 1) < 0.1
  assert jax.config.jax_exec_time_optimization_effort == 0.0


def test_of_a_published_checkpoint_nothing_is_needed(tmp_path):
  for name in ("THUDM/CogVideoX-2b", "THUDM/CogVideoX1.5-5B-I2V"):
    folder = programs.skeleton(name, tmp_path)
    assert (folder / "model_index.json").is_file()
  with pytest.raises(errors.InputError, match="known by heart: THUDM/"):
    programs.skeleton("THUDM/CogVideoX-9b", tmp_path)


@pytest.mark.parametrize(
  "name, words",
  [
    ("v9:2x4", "give v5e, v5p, v6e"),
    ("v5e", "give v5e, v5p, v6e"),
    ("v5p:4x4", "3 sides, for example v5p:4x4x4"),
    ("v5e:2x4x2", "2 sides"),
    ("v6e:0x4", "2 sides"),
    ("v6e:3x5", "not divisible"),
  ],
)
def test_topologies_that_there_are_not(name, words):
  with pytest.raises(errors.InputError, match=words):
    topology.find(name)


def test_several_slices():
  found = topology.find("2*v5e:2x4")
  assert len(found.devices) == 16
  assert {device.slice_index for device in found.devices} == {0, 1}


def test_the_config_of_either_job_is_taken(capsys, tmp_path):
  (tmp_path / "other.py").write_text("def get_config():\n  return 3\n")
  code = main.main(
    ["compile", f"--config={tmp_path / 'other.py'}", "--topology=v5e:2x2"]
  )
  assert code == 2
  assert "SampleConfig or a TrainConfig, not a int" in capsys.readouterr().err
