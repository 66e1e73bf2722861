"""The normal distribution over latents that an autoencoder's encoder gives.

Kingma and Welling, https://arxiv.org/abs/1312.6114; diffusers'
DiagonalGaussianDistribution.
"""

from typing import NamedTuple

import jax.numpy as jnp
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
