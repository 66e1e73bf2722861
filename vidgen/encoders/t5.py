"""The encoder of T5 v1.1, which reads the prompt.

Raffel et al., https://arxiv.org/abs/1910.10683; v1.1 gates its feed-forward
layer, Shazeer, https://arxiv.org/abs/2002.05202. Checked against transformers'
`T5EncoderModel` (models/t5/modeling_t5.py).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from vidgen import errors, sharding, weights
from vidgen.nn import attention as attention_lib
from vidgen.nn import layers, norm

# Published name of each field, and what transformers takes where it is missing:
# the sizes of T5-small.
_PUBLISHED = {
  "d_model": ("d_model", 512),
  "d_kv": ("d_kv", 64),
  "num_heads": ("num_heads", 8),
  "d_ff": ("d_ff", 2048),
  "num_layers": ("num_layers", 6),
  "vocab_size": ("vocab_size", 32128),
  "num_buckets": ("relative_attention_num_buckets", 32),
  "max_distance": ("relative_attention_max_distance", 128),
  "eps": ("layer_norm_epsilon", 1e-6),
}

# What must hold for the encoder below to be the published one.
_VARIANT = {
  "model_type": ("t5", "t5"),
  "feed_forward_proj": ("relu", "gated-gelu"),
  "is_decoder": (False, False),
  "quantization_config": (None, None),
}


@dataclasses.dataclass
class T5Config:
  """Sizes of a T5 v1.1 encoder; the defaults are T5 v1.1-XXL."""

  d_model: int = 4096
  d_kv: int = 64
  num_heads: int = 64
  d_ff: int = 10240
  num_layers: int = 24
  vocab_size: int = 32128
  num_buckets: int = 32
  max_distance: int = 128
  eps: float = 1e-6


def t5_config(published: Mapping[str, Any]) -> T5Config:
  """Returns the config that a published text_encoder/config.json describes.

  Raises:
    InputError: A variant that is not supported, or a size that is no size.
  """
  where = "text_encoder/config.json"
  for key, (default, supported) in _VARIANT.items():
    if (value := published.get(key, default)) != supported:
      raise errors.InputError(
        f"{where}: {key} is {value!r}, supported is {supported!r}; use a "
        "T5 v1.1 encoder as CogVideoX publishes it."
      )
  sizes = {}
  for field, (key, default) in _PUBLISHED.items():
    value = sizes[field] = published.get(key, default)
    kind = float if field == "eps" else int
    if (
      isinstance(value, bool)
      or not isinstance(value, kind)
      or not (0 < value < math.inf)
    ):
      raise errors.InputError(
        f"{where}: {key} must be a positive {kind.__name__}, not {value!r}."
      )
  buckets, distance = sizes["num_buckets"], sizes["max_distance"]
  # Half of the buckets are for each sign, half of those for single distances,
  # and the logarithm divides by their number.
  if buckets < 4 or distance <= buckets // 4:
    raise errors.InputError(
      f"{where}: relative_attention_num_buckets {buckets} and relative_"
      f"attention_max_distance {distance} leave no logarithmic bucket."
    )
  return T5Config(**sizes)


def relative_buckets(
  length: int, num_buckets: int = 32, max_distance: int = 128
) -> Int[np.ndarray, "l l"]:
  """Returns the bucket of the distance from each query (row) to each key.

  Half of the buckets are for keys to the right. Of each half, one half holds
  single distances, the rest grow logarithmically up to `max_distance`:
  Raffel et al., section 2.1.
  """
  positions = np.arange(length)
  distance = positions - positions[:, None]
  half = num_buckets // 2
  exact = half // 2
  size = np.abs(distance)
  # Truncation makes the last bit matter: the published model takes a float32
  # logarithm and each further step in float32. The logarithm is rounded from
  # float64 because float32 ones differ between processors.
  ratio = np.maximum(size, exact).astype(np.float32) / np.float32(exact)
  ratio = np.log(ratio.astype(np.float64)).astype(np.float32)
  ratio = ratio / np.float32(np.log(max_distance / exact))
  large = exact + (ratio * np.float32(half - exact)).astype(np.int32)
  bucket = np.where(size < exact, size, np.minimum(large, half - 1))
  return (bucket + half * (distance > 0)).astype(np.int32)


def _normal(fan_in: int) -> nn.initializers.Initializer:
  """Returns T5's own initialisation (transformers, `_init_weights`)."""
  return nn.initializers.normal(fan_in**-0.5)


def _near(
  key: Array, shape: tuple[int, int], dtype: DTypeLike
) -> Float[Array, "buckets heads"]:
  """Returns a position bias with which heads begin at single distances.

  The first head looks one word back, the second one ahead, the third two back,
  the fourth everywhere, and so on. Upstream begins with next to nothing; a
  small encoder then does not learn the order of words, which no other network
  of CogVideoX is told.
  """
  del key
  buckets, heads = shape
  half = buckets // 2
  bias = np.zeros(shape)
  near = [head for head in range(heads) if head % 4 != 3]
  for i, head in enumerate(near):
    distance = 1 + i // 2 % max(half // 2 - 1, 1)
    # e^6 is ten times what thirty other words have together.
    bias[distance + half * (i % 2), head] = 6.0
  return jnp.asarray(bias, dtype)


class Attention(nn.Module):
  """Self-attention without 1 / sqrt(d): T5 folds it into its initialisation."""

  num_heads: int
  head_dim: int
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b l e"], bias: Float[Array, "heads l l"]
  ) -> Float[Array, "b l e"]:
    dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    b, length, width = x.shape

    def project(name: str, fan_in: int = width) -> Array:
      inner = self.num_heads * self.head_dim
      dense = layers.dense(
        inner,
        ("embed", "heads"),
        name=name,
        use_bias=False,
        kernel_init=_normal(fan_in),
        **dtypes,
      )
      y = dense(x).reshape(b, length, self.num_heads, self.head_dim)
      return sharding.constrain(y, "batch", None, "activation_heads", None)

    # Here is the 1 / sqrt(d): without it, attention that starts from scratch
    # is saturated by what the words are and never learns where they stand.
    q = project("query", width * self.head_dim)
    k, v = project("key"), project("value")
    y = attention_lib.attention(q, k, v, bias=bias, scale=1.0)
    out = layers.dense(
      width,
      ("heads", "embed"),
      name="out",
      use_bias=False,
      kernel_init=_normal(self.num_heads * self.head_dim),
      **dtypes,
    )
    return out(y.reshape(b, length, -1))


class MLP(nn.Module):
  """Feed-forward layer down(gelu(gate x) · up x), gelu by its tanh formula."""

  d_ff: int
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b l e"]) -> Float[Array, "b l e"]:
    def dense(features: int, axes: tuple[str, str], name: str, dtype):
      return layers.dense(
        features,
        axes,
        name=name,
        use_bias=False,
        kernel_init=_normal(self.d_ff if name == "down" else x.shape[-1]),
        dtype=dtype,
        param_dtype=self.param_dtype,
      )

    gate = dense(self.d_ff, ("embed", "mlp"), "gate", self.dtype)(x)
    up = dense(self.d_ff, ("embed", "mlp"), "up", self.dtype)(x)
    y = nn.gelu(gate.astype(jnp.float32), approximate=True)
    y = y * up.astype(jnp.float32)
    y = sharding.constrain(y, "batch", None, "activation_mlp")
    # The result leaves float16's range in a trained T5, so upstream keeps this
    # one product in float32 there. bfloat16 has the range.
    narrow = jnp.dtype(self.dtype) == jnp.float16
    dtype = jnp.float32 if narrow else self.dtype
    return dense(x.shape[-1], ("mlp", "embed"), "down", dtype)(y)


class Block(nn.Module):
  """Pre-norm block: x + attention(norm x), then x + mlp(norm x)."""

  num_heads: int
  head_dim: int
  d_ff: int
  eps: float = 1e-6
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b l e"], bias: Float[Array, "heads l l"]
  ) -> tuple[Float[Array, "b l e"], None]:
    """Returns the new residual stream and no output, as a scan wants."""
    dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    rms = lambda name: norm.RMSNorm(self.eps, self.param_dtype, name=name)
    attend = Attention(
      self.num_heads, self.head_dim, name="attention", **dtypes
    )
    y = rms("attention_norm")(x).astype(self.dtype)
    x = x + attend(y, bias).astype(jnp.float32)
    y = rms("mlp_norm")(x).astype(self.dtype)
    x = x + MLP(self.d_ff, name="mlp", **dtypes)(y).astype(jnp.float32)
    x = sharding.constrain(x, "batch", None, "activation_embed")
    return x, None


class T5Encoder(nn.Module):
  """The encoder of T5 v1.1: token ids to one embedding a token, in `dtype`.

  Every token attends to every token, padding included: CogVideoX gives no mask.
  The residual stream, norms, softmax and position bias are float32.
  """

  config: T5Config
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, ids: Int[Array, "b l"]) -> Float[Array, "b l e"]:
    config, length = self.config, ids.shape[1]
    embedding = self._table(
      "token_embedding",
      (config.vocab_size, config.d_model),
      ("vocab", "embed"),
      nn.initializers.normal(1.0),
    )
    # `take` gives NaN, not another token, for an id outside of the vocabulary.
    x = jnp.take(embedding, ids, axis=0).astype(jnp.float32)
    x = sharding.constrain(x, "batch", None, "activation_embed")

    # One table for all blocks: upstream stores it with the first one.
    bias = self._table(
      "position_bias",
      (config.num_buckets, config.num_heads),
      (None, "heads"),
      _near,
    )
    buckets = relative_buckets(length, config.num_buckets, config.max_distance)
    bias = bias.astype(jnp.float32)[buckets].transpose(2, 0, 1)
    bias = sharding.constrain(bias, "activation_heads", None, None)

    blocks = nn.scan(
      Block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=config.num_layers,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(
      config.num_heads,
      config.d_kv,
      config.d_ff,
      config.eps,
      self.dtype,
      self.param_dtype,
      name="blocks",
    )
    x, _ = blocks(x, bias)
    x = norm.RMSNorm(config.eps, self.param_dtype, name="final_norm")(x)
    return x.astype(self.dtype)

  def _table(
    self,
    name: str,
    shape: tuple[int, int],
    axes: tuple[str | None, str],
    init: nn.initializers.Initializer,
  ) -> Float[Array, "rows columns"]:
    """Returns an embedding table, not cast: only the rows read will be."""
    init = nn.with_logical_partitioning(init, axes)
    return jnp.asarray(self.param(name, init, shape, self.param_dtype))


def _table() -> weights.Table:
  """Returns how the published tensors become the parameters of `T5Encoder`."""
  rule, linear = weights.Rule, weights.LINEAR
  block = "encoder.block.{layer}.layer"
  attention, mlp = f"{block}.0.SelfAttention", f"{block}.1.DenseReluDense"
  return (
    rule("shared.weight", "token_embedding"),
    # The same tensor; which of the names a file has depends on its writer.
    rule("encoder.embed_tokens.weight", "token_embedding", alias=True),
    rule(
      "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
      "position_bias",
    ),
    rule(f"{block}.0.layer_norm.weight", "blocks/attention_norm/scale"),
    rule(f"{attention}.q.weight", "blocks/attention/query/kernel", linear),
    rule(f"{attention}.k.weight", "blocks/attention/key/kernel", linear),
    rule(f"{attention}.v.weight", "blocks/attention/value/kernel", linear),
    rule(f"{attention}.o.weight", "blocks/attention/out/kernel", linear),
    rule(f"{block}.1.layer_norm.weight", "blocks/mlp_norm/scale"),
    rule(f"{mlp}.wi_0.weight", "blocks/mlp/gate/kernel", linear),
    rule(f"{mlp}.wi_1.weight", "blocks/mlp/up/kernel", linear),
    rule(f"{mlp}.wo.weight", "blocks/mlp/down/kernel", linear),
    rule("encoder.final_layer_norm.weight", "final_norm/scale"),
  )


T5_TABLE: weights.Table = _table()
