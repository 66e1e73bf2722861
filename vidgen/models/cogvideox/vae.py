"""The causal 3-D autoencoder of CogVideoX.

Yang et al., https://arxiv.org/abs/2408.06072, section 2.1. The arithmetic is
that of `AutoencoderKLCogVideoX` in diffusers, which differs from the paper's
own code: a video goes through in chunks of 8 frames (2 latents), and the group
norms see one chunk at a time.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from vidgen import errors, sharding
from vidgen.models.cogvideox import chunks
from vidgen.nn import posterior
from vidgen.nn.conv import (
  CausalConv3D,
  DownsampleConv2D,
  PointwiseConv3D,
  UpsampleConv2D,
)
from vidgen.nn.norm import GroupNorm

PIXEL_CHUNK = 8
LATENT_CHUNK = 2
# Upstream writes it out where `norm_eps` does not reach.
_EPS = 1e-6
_ABSENT = ("shift_factor", "latents_mean", "latents_std")
_FALSE = ("use_quant_conv", "use_post_quant_conv")
_BLOCKS = {
  "down_block_types": "CogVideoXDownBlock3D",
  "up_block_types": "CogVideoXUpBlock3D",
}


@dataclasses.dataclass
class VaeConfig:
  """The architecture, under the names of the published config.json."""

  in_channels: int = 3
  out_channels: int = 3
  block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
  latent_channels: int = 16
  layers_per_block: int = 3
  norm_eps: float = _EPS
  norm_num_groups: int = 32
  temporal_compression_ratio: int = 4
  sample_height: int = 480
  sample_width: int = 720
  scaling_factor: float = 1.15258426
  invert_scale_latents: bool = False

  @property
  def spatial_compression_ratio(self) -> int:
    return 2 ** (len(self.block_out_channels) - 1)


def vae_config(published: Mapping[str, Any]) -> VaeConfig:
  """Reads a published vae/config.json; what it lacks has upstream's default.

  Raises:
    InputError: It asks for what no published CogVideoX has.
  """
  blocks = published.get("block_out_channels", VaeConfig.block_out_channels)
  wanted = dict.fromkeys(_ABSENT) | dict.fromkeys(_FALSE, False)
  wanted |= {key: [kind] * len(blocks) for key, kind in _BLOCKS.items()}
  for key, want in wanted.items():
    have = published.get(key, want)
    if (list(have) if isinstance(have, tuple) else have) != want:
      raise errors.InputError(
        f"vae/config.json: {key} = {have!r} is not supported, only {want!r}."
      )
  if (name := published.get("act_fn", "silu")) not in ("silu", "swish"):
    raise errors.InputError(
      f"vae/config.json: act_fn = {name!r} is not supported, only 'silu'."
    )
  names = {field.name for field in dataclasses.fields(VaeConfig)}
  known = {k: v for k, v in published.items() if k in names}
  config = VaeConfig(**known | {"block_out_channels": tuple(blocks)})
  ratio = config.temporal_compression_ratio
  if ratio not in (1, 2, 4, 8) or int(ratio) > config.spatial_compression_ratio:
    raise errors.InputError(
      f"vae/config.json: temporal_compression_ratio = {ratio} must be a "
      "power of two, one halving per block at most."
    )
  config.temporal_compression_ratio = int(ratio)
  if odd := [c for c in blocks if c % config.norm_num_groups]:
    raise errors.InputError(
      f"vae/config.json: block_out_channels {odd} are no multiples of "
      f"norm_num_groups = {config.norm_num_groups}."
    )
  return config


def _resize(
  z: Float[Array, "b l y x c"], frames: int
) -> Float[Array, "b f y 1 x 1 c"]:
  """Repeats latents in time and makes room to broadcast them in space.

  The first latent stands for one frame where the number of frames is odd.
  """
  if frames > 1 and frames % 2:
    repeats = (frames - 1) // (z.shape[1] - 1)
    rest = jnp.repeat(z[:, 1:], repeats, axis=1)
    z = jnp.concatenate([z[:, :1], rest], axis=1)
  else:
    z = jnp.repeat(z, frames // z.shape[1], axis=1)
  return z[:, :, :, None, :, None]


class SpatialNorm(nn.Module):
  """Group norm whose scale and shift are read from the latents, in float32.

  Zheng et al., https://arxiv.org/abs/2209.09002, equation 3. The latents are
  projected while they are small: a 1x1x1 convolution and a nearest-neighbour
  resize may change places.
  """

  groups: int
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self, x: Float[Array, "b f h w c"], z: Float[Array, "b l y x k"]
  ) -> Float[Array, "b f h w c"]:
    project = lambda name: PointwiseConv3D(
      x.shape[-1], jnp.float32, self.param_dtype, name=name
    )
    scale = _resize(project("scale")(z), x.shape[1])
    shift = _resize(project("shift")(z), x.shape[1])
    norm = GroupNorm(self.groups, _EPS, self.param_dtype, name="norm")
    b, f, h, w, c = x.shape
    y, x = z.shape[2:4], norm(x)
    x = x.reshape(b, f, y[0], h // y[0], y[1], w // y[1], c)
    return (x * scale + shift).reshape(b, f, h, w, c)


class ResnetBlock(nn.Module):
  """Two norms, SiLUs and causal convolutions beside a shortcut.

  Norms are conditioned on latents `z` where they are given.
  """

  features: int
  groups: int
  eps: float
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b f h w i"],
    z: Float[Array, "b l y x k"] | None = None,
  ) -> Float[Array, "b f h w o"]:
    types = dict(dtype=self.dtype, param_dtype=self.param_dtype)

    def normalize(x: Array, name: str) -> Array:
      if z is None:
        norm = GroupNorm(self.groups, self.eps, self.param_dtype, name=name)
        return norm(x)
      return SpatialNorm(self.groups, self.param_dtype, name=name)(x, z)

    y = nn.silu(normalize(x, "norm1")).astype(self.dtype)
    y = CausalConv3D(self.features, **types, name="conv1")(y)
    y = nn.silu(normalize(y, "norm2")).astype(self.dtype)
    y = CausalConv3D(self.features, **types, name="conv2")(y)
    if x.shape[-1] != self.features:
      x = PointwiseConv3D(self.features, **types, name="shortcut")(x)
    return x + y


def _halve_time(x: Float[Array, "b f h w c"]) -> Float[Array, "b l h w c"]:
  """Averages pairs of frames; of an odd number the first stays alone."""
  alone = x.shape[1] % 2
  pairs = x[:, alone:].astype(jnp.float32)
  pairs = (pairs[:, ::2] + pairs[:, 1::2]) / 2
  return jnp.concatenate([x[:, :alone], pairs.astype(x.dtype)], axis=1)


def _double_time(x: Float[Array, "b l h w c"]) -> Float[Array, "b f h w c"]:
  """Repeats each frame; of an odd number the first stays alone."""
  alone = x.shape[1] % 2
  rest = jnp.repeat(x[:, alone:], 2, axis=1)
  return jnp.concatenate([x[:, :alone], rest], axis=1)


class Encoder(nn.Module):
  """Maps frames to the mean and log variance of their latents."""

  block_out_channels: tuple[int, ...]
  latent_channels: int
  layers_per_block: int
  time_levels: int
  groups: int
  eps: float
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  remat: bool = False

  def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b l y x m"]:
    ratio = 2 ** (len(self.block_out_channels) - 1)
    # Every level must divide over the devices: the coarsest decides.
    with sharding.frames(x.shape[0], x.shape[2] // ratio, x.shape[3] // ratio):
      return self._encode(x)

  @nn.compact
  def _encode(self, x):
    types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    block = nn.remat(ResnetBlock) if self.remat else ResnetBlock
    resnet = lambda width, name: block(
      width, self.groups, self.eps, **types, name=name
    )
    x = CausalConv3D(self.block_out_channels[0], **types, name="conv_in")(x)
    last = len(self.block_out_channels) - 1
    for i, width in enumerate(self.block_out_channels):
      for j in range(self.layers_per_block):
        x = resnet(width, f"down_{i}_resnet_{j}")(x)
      if i < min(self.time_levels, last):
        x = _halve_time(x)
      if i < last:
        x = DownsampleConv2D(width, **types, name=f"down_{i}_resize")(x)
    for j in range(2):
      x = resnet(width, f"mid_resnet_{j}")(x)
    x = GroupNorm(self.groups, _EPS, self.param_dtype, name="norm_out")(x)
    x = nn.silu(x).astype(self.dtype)
    x = CausalConv3D(2 * self.latent_channels, **types, name="conv_out")(x)
    return sharding.settle(x)


class Decoder(nn.Module):
  """Maps latents to frames."""

  block_out_channels: tuple[int, ...]
  out_channels: int
  layers_per_block: int
  time_levels: int
  groups: int
  eps: float
  dtype: DTypeLike = jnp.float32
  param_dtype: DTypeLike = jnp.float32
  remat: bool = False

  def __call__(self, z: Float[Array, "b l y x k"]) -> Float[Array, "b f h w c"]:
    with sharding.frames(z.shape[0], *z.shape[2:4]):
      return self._decode(z)

  @nn.compact
  def _decode(self, z):
    types = dict(dtype=self.dtype, param_dtype=self.param_dtype)
    block = nn.remat(ResnetBlock) if self.remat else ResnetBlock
    resnet = lambda width, name: block(
      width, self.groups, self.eps, **types, name=name
    )
    widths = self.block_out_channels[::-1]
    x = CausalConv3D(widths[0], **types, name="conv_in")(z)
    for j in range(2):
      x = resnet(widths[0], f"mid_resnet_{j}")(x, z)
    for i, width in enumerate(widths):
      for j in range(self.layers_per_block + 1):
        x = resnet(width, f"up_{i}_resnet_{j}")(x, z)
      if i < len(widths) - 1:
        x = UpsampleConv2D(width, **types, name=f"up_{i}_resize")(x)
        # Upstream repeats frames before it convolves each of them alone.
        x = _double_time(x) if i < self.time_levels else x
    x = SpatialNorm(self.groups, self.param_dtype, name="norm_out")(x, z)
    x = nn.silu(x).astype(self.dtype)
    x = CausalConv3D(self.out_channels, **types, name="conv_out")(x)
    return sharding.settle(x)


def _network(
  kind: type[Encoder] | type[Decoder],
  config: VaeConfig,
  channels: int,
  dtype: DTypeLike,
  param_dtype: DTypeLike,
  remat: bool,
) -> Encoder | Decoder:
  return kind(
    tuple(config.block_out_channels),
    channels,
    config.layers_per_block,
    config.temporal_compression_ratio.bit_length() - 1,
    config.norm_num_groups,
    config.norm_eps,
    dtype,
    param_dtype,
    remat,
  )


def encoder(
  config: VaeConfig,
  dtype: DTypeLike = jnp.float32,
  param_dtype: DTypeLike = jnp.float32,
  remat: bool = False,
) -> Encoder:
  """Returns the encoder of one chunk."""
  channels = config.latent_channels
  return _network(Encoder, config, channels, dtype, param_dtype, remat)


def decoder(
  config: VaeConfig,
  dtype: DTypeLike = jnp.float32,
  param_dtype: DTypeLike = jnp.float32,
  remat: bool = False,
) -> Decoder:
  """Returns the decoder of one chunk."""
  channels = config.out_channels
  return _network(Decoder, config, channels, dtype, param_dtype, remat)


def init(
  config: VaeConfig, key: Array, param_dtype: DTypeLike = jnp.float32
) -> PyTree:
  """Returns random parameters, `{"encoder": ..., "decoder": ...}`, boxed."""
  size = config.spatial_compression_ratio
  video = jnp.zeros((1, 1, size, size, config.in_channels))
  latents = jnp.zeros((1, 1, 1, 1, config.latent_channels))
  keys = jax.random.split(key)
  encode_init = encoder(config, param_dtype=param_dtype).init
  decode_init = decoder(config, param_dtype=param_dtype).init
  return {
    "encoder": encode_init(keys[0], video)["params"],
    "decoder": decode_init(keys[1], latents)["params"],
  }


def shapes(config: VaeConfig, param_dtype: DTypeLike = jnp.float32) -> PyTree:
  """Returns the shapes of the parameters, boxed with their logical axes."""
  run = lambda key: init(config, key, param_dtype)
  return jax.eval_shape(run, jax.random.key(0))


def encode(
  params: PyTree,
  config: VaeConfig,
  video: Float[Array, "b F H W c"],
  *,
  dtype: DTypeLike = jnp.float32,
  tiling: chunks.Tiling | None = None,
  slicing: bool = False,
  remat: bool = False,
) -> posterior.Posterior:
  """Encodes a video in [-1, 1]; the latents are not scaled yet.

  Args:
    params: `{"encoder": ...}`, unboxed.
    config: The architecture.
    video: Of 4k + 1 frames for 4 to 1 in time; others work, less well.
    dtype: What the network computes in. The posterior is float32.
    tiling: Encodes frames larger than a tile in tiles; call it outside of jit,
      which would compile every tile anew.
    slicing: Encodes one video of the batch after another.
    remat: Whether the backward pass computes each residual block again, instead
      of keeping what is within it.

  Raises:
    InputError: The video is too small, or the tiles do not fit together.
  """
  ratio = config.spatial_compression_ratio
  if min(video.shape[2:4]) < ratio or not video.shape[1]:
    raise errors.InputError(
      f"video: {video.shape[1]} frames of {video.shape[2]}x{video.shape[3]} "
      f"are too few to encode; give one frame of {ratio}x{ratio} or more."
    )
  network = encoder(config, dtype, remat=remat)
  run = chunks.Loop(network, params["encoder"], PIXEL_CHUNK, slicing)
  if tiling is None:
    moments = run(video)
  else:
    moments = chunks.over_tiles(run, video, tiling.encode_axes(ratio))
  return posterior.of_moments(moments)


def decode(
  params: PyTree,
  config: VaeConfig,
  latents: Float[Array, "b f h w c"],
  *,
  dtype: DTypeLike = jnp.float32,
  post: Callable[[Array], Array] = chunks.identity,
  tiling: chunks.Tiling | None = None,
  slicing: bool = False,
  remat: bool = False,
) -> Array:
  """Decodes latents, not scaled any more, to a video `b F H W c` in [-1, 1].

  An odd number f of latents gives 4 (f - 1) + 1 frames, an even one 4 f.

  Args:
    params: `{"decoder": ...}`, unboxed.
    config: The architecture.
    latents: What the posterior's mean or a sample of it looks like.
    dtype: What the network computes in.
    post: Applied to each chunk of frames (to each tile), for example to make
      bytes of them: the finished video alone then grows with the length. With
      `tiling` it must be one hashable function, not a new one each call.
    tiling: Decodes latents larger than a tile in tiles; call it outside of jit,
      which would compile every tile anew.
    slicing: Decodes one video of the batch after another.
    remat: As in `encode`.

  Raises:
    InputError: There are no latents, or the tiles do not fit together.
  """
  if 0 in latents.shape:
    raise errors.InputError(f"latents: nothing to decode in {latents.shape}.")
  network = decoder(config, dtype, remat=remat)
  run = chunks.Loop(network, params["decoder"], LATENT_CHUNK, slicing)
  if tiling is None:
    return run(latents, post)
  axes = tiling.decode_axes(config.spatial_compression_ratio)
  return chunks.over_tiles(run, latents, axes, post)
