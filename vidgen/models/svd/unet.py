"""The spatio-temporal UNet.

Blattmann et al., https://arxiv.org/abs/2311.15127; the arithmetic is that of
`UNetSpatioTemporalConditionModel` in diffusers.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Key, PyTree

from vidgen import errors, sharding
from vidgen.models.svd import published_config
from vidgen.models.svd.layers import Conv2D, FrameNorm, Upsample, VideoResBlock
from vidgen.models.svd.transformer import VideoTransformer
from vidgen.nn import embeddings, layers

DOWN, UP = "DownBlockSpatioTemporal", "UpBlockSpatioTemporal"
CROSS_DOWN, CROSS_UP = f"CrossAttn{DOWN}", f"CrossAttn{UP}"

# Epsilon of the norms of residual blocks: by whether a block going down has
# attention, of the middle, and going up. diffusers, which published the
# checkpoints that all read, and the original code, sgm, disagree.
_EPS = {
  "diffusers": {"cross_down": 1e-6, "down": 1e-5, "mid": 1e-5, "up": 1e-6},
  "sgm": dict.fromkeys(("cross_down", "down", "mid", "up"), 1e-5),
}

# What the backward pass keeps of a block's forward pass, next to its input; the
# rest is computed again. None keeps all.
_policies = jax.checkpoint_policies
_REMAT: dict[str, Callable | None] = {
  "none": None,
  "full": _policies.nothing_saveable,
  "dots": _policies.save_only_these_names(layers.SAVED),
}


def check_remat(name: str) -> None:
  """Raises InputError unless `name` is a way to save memory in training."""
  if name not in _REMAT:
    raise errors.InputError(
      f"remat: {name!r} is unknown; known are {', '.join(_REMAT)}."
    )


@dataclasses.dataclass
class UnetConfig:
  """Architecture; the names are those of the published config.json.

  Attributes:
    sample_size: Pixels / 8 of the trained height or width; nothing depends on
      it.
    in_channels: Channels of the input: latents, then what they are beside.
    out_channels: Channels of the output.
    down_block_types: Which levels have attention, from the finest on.
    up_block_types: The same from the coarsest on.
    block_out_channels: Channels of each level.
    addition_time_embed_dim: Of the embedding of each number, such as fps.
    projection_class_embeddings_input_dim: Of all of them, side by side.
    layers_per_block: Residual blocks of a level.
    cross_attention_dim: Of a token of the context.
    transformer_layers_per_block: Pairs of blocks of a transformer.
    num_attention_heads: Of each level.
    num_frames: That it was trained for.
    norms: Whose epsilon the norms have, "diffusers" or "sgm"; not published.
  """

  sample_size: int = 96
  in_channels: int = 8
  out_channels: int = 4
  down_block_types: tuple[str, ...] = (CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, DOWN)
  up_block_types: tuple[str, ...] = (UP, CROSS_UP, CROSS_UP, CROSS_UP)
  block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
  addition_time_embed_dim: int = 256
  projection_class_embeddings_input_dim: int = 768
  layers_per_block: int = 2
  cross_attention_dim: int = 1024
  transformer_layers_per_block: int = 1
  num_attention_heads: tuple[int, ...] = (5, 10, 20, 20)
  num_frames: int = 25
  norms: str = "diffusers"


def unet_config(published: Mapping[str, Any]) -> UnetConfig:
  """Reads a published unet/config.json; what it lacks has upstream's default.

  Raises:
    InputError: It asks for what no published model of this family has.
  """
  where = "unet/config.json"
  heads = published.get("num_attention_heads")
  if isinstance(heads, int):
    # One number stands for all levels.
    widths = published.get("block_out_channels", UnetConfig.block_out_channels)
    published = {**published, "num_attention_heads": [heads] * len(widths)}
  config = UnetConfig(
    **published_config.pick(published, UnetConfig, where, leave="norms")
  )
  levels = len(config.block_out_channels)
  if len(config.num_attention_heads) != levels:
    raise errors.InputError(
      f"{where}: num_attention_heads = {list(config.num_attention_heads)} is "
      f"not supported; it takes {levels}, one a level."
    )
  for name, kinds in (
    ("down_block_types", (CROSS_DOWN, DOWN)),
    ("up_block_types", (CROSS_UP, UP)),
  ):
    value = getattr(config, name)
    if len(value) != levels or not set(value) <= set(kinds):
      raise errors.InputError(
        f"{where}: {name} = {list(value)} is not supported; it takes "
        f"{levels} of {', '.join(kinds)}."
      )
  for width, heads in zip(
    config.block_out_channels, config.num_attention_heads, strict=True
  ):
    if width % 32 or width % heads:
      raise errors.InputError(
        f"{where}: {width} channels are no multiple of 32, the groups of its "
        f"norms, and of {heads} heads."
      )
  return config


def embed_numbers(
  numbers: Float[Array, "*n k"], dim: int
) -> Float[Array, "*n d"]:
  """Embeds each number by `dim` cosines and sines, and puts them side by side.

  Published checkpoints take fps - 1, the motion bucket and the strength of the
  image's noise, in this order. Float32: numbers go up to 255.
  """
  flat = embeddings.sinusoid(numbers.reshape(-1), dim)
  return flat.reshape(*numbers.shape[:-1], -1)


class Unet(nn.Module):
  """Predicts v from noisy latents, their noise level and conditions; float32.

  Attributes:
    config: The architecture.
    dtype: What is computed in.
    param_dtype: What parameters are made in.
    remat: What is kept for the backward pass: "none" keeps all, "full" the
      input of each block, "dots" what its dense layers give, too.
    images: An image model: each frame by itself, layers over time left out.
      Their parameters are not read; made so, there are none.
    attention: Its implementation within frames; None is the fastest of the
      platform.
  """

  config: UnetConfig
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  remat: str = "none"
  images: bool = False
  attention: str | None = None

  def __call__(
    self,
    latents: Float[Array, "b f h w c"],
    timestep: Float[Array, " b"],
    context: Float[Array, "b l e"],
    vector: Float[Array, "b _f d"] | None = None,
    *,
    image_only: Bool[Array, "b f"] | None = None,
    time_context: Float[Array, "b m e"] | None = None,
  ) -> Float[Array, "b f h w c_out"]:
    """Returns the prediction.

    Args:
      latents: Times c_in, beside the conditions' channels.
      timestep: ln(sigma) / 4.
      context: Tokens of an image or a text that positions attend to.
      vector: Embedded numbers, see `embed_numbers`, of each video or of each
        frame. Needed where the config has any.
      image_only: Which frames are single images; they see no other frame.
      time_context: What layers over time attend to; the context by default.
    """
    check_remat(self.remat)
    levels = len(self.config.block_out_channels) - 1
    b, _, h, w, _ = latents.shape
    coarsest = (-(-h // 2**levels), -(-w // 2**levels))
    if time_context is None:
      time_context = context
    with sharding.frames(b, *coarsest):
      return self._run(
        latents, timestep, vector, context, time_context, image_only
      )

  @nn.compact
  def _run(self, x, timestep, vector, context, time_context, image_only):
    config = self.config
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    widths, heads = config.block_out_channels, config.num_attention_heads
    last = len(widths) - 1
    temb = self._embed(timestep, vector)
    contexts = (context.astype(self.dtype), time_context.astype(self.dtype))
    eps = _EPS[config.norms]

    def resnet(x, width, where, name):
      block = self._remat(VideoResBlock)(
        width, eps[where], eps[where], images=self.images, name=name, **dtypes
      )
      return block(x, temb, image_only)

    def attend(x, level, name):
      block = self._remat(VideoTransformer)(
        heads=heads[level],
        depth=config.transformer_layers_per_block,
        images=self.images,
        implementation=self.attention,
        name=name,
        **dtypes,
      )
      return block(x, *contexts, image_only)

    x = Conv2D(widths[0], name="conv_in", **dtypes)(x)
    skips = [x]
    for i, (width, kind) in enumerate(
      zip(widths, config.down_block_types, strict=True)
    ):
      cross = kind == CROSS_DOWN
      for j in range(config.layers_per_block):
        where = "cross_down" if cross else "down"
        x = resnet(x, width, where, f"down_{i}_resnet_{j}")
        if cross:
          x = attend(x, i, f"down_{i}_attention_{j}")
        skips.append(x)
      if i < last:
        x = Conv2D(width, stride=2, name=f"down_{i}_resize", **dtypes)(x)
        skips.append(x)

    x = resnet(x, widths[-1], "mid", "mid_resnet_0")
    x = attend(x, last, "mid_attention_0")
    x = resnet(x, widths[-1], "mid", "mid_resnet_1")

    for i, kind in enumerate(config.up_block_types):
      level = last - i
      for j in range(config.layers_per_block + 1):
        x = jnp.concatenate([x, skips.pop()], axis=-1)
        x = resnet(x, widths[level], "up", f"up_{i}_resnet_{j}")
        if kind == CROSS_UP:
          x = attend(x, level, f"up_{i}_attention_{j}")
      if level:
        resize = Upsample(widths[level], name=f"up_{i}_resize", **dtypes)
        x = resize(x, skips[-1].shape[2:4])
    return self._head(x)

  def _embed(self, timestep, vector):
    """Embeds the noise level and the vector: `b f e` or `b 1 e`, float32."""
    config, width = self.config, self.config.block_out_channels[0]
    mlp = lambda name: embeddings.ScalarEmbedding(
      4 * width, param_dtype=self.param_dtype, name=name
    )
    temb = mlp("time_embedding")(embeddings.sinusoid(timestep, width))[:, None]
    if not config.projection_class_embeddings_input_dim:
      return temb
    b, f, d = vector.shape
    flat = vector.astype(jnp.float32).reshape(b * f, d)
    return temb + mlp("vector_embedding")(flat).reshape(b, f, -1)

  def _head(self, x):
    param_dtype = self.param_dtype
    x = nn.silu(FrameNorm(1e-5, param_dtype=param_dtype, name="norm_out")(x))
    head = Conv2D(
      self.config.out_channels,
      kernel_init=nn.initializers.zeros,
      param_dtype=param_dtype,
      name="conv_out",
    )
    return head(x)

  def _remat(self, block: type[nn.Module]) -> type[nn.Module]:
    policy = _REMAT[self.remat]
    return block if policy is None else nn.remat(block, policy=policy)


def init(
  config: UnetConfig, key: Key[Array, ""], *, images: bool = False
) -> PyTree:
  """Returns new float32 parameters, boxed with their logical axes.

  With layers over time the model does what it does without them.

  Args:
    config: The architecture.
    key: Draws them.
    images: Leaves out layers over time.
  """
  side = 2 ** (len(config.block_out_channels) - 1)
  width = config.projection_class_embeddings_input_dim
  return Unet(config, images=images).init(
    key,
    jnp.zeros((1, 1, side, side, config.in_channels)),
    jnp.zeros(1),
    jnp.zeros((1, 1, config.cross_attention_dim)),
    jnp.zeros((1, 1, width)) if width else None,
  )["params"]
