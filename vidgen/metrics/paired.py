"""PSNR, SSIM and LPIPS of two videos in bytes, one frame at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from vidgen import errors
from vidgen.metrics import lpips, pixels


def psnr(
  x: UInt8[np.ndarray, "F H W 3"], y: UInt8[np.ndarray, "f h w 3"]
) -> float:
  """Returns the peak signal-to-noise ratio in dB; the peak is 255.

  It is `pixels.psnr`, in float64: the squared error is averaged over the whole
  video, RGB, before the logarithm (averages of the frames' PSNR are larger).
  Equal videos have `pixels.MAX_PSNR`, 100, in place of infinity.

  Raises:
    InputError: They differ in frames or in size.
  """
  _check(x, y)
  pairs = zip(x, y, strict=True)
  # A difference of bytes fits 16 bits, its square does not.
  squares = [np.mean(np.square(a.astype(np.int32) - b)) for a, b in pairs]
  mse = float(np.mean(squares)) / 255**2
  least = 10 ** (-pixels.MAX_PSNR / 10)
  return float(-10 * np.log10(max(mse, least)))


def ssim(
  x: UInt8[np.ndarray, "F H W 3"], y: UInt8[np.ndarray, "f h w 3"]
) -> float:
  """Returns the mean structural similarity of the frames; see `pixels.ssim`.

  Raises:
    InputError: They differ in frames or in size, or are smaller than a window.
  """
  _check(x, y)
  # By frame, so that a long video takes no more memory than a short one.
  pairs = zip(x, y, strict=True)
  found = [float(_frame_ssim(_one(a)[None], _one(b)[None])) for a, b in pairs]
  return float(np.mean(found))


def lpips_measure(
  net: str, params: lpips.Params
) -> Callable[[np.ndarray, np.ndarray], float]:
  """Returns a function of two videos: the mean LPIPS of their frames.

  It raises InputError if they differ in frames or in size, or are too small.

  Args:
    net: One of `lpips.NETS`.
    params: From `lpips.load`.
  """
  run = jax.jit(lambda params, x, y: lpips.distance(params, net, x, y)[0])

  def measure(x: np.ndarray, y: np.ndarray) -> float:
    _check(x, y)
    pairs = zip(x, y, strict=True)
    found = [run(params, 2 * _one(a) - 1, 2 * _one(b) - 1) for a, b in pairs]
    return float(np.mean([float(f) for f in found]))

  return measure


@jax.jit
def _frame_ssim(
  x: Float[Array, "1 1 H W 3"], y: Float[Array, "1 1 H W 3"]
) -> Float[Array, ""]:
  return pixels.ssim(x, y)[0]


def _one(frame: UInt8[np.ndarray, "H W 3"]) -> Float[Array, "1 H W 3"]:
  return jnp.asarray(frame, jnp.float32)[None] / 255


def _check(x: Any, y: Any) -> None:
  if x.shape != y.shape:
    size = lambda v: f"{v.shape[0]} frames of {v.shape[1]}x{v.shape[2]}"
    raise errors.InputError(
      f"has {size(y)}, and its reference {size(x)}; make them alike."
    )
