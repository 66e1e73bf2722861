"""Attention of the UNet: within each frame, over time, and to the context.

Blattmann et al., https://arxiv.org/abs/2311.15127, appendix D.2; the arithmetic
is that of diffusers' transformer_temporal.py. Tokens are `b f n c`: frames stay
an axis of their own, so that neither kind of attention reorders the others'
input, and devices may share the positions of a frame.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from vidgen.models.svd.layers import Blend, FrameNorm
from vidgen.nn import attention, conv, embeddings, layers, norm
from vidgen.sharding import constrain

_EPS = 1e-5


class _Layer(nn.Module):
  """What all layers here have: in what is computed, in what parameters are."""

  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  def dense(
    self,
    features: int,
    axes: tuple[str | None, str | None],
    name: str,
    heads: int | None = None,
    use_bias: bool = True,
    zero: bool = False,
  ) -> layers.Dense:
    return layers.dense(
      features,
      axes,
      name=name,
      use_bias=use_bias,
      kernel_init=nn.initializers.zeros if zero else None,
      heads=heads,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
    )

  def norm(self, x: Array, name: str) -> Array:
    y = norm.LayerNorm(_EPS, self.param_dtype, name=name)(x)
    return y.astype(self.dtype)


class FeedForward(_Layer):
  """down(value · gelu(gate)), both read from one projection, the exact GELU.

  Shazeer, https://arxiv.org/abs/2002.05202.

  Attributes:
    zero: Whether it starts by giving zero.
  """

  zero: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "b f n c"]) -> Float[Array, "b f n c"]:
    width = x.shape[-1]
    y = self.dense(8 * width, ("embed", "mlp"), "in")(x)
    value, gate = jnp.split(y, 2, axis=-1)
    gate = nn.gelu(gate.astype(jnp.float32), approximate=False)
    y = (value.astype(jnp.float32) * gate).astype(self.dtype)
    return self.dense(width, ("mlp", "embed"), "out", zero=self.zero)(y)


class _Attention(_Layer):
  """Projections of queries, keys, values and of what attention gives.

  Attributes:
    heads: Heads.
    zero: Whether it starts by giving zero.
  """

  heads: int = 1
  zero: bool = False

  def project(self, x: Array, features: int, name: str) -> Array:
    """`... c` to `... heads head_dim`, with heads of zeros where they pad."""
    y = self.dense(
      features, ("embed", "heads"), name, heads=self.heads, use_bias=False
    )(x)
    return y.reshape(*x.shape[:-1], -1, features // self.heads)

  def out(self, x: Array, features: int) -> Array:
    """`... heads head_dim` to `... c`."""
    dense = self.dense(
      features, ("heads", "embed"), "out", heads=self.heads, zero=self.zero
    )
    return dense(x.reshape(*x.shape[:-2], -1))


class FrameAttention(_Attention):
  """Attention among the positions of a frame.

  Attributes:
    implementation: See `attention.attention`.
  """

  implementation: str | None = None

  @nn.compact
  def __call__(self, x: Float[Array, "b f n c"]) -> Float[Array, "b f n c"]:
    b, f, n, width = x.shape

    def part(name: str) -> Array:
      y = self.project(x, width, name)
      y = y.reshape(b * f, *y.shape[2:])
      return constrain(y, "batch", "tokens", "activation_heads", "head_dim")

    y = attention.attention(
      part("query"),
      part("key"),
      part("value"),
      implementation=self.implementation,
    )
    return self.out(y.reshape(b, f, n, *y.shape[2:]), width)


class TimeAttention(_Attention):
  """Attention among the frames of a position."""

  @nn.compact
  def __call__(self, x: Float[Array, "b f n c"]) -> Float[Array, "b f n c"]:
    width = x.shape[-1]
    part = lambda name: self.project(x, width, name)
    q, k, v = part("query"), part("key"), part("value")
    # Frames are few and positions many: one product for all scores. It stays on
    # the devices that share the positions.
    scores = jnp.einsum(
      "bfnhd,bgnhd->bnhfg",
      q,
      k,
      precision=layers.precision(q.dtype),
      preferred_element_type=jnp.float32,
    )
    scores = jax.nn.softmax(scores * q.shape[-1] ** -0.5, axis=-1)
    y = jnp.einsum(
      "bnhfg,bgnhd->bfnhd",
      scores.astype(v.dtype),
      v,
      precision=layers.precision(v.dtype),
    )
    return self.out(y, width)


class CrossAttention(_Attention):
  """Attention of all positions of all frames to the context.

  To one token all attend alike: what comes out is `out(value(context))`, and
  neither queries nor keys are computed.
  """

  @nn.compact
  def __call__(
    self, x: Float[Array, "b f n c"], context: Float[Array, "b l e"]
  ) -> Float[Array, "b _f _n c"]:
    b, f, n, width = x.shape
    v = self.project(context, width, "value")
    if context.shape[1] == 1 and not self.is_initializing():
      return self.out(v[:, None], width)
    q = self.project(x.reshape(b, f * n, width), width, "query")
    k = self.project(context, width, "key")
    y = attention.attention(q, k, v)
    return self.out(y.reshape(b, f, n, *y.shape[2:]), width)


class SpatialBlock(_Layer):
  """Attention within frames, to the context, and a feed-forward layer.

  Attributes:
    heads: Heads.
    implementation: As of `FrameAttention`.
  """

  heads: int = 1
  implementation: str | None = None

  @nn.compact
  def __call__(
    self, x: Float[Array, "b f n c"], context: Float[Array, "b l e"]
  ) -> Float[Array, "b f n c"]:
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    attend = FrameAttention(
      heads=self.heads,
      implementation=self.implementation,
      name="self_attention",
      **dtypes,
    )
    look = CrossAttention(heads=self.heads, name="cross_attention", **dtypes)
    x = x + attend(self.norm(x, "norm1"))
    x = x + look(self.norm(x, "norm2"), context)
    return x + FeedForward(name="feed_forward", **dtypes)(self.norm(x, "norm3"))


class TemporalBlock(_Layer):
  """A feed-forward layer, attention over time, to the context, and another one.

  It starts by giving what it is given: a video model begins as the image model
  that it is made from. The original starts at random.

  Attributes:
    heads: Heads.
  """

  heads: int = 1

  @nn.compact
  def __call__(
    self, x: Float[Array, "b f n c"], context: Float[Array, "b l e"]
  ) -> Float[Array, "b f n c"]:
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    dtypes |= {"zero": True}
    attend = TimeAttention(heads=self.heads, name="self_attention", **dtypes)
    look = CrossAttention(heads=self.heads, name="cross_attention", **dtypes)
    feed = lambda name: FeedForward(name=name, **dtypes)
    x = x + feed("feed_forward_in")(self.norm(x, "norm_in"))
    x = x + attend(self.norm(x, "norm1"))
    x = x + look(self.norm(x, "norm2"), context)
    return x + feed("feed_forward")(self.norm(x, "norm3"))


class FrameEmbedding(_Layer):
  """Embeds the number of each frame; float32.

  It starts at zero, as `TemporalBlock` does.
  """

  @nn.compact
  def __call__(self, frames: int, features: int) -> Float[Array, "1 f 1 c"]:
    x = embeddings.sinusoid(jnp.arange(frames, dtype=jnp.float32), features)
    x = self.dense(4 * features, ("embed", "conditioning"), "in")(x)
    axes = ("conditioning", "embed")
    x = self.dense(features, axes, "out", zero=True)(nn.silu(x))
    return x[None, :, None]


class VideoTransformer(_Layer):
  """Spatial blocks, each blended with a temporal block behind it.

  Attributes:
    heads: Heads of each attention.
    depth: Pairs of blocks.
    images: Leaves time out; parameters of it are not read.
    implementation: As of `FrameAttention`.
  """

  heads: int = 1
  depth: int = 1
  images: bool = False
  implementation: str | None = None

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b f h w c"],
    context: Float[Array, "b l e"],
    time_context: Float[Array, "b m e"],
    image_only: Bool[Array, "b f"] | None = None,
  ) -> Float[Array, "b f h w c"]:
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    b, f, h, w, width = x.shape
    y = FrameNorm(1e-6, param_dtype=self.param_dtype, name="norm")(x)
    y = y.astype(self.dtype).reshape(b, f, h * w, width)
    y = self.dense(width, (None, "embed"), "proj_in")(y)
    if not self.images:
      embed = FrameEmbedding(param_dtype=self.param_dtype, name="frames")
      frames = embed(f, width)
      blend = Blend(0.5, self.param_dtype, name="blend")
    for i in range(self.depth):
      block = SpatialBlock(
        heads=self.heads,
        implementation=self.implementation,
        name=f"spatial_{i}",
        **dtypes,
      )
      y = block(y, context)
      if not self.images:
        block = TemporalBlock(heads=self.heads, name=f"temporal_{i}", **dtypes)
        time = (y.astype(jnp.float32) + frames).astype(self.dtype)
        y = blend(y, block(time, time_context), image_only)
    y = self.dense(width, ("embed", None), "proj_out", zero=True)(y)
    return x + conv.constrain(y.reshape(x.shape))
