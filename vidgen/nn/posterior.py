"""The normal distribution over latents that an autoencoder's encoder gives.

Kingma and Welling, https://arxiv.org/abs/1312.6114; diffusers'
DiagonalGaussianDistribution.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Posterior(NamedTuple):
  """A normal distribution over latents; `logvar` is within [-30, 20]."""

  mean: Float[Array, "b f h w c"]
  logvar: Float[Array, "b f h w c"]


def of_moments(moments: Float[Array, "b f h w m"]) -> Posterior:
  """Returns what a network's last channels stand for, in float32."""
  mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
  return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))


def sample(
  posterior: Posterior, noise: Float[Array, "b f h w c"]
) -> Float[Array, "b f h w c"]:
  """Returns the latents that standard normal `noise` stands for."""
  return posterior.mean + jnp.exp(posterior.logvar / 2) * noise


def kl(posterior: Posterior) -> Float[Array, " b"]:
  """Divergence from the standard normal, in nats per video."""
  mean, logvar = posterior
  terms = jnp.square(mean) + jnp.exp(logvar) - 1 - logvar
  return terms.sum(axis=(1, 2, 3, 4)) / 2


def affine(
  mean: Float[np.ndarray, " c"], basis: Float[np.ndarray, "c c"]
) -> tuple[Float[np.ndarray, "m m"], Float[np.ndarray, " m"]]:
  """Returns `scale` and `shift` of moments for latents in another basis.

  `moments @ scale + shift` are those of `(latents - mean) @ inv(basis)`. A
  variance there is a sum of variances here, whose logarithms are averaged by
  their shares: exact where a basis scales alone, or where variances are equal.
  """
  change = np.linalg.inv(basis)
  sums = np.square(change).sum(axis=0)
  zeros = np.zeros_like(change)
  scale = np.block([[change, zeros], [zeros, np.square(change) / sums]])
  return scale, np.concatenate([-mean @ change, np.log(sums)])
