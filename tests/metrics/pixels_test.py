"""PSNR and SSIM against scikit-image; flicker by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from skimage import metrics

from vidgen import errors
from vidgen.metrics import pixels

_psnr, _ssim = jax.jit(pixels.psnr), jax.jit(pixels.ssim)


def _videos(noise, seed=0, shape=(2, 3, 24, 31, 3)):
  """Smooth videos and the same with noise, float32 in [0, 1]."""
  rng = np.random.default_rng(seed)
  b, f, h, w, c = shape
  y, x = np.mgrid[:h, :w] / h
  speed = rng.uniform(1, 9, (b, f, 1, 1, c))
  clean = 0.5 + 0.45 * np.sin(speed * (x + 2 * y)[None, None, ..., None])
  dirty = clean + noise * rng.standard_normal(shape)
  return [np.float32(np.clip(v, 0, 1)) for v in (clean, dirty)]


@pytest.mark.parametrize("noise", [0.004, 0.1, 1.0])
def test_psnr_is_scikit_images(noise):
  x, y = _videos(noise)
  want = [
    metrics.peak_signal_noise_ratio(a, b, data_range=1)
    for a, b in zip(x, y, strict=True)
  ]
  got = _psnr(jnp.asarray(x), jnp.asarray(y))
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_psnr_by_hand():
  x = jnp.zeros((1, 2, 4, 4, 3))
  np.testing.assert_allclose(pixels.psnr(x, x + 0.1), [20.0], rtol=1e-5)
  np.testing.assert_allclose(pixels.psnr(x, x), [pixels.MAX_PSNR])


@pytest.mark.parametrize("noise", [0.004, 0.1, 1.0])
def test_ssim_is_scikit_images(noise):
  x, y = _videos(noise)
  run = lambda a, b: metrics.structural_similarity(
    np.float64(a),
    np.float64(b),
    data_range=1,
    channel_axis=-1,
    gaussian_weights=True,
    sigma=1.5,
    use_sample_covariance=False,
  )
  frames = lambda a, b: [run(*pair) for pair in zip(a, b, strict=True)]
  want = [np.mean(frames(a, b)) for a, b in zip(x, y, strict=True)]
  got = _ssim(jnp.asarray(x), jnp.asarray(y))
  np.testing.assert_allclose(got, want, atol=2e-6)


def test_ssim_of_flat_frames_is_that_of_their_brightness():
  a, b = 0.9, 0.91
  x, y = (jnp.full((1, 1, 11, 11, 3), v) for v in (a, b))
  want = (2 * a * b + 1e-4) / (a * a + b * b + 1e-4)
  np.testing.assert_allclose(_ssim(x, y), [want], atol=3e-5)
  np.testing.assert_allclose(_ssim(x, x), [1.0], rtol=1e-6)


def test_frames_smaller_than_a_window_are_an_error():
  x = jnp.zeros((1, 1, 10, 32, 3))
  with pytest.raises(errors.InputError, match="10x32 are smaller"):
    pixels.ssim(x, x)


def test_flicker_by_hand():
  levels = np.float32([[0, 10, 40], [255, 255, 255]]) / 255
  x = jnp.broadcast_to(levels[..., None, None, None], (2, 3, 4, 4, 3))
  np.testing.assert_allclose(pixels.flicker(x), [20.0, 0.0], rtol=1e-5)
  np.testing.assert_array_equal(pixels.flicker(x[:, :1]), [0.0, 0.0])
