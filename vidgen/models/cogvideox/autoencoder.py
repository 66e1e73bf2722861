"""The autoencoder as its training takes it."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Key, PyTree

from vidgen import errors
from vidgen.models.cogvideox import vae

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
  ) -> vae.Posterior:
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


def _drop_past(x: Array) -> Array:
  # Only causal convolutions have three taps in time.
  causal = x.ndim == 5 and x.shape[0] == 3
  return x.at[:2].set(0) if causal else x
