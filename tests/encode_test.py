"""The encoding job: trained from its cache, a run is as from the videos."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from tests import tiny_training
from vidgen import encode, errors, preemption, sharding, train, train_step
from vidgen.data import cache, loader
from vidgen.models import cogvideox
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


def config_of(data_dir, checkpoint, shapes=((9, 32, 32),), **fields):
  stage = tiny_training.stage(data_dir, 4, shapes=shapes)
  return tiny_training.config(data_dir, checkpoint, stages=(stage,), **fields)


def trained(config, workdir):
  """The losses of a run."""
  train.run(config, workdir)
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line)["loss"] for line in lines]


def losses(config):
  """The losses of a run's first steps, before it learns anything."""
  mesh = sharding.make_mesh(None)
  task = config.task.build(mesh)
  trainer = train.Trainer(config, task, mesh)
  params = task.start(trainer.places.params, jax.random.key(0))
  every = {**task.frozen(mesh), **params}
  loss, told = jax.jit(lambda *args: task._loss(*args)), []
  for batch in trainer.batches(config.stages[0], 0, 0, 4):
    arrays = train_step.place_batch(task.host_batch(batch), mesh, 0, 4)
    key = jax.random.fold_in(jax.random.key(0), batch.step)
    with sharding.use(mesh):
      told.append(float(loss(every, arrays, key)[0]))
  return told


@pytest.mark.slow
def test_trains_as_from_videos(data_dir, checkpoint, tmp_path):
  """Of clips longer than the bucket too, where all windows are kept."""
  config = config_of(data_dir, checkpoint, noised={"text_dropout": 0.4})
  out = tmp_path / "cache"
  report = encode.run(config, out, encode.Options(windows=9))
  assert report.records == {"latents 9x32x32": 9 * 24, "text": 4 * 24}
  want = trained(config, tmp_path / "videos")
  got = trained(from_cache(config, out), tmp_path / "cached")
  assert len(want) == 4
  np.testing.assert_allclose(got, want, rtol=1e-5)
  text = (tmp_path / "cached" / "manifest.json").read_text()
  told = json.loads(text)["data"]
  assert told["stages.0.cache"] == cache.Cache(out).key


@pytest.mark.slow
def test_same_losses_with_the_text_encoder_trained(
  data_dir, checkpoint, tmp_path
):
  """And of images, of which 17 frames are kept."""
  shapes, task = ((5, 16, 16), (1, 16, 16)), {"train_text_encoder": True}
  config = config_of(data_dir, checkpoint, shapes, task=task)
  report = encode.run(config, tmp_path / "cache", encode.Options(windows=20))
  assert report.records == {
    "latents 5x16x16": 13 * 24,
    "latents 1x16x16": 17 * 24,
  }
  got = losses(from_cache(config, tmp_path / "cache"))
  np.testing.assert_allclose(got, losses(config), rtol=1e-5)


@pytest.mark.slow
def test_same_losses_from_images(data_dir, tmp_path):
  checkpoint = tiny_training.checkpoint(tmp_path, "1.5-5b-i2v")
  noised = {"text_dropout_by": "zeros", "text_dropout": 0.4}
  config = config_of(data_dir, checkpoint, ((5, 16, 16),), noised=noised)
  encode.run(config, tmp_path / "cache", encode.Options(windows=13))
  got = losses(from_cache(config, tmp_path / "cache"))
  np.testing.assert_allclose(got, losses(config), rtol=1e-5)


IMAGES = {"shapes": ((1, 16, 16),), "task": {"train_text_encoder": True}}


@pytest.fixture(scope="module")
def whole(data_dir, checkpoint, tmp_path_factory):
  """A cache of small images in files of 8 clips, its config, its folder."""
  config = config_of(data_dir, checkpoint, **IMAGES)
  out = tmp_path_factory.mktemp("caches") / "whole"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(encode, "_FILE_CLIPS", 8)
    encode.run(config, out)
  return config, out


@pytest.fixture
def small_files(monkeypatch):
  monkeypatch.setattr(encode, "_FILE_CLIPS", 8)


def arrays_of(config, out):
  """All latents of a cache, in an order of their own."""
  data = from_cache(config, out).stages[0].data
  batches = loader.batches(data, seed=0, start=0, stop=6)
  return np.concatenate([batch.arrays["latents"] for batch in batches])


def test_a_stopped_run_goes_on(whole, small_files, tmp_path, monkeypatch):
  config, want = whole
  out = tmp_path / "cache"
  with monkeypatch.context() as patch:
    patch.setattr(preemption.Preemption, "requested", lambda _, done: done > 11)
    with pytest.raises(errors.PreemptedError, match="clip 12 of 24 of latents"):
      encode.run(config, out)
  assert not out.exists()
  drafts = list(tmp_path.glob(".cache.draft/cache/*"))
  assert [path.name for path in drafts] == ["latents-00-00000.array_record"]
  before = drafts[0].stat().st_mtime_ns
  (drafts[0].parent / ".abc.tmp.array_record").write_bytes(b"half")
  read = []
  windows = encode._windows
  monkeypatch.setattr(
    encode, "_windows", lambda *args: read.append(args[-1]) or windows(*args)
  )
  encode.run(config, out)
  assert sorted(read) == list(range(8, 24))
  first = out / "latents-00-00000.array_record"
  assert first.stat().st_mtime_ns == before
  assert [p.name for p in tmp_path.iterdir()] == ["cache"]
  for path in want.iterdir():
    assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_the_same_again_and_another(whole, small_files):
  config, out = whole
  report = encode.run(config, out)
  assert report.was_there and report.records == {"latents 1x16x16": 24}
  assert "is already encoded: 24 latents 1x16x16" in str(report)
  for options, word in (
    (encode.Options(dtype="bfloat16"), "another dtype;"),
    (encode.Options(windows=2), "another size;"),
  ):
    with pytest.raises(errors.InputError, match=f"exists, a cache of {word}"):
      encode.run(config, out, options)
  with pytest.raises(errors.InputError, match="exists; name a new"):
    encode.run(config, out.parent)


@pytest.mark.slow
def test_many_devices_encode_as_one(whole, tmp_path):
  config, out = whole
  many = tiny_training.replace(config, mesh={"data": 2, "fsdp": 2, "tensor": 2})
  # 5 at once is made 8, and 24 are no multiple of that on four parts.
  encode.run(many, tmp_path / "cache", encode.Options(batch_size=5))
  np.testing.assert_allclose(
    arrays_of(config, tmp_path / "cache"), arrays_of(config, out), atol=1e-5
  )


def test_bfloat16_is_half_the_size(whole, tmp_path):
  config, out = whole
  options = encode.Options(dtype="bfloat16")
  encode.run(config, tmp_path / "cache", options)
  want = arrays_of(config, out)
  got = arrays_of(config, tmp_path / "cache")
  assert got.dtype.itemsize == 2 and want.dtype == np.float32
  np.testing.assert_allclose(
    got.astype(np.float32), want, rtol=2**-8, atol=1e-6
  )


def host_batch(config, out):
  """What a run takes of the first batch of a cache."""
  config = from_cache(config, out)
  task = config.task.build(sharding.make_mesh(None))
  data = config.stages[0].data
  (batch,) = loader.batches(data, seed=0, start=0, stop=1)
  return task.host_batch(batch)


def test_a_run_takes_its_own_cache_only(whole, data_dir, checkpoint, tmp_path):
  config, out = whole
  arrays = host_batch(config, out)
  assert arrays.keys() == {"latents", "latents_std", "ids", "captions_cut"}
  # A frozen text encoder may go along with latents alone.
  frozen = config_of(data_dir, checkpoint, IMAGES["shapes"])
  assert host_batch(frozen, out).keys() == arrays.keys()
  task = tiny_training.replace(config.task, dtype="bfloat16")
  with pytest.raises(errors.InputError, match=r"another dtype \(float32 there"):
    host_batch(tiny_training.replace(config, task=task), out)
  task = tiny_training.replace(task, vae_dtype="float32")
  got = host_batch(tiny_training.replace(config, task=task), out)
  assert got.keys() == arrays.keys()
  frozen_task = tiny_training.replace(
    frozen.task, dtype="bfloat16", vae_dtype="float32"
  )
  opened = frozen_task.build(sharding.make_mesh(None))
  assert opened.encoders().dtype == "float32, text bfloat16"
  other = pathlib.Path(tiny_training.checkpoint(tmp_path))
  (path,) = (other / "vae").glob("*.safetensors")
  weights = safetensors.numpy.load_file(path)
  name = min(weights)
  weights[name] = weights[name] + 1e-3
  safetensors.numpy.save_file(weights, path)
  changed = config_of(data_dir, str(other), **IMAGES)
  with pytest.raises(errors.InputError, match=r"another model \(vae\);"):
    host_batch(changed, out)


def test_a_cache_without_images_is_none_of_an_image_model(
  whole, data_dir, tmp_path
):
  _, out = whole
  images = tiny_training.checkpoint(tmp_path, "5b-i2v")
  config = config_of(data_dir, images, **IMAGES)
  with pytest.raises(errors.InputError, match=r"model \(one without images\)"):
    host_batch(config, out)


def test_text_of_another_tokenizer(data_dir, checkpoint, tmp_path):
  config = config_of(data_dir, checkpoint)
  mesh = sharding.make_mesh(None)
  one = config.task.build(mesh).encoders()
  other = pathlib.Path(tiny_training.checkpoint(tmp_path)) / "tokenizer"
  source = tiny_training.replace(config.task.source, tokenizer=str(other))
  task = tiny_training.replace(config.task, source=source)
  assert task.build(mesh).encoders() == one, "where it lies changes nothing"
  (other / "special_tokens_map.json").write_text("{}")
  changed = task.build(mesh).encoders()
  assert changed.text != one.text and changed.vae == one.vae
  with pytest.raises(errors.InputError, match="text_encoder or tokenizer"):
    cache.check_encoders(changed, one)


def test_stages_share_what_is_the_same(data_dir, checkpoint):
  """Filters of the same size make one group, other sizes their own."""
  black = tiny_training.stage(data_dir, 2, shapes=((9, 32, 32), (1, 32, 32)))
  black.data.where = {"background": "black"}
  every = tiny_training.stage(data_dir, 2, shapes=((9, 32, 32),), batch_size=2)
  config = tiny_training.config(data_dir, checkpoint, stages=(black, every))
  mesh = sharding.make_mesh(None)
  task = config.task.build(mesh)
  jobs = encode._jobs(task, config.stages, True, mesh, encode.Options())
  groups = [job.group for job in jobs]
  assert [(g.kind, g.size) for g in groups] == [
    ("latents", (9, 32, 32)),
    ("latents", (1, 32, 32)),
    ("text", ()),
  ]
  counts = [len(group.clips) for group in groups]
  assert counts[0] == counts[2] == 24 > counts[1] > 0
  assert [job.batch_size for job in jobs] == [2, 4, 2]


def test_a_latent_that_is_not_finite(data_dir, checkpoint):
  made = {"latents": jnp.array([[1.0], [np.inf]], jnp.float16)}
  group = cache.Group("x", "latents", "", "", None, (1, 8, 8), np.arange(2), 2)
  job = encode.Job(group, len, len, len, 2, 1)
  items = [encode.Item(0, i, f"clip-{i}", [], None) for i in range(2)]
  with pytest.raises(errors.InputError, match=r"clip-1: its latents.*float16"):
    list(encode._packed(job, items, made))


@pytest.mark.parametrize(
  "options, word",
  [
    ({"dtype": "int8"}, "dtype: 'int8'"),
    ({"windows": 0}, "windows: 0"),
    ({"batch_size": 0}, "batch_size: 0"),
  ],
)
def test_bad_options(options, word, whole, tmp_path):
  with pytest.raises(errors.InputError, match=word):
    encode.run(whole[0], tmp_path / "cache", encode.Options(**options))


def test_what_has_nothing_to_encode(data_dir, checkpoint, tmp_path):
  model = cogvideox.config_demo(100)
  task = autoencoding.AutoencoderTaskConfig(model=model)
  config = config_of(data_dir, checkpoint)
  config = tiny_training.replace(config, task=task)
  with pytest.raises(errors.InputError, match="only a diffusion run"):
    encode.run(config, tmp_path / "cache")
  source = {"scratch": ("vae",)}
  config = config_of(data_dir, checkpoint, source=source)
  with pytest.raises(errors.InputError, match="vae starts from random weights"):
    encode.run(config, tmp_path / "cache")
  assert not list(tmp_path.iterdir())


def test_command(whole, monkeypatch, tmp_path):
  from vidgen.cli import encode as command
  from vidgen.cli import parse

  path = tmp_path / "config.py"
  path.write_text(
    "from vidgen import train\n"
    "def get_config():\n"
    "  return train.TrainConfig(task=None, stages=())\n"
  )
  given = []
  monkeypatch.setattr(encode, "run", lambda *args: given.append(args) or "done")
  monkeypatch.setattr(command.cache, "enable", lambda: None)
  argv = [f"--config={path}", "--config.seed=3", "--out=x", "--windows=4"]
  command.run(parse.parse(command.define, "vidgen encode", argv))
  config, out, options, _ = given[0]
  assert (config.seed, out) == (3, "x")
  assert options == encode.Options("float32", 4, None)
  with pytest.raises(errors.InputError, match="--config is missing"):
    parse.parse(command.define, "vidgen encode", ["--out=x"])
  values = parse.parse(command.define, "vidgen encode", argv[:1])
  with pytest.raises(errors.InputError, match="--out is missing"):
    command.run(values)
