"""PSNR and SSIM of bytes against scikit-image, LPIPS against its own module."""

import jax.numpy as jnp
import numpy as np
import pytest
import skimage.metrics

from vidgen import errors
from vidgen.metrics import lpips, paired, pixels


def _pair(seed=0, count=3, size=(32, 40)):
  rng = np.random.default_rng(seed)
  x = rng.integers(0, 256, (count, *size, 3), dtype=np.uint8)
  noise = rng.normal(0, 20, x.shape)
  return x, np.clip(x + noise, 0, 255).astype(np.uint8)


def test_psnr_is_scikit_images():
  x, y = _pair()
  want = skimage.metrics.peak_signal_noise_ratio(x, y, data_range=255)
  np.testing.assert_allclose(paired.psnr(x, y), want, rtol=1e-12)
  # Not the mean over frames, where they differ.
  y[0] = x[0]
  want = skimage.metrics.peak_signal_noise_ratio(x, y, data_range=255)
  np.testing.assert_allclose(paired.psnr(x, y), want, rtol=1e-12)
  to_unit = lambda v: jnp.asarray(v, jnp.float32)[None] / 255
  want = pixels.psnr(to_unit(x), to_unit(y))[0]
  np.testing.assert_allclose(paired.psnr(x, y), want, rtol=1e-6)


def test_ssim_is_scikit_images():
  x, y = _pair()
  want = [
    skimage.metrics.structural_similarity(
      a,
      b,
      data_range=255,
      channel_axis=-1,
      gaussian_weights=True,
      sigma=1.5,
      use_sample_covariance=False,
    )
    for a, b in zip(x, y, strict=True)
  ]
  np.testing.assert_allclose(paired.ssim(x, y), np.mean(want), atol=2e-6)


def test_lpips_is_that_of_videos(tmp_path):
  params = lpips.load("alexnet", tmp_path)
  x, y = _pair(count=2)
  to_unit = lambda v: jnp.asarray(v, jnp.float32)[None] / 255
  want = lpips.videos(params, "alexnet", to_unit(x), to_unit(y))[0]
  measure = paired.lpips_measure("alexnet", params)
  np.testing.assert_allclose(measure(x, y), want, rtol=1e-4)
  assert measure(x, x) < 1e-9


def test_equal_videos():
  x, _ = _pair()
  assert paired.psnr(x, x) == 100
  assert paired.ssim(x, x) == pytest.approx(1, abs=1e-6)


def test_black_and_white_are_as_far_as_can_be():
  black = np.zeros((2, 11, 11, 3), np.uint8)
  white = np.full_like(black, 255)
  assert paired.psnr(black, white) == paired.psnr(white, black) == 0


def test_videos_that_differ_in_size_are_an_error():
  x, _ = _pair()
  for y in (x[:2], x[:, :30]):
    for metric in (paired.psnr, paired.ssim):
      with pytest.raises(errors.InputError, match="its reference 3 frames"):
        metric(x, y)
