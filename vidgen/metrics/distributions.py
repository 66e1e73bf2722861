"""Distances between two sets of features: Fréchet's, and a kernel's.

With the features of `i3d`, FVD and the kernel video distance; with those of an
image network, FID and KID. All in float64.
"""

import numpy as np
from jaxtyping import Float

from vidgen import errors
from vidgen.metrics import intervals

# FVD's authors and most who report it take so many; with fewer, it grows.
ENOUGH = 2048

# Each takes the singular values of a matrix as wide as the features.
RESAMPLES = 100


def frechet(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> float:
  """Returns the Fréchet distance of the normal distributions of two sets.

  |mean x - mean y|^2 + tr(Sx + Sy - 2 (Sx Sy)^(1/2)): Dowson and Landau,
  https://doi.org/10.1016/0047-259X(82)90077-X, as Heusel et al.,
  https://arxiv.org/abs/1706.08500, equation 6. Covariances are unbiased.

  With Sx = A'A and Sy = B'B, the trace of the root is the sum of the singular
  values of AB', which needs no root of a matrix that is nearly singular.

  Raises:
    InputError: A set has less than two members.
  """
  _check(x, y)
  a, b = _factor(x), _factor(y)
  shift = np.sum(np.square(x.mean(0, np.float64) - y.mean(0, np.float64)))
  roots = np.linalg.svd(a @ b.T, compute_uv=False)
  spread = np.sum(a * a) + np.sum(b * b) - 2 * np.sum(roots)
  # Rounding can make a zero negative.
  return float(max(shift + spread, 0.0))


def frechet_estimate(
  x: Float[np.ndarray, "n d"],
  y: Float[np.ndarray, "m d"],
  resamples: int = RESAMPLES,
  seed: int = 0,
) -> intervals.Estimate:
  """Returns the Fréchet distance and its interval; see `intervals.halved`.

  Raises:
    InputError: A set has less than two members.
  """
  return intervals.halved(frechet, x, y, resamples, seed, least=0.0)


def kernel(
  x: Float[np.ndarray, "n d"],
  y: Float[np.ndarray, "m d"],
  resamples: int = RESAMPLES,
  seed: int = 0,
) -> intervals.Estimate:
  """Returns the squared maximum mean discrepancy of two sets, unbiased.

  Gretton et al. 2012, lemma 6, with the polynomial kernel (x.y / d + 1)^3 of
  Bińkowski et al., https://arxiv.org/abs/1801.01401, section 4: KID's, of all
  members at once. It does not depend on n, so that it serves small sets, and
  may fall below zero. The interval is that of `intervals.halved`.

  Raises:
    InputError: A set has less than two members.
  """
  _check(x, y)
  x, y = x.astype(np.float64), y.astype(np.float64)
  gram = lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3
  xx, yy, xy = gram(x, x), gram(y, y), gram(x, y)

  def distance(rows: np.ndarray, others: np.ndarray) -> float:
    return _mmd(
      xx[np.ix_(rows, rows)],
      yy[np.ix_(others, others)],
      xy[np.ix_(rows, others)],
    )

  members = np.arange(len(x)), np.arange(len(y))
  return intervals.halved(distance, *members, resamples, seed)


def _mmd(
  xx: Float[np.ndarray, "n n"],
  yy: Float[np.ndarray, "m m"],
  xy: Float[np.ndarray, "n m"],
) -> float:
  """Returns the discrepancy; pairs of a member with itself are left out."""
  n, m = xy.shape
  within = (np.sum(xx) - np.trace(xx)) / (n * (n - 1))
  within += (np.sum(yy) - np.trace(yy)) / (m * (m - 1))
  return float(within - 2 * np.mean(xy))


def _factor(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "k d"]:
  """Returns A, of no more rows than columns, where A'A is the covariance."""
  centred = x.astype(np.float64) - x.mean(0, np.float64)
  centred /= np.sqrt(len(x) - 1)
  return np.linalg.qr(centred, "r") if len(x) > x.shape[1] else centred


def _check(x: np.ndarray, y: np.ndarray) -> None:
  if min(len(x), len(y)) < 2:
    raise errors.InputError(
      f"a distance between distributions needs 2 clips or more of each set, "
      f"not {len(x)} and {len(y)}."
    )
