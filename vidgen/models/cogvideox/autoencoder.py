"""The autoencoder as its training takes it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, PyTree

from vidgen import errors
from vidgen.models.cogvideox import vae
from vidgen.nn import posterior

_PAST_TAPS = ("random", "zeros")


@dataclasses.dataclass
class Autoencoder:
  """CogVideoX's autoencoder, on latents that are not scaled.

  Attributes:
    config: The architecture.
    dtype: What the networks compute in.
    init_past_taps: "zeros" starts the causal convolutions with weights for the
      present frame only. Images then train what a video starts from.
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

  def init(self, key: Key[Array, ""]) -> PyTree:
    """Returns random parameters, boxed with logical axes."""
    params = vae.init(self.config, key)
    return self.drop_past(params) if self.init_past_taps == "zeros" else params

  def drop_past(self, tree: PyTree) -> PyTree:
    """Returns `tree`, like the parameters, with zeros for past frames."""
    return jax.tree.map(_drop_past, tree)

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
    The decoder undoes it, but for the border of its first convolution, which is
    padded with zeros that mean the mean now.

    Args:
      params: The parameters, unboxed.
      mean: Of each channel of the latents.
      basis: What each of the new channels was in the old ones.
    """
    params = jax.tree.map(np.asarray, params)
    flat = traverse_util.flatten_dict(params)
    out = ("encoder", "conv_out")
    scale, shift = posterior.affine(mean, basis)
    flat[*out, "kernel"] = flat[*out, "kernel"] @ scale
    flat[*out, "bias"] = flat[*out, "bias"] @ scale + shift
    # What reads latents: the decoder's first layer, and its norms.
    readers = ("conv_in", "scale", "shift")
    for path in {p[:-1] for p in flat if p[0] == "decoder"}:
      if path[-1] not in readers or (*path, "bias") not in flat:
        continue
      kernel = flat[*path, "kernel"]
      taps = kernel.sum(axis=(0, 1, 2))
      flat[*path, "bias"] = flat[*path, "bias"] + mean @ taps
      flat[*path, "kernel"] = basis @ kernel
    return jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(flat))


def _drop_past(x: Array) -> Array:
  # Only causal convolutions have three taps in time.
  causal = x.ndim == 5 and x.shape[0] == 3
  return x.at[:2].set(0) if causal else x
