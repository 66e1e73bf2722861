"""The autoencoder as its training takes it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, PyTree

from vidgen import errors
from vidgen.models.svd import vae
from vidgen.nn import posterior

_PAST_TAPS = ("random", "zeros")
# Of the decoder's layers over time, parts of whose paths these are.
_OVER_TIME = ("temporal", "blend", "time_out")


@dataclasses.dataclass
class Autoencoder:
  """The family's autoencoder, on latents that are not scaled.

  Attributes:
    config: The architecture.
    dtype: What the networks compute in.
    init_past_taps: Either will do: layers over time start by giving what they
      are given.
    remat: Whether the backward pass computes each residual block again.
  """

  config: vae.VaeConfig
  dtype: DTypeLike = jnp.float32
  init_past_taps: str = "random"
  remat: bool = False

  # The path of the decoder's last kernel in the parameters.
  last_kernel: tuple[str, ...] = ("decoder", "conv_out", "kernel")

  def __post_init__(self):
    if self.init_past_taps not in _PAST_TAPS:
      raise errors.InputError(
        f"init_past_taps: {self.init_past_taps!r} is none of "
        f"{', '.join(_PAST_TAPS)}."
      )
    if self.config.temporal:
      self.last_kernel = ("decoder", "time_out", "kernel")

  def init(self, key: Key[Array, ""]) -> PyTree:
    """Returns random parameters, boxed with logical axes."""
    return vae.init(self.config, key)

  def drop_past(self, tree: PyTree) -> PyTree:
    """Returns gradients with zeros for layers over time."""

    def drop(path, x):
      over_time = any(part.key in _OVER_TIME for part in path)
      return jnp.zeros_like(x) if over_time else x

    return jax.tree_util.tree_map_with_path(drop, tree)

  def encode(
    self, params: PyTree, video: Float[Array, "b F H W 3"]
  ) -> posterior.Posterior:
    """Returns the posterior of a video in [-1, 1]."""
    return vae.encode(
      params, self.config, video, dtype=self.dtype, remat=self.remat
    )

  def decode(
    self, params: PyTree, latents: Float[Array, "b f h w c"]
  ) -> Float[Array, "b F H W 3"]:
    """Returns the video, float32, nominally in [-1, 1]."""
    video = vae.decode(
      params, self.config, latents, dtype=self.dtype, remat=self.remat
    )
    return video.astype(jnp.float32)

  def normalise(
    self,
    params: PyTree,
    mean: Float[np.ndarray, " c"],
    basis: Float[np.ndarray, "c c"],
  ) -> PyTree:
    """Returns parameters whose latents times `basis`, plus `mean`, were theirs.

    The encoder's are exactly that; for the variances see `posterior.affine`.
    The decoder undoes it, but, where its first convolution has a border of
    zeros, they mean the mean now.

    Args:
      params: The parameters, unboxed.
      mean: Of each channel of the latents.
      basis: What each of the new channels was in the old ones.
    """
    params = jax.tree.map(np.asarray, params)
    flat = traverse_util.flatten_dict(params)
    out = ("encoder", "quant")
    scale, shift = posterior.affine(mean, basis)
    flat[*out, "kernel"] = flat[*out, "kernel"] @ scale
    flat[*out, "bias"] = flat[*out, "bias"] @ scale + shift
    first = ("decoder", "conv_in" if self.config.temporal else "post_quant")
    kernel = flat[*first, "kernel"]
    flat[*first, "bias"] = flat[*first, "bias"] + mean @ kernel.sum(axis=(0, 1))
    flat[*first, "kernel"] = basis @ kernel
    return jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(flat))
