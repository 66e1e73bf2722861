"""Metrics of pixels: PSNR, SSIM and flicker, one number per video."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vidgen import errors

MAX_PSNR = 100.0

# Wang et al., section III.C: a Gaussian of 1.5 pixels, cut to 11x11.
_SIGMA = 1.5
_RADIUS = 5
WINDOW = 2 * _RADIUS + 1
_C1, _C2 = 0.01**2, 0.03**2


def psnr(
  x: Float[Array, "b F H W 3"], y: Float[Array, "b F H W 3"]
) -> Float[Array, " b"]:
  """Peak signal-to-noise ratio in dB of videos in [0, 1].

  The squared error is averaged over the whole video before the logarithm. What
  is equal, or nearly so, has `MAX_PSNR`, so that means stay finite.
  """
  mse = jnp.mean(jnp.square(x - y), axis=(1, 2, 3, 4))
  return -10 * jnp.log10(jnp.maximum(mse, 10 ** (-MAX_PSNR / 10)))


def _blur(x: Float[Array, "*n H W c"]) -> Float[Array, "*n h w c"]:
  """Averages each window that lies within the frame."""
  offsets = np.arange(-_RADIUS, _RADIUS + 1)
  taps = np.exp(-0.5 * np.square(offsets / _SIGMA))
  for axis in (-3, -2):
    size = x.shape[axis] - WINDOW + 1
    at = lambda i, x=x, axis=axis, size=size: jnp.take(
      x, jnp.arange(i, i + size), axis=axis
    )
    x = sum(at(i) * float(tap) for i, tap in enumerate(taps / taps.sum()))
  return x


def ssim(
  x: Float[Array, "b F H W 3"], y: Float[Array, "b F H W 3"]
) -> Float[Array, " b"]:
  """Structural similarity of videos in [0, 1]; 1 is equal.

  Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861: Gaussian windows of
  11x11 pixels and sigma 1.5, population covariance, the mean over all windows
  that lie within the frame, over channels and frames. It is what scikit-image
  calls `structural_similarity(..., data_range=1, gaussian_weights=True,
  sigma=1.5, use_sample_covariance=False)`.

  Raises:
    InputError: A frame is smaller than a window.
  """
  if min(x.shape[2:4]) < WINDOW:
    raise errors.InputError(
      f"ssim: frames of {x.shape[2]}x{x.shape[3]} are smaller than its window; "
      f"give {WINDOW}x{WINDOW} pixels or more."
    )
  # Differences of squares lose fewer bits around zero.
  x, y = x - 0.5, y - 0.5
  mean_x, mean_y = _blur(x), _blur(y)
  variances = _blur(x * x + y * y) - mean_x**2 - mean_y**2
  covariance = _blur(x * y) - mean_x * mean_y
  mean_x, mean_y = mean_x + 0.5, mean_y + 0.5
  likeness = (2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)
  likeness /= (mean_x**2 + mean_y**2 + _C1) * (variances + _C2)
  return jnp.mean(likeness, axis=(1, 2, 3, 4))


def flicker(x: Float[Array, "b F H W 3"]) -> Float[Array, " b"]:
  """Mean absolute difference of adjacent frames, in units of 0 to 255.

  The metric of Yang et al., https://arxiv.org/abs/2408.06072, table 2, which
  does not state its unit. The video is in [0, 1]; one frame alone has 0.
  """
  if x.shape[1] == 1:
    return jnp.zeros(x.shape[0])
  return 255 * jnp.mean(jnp.abs(jnp.diff(x, axis=1)), axis=(1, 2, 3, 4))
