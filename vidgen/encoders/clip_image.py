"""What CLIP sees of an image in Stable Video Diffusion.

The arithmetic is that of `_resize_with_antialiasing` in diffusers'
pipeline_stable_video_diffusion.py: a Gaussian blur, then PyTorch's bicubic
interpolation with aligned corners. No image library does the same.
"""

import numpy as np
from jaxtyping import Float, Shaped

from vidgen import errors

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
# PyTorch's; most others take -0.5.
_CUBIC = -0.75


def preprocess(
  image: Shaped[np.ndarray, "h w 3"], size: int = 224
) -> Float[np.ndarray, "size size 3"]:
  """Returns the pixels that CLIP's vision tower takes; float32.

  The whole image is resized, its aspect is not kept.

  Args:
    image: Bytes, or floats in [0, 1].
    size: Height and width of the result.

  Raises:
    InputError: A side of a single pixel.
  """
  if image.dtype == np.uint8:
    pixels = image.astype(np.float32) / np.float32(255)
  else:
    pixels = image.astype(np.float32)
  pixels = (resize_antialiased(pixels * 2 - 1, (size, size)) + 1) / 2
  mean, std = np.array(_MEAN, np.float32), np.array(_STD, np.float32)
  return (pixels - mean) / std


def resize_antialiased(
  image: Float[np.ndarray, "h w c"], size: tuple[int, int]
) -> Float[np.ndarray, "y x c"]:
  """Blurs and resizes an image, a float32 one, to `size`, height first.

  Both steps are linear in each axis, and so are one matrix for each axis.

  Raises:
    InputError: A side of a single pixel, beyond which nothing can be mirrored.
  """
  h, w, c = image.shape
  if min(h, w) < 2:
    raise errors.InputError(
      f"image: {w}x{h} pixels are too few; both sides need at least 2."
    )
  rows, columns = _matrix(h, size[0]), _matrix(w, size[1])
  image = image.astype(np.float32)
  y = (rows @ image.reshape(h, w * c)).reshape(size[0], w, c)
  return np.einsum("xw,ywc->yxc", columns, y, optimize=True)


def _matrix(length: int, size: int) -> Float[np.ndarray, "size length"]:
  """Returns how much each pixel of an axis is of each pixel of the result."""
  blur, reach = _gaussian(length / size)
  taps, at = _cubic(length, size)
  # The blur of what each tap reads; beyond the edges the image is mirrored.
  near = at[:, :, None] + np.arange(-reach, reach + 1)
  near = np.abs(near)
  near = np.where(near >= length, 2 * (length - 1) - near, near)
  weight = taps[:, :, None] * blur
  matrix = np.zeros((size, length))
  rows = np.broadcast_to(np.arange(size)[:, None, None], near.shape)
  np.add.at(matrix, (rows, near), weight)
  return matrix.astype(np.float32)


def _gaussian(factor: float) -> tuple[Float[np.ndarray, " k"], int]:
  """Returns the blur before resizing by 1 / factor, and its reach."""
  sigma = max((factor - 1) / 2, 0.001)
  reach = int(max(4 * sigma, 3)) // 2
  x = np.arange(-reach, reach + 1, dtype=np.float64)
  kernel = np.exp(-(x**2) / (2 * sigma**2))
  return kernel / kernel.sum(), reach


def _cubic(
  length: int, size: int
) -> tuple[Float[np.ndarray, "size 4"], np.ndarray]:
  """Returns the four weights of each pixel of the result, and where they read.

  Keys, https://doi.org/10.1109/TASSP.1981.1163711. Positions are float32, as
  PyTorch has them: in a large image their rounding shows.
  """
  scale = np.float32(length - 1) / np.float32(max(size - 1, 1))
  where = scale * np.arange(size, dtype=np.float32)
  start = np.minimum(np.floor(where), length - 1)
  t = np.clip((where - start).astype(np.float64), 0, 1)[:, None]
  a = _CUBIC
  distance = np.abs(t - np.arange(-1, 3))
  inner = ((a + 2) * distance - (a + 3)) * distance**2 + 1
  outer = a * (((distance - 5) * distance + 8) * distance - 4)
  taps = np.where(distance <= 1, inner, outer)
  at = start.astype(np.int64)[:, None] + np.arange(-1, 3)
  return taps, np.clip(at, 0, length - 1)
