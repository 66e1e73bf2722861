"""The T5 encoder against transformers' T5EncoderModel."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn

from tests import tiny_cogvideox
from tests.parity import compare
from vidgen import tensorfile, weights
from vidgen.encoders import t5

TOLERANCE = 1e-5
VOCAB = 1000


def build(**fields):
  """Returns a random encoder whose scores are of order one.

  T5 divides its initial queries instead of its scores. Without that the softmax
  picks single keys, and float32 cannot tell either side's rounding from errors.
  """
  module = tiny_cogvideox.text_encoder(VOCAB, **fields)
  with torch.no_grad():
    for block in module.encoder.block:
      block.layer[0].SelfAttention.q.weight.mul_(module.config.d_kv**-0.5)
  return module


def read(folder, published):
  """Returns our config and parameters of a saved text encoder."""
  config = t5.t5_config(published)
  init = t5.T5Encoder(config).init
  ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0), ids))["params"]
  params = weights.load(tensorfile.open_folder(folder), t5.T5_TABLE, shapes)
  return config, {"params": params}


def random_ids(batch, length, vocab=VOCAB):
  """Returns prompts of which half is padding, as short prompts are."""
  ids = np.random.default_rng(length).integers(3, vocab, (batch, length))
  ids[:, length // 2] = 1
  ids[:, length // 2 + 1 :] = 0
  return ids


def encode(config, params, ids, dtype=jnp.float32):
  """Returns our embeddings."""
  run = jax.jit(t5.T5Encoder(config, dtype=dtype).apply)
  return run(params, jnp.asarray(ids))


def run(module, ids):
  """Returns transformers' embeddings."""
  with torch.inference_mode():
    return module(torch.from_numpy(ids))[0]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """A tiny encoder as its folder, reference, our config and parameters."""
  folder = tmp_path_factory.mktemp("text_encoder")
  module = build(num_layers=3)
  module.save_pretrained(folder)
  return folder, module, *read(folder, module.config.to_dict())


@pytest.mark.parametrize("length", [16, 226])
@pytest.mark.parametrize("batch", [1, 2])
def test_float32(tiny, batch, length):
  _, module, config, params = tiny
  ids = random_ids(batch, length)
  got = encode(config, params, ids)
  case = f"tiny, {batch} x {length}"
  compare.check("T5", case, got, run(module, ids), TOLERANCE)


@pytest.mark.parametrize("fill", [0, 1, VOCAB - 1])
def test_one_token_repeated(tiny, fill):
  """The empty prompt is one end and 225 pads: only the bias tells them."""
  _, module, config, params = tiny
  ids = np.full((1, 226), fill)
  ids[0, 0] = 1
  got = encode(config, params, ids)
  compare.check("T5", f"tiny, all {fill}", got, run(module, ids), TOLERANCE)


@pytest.mark.slow
def test_full_width(tmp_path):
  """The published width and heads, two layers, a short vocabulary."""
  module = build(d_model=4096, d_kv=64, num_heads=64, d_ff=10240)
  module.save_pretrained(tmp_path)
  config, params = read(tmp_path, module.config.to_dict())
  assert config == t5.T5Config(num_layers=2, vocab_size=VOCAB)
  ids = random_ids(1, 226)
  want = run(module, ids).numpy()
  del module
  got = encode(config, params, ids)
  compare.check("T5", "XXL width, 1 x 226", got, want, TOLERANCE)


def rounded(module, folder, dtype):
  """Saves `module` in `dtype`; returns it read so, and read as float32."""
  copy.deepcopy(module).to(dtype).save_pretrained(folder)
  load = transformers.T5EncoderModel.from_pretrained
  return load(folder, dtype=dtype), load(folder, dtype=torch.float32)


def test_bfloat16_is_nearer_to_float32_than_the_reference(tiny, tmp_path):
  """Our residual stream stays float32 where transformers' is bfloat16."""
  half, single = rounded(tiny[1], tmp_path, torch.bfloat16)
  ids = random_ids(2, 226)
  exact = run(single, ids)
  reference = compare.error(run(half, ids).float(), exact)
  config, params = read(tmp_path, half.config.to_dict())
  kernel = params["params"]["blocks"]["mlp"]["down"]["kernel"]
  assert kernel.dtype == jnp.bfloat16
  got = encode(config, params, ids, jnp.bfloat16)
  assert got.dtype == jnp.bfloat16
  assert compare.error(got, exact) <= reference <= 3e-2


def test_float16_is_that_of_transformers(tiny, tmp_path):
  """transformers keeps `wo` and what follows in float32 then."""
  half, single = rounded(tiny[1], tmp_path, torch.float16)
  down = half.encoder.block[0].layer[1].DenseReluDense.wo
  assert down.weight.dtype == torch.float32
  ids = random_ids(2, 226)
  exact, want = run(single, ids), run(half, ids)
  assert want.dtype == torch.float16
  config, params = read(tmp_path, half.config.to_dict())
  got = encode(config, params, ids, jnp.float16)
  assert got.dtype == jnp.float16
  compare.check("T5", "tiny, float16", got, want, 3e-3)
  assert compare.error(got, exact) <= compare.error(want, exact)


def test_float16_does_not_overflow(tmp_path):
  """A trained T5's feed-forward output leaves float16's range."""
  module = build()
  with torch.no_grad():
    for block in module.encoder.block:
      block.layer[1].DenseReluDense.wo.weight.mul_(6e4)
  half, single = rounded(module, tmp_path, torch.float16)
  ids = random_ids(1, 226)
  hidden = []
  single.encoder.block[-1].register_forward_hook(
    lambda _, args, out: hidden.append(out[0])
  )
  exact, want = run(single, ids), run(half, ids)
  assert hidden[0].abs().max() > 2 * torch.finfo(torch.float16).max
  config, params = read(tmp_path, half.config.to_dict())
  got = encode(config, params, ids, jnp.float16)
  assert jnp.isfinite(got).all()
  compare.check("T5", "tiny, float16, large", got, want, 5e-3)
  assert compare.error(got, exact) <= compare.error(want, exact)


def test_writes_what_transformers_reads(tiny):
  """Published, ours, published: the names and bits that were there."""
  folder, _, _, params = tiny
  exported = dict(weights.export(params["params"], t5.T5_TABLE))
  source = tensorfile.open_folder(folder)
  assert exported.keys() == source.keys()
  for name, array in exported.items():
    np.testing.assert_array_equal(array, source.read(name), err_msg=name)
