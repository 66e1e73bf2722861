"""Noise levels, schedules and what a network predicts.

One process, x = alpha · x0 + sigma · eps, serves every family. Schedules are
made on the host in float64; a network sees them in float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

ArrayLike = jax.Array | np.ndarray | np.floating


class NoiseLevel(NamedTuple):
  """How much of a sample is signal, and how much is noise.

  Each is a number, or, in training, an array with one for each sample.

  Attributes:
    alpha: Factor of the clean sample.
    sigma: Standard deviation of the noise.
    timestep: What the network is told of the level.
  """

  alpha: ArrayLike
  sigma: ArrayLike
  timestep: ArrayLike


class Schedule(NamedTuple):
  """The levels that a sampler visits.

  Attributes:
    now: The level at which each step predicts.
    next: The level that each step reaches. It need not be the next step's
      `now`: where the number of steps does not divide the trained levels,
      published samplers leave a gap.
  """

  now: NoiseLevel
  next: NoiseLevel

  def __len__(self) -> int:
    return len(self.now.alpha)

  def tail(self, steps: int) -> "Schedule":
    """Returns the last `steps` steps."""
    cut = lambda level: NoiseLevel(*(x[len(x) - steps :] for x in level))
    return Schedule(cut(self.now), cut(self.next))


def zero_terminal_snr(
  *,
  levels: int = 1000,
  beta_start: float = 0.00085,
  beta_end: float = 0.012,
  snr_shift: float = 1.0,
) -> Float[np.ndarray, " levels"]:
  """Returns alpha² of the trained levels; the last is exactly 0.

  Betas are linear in their square roots; the signal-to-noise ratio is shifted,
  then rescaled to end at zero: Lin et al., https://arxiv.org/abs/2305.08891,
  algorithm 1, and diffusers' scheduling_ddim_cogvideox.py.
  """
  betas = np.linspace(beta_start**0.5, beta_end**0.5, levels) ** 2
  alpha2 = np.cumprod(1 - betas)
  alpha2 = alpha2 / (snr_shift + (1 - snr_shift) * alpha2)
  alpha = np.sqrt(alpha2)
  first, last = alpha[0], alpha[-1]
  return ((alpha - last) * first / (first - last)) ** 2


def trained(alpha2: Float[np.ndarray, " levels"]) -> NoiseLevel:
  """Returns all the trained levels, clean ones first, in float64."""
  timestep = np.arange(len(alpha2), dtype=np.float64)
  return NoiseLevel(np.sqrt(alpha2), np.sqrt(1 - alpha2), timestep)


def trailing(alpha2: Float[np.ndarray, " levels"], num_steps: int) -> Schedule:
  """Returns `num_steps` evenly spaced levels that start at the last one.

  Lin et al., https://arxiv.org/abs/2305.08891, section 3.3. As in diffusers, a
  step reaches the level `levels // num_steps` below its own, and the clean
  sample below level 0.

  Args:
    alpha2: alpha² of the trained levels.
    num_steps: Steps, at most as many as levels.
  """
  levels = len(alpha2)
  timestep = np.round(np.arange(levels, 0, -levels / num_steps)) - 1
  timestep = timestep.astype(np.int64)[:num_steps]
  reached = timestep - levels // num_steps
  at = lambda t: np.where(t >= 0, alpha2[np.maximum(t, 0)], 1.0)
  level = lambda t: NoiseLevel(
    np.sqrt(at(t)), np.sqrt(1 - at(t)), t.astype(np.float64)
  )
  return Schedule(level(timestep), level(reached))


def edm_level(sigma: ArrayLike) -> NoiseLevel:
  """Returns the level that EDM calls `sigma`, variance preserved.

  EDM's sample x0 + sigma · eps, times its c_in = 1 / sqrt(1 + sigma²), is
  alpha · x0 + sigma' · eps with alpha² + sigma'² = 1. What EDM with unit data
  variance then asks of a network is v, and networks are told ln(sigma) / 4:
  Karras et al., https://arxiv.org/abs/2206.00364, table 1.

  Args:
    sigma: One or several, of numpy or jax; 0 is the clean sample, of which no
      network is told.
  """
  xp = jnp if isinstance(sigma, jax.Array) else np
  norm = xp.sqrt(1 + xp.square(sigma))
  with np.errstate(divide="ignore"):
    return NoiseLevel(1 / norm, sigma / norm, xp.log(sigma) / 4)


def karras(
  sigma_min: float, sigma_max: float, num_steps: int, rho: float = 7.0
) -> Schedule:
  """Returns levels from `sigma_max` to `sigma_min`, then the clean sample.

  Karras et al., https://arxiv.org/abs/2206.00364, equation 5: evenly spaced in
  sigma^(1 / rho).

  Args:
    sigma_min: EDM's, of the last step.
    sigma_max: EDM's, of the first step.
    num_steps: Steps.
    rho: How much denser low noise is.
  """
  first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
  sigma = np.linspace(first, last, num_steps) ** rho
  return Schedule(edm_level(sigma), edm_level(np.append(sigma[1:], 0.0)))


def x0_from_v(
  x: Float[Array, "*shape"], v: Float[Array, "*shape"], level: NoiseLevel
) -> Float[Array, "*shape"]:
  """x0 = alpha · x - sigma · v, where alpha² + sigma² = 1.

  Salimans and Ho, https://arxiv.org/abs/2202.00512, appendix D.
  """
  return _each(level.alpha, x) * x - _each(level.sigma, x) * v


def v_from_x0_noise(
  x0: Float[Array, "*shape"],
  noise: Float[Array, "*shape"],
  level: NoiseLevel,
) -> Float[Array, "*shape"]:
  """v = alpha · noise - sigma · x0, where alpha² + sigma² = 1.

  Salimans and Ho, https://arxiv.org/abs/2202.00512, appendix D. The plain mean
  of squared errors of v is the "SNR + 1" weighting of section 4 there.
  """
  return _each(level.alpha, x0) * noise - _each(level.sigma, x0) * x0


def add_noise(
  x0: Float[Array, "*shape"],
  noise: Float[Array, "*shape"],
  level: NoiseLevel,
) -> Float[Array, "*shape"]:
  """x = alpha · x0 + sigma · noise."""
  return _each(level.alpha, x0) * x0 + _each(level.sigma, x0) * noise


def _each(factor, x):
  """Returns a factor of each sample with the rank of `x`; a number as it is."""
  if np.ndim(factor) == 0:
    return factor
  return factor.reshape(factor.shape + (1,) * (x.ndim - factor.ndim))
