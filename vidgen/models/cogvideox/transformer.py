"""The expert diffusion transformer over text and video tokens.

Yang et al., https://arxiv.org/abs/2408.06072, section 2.2; numerics follow
diffusers' cogvideox_transformer_3d.py. Text and video are one sequence, text
first; what differs between them (modulation, rotation) is chosen by position,
so that the sequence is never split.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, PyTree

from vidgen import errors, layouts
from vidgen.models.cogvideox import positions
from vidgen.nn import attention, embeddings, layers, norm, rope
from vidgen.sharding import constrain, gathered, parts, platform

# What the offset embedding of CogVideoX1.5-5B-I2V is asked for, always.
_OFS = 2.0

# What the backward pass keeps of a block's forward pass, next to its input; the
# rest is computed again. None keeps all. Attention scores are never kept by
# "dots": it is the outputs of dense layers that are dear to compute again, and
# for "attention" its own.
_policies = jax.checkpoint_policies
REMATS: dict[str, Callable | None] = {
  "none": None,
  "full": _policies.nothing_saveable,
  "attention": attention.saved,
  "dots": _policies.save_only_these_names(layers.SAVED),
}


def check_remat(name: str) -> None:
  """Raises InputError unless `name` is a way to save memory in training."""
  if name not in REMATS:
    raise errors.InputError(
      f"remat: {name!r} is unknown; known are {', '.join(REMATS)}."
    )


def check_attention(name: str | None) -> None:
  """Raises InputError unless attention of this name can run here."""
  if reason := attention.unavailable(name, platform()):
    raise errors.InputError(f"attention: {reason}.")


@dataclasses.dataclass
class TransformerConfig:
  """Architecture; the names are those of the published config.json.

  Attributes:
    num_layers: Blocks.
    num_attention_heads: Heads of a block.
    attention_head_dim: Channels of a head.
    in_channels: Channels of the input: latents, then the image's for I2V.
    out_channels: Channels of the prediction.
    time_embed_dim: Width of the embedding that modulates the blocks.
    ofs_embed_dim: Width of the offset embedding, where the model has it.
    text_embed_dim: Width of the text encoder's output.
    patch_size: Latents along height and width of a token.
    patch_size_t: Latents along time of a token; None is CogVideoX 1.0.
    sample_height: Height of the trained size, in latents.
    sample_width: Width of the trained size, in latents.
    sample_frames: Frames of the trained length, in pixels.
    max_text_seq_length: Text tokens.
    norm_eps: Epsilon of the layer norms of tokens.
    spatial_interpolation_scale: Divides the sincos positions in space.
    temporal_interpolation_scale: Divides the sincos positions in time.
    temporal_compression_ratio: Frames of a latent.
    use_rotary_positional_embeddings: Whether queries and keys are rotated.
    use_learned_positional_embeddings: Whether the checkpoint holds a table.
  """

  num_layers: int = 30
  num_attention_heads: int = 30
  attention_head_dim: int = 64
  in_channels: int = 16
  out_channels: int = 16
  time_embed_dim: int = 512
  ofs_embed_dim: int | None = None
  text_embed_dim: int = 4096
  patch_size: int = 2
  patch_size_t: int | None = None
  sample_height: int = 60
  sample_width: int = 90
  sample_frames: int = 49
  max_text_seq_length: int = 226
  norm_eps: float = 1e-5
  spatial_interpolation_scale: float = 1.875
  temporal_interpolation_scale: float = 1.0
  temporal_compression_ratio: int = 4
  use_rotary_positional_embeddings: bool = False
  use_learned_positional_embeddings: bool = False

  @property
  def dim(self) -> int:
    """Width of a token."""
    return self.num_attention_heads * self.attention_head_dim

  @property
  def learned_tokens(self) -> int:
    """Rows of the learned table: the text's, then the trained grid's."""
    frames = (self.sample_frames - 1) // self.temporal_compression_ratio + 1
    height = self.sample_height // self.patch_size
    width = self.sample_width // self.patch_size
    return self.max_text_seq_length + frames * height * width


class Modulation(nn.Module):
  """Reads `parts` vectors from the time embedding for text and for video.

  The linear layer gives all of the video's, then all of the text's.
  """

  parts: int
  features: int
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, temb: Float[Array, "b e"], is_text: Float[Array, " n"]
  ) -> list[Float[Array, "b n d"]]:
    out = layers.dense(
      2 * self.parts * self.features,
      ("conditioning", "mlp"),
      name="linear",
      kernel_init=nn.initializers.zeros,
      param_dtype=self.param_dtype,
    )(nn.silu(temb))
    out = constrain(out, "batch", "activation_embed")
    video, text = jnp.split(out[:, None], 2, axis=-1)
    is_text = is_text[:, None] > 0
    pick = lambda t, v: jnp.where(is_text, t, v)
    parts = functools.partial(
      jnp.split, indices_or_sections=self.parts, axis=-1
    )
    return [pick(t, v) for t, v in zip(parts(text), parts(video), strict=True)]


class SelfAttention(nn.Module):
  """Joint attention of text and video; each head norms queries and keys.

  Attributes:
    heads: Heads.
    head_dim: Channels of a head.
    num_keys: Tokens that are no padding.
    implementation: Of attention; see `attention.attention`.
    dtype: What is computed in.
    param_dtype: What parameters are made in.
  """

  heads: int
  head_dim: int
  num_keys: int
  implementation: str | None = None
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    rotation: tuple[Float[Array, "n head_dim"], Float[Array, "n head_dim"]]
    | None,
  ) -> Float[Array, "b n d"]:
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    dtypes |= {"heads": self.heads}
    dim = self.heads * self.head_dim

    def project(name: str) -> Array:
      y = layers.dense(dim, ("embed", "heads"), name=name, **dtypes)(x)
      y = y.reshape(*y.shape[:2], -1, self.head_dim)
      return constrain(y, "batch", "tokens", "activation_heads", "head_dim")

    def normed(name: str) -> tuple[Array, Array]:
      normalize = norm.LayerNorm(1e-6, self.param_dtype, name=f"{name}_norm")
      y = normalize(project(name))
      if rotation is not None:
        y = rope.rotate(y, *rotation)
      return y.astype(self.dtype), normalize.longest()

    (q, longest_q), (k, longest_k) = normed("query"), normed("key")
    out = attention.attention(
      q,
      k,
      project("value"),
      num_keys=self.num_keys,
      bound=longest_q * longest_k / self.head_dim**0.5,
      implementation=self.implementation,
    )
    out = out.reshape(*x.shape[:2], -1)
    out = layers.dense(x.shape[-1], ("heads", "embed"), name="out", **dtypes)(
      out
    )
    return constrain(out, "batch", "tokens", "activation_embed")


class FeedForward(nn.Module):
  """Two dense layers around the tanh approximation of GELU."""

  hidden: int
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    y = layers.dense(self.hidden, ("embed", "mlp"), name="in", **dtypes)(x)
    y = constrain(y, "batch", "tokens", "activation_mlp")
    y = nn.gelu(y.astype(jnp.float32), approximate=True).astype(self.dtype)
    y = layers.dense(x.shape[-1], ("mlp", "embed"), name="out", **dtypes)(y)
    return constrain(y, "batch", "tokens", "activation_embed")


class Block(nn.Module):
  """Attention and feed-forward, each modulated and gated by expert adaLN.

  The layer norm is shared by text and video; shift, scale and gate are not.
  Modulation and residual sums run in float32.
  """

  heads: int
  head_dim: int
  norm_eps: float
  num_keys: int
  implementation: str | None = None
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b n d"],
    temb: Float[Array, "b e"],
    is_text: Float[Array, " n"],
    rotation: tuple[Float[Array, "n head_dim"], Float[Array, "n head_dim"]]
    | None,
  ) -> tuple[Float[Array, "b n d"], None]:
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    attend = SelfAttention(
      self.heads,
      self.head_dim,
      self.num_keys,
      self.implementation,
      name="attention",
      **dtypes,
    )
    feed = FeedForward(4 * x.shape[-1], name="feed_forward", **dtypes)
    x = self._gated("1", x, temb, is_text, lambda y: attend(y, rotation))
    x = self._gated("2", x, temb, is_text, feed)
    return constrain(x, "batch", "tokens", "activation_embed"), None

  def _gated(self, index, x, temb, is_text, layer):
    """x + gate · layer(norm(x) · (1 + scale) + shift)."""
    modulation = Modulation(
      3, x.shape[-1], self.param_dtype, name=f"modulation_{index}"
    )
    shift, scale, gate = modulation(temb, is_text)
    normed = norm.LayerNorm(
      self.norm_eps, self.param_dtype, name=f"norm_{index}"
    )(x)
    y = layer((normed * (1 + scale) + shift).astype(self.dtype))
    y = x.astype(jnp.float32) + gate * y.astype(jnp.float32)
    return y.astype(x.dtype)


class PatchEmbed(nn.Module):
  """Projects patches of latents to tokens, the time axis slowest.

  CogVideoX 1.0 convolves patches of one latent frame; 1.5 projects patches of
  `patch_size_t` frames, flattened as (channel, time, height, width).
  """

  features: int
  patch_size: int
  patch_size_t: int | None
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b n d"]:
    b, f, h, w, c = x.shape
    p, t = self.patch_size, self.patch_size_t or 1
    x = x.astype(self.dtype).reshape(b, f // t, t, h // p, p, w // p, p, c)
    if self.patch_size_t is None:
      order, names = (0, 1, 3, 5, 2, 4, 6, 7), (None, None, None, "embed")
      shape = (p, p, c, self.features)
    else:
      order, names = (0, 1, 3, 5, 7, 2, 4, 6), (None, "embed")
      shape = (c * t * p * p, self.features)
    x = x.transpose(order).reshape(b, -1, t * p * p * c)
    init = nn.initializers.xavier_uniform()
    boxed = nn.with_logical_partitioning(init, names)
    kernel = self.param("kernel", boxed, shape, self.param_dtype)
    zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("embed",))
    bias = self.param("bias", zeros, (self.features,), self.param_dtype)
    kernel = gathered(kernel.astype(self.dtype), *names)
    kernel = kernel.reshape(-1, self.features)
    y = layers.matmul(x, kernel) + bias.astype(self.dtype)
    update = layers.low_rank(self, x, self.dtype)
    return y if update is None else y + update


class Transformer(nn.Module):
  """Predicts v from noisy latents, text and timestep.

  Raises on a call whose size the checkpoint's positions cannot serve.

  Attributes:
    config: The architecture.
    dtype: What is computed in.
    param_dtype: What parameters are made in.
    remat: What is kept for the backward pass: "none" keeps all, "full" the
      input of each block, "attention" what it gives, too, "dots" what dense
      layers give.
    unroll: How many blocks one round of the loop over them runs. More compile
      for longer, and copy less of what the backward pass needs.
    attention: Its implementation; None is the fastest of the platform.
  """

  config: TransformerConfig
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  remat: str = "none"
  unroll: int = 1
  attention: str | None = None

  @nn.compact
  def __call__(
    self,
    latents: Float[Array, "b f h w c"],
    text: Float[Array, "b l e"],
    timestep: Float[Array, " b"],
  ) -> Float[Array, "b f h w c_out"]:
    config, (_, f, h, w, _) = self.config, latents.shape
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    p = config.patch_size
    grid = (f // (config.patch_size_t or 1), h // p, w // p)
    length = text.shape[1]
    if not self.is_initializing():
      # Of one sample, no batch takes the mesh's axes.
      layouts.check_heads(config.num_attention_heads, len(latents))

    temb = self._embed_time(timestep)
    video = PatchEmbed(
      config.dim, p, config.patch_size_t, name="patch_embed", **dtypes
    )(latents)
    text = layers.dense(
      config.dim, ("conditioning", "embed"), name="text_embed", **dtypes
    )(text.astype(self.dtype))
    text, video = self._add_positions(text, video, grid, frames=f)
    tokens = length + video.shape[1]
    # Padding stands at the end; no token attends to it.
    pad = -tokens % parts(len(latents), "tokens")
    x = jnp.concatenate([text, video], axis=1)
    x = jnp.pad(x, [(0, 0), (0, pad), (0, 0)])
    x = constrain(x, "batch", "tokens", "activation_embed")

    is_text = (jnp.arange(x.shape[1]) < length).astype(jnp.float32)
    blocks = nn.scan(
      self._block(),
      variable_axes={"params": 0, layers.LORA: 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=config.num_layers,
      unroll=self.unroll,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )(
      config.num_attention_heads,
      config.attention_head_dim,
      config.norm_eps,
      tokens,
      self.attention,
      name="blocks",
      **dtypes,
    )
    x, _ = blocks(x, temb, is_text, self._rotation(grid, length, pad))
    return self._head(x, temb, grid, length)

  def _block(self) -> type[nn.Module]:
    """The block, under the policy of `remat`; its parameters stay the same."""
    check_remat(self.remat)
    policy = REMATS[self.remat]
    if policy is None:
      return Block
    # Within a scan, nothing can be merged with what is computed again.
    return nn.remat(Block, prevent_cse=False, policy=policy)

  def _embed_time(self, timestep):
    """The time embedding, with the constant offset's added; float32."""
    config = self.config
    mlp = lambda features, name: embeddings.ScalarEmbedding(
      features, param_dtype=self.param_dtype, name=name
    )
    time = embeddings.sinusoid(timestep, config.dim)
    temb = mlp(config.time_embed_dim, "time_embedding")(time)
    if config.ofs_embed_dim is not None:
      ofs = embeddings.sinusoid(jnp.full((1,), _OFS), config.ofs_embed_dim)
      temb = temb + mlp(config.ofs_embed_dim, "ofs_embedding")(ofs)
    return temb

  def _add_positions(self, text, video, grid, frames):
    """Adds the learned or the sincos table, where the model has one."""
    config = self.config
    if config.use_learned_positional_embeddings:
      init = nn.with_logical_partitioning(
        nn.initializers.zeros, (None, None, "embed")
      )
      shape = (1, config.learned_tokens, config.dim)
      table = self.param("pos_embedding", init, shape, self.param_dtype)
      pixels = (frames - 1) * config.temporal_compression_ratio + 1
      if pixels == config.sample_frames:
        table = table.astype(video.dtype)
        length = text.shape[1]
        return text + table[:, :length], video + table[:, length:]
      # diffusers silently falls back to sincos at another length: parity.
    elif config.use_rotary_positional_embeddings:
      return text, video
    table = positions.sincos_table(
      grid,
      config.dim,
      config.spatial_interpolation_scale,
      config.temporal_interpolation_scale,
    )
    return text, video + table.astype(video.dtype)

  def _rotation(self, grid, length, pad):
    """Cosines and sines of every token; text and padding are not rotated."""
    config = self.config
    if not config.use_rotary_positional_embeddings:
      return None
    base = (
      config.sample_height // config.patch_size,
      config.sample_width // config.patch_size,
    )
    where = positions.rotary_positions(
      grid, base, crop=config.patch_size_t is None
    )
    d = config.attention_head_dim
    cos, sin = rope.tables(where, (d // 4, d // 8 * 3, d // 8 * 3))
    around = lambda x, still: jnp.pad(
      x, [(length, pad), (0, 0)], constant_values=still
    )
    return around(cos, 1.0), around(sin, 0.0)

  def _head(self, x, temb, grid, length):
    """Norms, modulates and projects tokens, and gives the video's; float32."""
    config, param_dtype = self.config, self.param_dtype
    p, t = config.patch_size, config.patch_size_t or 1
    x = norm.LayerNorm(config.norm_eps, param_dtype, name="norm_final")(x)
    modulation = layers.dense(
      2 * config.dim,
      ("conditioning", "mlp"),
      name="modulation_out",
      param_dtype=param_dtype,
    )(nn.silu(temb))
    modulation = constrain(modulation, "batch", "activation_embed")
    shift, scale = jnp.split(modulation[:, None], 2, axis=-1)
    x = norm.LayerNorm(config.norm_eps, param_dtype, name="norm_out")(x)
    x = layers.dense(
      t * p * p * config.out_channels,
      ("embed", None),
      name="proj_out",
      param_dtype=param_dtype,
    )(x * (1 + scale) + shift)
    f, h, w = grid
    # Small now: tokens of 64 channels are whole on every device again.
    x = constrain(x, "batch", None, None)[:, length : length + f * h * w]
    x = x.reshape(-1, f, h, w, config.out_channels, t, p, p)
    x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(-1, f * t, h * p, w * p, config.out_channels)


def init(config: TransformerConfig, key: Key[Array, ""]) -> PyTree:
  """Returns random float32 parameters, boxed with their logical axes."""
  p, t = config.patch_size, config.patch_size_t or 1
  size = (t, p, p)
  if config.use_learned_positional_embeddings:
    frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
    size = (frames, config.sample_height, config.sample_width)
  text = (1, config.max_text_seq_length, config.text_embed_dim)
  return Transformer(config).init(
    key,
    jnp.zeros((1, *size, config.in_channels)),
    jnp.zeros(text),
    jnp.zeros(1),
  )["params"]
