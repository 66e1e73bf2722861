"""Metrics of one video alone: what changes from each frame to the next."""

import itertools
from typing import Any

import numpy as np
import scipy.ndimage
from jaxtyping import Bool, Float, UInt8

from vidgen import errors

# Below, no pyramid of patches fits the frame.
MIN_FLOW_SIZE = 16

# Ruder et al., section 3.3: where flow and flow back may differ.
_RELATIVE, _ABSOLUTE = 0.01, 0.5


def flicker(frames: UInt8[np.ndarray, "F H W 3"]) -> float:
  """Returns the mean absolute difference of adjacent frames, in grey levels.

  The metric of Yang et al., https://arxiv.org/abs/2408.06072, table 2; it is
  `pixels.flicker`, in float64.

  Raises:
    InputError: A single frame, which has no neighbour.
  """
  if len(frames) < 2:
    raise errors.InputError("has one frame, and adjacent ones are compared.")
  pairs = itertools.pairwise(frames)
  return float(np.mean([_mean_difference(a, b) for a, b in pairs]))


def temporal_flickering(frames: UInt8[np.ndarray, "F H W 3"]) -> float:
  """Returns VBench's temporal flickering: (255 - flicker) / 255; 1 is still.

  Huang et al., https://arxiv.org/abs/2311.17982, vbench/temporal_flickering.py.
  VBench asks for static scenes, and may leave out videos that move before it
  measures; nothing is left out here.

  Raises:
    InputError: A single frame.
  """
  return (255.0 - flicker(frames)) / 255.0


def _mean_difference(
  a: UInt8[np.ndarray, "H W 3"], b: UInt8[np.ndarray, "H W 3"]
) -> float:
  return float(np.mean(np.abs(a.astype(np.int16) - b)))


def need_opencv() -> Any:
  """Returns the module cv2, whose optical flow is used.

  Raises:
    InputError: It is not installed.
  """
  try:
    import cv2  # Optional: 60 MB for one metric.
  except ImportError as error:
    raise errors.InputError(
      "warp_error: its optical flow is OpenCV's; run `pip install "
      "opencv-python-headless`."
    ) from error
  return cv2


def warp_error(frames: UInt8[np.ndarray, "F H W 3"]) -> float:
  """Returns how far frames are from the next ones, moved back along the flow.

  The mean squared difference, over channels in [0, 1], of each frame and its
  successor warped onto it, over the pixels that both show; then the mean over
  pairs of frames: Lai et al., https://arxiv.org/abs/1808.00449, equation 7. The
  flow is DIS, Kroeger et al., https://arxiv.org/abs/1603.03590, OpenCV's preset
  "medium", not FlowNet2: compare with numbers that were got so only. A pixel
  counts as hidden where flow and flow back differ as Ruder et al.,
  https://arxiv.org/abs/1604.08610, say, or lead outside the frame.

  Raises:
    InputError: OpenCV is not installed; a single frame; frames that are too
      small; no pixel that two frames show.
  """
  cv2 = need_opencv()
  if len(frames) < 2:
    raise errors.InputError("has one frame, and adjacent ones are compared.")
  if min(frames.shape[1:3]) < MIN_FLOW_SIZE:
    raise errors.InputError(
      f"has frames of {frames.shape[1]}x{frames.shape[2]}, and optical flow "
      f"needs {MIN_FLOW_SIZE}x{MIN_FLOW_SIZE} pixels."
    )
  dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
  grey = [
    cv2.cvtColor(np.ascontiguousarray(f), cv2.COLOR_RGB2GRAY) for f in frames
  ]
  found = []
  for i in range(len(frames) - 1):
    forward = dis.calc(grey[i], grey[i + 1], None)
    back = dis.calc(grey[i + 1], grey[i], None)
    error, seen = warped_difference(frames[i], frames[i + 1], forward, back)
    if seen.any():
      found.append(np.mean(np.square(error[seen])))
  if not found:
    raise errors.InputError("has no pixel that two adjacent frames show.")
  return float(np.mean(found))


def warped_difference(
  frame: UInt8[np.ndarray, "H W 3"],
  following: UInt8[np.ndarray, "H W 3"],
  forward: Float[np.ndarray, "H W 2"],
  back: Float[np.ndarray, "H W 2"],
) -> tuple[Float[np.ndarray, "H W 3"], Bool[np.ndarray, "H W"]]:
  """Returns a frame minus its warped successor, and which pixels both show.

  Args:
    frame: A frame.
    following: The next.
    forward: Where each pixel of `frame` is in `following`: to the right and
      down, in pixels.
    back: The same from `following` to `frame`.
  """
  height, width, _ = frame.shape
  rows, columns = np.mgrid[:height, :width].astype(np.float64)
  at = np.stack([rows + forward[..., 1], columns + forward[..., 0]])
  inside = (at[0] >= 0) & (at[0] <= height - 1)
  inside &= (at[1] >= 0) & (at[1] <= width - 1)
  take = lambda image: np.stack(
    [
      scipy.ndimage.map_coordinates(
        channel.astype(np.float64), at, order=1, mode="nearest"
      )
      for channel in np.moveaxis(image, -1, 0)
    ],
    axis=-1,
  )
  back = take(back)
  square = lambda flow: np.sum(np.square(flow, dtype=np.float64), axis=-1)
  apart = square(forward + back)
  seen = apart < _RELATIVE * (square(forward) + square(back)) + _ABSOLUTE
  return (frame - take(following)) / 255.0, inside & seen
