"""The autoencoder of images, with a decoder that looks at neighbouring frames.

Blattmann et al., https://arxiv.org/abs/2304.08818, section 3.2. The arithmetic
is that of `AutoencoderKLTemporalDecoder` in diffusers, and, with a decoder of
images, that of `AutoencoderKL`. The encoder sees each frame by itself, and
nothing is compressed in time.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, PyTree

from vidgen import errors, sharding
from vidgen.models.svd import published_config
from vidgen.models.svd.layers import (
  Conv2D,
  FrameNorm,
  ResBlock,
  TemporalConv,
  Upsample,
  VideoResBlock,
)
from vidgen.nn import attention, layers, posterior
from vidgen.nn.conv import DownsampleConv2D

_EPS, _TEMPORAL_EPS = 1e-6, 1e-5
_KINDS = {"AutoencoderKLTemporalDecoder": True, "AutoencoderKL": False}
# What no published autoencoder of this family has otherwise.
_FIXED = {
  "act_fn": "silu",
  "norm_num_groups": 32,
  "shift_factor": None,
  "latents_mean": None,
  "latents_std": None,
  "use_quant_conv": True,
  "use_post_quant_conv": True,
  "mid_block_add_attention": True,
}
_BLOCKS = {
  "down_block_types": "DownEncoderBlock2D",
  "up_block_types": "UpDecoderBlock2D",
}


@dataclasses.dataclass
class VaeConfig:
  """Architecture; the names are those of the published config.json.

  Attributes:
    in_channels: Of frames.
    out_channels: Of frames.
    block_out_channels: Channels of each level.
    latent_channels: Of latents.
    layers_per_block: Residual blocks of a level of the encoder.
    sample_size: Pixels that it was trained for; nothing depends on it.
    scaling_factor: What latents are multiplied by to have unit variance.
    force_upcast: Whether float16 is too narrow for it.
    temporal: Whether the decoder looks at neighbouring frames; published as
      the name of the class.
  """

  in_channels: int = 3
  out_channels: int = 3
  block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
  latent_channels: int = 4
  layers_per_block: int = 2
  sample_size: int = 768
  scaling_factor: float = 0.18215
  force_upcast: bool = True
  temporal: bool = True

  @property
  def spatial_compression_ratio(self) -> int:
    return 2 ** (len(self.block_out_channels) - 1)


def vae_config(published: Mapping[str, Any]) -> VaeConfig:
  """Reads a published vae/config.json; what it lacks has our default.

  Raises:
    InputError: It asks for what no published model of this family has.
  """
  where = "vae/config.json"
  kind = published.get("_class_name", "AutoencoderKLTemporalDecoder")
  if kind not in _KINDS:
    raise errors.InputError(
      f"{where}: unknown autoencoder {kind}; known are {', '.join(_KINDS)}."
    )
  fields = published_config.pick(published, VaeConfig, where, leave="temporal")
  config = VaeConfig(**fields, temporal=_KINDS[kind])
  levels = len(config.block_out_channels)
  wanted = _FIXED | {key: [name] * levels for key, name in _BLOCKS.items()}
  for key, want in wanted.items():
    have = published.get(key, want)
    if (list(have) if isinstance(have, tuple) else have) != want:
      raise errors.InputError(
        f"{where}: {key} = {have!r} is not supported, only {want!r}."
      )
  if config.temporal and config.layers_per_block != 2:
    # diffusers builds a middle of as many blocks, and runs two of them.
    raise errors.InputError(
      f"{where}: layers_per_block = {config.layers_per_block} is not "
      "supported by a decoder over time, only 2."
    )
  if odd := [c for c in config.block_out_channels if c % 32]:
    raise errors.InputError(
      f"{where}: block_out_channels {odd} are no multiples of 32, the groups "
      "of its norms."
    )
  return config


class FrameAttention(nn.Module):
  """Attention of one head among the positions of a frame, beside a shortcut."""

  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f h w c"]:
    b, f, h, w, width = x.shape
    y = FrameNorm(_EPS, param_dtype=self.param_dtype, name="norm")(x)
    y = y.astype(self.dtype).reshape(b * f, h * w, width)
    dense = lambda name, axes: layers.dense(
      width, axes, name=name, dtype=self.dtype, param_dtype=self.param_dtype
    )
    part = lambda name: dense(name, ("embed", None))(y)[:, :, None]
    # One head is too wide for fused kernels.
    y = attention.attention(
      part("query"), part("key"), part("value"), implementation="blocked"
    )
    y = dense("out", (None, "embed"))(y[:, :, 0])
    return x + y.reshape(x.shape)


class Encoder(nn.Module):
  """Maps each frame to the moments of its latents, in `dtype`."""

  config: VaeConfig
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  remat: bool = False

  def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f y x m"]:
    ratio = self.config.spatial_compression_ratio
    with sharding.frames(x.shape[0], x.shape[2] // ratio, x.shape[3] // ratio):
      return self._encode(x)

  @nn.compact
  def _encode(self, x):
    config = self.config
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    block = nn.remat(ResBlock) if self.remat else ResBlock
    resnet = lambda width, name: block(
      width, _EPS, zero=False, name=name, **dtypes
    )
    widths = config.block_out_channels
    x = Conv2D(widths[0], name="conv_in", **dtypes)(x)
    for i, width in enumerate(widths):
      for j in range(config.layers_per_block):
        x = resnet(width, f"down_{i}_resnet_{j}")(x)
      if i < len(widths) - 1:
        x = DownsampleConv2D(width, name=f"down_{i}_resize", **dtypes)(x)
    x = resnet(widths[-1], "mid_resnet_0")(x)
    x = FrameAttention(name="mid_attention", **dtypes)(x)
    x = resnet(widths[-1], "mid_resnet_1")(x)
    x = FrameNorm(_EPS, param_dtype=self.param_dtype, name="norm_out")(x)
    x = nn.silu(x).astype(self.dtype)
    moments = 2 * config.latent_channels
    x = Conv2D(moments, name="conv_out", **dtypes)(x)
    return Conv2D(moments, kernel_size=1, name="quant", **dtypes)(x)


def _identity(key, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
  """A kernel over time that gives what it is given."""
  del key
  return jnp.zeros(shape, dtype).at[shape[0] // 2, 0, 0].set(jnp.eye(shape[-1]))


class Decoder(nn.Module):
  """Maps latents to frames.

  Layers over time start by changing nothing: the decoder begins as the decoder
  of images that it is made from.
  """

  config: VaeConfig
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  remat: bool = False

  def __call__(self, z: Float[Array, "b f y x k"]) -> Float[Array, "b f h w c"]:
    with sharding.frames(z.shape[0], *z.shape[2:4]):
      return self._decode(z)

  @nn.compact
  def _decode(self, x):
    config = self.config
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    widths = config.block_out_channels[::-1]
    if not config.temporal:
      post = Conv2D(x.shape[-1], kernel_size=1, name="post_quant", **dtypes)
      x = post(x)
    x = Conv2D(widths[0], name="conv_in", **dtypes)(x)
    x = self._resnet(widths[0], "mid_resnet_0")(x)
    x = FrameAttention(name="mid_attention", **dtypes)(x)
    x = self._resnet(widths[0], "mid_resnet_1")(x)
    for i, width in enumerate(widths):
      for j in range(config.layers_per_block + 1):
        x = self._resnet(width, f"up_{i}_resnet_{j}")(x)
      if i < len(widths) - 1:
        size = (2 * x.shape[2], 2 * x.shape[3])
        x = Upsample(width, name=f"up_{i}_resize", **dtypes)(x, size)
    x = FrameNorm(_EPS, param_dtype=self.param_dtype, name="norm_out")(x)
    x = nn.silu(x).astype(self.dtype)
    x = Conv2D(config.out_channels, name="conv_out", **dtypes)(x)
    if not config.temporal:
      return x
    time = TemporalConv(
      config.out_channels, kernel_init=_identity, name="time_out", **dtypes
    )
    return time(x)

  def _resnet(self, width: int, name: str) -> nn.Module:
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    if self.config.temporal:
      block = nn.remat(VideoResBlock) if self.remat else VideoResBlock
      return block(
        width,
        _EPS,
        _TEMPORAL_EPS,
        time_first=True,
        zero=False,
        initial=0.0,
        name=name,
        **dtypes,
      )
    block = nn.remat(ResBlock) if self.remat else ResBlock
    return block(width, _EPS, zero=False, name=name, **dtypes)


def init(
  config: VaeConfig, key: Key[Array, ""], param_dtype: DTypeLike = jnp.float32
) -> PyTree:
  """Returns random parameters, `{"encoder": ..., "decoder": ...}`, boxed."""
  size = config.spatial_compression_ratio
  keys = jax.random.split(key)
  encoder = Encoder(config, param_dtype=param_dtype)
  decoder = Decoder(config, param_dtype=param_dtype)
  frame = jnp.zeros((1, 1, size, size, config.in_channels))
  latents = jnp.zeros((1, 1, 1, 1, config.latent_channels))
  return {
    "encoder": encoder.init(keys[0], frame)["params"],
    "decoder": decoder.init(keys[1], latents)["params"],
  }


def _identity_post(x: Array) -> Array:
  return x


def _in_chunks(
  run: Callable[[Array], Array], x: Float[Array, "b f h w c"], chunk: int | None
) -> Array:
  """Applies `run` to so many frames at a time; the last chunk has the rest."""
  b, f = x.shape[:2]
  if chunk is None or chunk >= f:
    return run(x)
  count = f // chunk
  if count == 1:
    parts = [run(x[:, :chunk])]
  else:
    whole = x[:, : count * chunk].reshape(b, count, chunk, *x.shape[2:])
    y = jnp.moveaxis(lax.map(run, jnp.moveaxis(whole, 1, 0)), 0, 1)
    parts = [y.reshape(b, -1, *y.shape[3:])]
  if f % chunk:
    parts.append(run(x[:, count * chunk :]))
  return jnp.concatenate(parts, axis=1)


def encode(
  params: PyTree,
  config: VaeConfig,
  video: Float[Array, "b f H W c"],
  *,
  dtype: DTypeLike = jnp.float32,
  chunk: int | None = None,
  remat: bool = False,
) -> posterior.Posterior:
  """Encodes frames in [-1, 1]; the latents are not scaled yet.

  Args:
    params: `{"encoder": ...}`, unboxed.
    config: The architecture.
    video: Its height and width are multiples of the compression.
    dtype: What the network computes in. The posterior is float32.
    chunk: Frames at a time, all by default; it changes nothing but memory.
    remat: Whether the backward pass computes each residual block again, instead
      of keeping what is within it.

  Raises:
    InputError: The size is no multiple.
  """
  ratio = config.spatial_compression_ratio
  if video.shape[2] % ratio or video.shape[3] % ratio or 0 in video.shape:
    raise errors.InputError(
      f"video: {video.shape[1]} frames of {video.shape[2]}x{video.shape[3]} "
      f"cannot be encoded; height and width must be multiples of {ratio}."
    )
  network = Encoder(config, dtype, remat=remat)
  run = lambda x: network.apply({"params": params["encoder"]}, x)
  return posterior.of_moments(_in_chunks(run, video, chunk))


def decode(
  params: PyTree,
  config: VaeConfig,
  latents: Float[Array, "b f h w c"],
  *,
  dtype: DTypeLike = jnp.float32,
  post: Callable[[Array], Array] = _identity_post,
  chunk: int | None = None,
  remat: bool = False,
) -> Array:
  """Decodes latents, not scaled any more, to frames in [-1, 1].

  Args:
    params: `{"decoder": ...}`, unboxed.
    config: The architecture.
    latents: What the posterior's mean or a sample of it looks like.
    dtype: What the network computes in.
    post: Applied to each chunk of frames, for example to make bytes of them.
    chunk: Frames at a time, all by default. A decoder over time sees no frame
      of another chunk, which changes the result; chunks begin anew with each
      video, where diffusers runs them on from one into the next.
    remat: As in `encode`.

  Raises:
    InputError: There are no latents, or no frame at a time.
  """
  if 0 in latents.shape:
    raise errors.InputError(f"latents: nothing to decode in {latents.shape}.")
  if chunk is not None and chunk < 1:
    raise errors.InputError(f"decode_chunk: {chunk} frames at a time is none.")
  network = Decoder(config, dtype, remat=remat)
  run = lambda z: post(network.apply({"params": params["decoder"]}, z))
  return _in_chunks(run, latents, chunk)
