"""Samplers, guidance and the denoising loop.

Every sampler here is linear in what it has at hand:

  x_next = a · x + b · x0 + c · x0_previous + d · noise,

with x0 the prediction. A sampler is therefore the table of its coefficients,
made on the host in float64, where limits such as zero signal are plain cases.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree, UInt32

from vidgen.diffusion import NoiseLevel, Schedule

# What a key is for: `fold_in(fold_in(seed, clip), purpose)`.
POSTERIOR, INITIAL, STEP, IMAGE = range(4)

# Rows of every table: another number of steps compiles nothing new.
_ROWS = 1000


class Coefficients(NamedTuple):
  """The factors of a step, one row a step; see the module."""

  x: Float[np.ndarray, " steps"]
  x0: Float[np.ndarray, " steps"]
  x0_previous: Float[np.ndarray, " steps"]
  noise: Float[np.ndarray, " steps"]


def euler(schedule: Schedule) -> Coefficients:
  """Follows the probability-flow ODE, holding the predicted x0 fixed.

  The step is DDIM where the process preserves variance (Song et al.,
  https://arxiv.org/abs/2010.02502, eq. 12 with eta = 0), EDM's Euler step where
  alpha is 1, and rectified flow's where alpha is 1 - sigma.
  """
  now, reached = schedule
  a = reached.sigma / now.sigma
  zero = np.zeros_like(a)
  return Coefficients(a, reached.alpha - a * now.alpha, zero, zero)


def dpmpp_2m_sde(schedule: Schedule) -> Coefficients:
  """DPM-Solver++(2M) of the reverse SDE, first order at both ends.

  Lu et al., https://arxiv.org/abs/2211.01095, in the form of diffusers'
  scheduling_dpm_cogvideox.py. With lambda = log(alpha / sigma) and h its
  growth, exp(-2h) is `ratio`²; lambda is -inf at zero signal and h is inf at
  zero noise, which the cases below take to their limits.
  """
  now, reached = schedule
  with np.errstate(divide="ignore"):
    snr = np.log(now.alpha) - np.log(now.sigma)
    snr_reached = np.log(reached.alpha) - np.log(reached.sigma)
  ratio = now.alpha * reached.sigma / (now.sigma * reached.alpha)
  a = reached.sigma / now.sigma * ratio
  b = reached.alpha * (1 - ratio**2)
  d = reached.sigma * np.sqrt(1 - ratio**2)

  second = np.zeros_like(a)  # 1 / 2r: h over twice the step before.
  second_order = np.isfinite(snr_reached)
  second_order[0] = False
  i = np.flatnonzero(second_order)
  second[i] = (snr_reached[i] - snr[i]) / (2 * (snr[i] - snr[i - 1]))
  return Coefficients(a, b * (1 + second), -b * second, d)


SAMPLERS: dict[str, Callable[[Schedule], Coefficients]] = {
  "ddim": euler,
  "euler": euler,
  "dpmpp_2m_sde": dpmpp_2m_sde,
}


class Table(NamedTuple):
  """What each step needs, in float32; rows past the last step are unused."""

  level: NoiseLevel
  coefficients: Coefficients
  guidance: Float[Array, " rows *_frames"]


def table(
  schedule: Schedule,
  coefficients: Coefficients,
  guidance: Float[np.ndarray, " steps *_frames"],
) -> Table:
  """Gathers the rows of a run, padded to a length of its own.

  Args:
    schedule: The levels.
    coefficients: Of the sampler.
    guidance: The scale of each step, or of each frame in it.
  """
  rows = max(_ROWS, len(schedule))

  def pad(x: np.ndarray) -> Array:
    rest = [(0, rows - len(x))] + [(0, 0)] * (x.ndim - 1)
    return jnp.asarray(np.pad(x, rest), jnp.float32)

  return jax.tree.map(pad, Table(schedule.now, coefficients, guidance))


class State(NamedTuple):
  """What a step hands to the next; float32.

  Attributes:
    x: The noisy sample.
    x0: The prediction of the step before.
  """

  x: Float[Array, " b *shape"]
  x0: Float[Array, " b *shape"]


def init(x: Float[Array, " b *shape"]) -> State:
  """Returns the state before the first step."""
  return State(x, jnp.zeros_like(x))


def keys(
  seeds: int | UInt32[np.ndarray, " b"],
  clips: UInt32[np.ndarray, " b"],
  purpose: int,
) -> Key[Array, " b"]:
  """Returns a key for each clip, of nothing but its own seed and id."""
  seeds = np.broadcast_to(np.asarray(seeds, np.uint32), clips.shape)
  fold = lambda seed, clip: jax.random.fold_in(
    jax.random.fold_in(jax.random.key(seed), clip), purpose
  )
  return jax.vmap(fold)(jnp.asarray(seeds), jnp.asarray(clips))


def normal(
  keys: Key[Array, " b"], shape: tuple[int, ...]
) -> Float[Array, " b *shape"]:
  """Draws unit-variance noise of `shape` for each key, in float32."""
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def step_noise(
  keys: Key[Array, " b"], step: Int[Array, ""], shape: tuple[int, ...]
) -> Float[Array, " b *shape"]:
  """Draws the noise that `step` adds."""
  return normal(
    jax.vmap(lambda key: jax.random.fold_in(key, step))(keys), shape
  )


Denoise = Callable[[Array, NoiseLevel, PyTree], Array]


def guided(
  denoise: Denoise, condition: PyTree, unconditional: PyTree | None
) -> Callable[[Array, NoiseLevel, Array], Array]:
  """Returns a denoiser with classifier-free guidance.

  x0 = x0_u + scale · (x0_c - x0_u): Ho and Salimans,
  https://arxiv.org/abs/2207.12598. Prediction of v, eps or x0 alike, since x0
  is linear in each.

  Args:
    denoise: `(x, level, condition) -> x0`.
    condition: Leaves with a leading batch axis.
    unconditional: The same tree for the unconditional branch; None leaves
      guidance out.
  """
  if unconditional is None:
    return lambda x, level, scale: denoise(x, level, condition)
  both = jax.tree.map(
    lambda u, c: jnp.concatenate([u, c]), unconditional, condition
  )

  def apply(x, level, scale):
    x0 = denoise(jnp.concatenate([x, x]), level, both)
    x0_u, x0_c = jnp.split(x0, 2)
    if jnp.ndim(scale):
      # One for each frame, which are the second axis.
      scale = scale.reshape(-1, *[1] * (x.ndim - 2))
    return x0_u + scale * (x0_c - x0_u)

  return apply


def run(
  denoise: Callable[[Array, NoiseLevel, Array], Array],
  state: State,
  table: Table,
  keys: Key[Array, " b"],
  start: int | Int[Array, ""],
  stop: int | Int[Array, ""],
  *,
  stochastic: bool,
) -> State:
  """Takes the steps from `start` to `stop`.

  The bounds are values, not shapes: one compiled loop serves a whole run as
  well as a step at a time, with equal bits.

  Args:
    denoise: `(x, level, guidance scale) -> x0`; the scale is a number, or one
      for each frame.
    state: Where to start.
    table: What each step needs.
    keys: The clips' keys for the noise of steps.
    start: First step.
    stop: One past the last step.
    stochastic: Whether steps add noise; where they do not, none is drawn.
  """

  def step(i, state: State) -> State:
    row = jax.tree.map(lambda column: column[i], table)
    x0 = denoise(state.x, row.level, row.guidance).astype(jnp.float32)
    c = row.coefficients
    x = c.x * state.x + c.x0 * x0 + c.x0_previous * state.x0
    if stochastic:
      x = x + c.noise * step_noise(keys, i, x.shape[1:])
    return State(x, x0)

  return jax.lax.fori_loop(start, stop, step, state)
