"""95 % intervals by bootstrap: Efron 1979, https://doi.org/10.1214/aos/1176344552.

All draws come from one seed: the same numbers give the same interval.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

_LOW, _HIGH = 2.5, 97.5

# Fewer numbers than this say nothing about how far they spread.
_FEWEST = 2


class Estimate(NamedTuple):
  """A number and its 95 % interval; the interval is None for one clip."""

  value: float
  low: float | None
  high: float | None


def mean(
  values: Float[np.ndarray, " n"], resamples: int = 1000, seed: int = 0
) -> Estimate:
  """Returns the mean over clips, and the percentile interval of it."""
  value = float(np.mean(values))
  if len(values) < _FEWEST:
    return Estimate(value, None, None)
  drawn = [
    np.mean(values[rows]) for rows in draws(len(values), resamples, seed)
  ]
  low, high = np.percentile(drawn, [_LOW, _HIGH])
  return Estimate(value, float(low), float(high))


def centred(
  value: float, drawn: Float[np.ndarray, " r"], least: float = -np.inf
) -> Estimate:
  """Returns an interval around `value` as wide as that of resamples.

  A resample holds some clips twice, which raises a distance between
  distributions: only the spread of the resamples counts, not their mean.

  Args:
    value: The distance of all clips.
    drawn: The distances of the resamples.
    least: No distance is smaller.
  """
  spread = np.percentile(drawn, [_LOW, _HIGH]) - np.mean(drawn)
  low, high = np.maximum(value + spread, least)
  return Estimate(value, float(low), float(high))


def two_sets(
  n: int, m: int, resamples: int, seed: int
) -> Iterator[tuple[Int[np.ndarray, " n"], Int[np.ndarray, " m"]]]:
  """Yields resamples of two sets, which are drawn apart."""
  first, second = draws(n, resamples, seed), draws(m, resamples, seed + 1)
  yield from zip(first, second, strict=True)


def draws(n: int, resamples: int, seed: int) -> Iterator[Int[np.ndarray, " n"]]:
  """Yields `n` of `n` indices, with replacement, `resamples` times."""
  generator = np.random.default_rng(seed)
  for _ in range(resamples):
    yield generator.integers(0, n, n)


def over(
  distance: Callable[[np.ndarray, np.ndarray], float],
  x: Float[np.ndarray, "n ..."],
  y: Float[np.ndarray, "m ..."],
  resamples: int,
  seed: int,
  least: float = -np.inf,
) -> Estimate:
  """Returns the distance of two sets of features and its interval."""
  value = distance(x, y)
  if min(len(x), len(y)) < _FEWEST or not resamples:
    return Estimate(value, None, None)
  sets = two_sets(len(x), len(y), resamples, seed)
  drawn = np.array([distance(x[rows], y[others]) for rows, others in sets])
  return centred(value, drawn, least)
