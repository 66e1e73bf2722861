"""95 % intervals from the spread of the clips.

Those of means are bootstrapped: Efron 1979,
https://doi.org/10.1214/aos/1176344552. All draws come from one seed: the same
numbers give the same interval.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import scipy.stats
from jaxtyping import Float, Int, Num

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


def draws(n: int, resamples: int, seed: int) -> Iterator[Int[np.ndarray, " n"]]:
  """Yields `n` of `n` indices, with replacement, `resamples` times."""
  generator = np.random.default_rng(seed)
  for _ in range(resamples):
    yield generator.integers(0, n, n)


def halved(
  distance: Callable[[np.ndarray, np.ndarray], float],
  x: Num[np.ndarray, "n ..."],
  y: Num[np.ndarray, "m ..."],
  evaluations: int,
  seed: int,
  least: float = -np.inf,
) -> Estimate:
  """Returns the distance of two sets of features, and an interval around it.

  It is of the distance that sets of so many members have on the average, which
  for Fréchet's is larger than that of the distributions they are drawn from,
  and for the kernel's is the same.

  Both sets are halved at random, many times: Shao and Wu 1989,
  https://doi.org/10.1214/aos/1176347263. Where one half's mean,
  of features or of what a kernel maps them to, is off by e, the
  other's is by -e, so that half the difference of their distances has the
  variance L + 2Q, of what is linear and what is quadratic in e, and their mean
  Q. That of the distance itself is L + Q. Resamples of a bootstrap have
  L + 3Q: where both sets are of one distribution, L is 0, and they spread 1.7
  times too far.

  Args:
    distance: Of two sets, symmetric or not.
    x: One set: features, or what `distance` knows its members by.
    y: The other.
    evaluations: How often a distance of halves is computed.
    seed: Of the halves.
    least: No distance is smaller.
  """
  value = distance(x, y)
  splits = evaluations // 2
  # A half needs two members, and a variance two splits.
  if min(len(x), len(y)) < 2 * _FEWEST or splits < 2:
    return Estimate(value, None, None)
  generator, found = np.random.default_rng(seed), []
  for _ in range(splits):
    rows, others = (generator.permutation(len(side)) for side in (x, y))
    n, m = len(x) // 2, len(y) // 2
    one = distance(x[rows[:n]], y[others[:m]])
    other = distance(x[rows[n:]], y[others[m:]])
    found.append((one, other))
  first, second = np.array(found).T
  odd = np.mean(np.square(first - second)) / 4
  even = np.var((first + second) / 2, ddof=1)
  # L + Q is no less than half of L + 2Q.
  deviation = np.sqrt(max(odd - even, odd / 2))
  half = float(scipy.stats.t.ppf(_HIGH / 100, splits - 1) * deviation)
  return Estimate(value, max(value - half, least), value + half)
