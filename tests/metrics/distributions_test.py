"""Fréchet's distance against scipy, the kernel's against its definition."""

import numpy as np
import pytest
import scipy.linalg

from vidgen import errors
from vidgen.metrics import distributions, intervals


def _sets(n, m, d, seed=0):
  rng = np.random.default_rng(seed)
  mix = rng.normal(size=(d, d))
  x = rng.normal(size=(n, d)) @ mix
  y = 0.3 + rng.normal(size=(m, d)) @ (mix + 0.2 * rng.normal(size=(d, d)))
  return x, y


@pytest.mark.parametrize("n, m", [(200, 150), (60, 60), (12, 200), (9, 7)])
def test_frechet_is_scipys(n, m):
  x, y = _sets(n, m, 20)
  s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
  # The covariance of fewer members than features has no stable root.
  root = scipy.linalg.sqrtm(s @ t + 0j).real
  shift = np.sum((x.mean(0) - y.mean(0)) ** 2)
  want = shift + np.trace(s) + np.trace(t) - 2 * np.trace(root)
  rtol = 1e-9 if min(n, m) > 20 else 1e-5
  got = distributions.frechet(x, y)
  np.testing.assert_allclose(got, want, rtol=rtol)


def test_frechet_of_a_set_with_itself_is_zero():
  x, _ = _sets(300, 10, 40)
  assert distributions.frechet(x, x) < 1e-9
  x = x.astype(np.float32)
  assert distributions.frechet(x, x[::-1].copy()) < 1e-9


def test_frechet_of_known_normals():
  # In one dimension it is (difference of means)^2 + (of deviations)^2.
  x = np.array([-1.0, 1.0])[:, None] / np.sqrt(2)
  got = distributions.frechet(x, 3 * x + 5)
  np.testing.assert_allclose(got, 5**2 + (3 - 1) ** 2, rtol=1e-12)


def _mmd_by_pairs(x, y):
  k = lambda a, b: (a @ b / len(a) + 1) ** 3
  within = lambda s: np.mean(
    [k(a, b) for i, a in enumerate(s) for j, b in enumerate(s) if i != j]
  )
  return within(x) + within(y) - 2 * np.mean([k(a, b) for a in x for b in y])


def test_kernel_is_its_definition_pair_by_pair():
  x, y = _sets(7, 9, 5)
  got = distributions.kernel(x, y)
  np.testing.assert_allclose(got.value, _mmd_by_pairs(x, y), rtol=1e-10)
  assert got.low < got.value < got.high


def test_kernel_is_unbiased_where_frechet_is_not():
  rng = np.random.default_rng(1)
  pairs = [rng.normal(size=(2, 16, 24)) for _ in range(200)]
  values = [distributions.kernel(x, y, resamples=0).value for x, y in pairs]
  error = np.std(values) / np.sqrt(len(values))
  assert abs(np.mean(values)) < 4 * error
  assert distributions.frechet(*pairs[0]) > 10


def test_frechets_interval_is_seeded_and_holds_the_value():
  x, y = _sets(30, 30, 6)
  a, b, c = (
    distributions.frechet_estimate(x, y, resamples=50, seed=seed)
    for seed in (0, 0, 1)
  )
  assert a == b
  assert a != c
  assert 0 <= a.low < a.value == c.value < a.high


def _shares(n, d, shift, want, sets=200, kernel=False):
  """How often the interval holds what it is of, and `want`; its width."""
  rng = np.random.default_rng(0)
  draw = lambda: (rng.normal(size=(n, d)), shift + rng.normal(size=(n, d)))
  estimate, distance = distributions.frechet_estimate, distributions.frechet
  if kernel:
    estimate = distributions.kernel
    distance = lambda *sets: estimate(*sets, resamples=0).value
  made = [estimate(*draw(), resamples=40) for _ in range(sets)]
  more = [distance(*draw()) for _ in range(1000)]
  low, high = np.array([(one.low, one.high) for one in made]).T
  share = lambda value: np.mean((low <= value) & (value <= high))
  return share(np.mean(more)), share(want), np.mean(high - low) / np.std(more)


def test_frechets_interval_holds_a_known_distance_as_often_as_it_says():
  # Of normals whose means are apart; two numbers of 400 have hardly a bias.
  share, of_endless, width = _shares(400, 2, 0.3, 2 * 0.3**2)
  assert 0.9 < share < 0.985 and 0.9 < of_endless < 0.985
  assert 3.6 < width < 4.4
  # Of equal ones, and of fewer than there are numbers.
  for n, d in ((60, 6), (20, 30)):
    share, _, width = _shares(n, d, 0.0, 0.0)
    assert 0.9 < share < 0.985
    assert width < 5


@pytest.mark.parametrize("n, d, shift", [(100, 4, 0.5), (60, 6, 0.0)])
def test_kernels_interval_holds_its_mean_as_often_as_it_says(n, d, shift):
  share, _, width = _shares(n, d, shift, 0.0, kernel=True)
  assert 0.9 < share < 0.985
  assert 3.5 < width < 5


def test_sets_of_one_are_an_error():
  x, y = _sets(1, 5, 3)
  with pytest.raises(errors.InputError, match="2 clips or more"):
    distributions.frechet(x, y)
  with pytest.raises(errors.InputError, match="not 5 and 1"):
    distributions.kernel(y, x)


def test_interval_of_a_mean_is_that_of_theory():
  values = np.random.default_rng(0).normal(5, 2, 400)
  got = intervals.mean(values, resamples=2000)
  deviation = values.std(ddof=1) / np.sqrt(400)
  want = values.mean() + 1.96 * deviation * np.array([-1, 1])
  np.testing.assert_allclose([got.low, got.high], want, atol=0.03)
  assert got == intervals.mean(values, resamples=2000)


def test_one_clip_has_no_interval():
  assert intervals.mean(np.array([3.0])) == (3.0, None, None)
