"""LoRA: what is trained, what it changes, and the file that it becomes."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn

import vidgen
from tests import tiny_cogvideox
from tests.parity import compare, transformer_test
from vidgen import adapters, diffusion, errors, sharding, tensorfile
from vidgen.adapters import LoraConfig

pytestmark = pytest.mark.usefixtures("compiled_fast")

CASES = {
  "5b": LoraConfig(rank=4, alpha=2.0),
  "1.5-5b": LoraConfig(
    rank=3,
    alpha=7.5,
    targets=(
      "to_q",
      "to_out.0",
      "proj",  # Of the patches and of the feed-forward layer.
      "net.2",
      "norm1.linear",
      "text_proj",
      "time_embedding.linear_1",
      "proj_out",
    ),
    init="gaussian",
  ),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """Returns (folder, diffusers pipeline, our pipeline) of a variant."""

  @functools.cache
  def make(variant):
    folder = tmp_path_factory.mktemp(variant)
    theirs = tiny_cogvideox.write(folder, variant)
    folder = folder / "checkpoint"
    return folder, theirs, vidgen.load(folder, dtype="float32")

  return make


def part(pipeline, name="transformer"):
  return next(c for c in pipeline.model.components if c.name == name)


def trained(component, config):
  """A LoRA as training leaves it: neither A nor B is zero."""
  tree = nn.unbox(adapters.init(component, config, jax.random.key(0)))
  normal = np.random.default_rng(1).standard_normal
  return jax.tree.map(lambda x: x + 0.3 * normal(x.shape, np.float32), tree)


def inputs(model):
  """Arguments of `predict`, each sample with its own level."""
  config = model.config.transformer
  normal = np.random.default_rng(2).standard_normal
  draw = lambda *shape: jnp.asarray(normal(shape, np.float32))
  x = draw(2, 4, 8, 12, config.in_channels)
  text = draw(2, config.max_text_seq_length, config.text_embed_dim)
  at = np.array([319, 851])
  level = diffusion.NoiseLevel(
    *(jnp.asarray(values[at], jnp.float32) for values in model.levels())
  )
  return x, level, {"text": text}


def test_starts_as_nothing(checkpoint):
  _, _, ours = checkpoint("5b")
  component, config = part(ours), CASES["5b"]
  tree = nn.unbox(adapters.init(component, config, jax.random.key(0)))
  params = adapters.attach(ours.params, tree, config, component)
  run, args = jax.jit(ours.model.predict), inputs(ours.model)
  assert compare.error(run(params, *args), run(ours.params, *args)) < 1e-6


def test_shapes_and_axes(checkpoint):
  component = part(checkpoint("5b")[2])
  config = LoraConfig(rank=8, targets=("to_q", "net.2", "proj_out"))
  boxed = jax.eval_shape(
    lambda key: adapters.init(component, config, key), jax.random.key(0)
  )
  query = boxed["blocks"]["attention"]["query"]
  assert query["down"].value.shape == (2, 32, 8)
  assert query["down"].names == ("layers", "embed", None)
  assert query["up"].value.shape == (2, 8, 32)
  assert query["up"].names == ("layers", None, "heads")
  out = boxed["blocks"]["feed_forward"]["out"]
  assert out["down"].names == ("layers", "mlp", None)
  assert boxed["proj_out"]["up"].value.shape == (8, 16)
  mesh = sharding.make_mesh({"fsdp": 2, "tensor": 4})
  where = sharding.shardings(boxed, mesh)["blocks"]["attention"]["query"]
  assert tuple(where["down"].spec) == (None, "fsdp", None)
  assert tuple(where["up"].spec) == (None, None, "tensor")


def test_start_is_that_of_peft(checkpoint):
  component = part(checkpoint("5b")[2])
  down = lambda **fields: np.asarray(
    nn.unbox(adapters.init(component, LoraConfig(**fields), jax.random.key(3)))[
      "blocks"
    ]["attention"]["query"]["down"]
  )
  kaiming = down(rank=64)
  assert np.abs(kaiming).max() <= 32**-0.5
  assert kaiming.std() == pytest.approx((3 * 32) ** -0.5, rel=0.05)
  assert not np.array_equal(kaiming[0], kaiming[1])
  assert down(rank=64, init="gaussian").std() == pytest.approx(1 / 64, rel=0.05)


@pytest.mark.parametrize("variant", CASES)
def test_diffusers_loads_what_is_exported(variant, checkpoint, tmp_path):
  """One LoRA three ways: in our network, in diffusers, and merged on load."""
  folder, theirs, ours = checkpoint(variant)
  component, config = part(ours), CASES[variant]
  tree = trained(component, config)
  path = adapters.export(tmp_path / "lora", tree, config, component)
  assert path.name == "pytorch_lora_weights.safetensors"

  x, level, condition = args = inputs(ours.model)
  params = adapters.attach(ours.params, tree, config, component)
  run = jax.jit(ours.model.predict)
  got, plain = run(params, *args), run(ours.params, *args)
  assert compare.error(got, plain) > 0.05

  theirs.load_lora_weights(tmp_path / "lora")
  module = theirs.transformer
  assert [
    (c.r, c.lora_alpha, c.init_lora_weights)
    for c in module.peft_config.values()
  ] == [(config.rank, config.alpha, config.init == "kaiming" or "gaussian")]
  with torch.no_grad():
    want = module(
      torch.from_numpy(np.array(x)).permute(0, 1, 4, 2, 3),
      torch.from_numpy(np.array(condition["text"])),
      torch.from_numpy(np.array(level.timestep)).long(),
      image_rotary_emb=transformer_test.rotary(module, x.shape[1:4]),
    ).sample
  theirs.unload_lora_weights()
  want = want.permute(0, 1, 3, 4, 2).numpy()
  compare.check("LoRA", f"{variant}, by diffusers", got, want, 1e-5)

  merged = vidgen.load(folder, dtype="float32", lora=str(path))
  again = jax.jit(merged.model.predict)(merged.params, *args)
  compare.check("LoRA", f"{variant}, merged", again, got, 1e-5)


def test_gradient_is_that_of_the_merged_weights(checkpoint):
  """dL/dA and dL/dB of W + s B A, with the sum written out."""
  _, _, ours = checkpoint("5b")
  component, config = part(ours), CASES["5b"]
  tree, args = trained(component, config), inputs(ours.model)
  target = jax.random.normal(jax.random.key(9), args[0].shape)

  def loss(params):
    return jnp.mean((ours.model.predict(params, *args) - target) ** 2)

  def attached(tree):
    return loss(adapters.attach(ours.params, tree, config, component))

  def merged(tree):
    params = ours.params["transformer"]
    attention = dict(params["blocks"]["attention"])
    for name, update in tree["blocks"]["attention"].items():
      delta = jnp.einsum("lir,lro->lio", update["down"], update["up"])
      kernel = attention[name]["kernel"] + config.alpha / config.rank * delta
      attention[name] = {**attention[name], "kernel": kernel}
    blocks = {**params["blocks"], "attention": attention}
    return loss({"transformer": {**params, "blocks": blocks}})

  got = jax.jit(jax.value_and_grad(attached))(tree)
  want = jax.jit(jax.value_and_grad(merged))(tree)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.any(b)
    assert compare.error(a, b) < 1e-5


def test_dtype_and_metadata(checkpoint, tmp_path):
  component, config = part(checkpoint("5b")[2]), CASES["5b"]
  tree = trained(component, config)
  path = adapters.export(tmp_path, tree, config, component, dtype="bfloat16")
  files = tensorfile.open_file(path)
  name = "transformer.transformer_blocks.1.attn1.to_k.lora_A.weight"
  assert files[name].dtype == jnp.bfloat16 and files[name].shape == (4, 32)
  metadata = json.loads(files.metadata["lora_adapter_metadata"])
  assert metadata["transformer.lora_alpha"] == 2.0
  with pytest.raises(errors.InputError, match="exists"):
    adapters.export(tmp_path, tree, config, component)


BAD = {
  "rank: 0": {"rank": 0},
  "alpha: 0": {"alpha": 0.0},
  "init: 'zeros'": {"init": "zeros"},
  "names layers": {"targets": ()},
  "to_x is no layer": {"targets": ("to_q", "to_x")},
  "no linear layer": {"targets": ("patch_embed.proj",)},
  "norm_q, which is no linear": {"targets": ("norm_q",)},
  "one of 2 layers": {"targets": ("transformer_blocks.0.attn1.to_q",)},
}


@pytest.mark.parametrize("message", BAD)
def test_config_that_makes_no_sense(message, checkpoint):
  component = part(checkpoint("5b")[2])
  with pytest.raises(errors.InputError, match=message):
    adapters.init(component, LoraConfig(**BAD[message]), jax.random.key(0))


def test_only_the_transformer_takes_one(checkpoint):
  component = part(checkpoint("5b")[2], "text_encoder")
  with pytest.raises(errors.InputError, match="text_encoder takes none"):
    adapters.init(component, LoraConfig(), jax.random.key(0))


def test_export_refuses(checkpoint, tmp_path):
  component, config = part(checkpoint("5b")[2]), CASES["5b"]
  tree = trained(component, config)
  other = dataclasses.replace(config, targets=("to_q",))
  with pytest.raises(errors.InputError, match="not what its config says"):
    adapters.export(tmp_path, tree, other, component)
  tree["blocks"]["attention"]["query"]["up"] *= np.nan
  with pytest.raises(errors.InputError, match="NaN"):
    adapters.export(tmp_path, tree, config, component)
  assert not list(tmp_path.iterdir())
