"""What is published is what diffusers and vidgen open, bit for bit."""

import dataclasses
import json

import diffusers
import jax
import numpy as np
import pytest
import torch
import transformers

import vidgen
from tests import tiny_cogvideox, tiny_tokenizer
from vidgen import errors, publish, tensorfile
from vidgen.models import base, cogvideox
from vidgen.models.cogvideox import plan

CONFIGS = {
  "2b": cogvideox.config_2b,
  "5b": cogvideox.config_5b,
  "5b-i2v": cogvideox.config_5b_i2v,
  "1.5-5b": cogvideox.config_1_5_5b,
  "1.5-5b-i2v": cogvideox.config_1_5_5b_i2v,
  "demo": lambda: cogvideox.config_demo(300),
}
PIPELINES = {
  True: diffusers.CogVideoXImageToVideoPipeline,
  False: diffusers.CogVideoXPipeline,
}


def write_configs(configs, folder):
  for name, config in configs.items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("variant", CONFIGS)
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m_sde"])
def test_configs_read_back(variant, sampler, tmp_path):
  config = dataclasses.replace(CONFIGS[variant](), sampler=sampler)
  configs = cogvideox.published_configs(config)
  write_configs(configs, tmp_path)
  assert cogvideox.read_config(tmp_path) == config
  kind = PIPELINES[variant.endswith("i2v")].__name__
  assert configs["model_index.json"]["_class_name"] == kind


def test_a_checkpoint_has_defaults_of_its_own(tmp_path):
  plain = CONFIGS["2b"]()
  config = dataclasses.replace(plain, num_steps=25, guidance_scale=1.6)
  configs = cogvideox.published_configs(config)
  index = configs["model_index.json"]
  own = index.keys() - cogvideox.published_configs(plain)["model_index.json"]
  assert own == {"_num_steps", "_guidance_scale"}
  write_configs(configs, tmp_path)
  assert cogvideox.read_config(tmp_path) == config
  made = plan.plan(config, base.Request())
  assert len(made.schedule) == 25 and (made.guidance == 1.6).all()
  for value in (0, "6", None, True):
    index["_guidance_scale"] = value
    write_configs(configs, tmp_path)
    with pytest.raises(errors.InputError, match="_guidance_scale"):
      cogvideox.read_config(tmp_path)


@pytest.mark.parametrize("variant", ["2b", "1.5-5b-i2v"])
def test_full_size_networks_are_those_of_the_configs(variant):
  """diffusers builds them without a word about a key it does not know."""
  configs = cogvideox.published_configs(CONFIGS[variant]())
  for name, kind in (
    ("transformer", diffusers.CogVideoXTransformer3DModel),
    ("vae", diffusers.AutoencoderKLCogVideoX),
  ):
    with torch.device("meta"):
      module, unused = kind.from_config(
        configs[f"{name}/config.json"], return_unused_kwargs=True
      )
    assert unused.keys() <= {"_class_name", "_diffusers_version"}
    assert set(module.config) - {"_use_default_values"} <= (
      set(configs[f"{name}/config.json"])
    )


@pytest.fixture(scope="module", params=["5b-i2v", "1.5-5b"])
def trip(request, tmp_path_factory):
  """(folder, diffusers pipeline, our pipeline) of a checkpoint."""
  folder = tmp_path_factory.mktemp(request.param)
  theirs = tiny_cogvideox.write(folder, request.param)
  folder = folder / "checkpoint"
  return folder, theirs, vidgen.load(folder, dtype="float32")


def test_configs_are_those_diffusers_wrote(trip):
  folder, _, ours = trip
  for name, got in ours.model.published_configs().items():
    want = json.loads((folder / name).read_text(encoding="utf-8"))
    if "_diffusers_version" in got:
      assert {**got, "_diffusers_version": want["_diffusers_version"]} == want
    else:
      assert want.keys() - got.keys() <= _T5_DEFAULTS, name


# transformers writes these too; for it they follow from what is there.
_T5_DEFAULTS = {
  "classifier_dropout",
  "dense_act_fn",
  "dtype",
  "is_decoder",
  "is_gated_act",
  "scale_decoder_outputs",
  "transformers_version",
}


def states(pipeline):
  return {
    f"{name}.{key}": value
    for name in ("transformer", "vae", "text_encoder")
    for key, value in getattr(pipeline, name).state_dict().items()
  }


def public(config):
  return {k: v for k, v in config.items() if not k.startswith("_")}


def assert_same_trees(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_array_equal(a, b)


def sample(pipeline, image):
  """Two steps of diffusers' pipeline from the same noise."""
  config = pipeline.transformer.config
  size = {"num_frames": 9, "height": 64, "width": 96}
  pipeline.set_progress_bar_config(disable=True)
  return pipeline(
    **({"image": PIXELS} if image else {}),
    prompt="a red kite drifts",
    num_inference_steps=2,
    generator=torch.Generator().manual_seed(0),
    output_type="latent",
    max_sequence_length=config.max_text_seq_length,
    **size,
  ).frames


PIXELS = torch.linspace(0, 1, 3 * 64 * 96).reshape(1, 3, 64, 96)


def test_round_trip(trip, tmp_path):
  folder, theirs, ours = trip
  target = tmp_path / "new" / "model"
  publish.publish(
    target, ours.model, ours.params, tokenizer=folder / "tokenizer"
  )
  assert [p.name for p in target.parent.iterdir()] == ["model"]

  kind = type(theirs)
  again = diffusers.DiffusionPipeline.from_pretrained(target)
  assert type(again) is kind
  want = states(theirs)
  got = states(again)
  assert got.keys() == want.keys()
  for name in want:
    # diffusers makes the table of learned positions in float64.
    assert torch.equal(got[name], want[name].float()), name
  assert type(again.scheduler) is type(theirs.scheduler)
  assert public(again.scheduler.config) == public(theirs.scheduler.config)
  image = kind is PIPELINES[True]
  assert torch.equal(sample(again, image), sample(theirs, image))

  _, report = transformers.T5EncoderModel.from_pretrained(
    target / "text_encoder", output_loading_info=True
  )
  for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
    assert not report[fault]

  loaded = vidgen.load(target, dtype="float32")
  assert loaded.model.config == ours.model.config
  assert_same_trees(loaded.params, ours.params)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
  """(model, parameters, tokenizer's folder) of a model never loaded."""
  folder = tmp_path_factory.mktemp("scratch") / "words"
  vocabulary = tiny_tokenizer.write(folder)
  config = cogvideox.config_demo(
    vocabulary, num_layers=1, num_attention_heads=1, attention_head_dim=16
  )
  model = cogvideox.create(config, "float32", folder)
  draw = np.random.default_rng(0)
  params = {
    c.name: jax.tree.map(
      lambda x: draw.normal(size=x.shape).astype(np.float32), base.shapes(c)
    )
    for c in model.components
  }
  return model, params, folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_made_here(dtype, scratch, tmp_path):
  model, params, tokenizer = scratch
  target = tmp_path / "model"
  publish.publish(target, model, params, tokenizer=tokenizer, dtype=dtype)
  want = getattr(torch, dtype)
  pipeline = diffusers.CogVideoXPipeline.from_pretrained(target, dtype=want)
  assert {x.dtype for x in pipeline.transformer.state_dict().values()} == {want}
  for name in params:
    files = tensorfile.open_folder(target / name)
    assert {entry.dtype.name for entry in files.values()} == {dtype}
  loaded = vidgen.load(target, dtype=dtype)
  cast = jax.tree.map(lambda x: x.astype(dtype), params)
  assert_same_trees(loaded.params, cast)
  ids = loaded.model.tokenizer(["the sea"], 8).ids
  np.testing.assert_array_equal(ids, model.tokenizer(["the sea"], 8).ids)


def test_each_component_in_its_own_dtype(scratch, tmp_path):
  model, params, tokenizer = scratch
  dtypes = dict.fromkeys(params, "bfloat16") | {"vae": "float32"}
  target = tmp_path / "model"
  publish.publish(target, model, params, tokenizer=tokenizer, dtype=dtypes)
  for name in params:
    files = tensorfile.open_folder(target / name)
    assert {entry.dtype.name for entry in files.values()} == {dtypes[name]}


def test_refuses(scratch, tmp_path):
  model, params, tokenizer = scratch
  target = tmp_path / "model"

  def refused(message, params=params, error=errors.InputError, **options):
    options = {"tokenizer": tokenizer, **options}
    with pytest.raises(error, match=message):
      publish.publish(target, model, params, **options)
    return sorted(tmp_path.iterdir())

  assert not refused("no folder with", tokenizer=tmp_path / "none")
  large = jax.tree.map(lambda x: x + 1e5, params["transformer"])
  large = {**params, "transformer": large}
  assert not refused("infinity as float16", large, dtype="float16")
  less = {k: v for k, v in params["transformer"].items() if k != "proj_out"}
  less = {**params, "transformer": less}
  assert not refused("proj_out", less, errors.CorruptError)
  target.mkdir()
  (target / "notes.txt").write_text("mine")
  assert refused("exists") == [target]
  assert [p.name for p in target.iterdir()] == ["notes.txt"]
