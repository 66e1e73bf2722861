"""The encoder's own promises: config, buckets, tree, axes, dtypes, meshes."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn
from transformers.models.t5 import modeling_t5

from vidgen import errors, sharding, weights
from vidgen.encoders import t5

TINY = t5.T5Config(
  d_model=32, d_kv=8, num_heads=4, d_ff=64, num_layers=2, vocab_size=100
)


def shapes(config):
  ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  init = t5.T5Encoder(config).init
  return jax.eval_shape(init, jax.random.key(0), ids)["params"]


@pytest.fixture(scope="module")
def params():
  ids = jnp.zeros((1, 4), jnp.int32)
  return nn.unbox(jax.jit(t5.T5Encoder(TINY).init)(jax.random.key(0), ids))


@pytest.fixture(scope="module")
def encode():
  return jax.jit(t5.T5Encoder(TINY).apply)


@pytest.fixture
def ids():
  return jnp.asarray(np.random.default_rng(0).integers(0, 100, (2, 24)))


@pytest.mark.parametrize("max_distance", [20, 64, 128, 300, 1000])
@pytest.mark.parametrize("num_buckets", [4, 8, 32, 64])
def test_buckets_are_those_of_transformers(num_buckets, max_distance):
  """Every distance from -600 to 600."""
  position = torch.arange(601)
  want = modeling_t5.T5Attention._relative_position_bucket(
    position[None] - position[:, None],
    bidirectional=True,
    num_buckets=num_buckets,
    max_distance=max_distance,
  )
  got = t5.relative_buckets(601, num_buckets, max_distance)
  np.testing.assert_array_equal(got, want.numpy())


def test_buckets_by_hand():
  """Distances where the logarithm is an integer stand in the next bucket."""
  row = t5.relative_buckets(300)[0]
  assert row[[0, 1, 7, 8, 15, 16, 31, 32, 63, 64, 127, 128, 299]].tolist() == [
    0,
    *(16 + n for n in (1, 7, 8, 9, 10, 11, 12, 13, 14, 15, 15, 15)),
  ]
  column = t5.relative_buckets(300)[:, 0]
  np.testing.assert_array_equal(column[1:], row[1:] - 16)


def test_config_defaults_are_xxl():
  published = dict(
    architectures=["T5EncoderModel"],
    d_ff=10240,
    d_kv=64,
    d_model=4096,
    decoder_start_token_id=0,
    dense_act_fn="gelu_new",
    feed_forward_proj="gated-gelu",
    is_gated_act=True,
    layer_norm_epsilon=1e-06,
    model_type="t5",
    num_heads=64,
    num_layers=24,
    torch_dtype="float16",
    vocab_size=32128,
  )
  assert t5.t5_config(published) == t5.T5Config()


def test_missing_keys_take_the_defaults_of_transformers():
  want = transformers.T5Config(feed_forward_proj="gated-gelu")
  got = t5.t5_config({"feed_forward_proj": "gated-gelu"})
  assert dataclasses.asdict(got) == dict(
    d_model=want.d_model,
    d_kv=want.d_kv,
    num_heads=want.num_heads,
    d_ff=want.d_ff,
    num_layers=want.num_layers,
    vocab_size=want.vocab_size,
    num_buckets=want.relative_attention_num_buckets,
    max_distance=want.relative_attention_max_distance,
    eps=want.layer_norm_epsilon,
  )


def test_what_transformers_saves_is_read():
  saved = transformers.T5Config(
    d_model=32, num_layers=3, feed_forward_proj="gated-gelu"
  ).to_dict()
  assert t5.t5_config(saved).d_model == 32
  assert t5.t5_config(saved).num_layers == 3


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("feed_forward_proj", "relu"),
    ("feed_forward_proj", "gated-silu"),
    ("model_type", "umt5"),
    ("is_decoder", True),
    ("quantization_config", {"load_in_8bit": True}),
    ("d_model", "4096"),
    ("d_kv", None),
    ("num_heads", 0),
    ("num_layers", 1.5),
    ("vocab_size", True),
    ("layer_norm_epsilon", -1e-6),
    ("layer_norm_epsilon", float("nan")),
    ("relative_attention_num_buckets", 2),
    ("relative_attention_max_distance", 8),
  ],
)
def test_unsupported_configs_are_named(field, value):
  published = {"feed_forward_proj": "gated-gelu", field: value}
  with pytest.raises(errors.InputError) as error:
    t5.t5_config(published)
  assert str(error.value).startswith("text_encoder/config.json: ")
  assert re.search(rf"\b{field}\b", str(error.value))
  assert "\n" not in str(error.value)


def test_ungated_default_is_refused():
  """transformers takes relu where the key is missing."""
  with pytest.raises(errors.InputError, match="feed_forward_proj is 'relu'"):
    t5.t5_config({})


def test_full_size_has_the_published_parameters():
  sizes = [leaf.size for leaf in jax.tree.leaves(shapes(t5.T5Config()))]
  assert sum(sizes) == 4_762_310_656


def test_table_covers_the_published_tensors_key_by_key():
  """Against transformers' full-size state dict, without memory."""
  config = transformers.T5Config(
    d_model=4096,
    d_kv=64,
    num_heads=64,
    d_ff=10240,
    num_layers=24,
    feed_forward_proj="gated-gelu",
  )
  with torch.device("meta"):
    state = transformers.T5EncoderModel(config).state_dict()
  published = {name: tuple(tensor.shape) for name, tensor in state.items()}
  assert len(published) == 24 * 9 + 4
  tree = nn.unbox(shapes(t5.T5Config()))
  targets = weights.match(published, t5.T5_TABLE, tree)
  main = published.keys() - {"encoder.embed_tokens.weight"}
  assert targets.keys() == main
  # A file has one of the two names of the vocabulary, or both.
  for name in ("encoder.embed_tokens.weight", "shared.weight"):
    one = {key: value for key, value in published.items() if key != name}
    assert weights.match(one, t5.T5_TABLE, tree).keys() == one.keys()
  for name in main - {"shared.weight"}:
    less = {key: value for key, value in published.items() if key != name}
    with pytest.raises(errors.CorruptError, match=re.escape(name)):
      weights.match(less, t5.T5_TABLE, tree)


def test_initialisation_is_that_of_transformers():
  """In a query's is the 1 / sqrt(d) that T5's attention lacks."""
  sizes = dict(
    d_model=256, d_kv=64, num_heads=8, d_ff=512, num_layers=2, vocab_size=999
  )
  config = t5.T5Config(**sizes)
  theirs = transformers.T5EncoderModel(
    transformers.T5Config(**sizes, feed_forward_proj="gated-gelu")
  ).state_dict()
  ids = jnp.zeros((1, 4), jnp.int32)
  ours = nn.unbox(jax.jit(t5.T5Encoder(config).init)(jax.random.key(0), ids))
  del ours["params"]["position_bias"]  # Ours by intent.
  for name, tensor in weights.export(ours["params"], t5.T5_TABLE):
    tensor, deviation = np.asarray(tensor), theirs[name].numpy().std()
    rtol = 0.03 if tensor.size > 10_000 else 0.25
    np.testing.assert_allclose(tensor.std(), deviation, rtol, 1e-6, name)


def test_heads_begin_with_the_words_beside():
  """Of 4 heads, from the middle of 9 words: back, ahead, two back, all."""
  params = t5.T5Encoder(TINY).init(jax.random.key(0), jnp.zeros((1, 4), int))
  bias = np.asarray(nn.unbox(params)["params"]["position_bias"])
  rows = np.exp(bias[t5.relative_buckets(9)[4]])
  shares = rows / rows.sum(0)
  assert shares.argmax(0)[:3].tolist() == [3, 5, 2]
  assert (shares.max(0)[:3] > 0.9).all()
  np.testing.assert_allclose(shares[:, 3], 1 / 9)


@pytest.mark.parametrize("num_buckets, num_heads", [(4, 8), (32, 64), (8, 1)])
def test_any_number_of_heads(num_buckets, num_heads):
  config = dataclasses.replace(
    TINY, num_buckets=num_buckets, num_heads=num_heads
  )
  bias = nn.unbox(
    t5.T5Encoder(config).init(jax.random.key(0), jnp.zeros((1, 4), int))
  )["params"]["position_bias"]
  assert np.count_nonzero(bias) == num_heads - num_heads // 4
  assert (np.count_nonzero(bias, axis=0) <= 1).all()


def test_logical_axes():
  names = {
    "/".join(key.key for key in path): leaf.names
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      shapes(TINY), is_leaf=lambda leaf: isinstance(leaf, nn.Partitioned)
    )
  }
  column, row = ("layers", "embed", "heads"), ("layers", "heads", "embed")
  assert names == {
    "token_embedding": ("vocab", "embed"),
    "position_bias": (None, "heads"),
    "blocks/attention_norm/scale": ("layers", "norm"),
    "blocks/attention/query/kernel": column,
    "blocks/attention/key/kernel": column,
    "blocks/attention/value/kernel": column,
    "blocks/attention/out/kernel": row,
    "blocks/mlp_norm/scale": ("layers", "norm"),
    "blocks/mlp/gate/kernel": ("layers", "embed", "mlp"),
    "blocks/mlp/up/kernel": ("layers", "embed", "mlp"),
    "blocks/mlp/down/kernel": ("layers", "mlp", "embed"),
    "final_norm/scale": ("norm",),
  }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_output_is_of_the_dtype(encode, params, ids, dtype):
  got = jax.jit(t5.T5Encoder(TINY, jnp.dtype(dtype)).apply)(params, ids)
  assert got.dtype == dtype
  want = encode(params, ids)
  tolerance = {"float32": 0, "bfloat16": 2e-2, "float16": 2e-3}[dtype]
  difference = jnp.linalg.norm(got.astype(jnp.float32) - want)
  assert difference <= tolerance * jnp.linalg.norm(want)


def test_rows_of_a_batch_do_not_mix(encode, params, ids):
  one = jnp.concatenate([encode(params, ids[:1]), encode(params, ids[1:])])
  np.testing.assert_allclose(encode(params, ids), one, atol=1e-5)


def test_a_token_outside_of_the_vocabulary_is_seen(encode, params):
  """It would silently become another token."""
  ids = jnp.full((2, 24), TINY.vocab_size)
  assert jnp.isnan(encode(params, ids)).all()


@pytest.mark.parametrize(
  "sizes",
  [
    {"tensor": 4},
    {"fsdp": 2, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 2, "context": 4},
  ],
)
def test_a_mesh_equals_one_device(encode, params, ids, sizes):
  want = encode(params, ids)
  mesh = sharding.make_mesh(sizes)
  places = sharding.shardings(shapes(TINY), mesh)
  placed = {"params": jax.device_put(params["params"], places)}
  ids = jax.device_put(ids, sharding.batch_sharding(mesh, 2))
  with jax.set_mesh(mesh), nn.logical_axis_rules(sharding.RULES):
    got = jax.jit(t5.T5Encoder(TINY).apply)(placed, ids)
  np.testing.assert_allclose(got, want, atol=2e-5)
  if sizes.get("tensor", 1) > 1:
    kernel = placed["params"]["blocks"]["mlp"]["up"]["kernel"]
    assert not kernel.sharding.is_fully_replicated


def test_compile_time_does_not_grow_with_depth(ids):
  """The layers are one loop: the program is as long for 24 as for 2."""
  lines = []
  for num_layers in (2, 24):
    config = dataclasses.replace(TINY, num_layers=num_layers)
    tree = {"params": nn.unbox(shapes(config))}
    text = jax.jit(t5.T5Encoder(config).apply).lower(tree, ids).as_text()
    lines.append(len(text.splitlines()))
  assert lines[0] == lines[1]
