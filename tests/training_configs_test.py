"""Every training config loads by itself, and its steps trace at full size."""

import dataclasses
import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from tests import tiny_clip_tokenizer, tiny_tokenizer
from vidgen import checkpoint, sharding, train, train_step
from vidgen.cli import parse
from vidgen.data import buckets, loader, moving_shapes
from vidgen.encoders import word_tokenizer
from vidgen.models import cogvideox, svd
from vidgen.tasks import diffusion, sources

FOLDER = pathlib.Path(__file__).parent.parent / "configs"
CONFIGS = sorted(FOLDER.glob("*_train.py"))
CASES = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)

PUBLISHED = {
  "THUDM/CogVideoX-2b": cogvideox.config_2b(),
  "THUDM/CogVideoX-5b": cogvideox.config_5b(),
  "THUDM/CogVideoX-5b-I2V": cogvideox.config_5b_i2v(),
  "THUDM/CogVideoX1.5-5B-I2V": cogvideox.config_1_5_5b_i2v(),
  "stabilityai/stable-diffusion-2-1-base": svd.config_image(),
  "stabilityai/stable-video-diffusion-img2vid": svd.config_svd(),
  "stabilityai/stable-video-diffusion-img2vid-xt": svd.config_svd_xt(),
  # What earlier runs publish.
  "runs/svd_image_pretrain/published": svd.config_image(),
  "runs/svd_video_pretrain/published": svd.config_text_to_video(),
  "runs/svd_t2v_finetune/published": svd.config_text_to_video(),
  "runs/svd_small_vae/published": svd.config_small(9),
  "runs/svd_small_vae_solids/published": svd.config_small(9),
  "runs/svd_small_decoder/published": svd.config_small(9),
  "runs/svd_small_decoder_solids/published": svd.config_small(9),
}
# What the demo's own runs publish.
MADE_HERE = (
  "runs/demo_vae/published",
  "runs/demo_vae_longer/published",
  "runs/demo_decoder/published",
  "runs/demo_dit/published",
  "demo",
)
# Of components, by their config.
SHAPES = {}
# Those that take long to trace, and those whose last bucket is of images.
SLOW = ("cogvideox_vae_train",)
SLOW += tuple(
  path.stem for path in CONFIGS if path.stem.startswith("svd_")
)  # fmt: skip
LARGER = ("cogvideox_2b_train", "cogvideox_5b_train")
IMAGES = ("cogvideox_vae_train", "svd_video_pretrain_train")


def load(path, *overrides):
  def define(values, argv):
    parse.define_config(values, argv, train.TrainConfig, "")

  argv = [f"--config={path}", *overrides]
  return parse.parse(define, "vidgen train", argv)["config"].value


def sized(data):
  """The buckets of a stage, each with its batch size."""
  budget = functools.partial(
    buckets.token_budget,
    budget=data.token_budget,
    temporal=data.token_frames,
    spatial=data.token_pixels,
    multiple=data.batch_multiple,
  )
  return [
    dataclasses.replace(
      b, batch_size=b.batch_size or budget(b.num_frames, b.height, b.width)
    )
    for b in data.buckets
  ]


@pytest.fixture
def without_weights(monkeypatch, tmp_path):
  """Checkpoints that hold configs and a tokenizer; their weights are zeros."""
  words = moving_shapes.words()
  demo = cogvideox.config_demo(word_tokenizer.vocab_size(words))

  def resolve(name, revision=None):
    del revision
    config = demo if name in MADE_HERE else PUBLISHED[name]
    folder = tmp_path / name
    family = sources.family_of(config)
    for file, content in family.published_configs(config).items():
      path = folder / file
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(json.dumps(content))
    if not (folder / "tokenizer").exists():
      if family is cogvideox:
        tiny_tokenizer.write(folder / "tokenizer")
      else:
        tiny_clip_tokenizer.write(folder / "tokenizer")
    return folder

  def zeros(opened, name, places, dtype):
    del places
    # Asked for once for all variants: their encoders are the same.
    known = f"{name} {getattr(opened.config, name)}"
    if known not in SHAPES:
      SHAPES[known] = nn.unbox(opened.components[name].shapes())
    return jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), SHAPES[known])

  def empty_text(task, params):
    del params
    if not hasattr(task.model.config, "transformer"):
      return jnp.zeros((1, 77, 1024), task.config.dtype)
    config = task.model.config.transformer
    shape = (1, config.max_text_seq_length, config.text_embed_dim)
    return jnp.zeros(shape, task.config.dtype)

  for name in (*MADE_HERE, *PUBLISHED):
    if name.startswith("runs/") or name in MADE_HERE:
      resolve(name)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(checkpoint, "resolve", resolve)
  monkeypatch.setattr(sources.Opened, "load", zeros)
  # It is computed at once, so it cannot be traced.
  task = diffusion.DiffusionTask
  monkeypatch.setattr(task, "_empty_text", empty_text)
  # The parts of a batch are traced once, not once more for their shapes.
  once = jax.jit(task.gradients, static_argnums=0)
  monkeypatch.setattr(task, "gradients", once)
  return tmp_path


def mesh_like(sizes):
  """A mesh of eight devices with the axes of a larger one."""
  axes = [axis for axis, size in sizes.items() if size > 1]
  if not axes:
    return sharding.make_mesh(None)
  rest = 8 // 2 ** (len(axes) - 1)
  return sharding.make_mesh({a: 2 for a in axes} | {axes[-1]: rest})


def batch_of(task, bucket):
  """The shapes of a global batch, as the devices have it."""
  arrays = task.host_batch(loader.blank(bucket))
  n = bucket.batch_size
  whole = lambda x: jax.ShapeDtypeStruct((n, *x.shape[1:]), x.dtype)
  number = jax.ShapeDtypeStruct((n,), jnp.int32)
  return {
    **{name: whole(x) for name, x in arrays.items()},
    "index": number,
    "count": number,
  }


def trace(config, stage, bucket, mesh):
  """Traces a step of a stage, with the bucket of that number; nothing runs.

  Returns:
    The shapes of the state before, those after, and those of the scalars.
  """
  trainer = train.Trainer(config, config.task.build(mesh), mesh)
  task, step = trainer.stage_steps(stage)
  frozen = jax.eval_shape(functools.partial(task.frozen, mesh))
  batch = batch_of(task, sized(stage.data)[bucket])
  key = jax.eval_shape(lambda: train_step.key_of(0, train_step.STEP))
  with sharding.use(mesh):
    after, scalars = jax.eval_shape(step, trainer.shapes, frozen, batch, key)
  return trainer.shapes, after, scalars


def kinds(tree):
  return jax.tree.map(lambda x: (x.shape, x.dtype), tree)


def test_the_configs_are_there():
  names = ["2b", "5b", "5b_finetune", "5b_lora", "5b_i2v_finetune", "vae"]
  demo = [
    "demo_vae",
    "demo_vae_longer",
    "demo_decoder",
    "demo_dit",
    "demo_lora",
  ]
  want = {f"cogvideox_{name}_train.py" for name in names}
  want |= {f"{name}_train.py" for name in demo}
  assert {path.name for path in CONFIGS} >= want


@CASES
def test_docstring_holds_the_command(path):
  text = path.read_text()
  assert f"--config=configs/{path.name}" in text
  for word in ("Hardware:", "Cost:", "Expect:", "--workdir="):
    assert word in text


@CASES
def test_config_is_legal(path):
  config = load(path)
  assert train.check(config) == sum(s.num_steps for s in config.stages)
  split = math.prod(config.mesh.get(a, 1) for a in ("data", "cfg", "fsdp"))
  for stage in config.stages:
    for bucket in sized(stage.data):
      assert bucket.batch_size % (split * config.accumulate) == 0, bucket
      if path.stem.startswith("svd_"):
        # Nothing is compressed in time.
        assert bucket.height % 8 == bucket.width % 8 == 0
        continue
      # The causal autoencoder takes one frame, then groups of four; what
      # decodes to as many frames again is 8k + 1.
      assert bucket.num_frames % 8 == 1
      assert bucket.height % 16 == bucket.width % 16 == 0


@CASES
def test_fields_are_overridden(path):
  config = load(
    path,
    "--config.seed=3",
    "--config.num_steps=5",
    "--config.mesh.fsdp=4",
    "--config.task.dtype=float32",
    "--config.stages[0].data.data_dir=elsewhere",
  )
  assert (config.seed, config.num_steps, config.mesh["fsdp"]) == (3, 5, 4)
  assert config.task.dtype == "float32"
  assert config.stages[0].data.data_dir == "elsewhere"
  config.task = config.stages = config.seed = config.num_steps = None
  config.mesh.pop("fsdp")
  want = load(path)
  want.task = want.stages = want.seed = want.num_steps = None
  want.mesh.pop("fsdp", None)
  assert config == want


def different(path):
  """The numbers of the stages whose steps differ."""
  stages = load(path).stages
  kinds = [(sized(stage.data)[0], stage.options) for stage in stages]
  return [i for i, kind in enumerate(kinds) if kind not in kinds[:i]]


def cases():
  for path in CONFIGS:
    for i in different(path):
      # Networks for each chunk and three passes back, or a whole UNet block by
      # block: half a minute to trace.
      # The later stages of 2b and 5b are the first at a larger size.
      larger = i > 0 and path.stem in LARGER
      slow = pytest.mark.slow if larger or path.stem in SLOW else ()
      yield pytest.param(path, i, 0, id=f"{path.stem}-{i}", marks=slow)
      if path.stem in IMAGES and len(load(path).stages[i].data.buckets) > 1:
        # Those of the autoencoder stay: one is enough each time.
        later = slow if i else ()
        if path.stem == "svd_video_pretrain_train":
          later = pytest.mark.slow
        yield pytest.param(
          path, i, -1, id=f"{path.stem}-{i}-images", marks=later
        )


@pytest.mark.parametrize("path, number, bucket", list(cases()))
def test_step_traces_at_full_size(path, number, bucket, without_weights):
  config = load(path)
  if "vae" in path.stem:
    config.task.lpips_folder = str(without_weights)
  mesh = mesh_like(config.mesh)
  stage = config.stages[number]
  before, after, scalars = trace(config, stage, bucket, mesh)
  assert kinds(after) == kinds(before)
  assert scalars["loss"].shape == ()
  dtypes = {x.dtype for x in jax.tree.leaves(after.params)}
  assert dtypes == {jnp.dtype("float32")}


def test_sizes_are_the_papers():
  """Yang et al., https://arxiv.org/abs/2408.06072, tables 5 and 6."""
  for name in ("2b", "5b"):
    config = load(FOLDER / f"cogvideox_{name}_train.py")
    found = [
      (stage.num_steps, bucket.height, bucket.width)
      for stage in config.stages
      for bucket in sized(stage.data)[:1]
    ]
    assert found == [
      (400_000, 256, 384),
      (220_000, 480, 720),
      (120_000, 768, 1360),
    ]
    assert all(
      1 in [b.num_frames for b in s.data.buckets] for s in config.stages
    )
    adamw = config.optimizers["transformer"]
    assert adamw.name == "adamw" and adamw.clip_norm == 1.0
    assert adamw.options == {
      "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 1e-4
    }  # fmt: skip


@pytest.mark.parametrize("name", ["5b", "1_5_5b_i2v"])
def test_a_lora_is_all_that_is_trained(name, without_weights):
  del without_weights
  config = load(FOLDER / f"cogvideox_{name}_lora_train.py")
  mesh = sharding.make_mesh(None)
  trainer = train.Trainer(config, config.task.build(mesh), mesh)
  assert list(trainer.shapes.params) == ["transformer_lora"]
  count = sum(x.size for x in jax.tree.leaves(trainer.shapes.params))
  # 42 blocks, four layers of 3072 x 3072, rank 128.
  assert count == 42 * 4 * 2 * 3072 * 128
