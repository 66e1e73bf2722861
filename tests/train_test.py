"""Training runs end to end: what they write, how they stop and go on."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import optax
import pytest
import safetensors.numpy

import vidgen
from tests import tiny_training
from vidgen import (
  adapters,
  errors,
  optimizers,
  outputs,
  runs,
  sharding,
  statefile,
  statetree,
  train,
)
from vidgen.data import loader

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  return tiny_training.shapes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  return tiny_training.checkpoint(tmp_path_factory.mktemp("checkpoint"))


def final(workdir):
  """The arrays of a run's newest checkpoint, by name."""
  step = max(runs.checkpoint_steps(workdir))
  path = pathlib.Path(workdir).absolute() / "checkpoints" / f"{step:09d}"
  held = statefile.held(path)
  like = {n: np.empty(x.shape, x.dtype) for n, x in held.items()}
  return statefile.read(path, like)


def same(one, other):
  assert one.keys() == other.keys()
  bad = [n for n in one if one[n].tobytes() != other[n].tobytes()]
  assert not bad, bad


def losses(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return {row["step"]: row["loss"] for row in map(json.loads, lines)}


@pytest.fixture(scope="module")
def undisturbed(data_dir, checkpoint, tmp_path_factory):
  """A run of 6 steps, and its folder."""
  workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
  config = tiny_training.config(data_dir, checkpoint)
  train.run(config, workdir)
  return config, workdir


def test_a_run_leaves_what_it_should(undisturbed):
  _, workdir = undisturbed
  names = {path.name for path in workdir.iterdir()}
  assert {"config.json", "checkpoints", "metrics.jsonl", "published"} <= names
  assert "goodput.json" in names
  assert sorted(losses(workdir)) == [1, 2, 3, 4, 5, 6]
  assert all(np.isfinite(list(losses(workdir).values())))


def test_a_run_tells_what_it_is_made_of(undisturbed, data_dir):
  config, workdir = undisturbed
  told = json.loads((workdir / "manifest.json").read_text())
  assert told["exit"] == {"reason": "done", "code": 0}
  assert told["unknown"] == {}
  assert sorted(told["weights"]) == ["text_encoder", "transformer", "vae"]
  for item in (*told["weights"].values(), *told["tokenizer"].values()):
    assert "config.json" in item["sha256"] or "tokenizer.json" in item["sha256"]
  fingerprint = loader.dataset_fingerprint(config.stages[0].data)
  assert told["data"] == {"stages.0": fingerprint}
  assert told["outputs"]["step"] == 6
  assert told["outputs"]["metrics"]["loss"] == losses(workdir)[6]
  state = outputs.state_digest(final(workdir))
  assert told["outputs"]["state_sha256"] == state


def test_what_was_trained_samples(undisturbed, checkpoint):
  _, workdir = undisturbed
  pipeline = vidgen.load(workdir / "published", dtype="float32")
  video = pipeline.sample("a red circle", num_frames=9, num_steps=2)
  assert video.shape == (1, 9, 64, 96, 3)
  before = safetensors.numpy.load_file(_weights(checkpoint))
  after = safetensors.numpy.load_file(_weights(workdir / "published"))
  moved = {n for n in before if (before[n] != after[n]).any()}
  assert len(moved) > 0.9 * len(before)


def _weights(folder):
  return pathlib.Path(folder, "transformer/diffusion_pytorch_model.safetensors")


def test_two_runs_of_one_seed_are_bit_equal(undisturbed, tmp_path):
  config, workdir = undisturbed
  train.run(config, tmp_path / "again")
  same(final(tmp_path / "again"), final(workdir))
  other = tiny_training.replace(config, seed=1)
  train.run(other, tmp_path / "other")
  assert losses(tmp_path / "other") != losses(workdir)


def _files(folder):
  """What a run's folder tells of it."""
  return {path.name: path.read_bytes() for path in folder.glob("*.json*")}


def test_a_run_in_two_goes_is_one_run(undisturbed, tmp_path, capsys):
  config, workdir = undisturbed
  train.run(tiny_training.replace(config, num_steps=2), tmp_path / "two")
  kept = tmp_path / "two/checkpoints/000000002"
  before = kept.stat().st_ino
  train.run(tiny_training.replace(config, num_steps=2), tmp_path / "two")
  assert kept.stat().st_ino == before, "what is there is not written again"
  told = _files(tmp_path / "two")
  with pytest.raises(errors.InputError, match="has made 2 already"):
    train.run(tiny_training.replace(config, num_steps=1), tmp_path / "two")
  assert _files(tmp_path / "two") == told, "what is refused writes nothing"
  assert "begins: 2 steps" in capsys.readouterr().err
  train.run(config, tmp_path / "two")
  assert "goes on from step 2 of 6" in capsys.readouterr().err
  same(final(tmp_path / "two"), final(workdir))
  assert losses(tmp_path / "two") == losses(workdir)


_CHILD = """
import sys, jax, pathlib
jax.config.update("jax_num_cpu_devices", 8)
from tests import tiny_training
from vidgen import errors, train
data, checkpoint, workdir = sys.argv[1:]
config = tiny_training.config(
    data, checkpoint, stages=(tiny_training.stage(data, 40),),
    checkpoint_every=3)
try:
  train.run(config, workdir)
except errors.VidgenError as error:
  print(error)
  sys.exit(error.exit_code)
"""


def start(data_dir, checkpoint, workdir):
  return subprocess.Popen(
    [sys.executable, "-c", _CHILD, data_dir, checkpoint, str(workdir)],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )


def wait_for(workdir, step, child):
  """Waits until a run has told of a step."""
  metrics = workdir / "metrics.jsonl"
  for _ in range(1200):
    if child.poll() is not None:
      return
    if metrics.exists() and f'"step": {step},' in metrics.read_text():
      return
    time.sleep(0.1)
  raise AssertionError("the run does not get on")


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_in_the_same_bits(
  data_dir, checkpoint, tmp_path
):
  whole = start(data_dir, checkpoint, tmp_path / "whole")
  assert whole.wait() == 0
  codes = []
  for step, kind in ((5, signal.SIGKILL), (11, signal.SIGTERM), (20, 9)):
    child = start(data_dir, checkpoint, tmp_path / "killed")
    wait_for(tmp_path / "killed", step, child)
    child.send_signal(kind)
    codes.append(child.wait())
  assert codes == [-9, 75, -9]
  last = start(data_dir, checkpoint, tmp_path / "killed")
  assert last.wait() == 0
  same(final(tmp_path / "killed"), final(tmp_path / "whole"))
  assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


def test_asked_to_stop_it_saves(data_dir, checkpoint, tmp_path):
  stage = tiny_training.stage(data_dir, 2000)
  config = tiny_training.config(data_dir, checkpoint, stages=(stage,))
  metrics = tmp_path / "run" / "metrics.jsonl"

  def ask():
    while not metrics.exists() or not metrics.read_text():
      time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)

  thread = threading.Thread(target=ask, daemon=True)
  thread.start()
  with pytest.raises(errors.PreemptedError, match="saved at step") as caught:
    train.run(config, tmp_path / "run")
  assert caught.value.exit_code == 75
  assert runs.checkpoint_steps(tmp_path / "run")


@pytest.mark.slow
def test_other_mesh_same_state_and_losses(undisturbed, tmp_path):
  config, workdir = undisturbed
  train.run(tiny_training.replace(config, num_steps=3), tmp_path / "one")
  before = final(tmp_path / "one")
  many = tiny_training.replace(config, mesh={"data": 2, "fsdp": 2, "tensor": 2})
  trainer_state = restored(many, tmp_path / "one")
  same(trainer_state, before)
  train.run(many, tmp_path / "one")
  want, got = losses(workdir), losses(tmp_path / "one")
  np.testing.assert_allclose(
    [got[s] for s in sorted(got)], [want[s] for s in sorted(want)], rtol=1e-4
  )


def restored(config, workdir):
  """The state as a run on another mesh finds it."""
  mesh = sharding.make_mesh(config.mesh)
  task = config.task.build(mesh)
  trainer = train.Trainer(config, task, mesh)
  with train.open_folder(config, workdir) as folder:
    state = trainer.start(folder)
  return {n: np.asarray(x) for n, x in statetree.named(state).items()}


@pytest.mark.parametrize("name", ["manifest.json", "manifest-00000-of-2.json"])
def test_workdir_of_another_command(undisturbed, tmp_path, name):
  (tmp_path / "run").mkdir()
  path = tmp_path / "run" / name
  path.write_text('{"command": "sample"}')
  with pytest.raises(errors.InputError) as error:
    train.run(undisturbed[0], tmp_path / "run")
  assert "is of vidgen sample, and vidgen train would write" in str(error.value)
  assert [p.name for p in (tmp_path / "run").iterdir()] == [name]


def test_workdir_of_another_config(undisturbed):
  config, workdir = undisturbed
  other = tiny_training.replace(config, ema_decay=0.5)
  with pytest.raises(errors.InputError, match="ema_decay"):
    train.run(other, workdir)


@pytest.mark.slow
def test_overfitting_one_batch(data_dir, checkpoint, tmp_path):
  """One clip, one level: the loss goes to zero, far below where it began."""
  stage = tiny_training.stage(data_dir, 250, batch_size=1, peak=1e-2)
  stage.data.where = {"background": "black"}
  config = tiny_training.config(
    data_dir,
    checkpoint,
    stages=(stage,),
    noised={
      "timesteps": ((990, 1000, 1.0),),
      "text_dropout": 0.0,
      "sample_posterior": False,
    },
    spike_sigmas=0.0,
  )
  one = one_clip(config)
  train.run(one, tmp_path / "run")
  told = losses(tmp_path / "run")
  first = np.mean([told[s] for s in range(1, 6)])
  last = np.mean([told[s] for s in range(231, 251)])
  assert last < 0.1 * first, (first, last)


def one_clip(config):
  """The config with the clips of one kind: two of them at the most."""
  index = loader.records.Split("moving_shapes", _data(config), "train").index
  rare = {}
  for labels in index.labels:
    if labels["things"] == 1:
      key = (labels["shapes"][0], labels["colours"][0], labels["motions"][0])
      rare.setdefault(key, []).append(labels)
  (shape, colour, motion), _ = min(rare.items(), key=lambda x: len(x[1]))
  where = {
    "things": 1,
    "shapes": shape,
    "colours": colour,
    "motions": motion,
  }
  config.stages[0].data.where = where
  return config


def _data(config):
  return config.stages[0].data.data_dir


@pytest.mark.slow
def test_stages_and_buckets(data_dir, checkpoint, tmp_path):
  """Two stages, of images and videos mixed, and of longer ones alone."""
  first = tiny_training.stage(
    data_dir, 6, shapes=((1, 32, 32), (9, 32, 32)), timesteps=((0, 500, 1.0),)
  )
  second = tiny_training.stage(data_dir, 2, shapes=((17, 32, 32),), peak=1e-4)
  config = tiny_training.config(data_dir, checkpoint, stages=(first, second))
  train.run(config, tmp_path / "run")
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  rates = [json.loads(line)["learning_rate"] for line in lines]
  np.testing.assert_allclose(rates, [1e-3] * 6 + [1e-4] * 2, rtol=1e-5)


def test_stages_that_differ_in_data_alone_share_a_step(data_dir, checkpoint):
  stages = (
    tiny_training.stage(data_dir, 1),
    tiny_training.stage(data_dir, 1, shapes=((17, 32, 32),), peak=1e-4),
    tiny_training.stage(data_dir, 1, timesteps=((0, 500, 1.0),)),
    dataclasses.replace(tiny_training.stage(data_dir, 1), trainable=("query",)),
  )
  config = tiny_training.config(data_dir, checkpoint, stages=stages)
  mesh = sharding.make_mesh(None)
  trainer = train.Trainer(config, config.task.build(mesh), mesh)
  steps = [trainer.stage_steps(stage)[1] for stage in stages]
  assert steps[0] is steps[1]
  assert len(set(steps)) == 3


def test_lora_run(data_dir, checkpoint, tmp_path):
  lora = adapters.LoraConfig(rank=4, alpha=4.0)
  config = tiny_training.config(
    data_dir, checkpoint, task={"lora": lora}, ema_decay=0.0
  )
  published = train.run(config, tmp_path / "run")
  (file,) = published.glob("*.safetensors")
  pipeline = vidgen.load(checkpoint, dtype="float32", lora=str(file))
  ours = {"num_frames": 9, "num_steps": 2, "output": "latents"}
  with_lora = pipeline.sample("a red circle", **ours)
  without = vidgen.load(checkpoint, dtype="float32").sample(
    "a red circle", **ours
  )
  assert np.abs(with_lora - without).max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["5b-i2v", "1.5-5b", "1.5-5b-i2v"])
def test_every_variant_trains(variant, data_dir, tmp_path):
  checkpoint = tiny_training.checkpoint(tmp_path, variant)
  # The learned table of 5b-I2V is for one size alone.
  shape = (9, 64, 96) if variant == "5b-i2v" else (9, 32, 32)
  stage = tiny_training.stage(data_dir, 2, shapes=(shape,))
  config = tiny_training.config(data_dir, checkpoint, stages=(stage,))
  train.run(config, tmp_path / "run")
  assert all(np.isfinite(list(losses(tmp_path / "run").values())))


def test_samples_of_fixed_prompts(data_dir, checkpoint, tmp_path):
  from vidgen.tasks import diffusion

  samples = diffusion.SampleSettings(
    prompts=("a red circle", "a star"), num_frames=9, num_steps=2
  )
  config = tiny_training.config(
    data_dir, checkpoint, task={"samples": samples}, sample_every=3
  )
  train.run(config, tmp_path / "run")
  files = sorted(p.name for p in (tmp_path / "run/samples/000000003").iterdir())
  assert files == ["000.mp4", "001.mp4"]


def test_diverged(data_dir, checkpoint, tmp_path):
  stage = tiny_training.stage(data_dir, 60, peak=1e30)
  config = tiny_training.config(
    data_dir, checkpoint, stages=(stage,), max_skipped=5, checkpoint_every=4
  )
  with pytest.raises(errors.DivergedError, match="train-0000") as caught:
    train.run(config, tmp_path / "run")
  assert caught.value.exit_code == 4
  state = final(tmp_path / "run")
  assert all(np.isfinite(x).all() for n, x in state.items() if "params" in n)


@pytest.mark.parametrize(
  "fields, word",
  [
    ({"stages": ()}, "at least one"),
    ({"num_steps": 7}, "num_steps 7"),
    ({"accumulate": 3}, "3 equal parts"),
    ({"mesh": {"data": 8}}, "4 does not divide"),
    ({"seed": -1}, "seed"),
    ({"optimizers": {"vae": optimizers.OptimizerConfig()}}, "vae"),
  ],
)
def test_bad_configs(fields, word, data_dir, checkpoint, tmp_path):
  config = tiny_training.config(data_dir, checkpoint)
  config = tiny_training.replace(config, **fields)
  with pytest.raises(errors.InputError, match=word):
    train.run(config, tmp_path / "run")
  assert not (tmp_path / "run").exists(), "nothing is left to be in the way"


def test_parts_of_a_batch_that_a_budget_sizes(data_dir, checkpoint):
  """Its size is known before the first step, and so is that it has no parts."""
  stage = tiny_training.stage(data_dir, batch_size=0)
  stage.data.token_budget = 7 * 12
  config = tiny_training.config(data_dir, checkpoint, stages=(stage,))
  config = tiny_training.replace(config, accumulate=2)
  with pytest.raises(errors.InputError, match=r"batch of 7 .* 2 equal parts"):
    train.check(config)


def test_an_optimiser_starts_from_the_given_weights(
  data_dir, checkpoint, tmp_path
):
  """Some hold a copy: it must be of the checkpoint, not of random weights."""
  config = tiny_training.config(
    data_dir,
    checkpoint,
    optimizers={
      "transformer": optimizers.OptimizerConfig("schedule_free_adamw", {})
    },
  )
  mesh = sharding.make_mesh(None)
  trainer = train.Trainer(config, config.task.build(mesh), mesh)
  with train.open_folder(config, tmp_path / "run") as folder:
    state = trainer.start(folder)
  held = optax.tree.get(state.opt["transformer"], "z")
  same = jax.tree.map(np.array_equal, held, state.params["transformer"])
  assert all(jax.tree.leaves(same))


def test_a_mesh_is_chosen(data_dir, checkpoint):
  """Weights are split unless there is known to be room for copies."""
  config = tiny_training.config(
    data_dir,
    checkpoint,
    stages=(tiny_training.stage(data_dir, batch_size=4),),
    mesh="auto",
  )
  mesh, why = train.choose_mesh(config)
  sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}
  assert sizes == {"fsdp": 4, "context": 2}
  assert why.startswith("mesh: auto chose fsdp=4, context=2 for 8 devices: ")
  roomy, _ = train.choose_mesh(config, device_bytes=2**34)
  assert (roomy.shape["data"], roomy.shape["context"]) == (4, 2)


def test_a_stage_without_clips_is_told_before_the_run(
  data_dir, checkpoint, tmp_path
):
  late = tiny_training.stage(data_dir, shapes=((33, 32, 32),))
  stages = (tiny_training.stage(data_dir), late)
  config = tiny_training.config(data_dir, checkpoint, stages=stages)
  with pytest.raises(errors.InputError, match="bucket 33x32x32: no clip"):
    train.run(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_checkpoint_of_another_model(data_dir, checkpoint, tmp_path):
  other = tiny_training.checkpoint(tmp_path, "1.5-5b")
  config = tiny_training.config(
    data_dir, checkpoint, source={"parts": {"transformer": other}}
  )
  with pytest.raises(errors.CorruptError, match=r"misshapen: .* instead of"):
    train.run(config, tmp_path / "run")


@pytest.mark.slow
def test_accumulated_run_is_the_run(undisturbed, tmp_path):
  config, workdir = undisturbed
  train.run(tiny_training.replace(config, accumulate=2), tmp_path / "parts")
  want, got = losses(workdir), losses(tmp_path / "parts")
  np.testing.assert_allclose(
    [got[s] for s in sorted(got)], [want[s] for s in sorted(want)], rtol=1e-4
  )


@pytest.mark.slow
def test_remat_changes_nothing(undisturbed, tmp_path):
  config, workdir = undisturbed
  task = tiny_training.replace(config.task, remat="full")
  train.run(tiny_training.replace(config, task=task), tmp_path / "remat")
  want, got = losses(workdir), losses(tmp_path / "remat")
  np.testing.assert_allclose(
    [got[s] for s in sorted(got)], [want[s] for s in sorted(want)], rtol=1e-5
  )


def test_eight_devices_are_there():
  assert len(jax.devices()) == 8
