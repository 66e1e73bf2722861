"""CLIP's two towers: an image to one embedding, a text to one for each token.

Radford et al., https://arxiv.org/abs/2103.00020. Checked against transformers'
`CLIPVisionModelWithProjection` and `CLIPTextModel` (models/clip).
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from vidgen import errors, sharding, weights
from vidgen.nn import attention as attention_lib
from vidgen.nn import layers, norm
from vidgen.weights import CONV2D, LINEAR, Rule

# The exact GELU is that of ViT-H; OpenAI's own towers have the other one.
_ACTIVATIONS = {
  "gelu": lambda x: nn.gelu(x, approximate=False),
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
}


@dataclasses.dataclass
class VisionConfig:
  """Sizes of a vision tower, under transformers' names; ViT-H/14's."""

  hidden_size: int = 1280
  intermediate_size: int = 5120
  num_hidden_layers: int = 32
  num_attention_heads: int = 16
  patch_size: int = 14
  image_size: int = 224
  hidden_act: str = "gelu"
  layer_norm_eps: float = 1e-5
  projection_dim: int = 1024


@dataclasses.dataclass
class TextConfig:
  """Sizes of a text tower, under transformers' names; those of ViT-H's.

  Stable Diffusion 2 leaves out its last layer, and so has 23.
  """

  vocab_size: int = 49408
  hidden_size: int = 1024
  intermediate_size: int = 4096
  num_hidden_layers: int = 23
  num_attention_heads: int = 16
  max_position_embeddings: int = 77
  hidden_act: str = "gelu"
  layer_norm_eps: float = 1e-5


# What transformers takes where a published config lacks a key.
_VISION_DEFAULTS = {
  "hidden_size": 768,
  "intermediate_size": 3072,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "patch_size": 32,
  "image_size": 224,
  "hidden_act": "quick_gelu",
  "layer_norm_eps": 1e-5,
  "projection_dim": 512,
}
_TEXT_DEFAULTS = {
  "vocab_size": 49408,
  "hidden_size": 512,
  "intermediate_size": 2048,
  "num_hidden_layers": 12,
  "num_attention_heads": 8,
  "max_position_embeddings": 77,
  "hidden_act": "quick_gelu",
  "layer_norm_eps": 1e-5,
}


def vision_config(published: Mapping[str, Any]) -> VisionConfig:
  """Returns the config that a published image_encoder/config.json describes.

  Raises:
    InputError: A variant that is not supported, or a size that is no size.
  """
  where = "image_encoder/config.json"
  config = VisionConfig(**_sizes(published, _VISION_DEFAULTS, where))
  if config.image_size % config.patch_size:
    raise errors.InputError(
      f"{where}: image_size {config.image_size} is no multiple of patch_size "
      f"{config.patch_size}."
    )
  if (channels := published.get("num_channels", 3)) != 3:
    raise errors.InputError(
      f"{where}: num_channels {channels} is not supported, only 3."
    )
  return config


def text_config(published: Mapping[str, Any]) -> TextConfig:
  """Returns the config that a published text_encoder/config.json describes.

  Raises:
    InputError: A variant that is not supported, or a size that is no size.
  """
  where = "text_encoder/config.json"
  return TextConfig(**_sizes(published, _TEXT_DEFAULTS, where))


def _sizes(
  published: Mapping[str, Any], defaults: dict[str, Any], where: str
) -> dict[str, Any]:
  """Returns the value of each field, checked."""
  sizes = {key: published.get(key, value) for key, value in defaults.items()}
  for key, value in sizes.items():
    if key == "hidden_act":
      if value not in _ACTIVATIONS:
        raise errors.InputError(
          f"{where}: hidden_act {value!r} is not supported; known are "
          f"{', '.join(_ACTIVATIONS)}."
        )
      continue
    kind = float if key == "layer_norm_eps" else int
    if type(value) is not kind or not 0 < value < math.inf:
      raise errors.InputError(
        f"{where}: {key} must be a positive {kind.__name__}, not {value!r}."
      )
  if sizes["hidden_size"] % sizes["num_attention_heads"]:
    raise errors.InputError(
      f"{where}: hidden_size {sizes['hidden_size']} is no multiple of "
      f"{sizes['num_attention_heads']} heads."
    )
  return sizes


class Block(nn.Module):
  """Pre-norm block: x + attention(norm x), then x + mlp(norm x).

  Attributes:
    heads: Heads.
    mlp_dim: Channels within the feed-forward layer.
    activation: Its activation, "gelu" or "quick_gelu".
    eps: Of the norms.
    dtype: What is computed in; the sums are float32.
    param_dtype: What parameters are made in.
  """

  heads: int
  mlp_dim: int
  activation: str
  eps: float
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    bias: Float[Array, "heads n n"] | None,
  ) -> tuple[Float[Array, "b n d"], None]:
    """Returns the new residual stream and no output, as a scan wants."""
    b, n, width = x.shape

    def dense(features, axes, name, heads=None):
      return layers.dense(
        features,
        axes,
        name=name,
        heads=heads,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
      )

    def normed(name):
      y = norm.LayerNorm(self.eps, self.param_dtype, name=name)(x)
      return y.astype(self.dtype)

    def part(name):
      y = dense(width, ("embed", "heads"), name, self.heads)(y_in)
      y = y.reshape(b, n, -1, width // self.heads)
      return sharding.constrain(y, "batch", None, "activation_heads", None)

    y_in = normed("attention_norm")
    q, k, v = part("query"), part("key"), part("value")
    if bias is not None and q.shape[2] > self.heads:
      bias = jnp.pad(bias, [(0, q.shape[2] - self.heads), (0, 0), (0, 0)])
    y = attention_lib.attention(q, k, v, bias=bias).reshape(b, n, -1)
    y = dense(width, ("heads", "embed"), "out", self.heads)(y)
    x = x + y.astype(jnp.float32)

    y = dense(self.mlp_dim, ("embed", "mlp"), "mlp_in")(normed("mlp_norm"))
    y = _ACTIVATIONS[self.activation](y.astype(jnp.float32)).astype(self.dtype)
    y = sharding.constrain(y, "batch", None, "activation_mlp")
    x = x + dense(width, ("mlp", "embed"), "mlp_out")(y).astype(jnp.float32)
    return sharding.constrain(x, "batch", None, "activation_embed"), None


class _Tower(nn.Module):
  """What both towers have: a config, tables of embeddings, and blocks."""

  config: VisionConfig | TextConfig
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  def run_blocks(
    self, x: Float[Array, "b n d"], bias: Float[Array, "heads n n"] | None
  ) -> Float[Array, "b n d"]:
    config = self.config
    blocks = nn.scan(
      Block,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=config.num_hidden_layers,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(
      config.num_attention_heads,
      config.intermediate_size,
      config.hidden_act,
      config.layer_norm_eps,
      self.dtype,
      self.param_dtype,
      name="blocks",
    )
    return blocks(x, bias)[0]

  def norm(self, x: Array, name: str) -> Array:
    eps = self.config.layer_norm_eps
    return norm.LayerNorm(eps, self.param_dtype, name=name)(x)

  def embedding(
    self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]
  ) -> Array:
    """Returns an embedding table, not cast: only the rows read will be."""
    init = nn.with_logical_partitioning(nn.initializers.normal(0.02), axes)
    return jnp.asarray(self.param(name, init, shape, self.param_dtype))


class VisionTower(_Tower):
  """The vision transformer: normalised pixels to one embedding, float32.

  It is projected from the class token, and not divided by its length.
  """

  config: VisionConfig

  @nn.compact
  def __call__(self, pixels: Float[Array, "b h w 3"]) -> Float[Array, "b e"]:
    config, width = self.config, self.config.hidden_size
    b, h, w, c = pixels.shape
    if (h, w) != (config.image_size, config.image_size):
      raise ValueError(f"CLIP: {h}x{w} pixels instead of {config.image_size}.")
    p, side = config.patch_size, config.image_size // config.patch_size
    kernel = self.embedding(
      "patches", (p, p, c, width), (None,) * 3 + ("embed",)
    )
    kernel = kernel.astype(self.dtype).reshape(-1, width)
    x = pixels.astype(self.dtype).reshape(b, side, p, side, p, c)
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(b, side * side, p * p * c)
    x = layers.matmul(x, kernel).astype(jnp.float32)
    first = self.embedding("class_token", (width,), ("embed",))
    first = jnp.broadcast_to(first.astype(jnp.float32), (b, 1, width))
    where = self.embedding("positions", (side**2 + 1, width), (None, "embed"))
    x = jnp.concatenate([first, x], axis=1) + where.astype(jnp.float32)
    x = self.run_blocks(self.norm(x, "norm_in"), None)
    project = layers.dense(
      config.projection_dim,
      ("embed", None),
      name="projection",
      use_bias=False,
      param_dtype=self.param_dtype,
    )
    return project(self.norm(x[:, 0], "norm_out"))


class TextTower(_Tower):
  """The text transformer: token ids to one embedding a token, in `dtype`.

  Each token sees those before it, padding like any other.
  """

  config: TextConfig

  @nn.compact
  def __call__(self, ids: Int[Array, "b l"]) -> Float[Array, "b l e"]:
    config, length = self.config, ids.shape[1]
    width, longest = config.hidden_size, config.max_position_embeddings
    if length > longest:
      raise ValueError(f"CLIP: {length} tokens are more than {longest}.")
    table = self.embedding(
      "tokens", (config.vocab_size, width), ("vocab", "embed")
    )
    where = self.embedding("positions", (longest, width), (None, "embed"))
    # `take` gives NaN, not another token, for an id outside of the vocabulary.
    x = jnp.take(table, ids, axis=0).astype(jnp.float32)
    x = x + where[:length].astype(jnp.float32)
    x = sharding.constrain(x, "batch", None, "activation_embed")
    later = np.triu(np.full((length, length), -1e30, np.float32), k=1)
    shape = (config.num_attention_heads, length, length)
    x = self.run_blocks(x, jnp.broadcast_to(later, shape))
    return self.norm(x, "norm_out").astype(self.dtype)


def _layer(published: str, ours: str, kind: str) -> weights.Table:
  """Returns the rules of a dense layer, "kernel", or of a norm, "scale"."""
  axes = LINEAR if kind == "kernel" else None
  return (
    Rule(f"{published}.weight", f"{ours}/{kind}", axes),
    Rule(f"{published}.bias", f"{ours}/bias"),
  )


def _blocks() -> Iterator[weights.Rule]:
  block = "encoder.layers.{layer}"
  for theirs, ours, kind in (
    ("layer_norm1", "attention_norm", "scale"),
    ("self_attn.q_proj", "query", "kernel"),
    ("self_attn.k_proj", "key", "kernel"),
    ("self_attn.v_proj", "value", "kernel"),
    ("self_attn.out_proj", "out", "kernel"),
    ("layer_norm2", "mlp_norm", "scale"),
    ("mlp.fc1", "mlp_in", "kernel"),
    ("mlp.fc2", "mlp_out", "kernel"),
  ):
    yield from _layer(f"{block}.{theirs}", f"blocks/{ours}", kind)


def _vision_table() -> Iterator[weights.Rule]:
  for rule in (
    Rule("embeddings.class_embedding", "class_token"),
    Rule("embeddings.patch_embedding.weight", "patches", CONV2D),
    Rule("embeddings.position_embedding.weight", "positions"),
    # The name is misspelt in every checkpoint.
    *_layer("pre_layrnorm", "norm_in", "scale"),
    *_blocks(),
    *_layer("post_layernorm", "norm_out", "scale"),
  ):
    yield rule._replace(published=f"vision_model.{rule.published}")
  yield Rule("visual_projection.weight", "projection/kernel", LINEAR)


def _text_table() -> Iterator[weights.Rule]:
  for rule in (
    Rule("embeddings.token_embedding.weight", "tokens"),
    Rule("embeddings.position_embedding.weight", "positions"),
    *_blocks(),
    *_layer("final_layer_norm", "norm_out", "scale"),
  ):
    yield rule._replace(published=f"text_model.{rule.published}")
    # transformers 5 writes no prefix, and reads both.
    yield rule._replace(alias=True)


VISION_TABLE: weights.Table = tuple(_vision_table())
TEXT_TABLE: weights.Table = tuple(_text_table())
