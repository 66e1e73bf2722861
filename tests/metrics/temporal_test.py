"""Metrics of one video, against VBench's arithmetic and known motion."""

import itertools
import sys

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from vidgen import errors
from vidgen.metrics import pixels, temporal


def _noise(seed=0, count=5, size=(32, 40)):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (count, *size, 3), dtype=np.uint8)


def _texture(shape, seed=0):
  """A smooth random image."""
  rng = np.random.default_rng(seed)
  image = scipy.ndimage.gaussian_filter(rng.normal(size=(*shape, 3)), (3, 3, 0))
  image -= image.min()
  return (255 * image / image.max()).astype(np.uint8)


def test_temporal_flickering_is_vbenchs():
  video = _noise()
  pairs = [
    np.mean(cv2.absdiff(a.astype(np.float32), b.astype(np.float32)))
    for a, b in itertools.pairwise(video)
  ]
  want = (255.0 - np.mean(np.array(pairs)).item()) / 255.0
  got = temporal.temporal_flickering(video)
  np.testing.assert_allclose(got, want, rtol=1e-6)
  assert 0.6 < got < 0.7  # A third of the range is the mean for noise.


def test_flicker_is_that_of_pixels():
  video = _noise(1)
  want = pixels.flicker(jnp.asarray(video, jnp.float32)[None] / 255)[0]
  np.testing.assert_allclose(temporal.flicker(video), want, rtol=1e-6)


def test_a_still_video_does_not_flicker():
  video = np.repeat(_noise(count=1), 3, axis=0)
  assert temporal.flicker(video) == 0
  assert temporal.temporal_flickering(video) == 1
  assert temporal.warp_error(video) == 0


def test_one_frame_is_an_error():
  for metric in (temporal.flicker, temporal.warp_error):
    with pytest.raises(errors.InputError, match="has one frame"):
      metric(_noise(count=1))


def test_warp_error_forgives_motion_but_not_flicker():
  image = _texture((80, 120))
  moving = np.stack([image[8:72, 4 + 3 * i : 68 + 3 * i] for i in range(6)])
  flickering = (
    moving.astype(int) + 12 * np.array([-1, 1] * 3)[:, None, None, None]
  )
  flickering = np.clip(flickering, 0, 255).astype(np.uint8)
  plain = np.mean(np.square(np.diff(moving / 255.0, axis=0)))
  calm, restless = map(temporal.warp_error, (moving, flickering))
  assert calm < 0.05 * plain
  # Frames that differ by 24 of 255 everywhere, but for what is clipped.
  np.testing.assert_allclose(restless, (24 / 255) ** 2, rtol=0.2)


def test_a_known_flow_leaves_no_difference():
  image = _texture((40, 50))
  frame, following = image[:, 3:43], image[:, :40]
  # What is at x in the first is at x + 3 in the second.
  forward = np.zeros((40, 40, 2), np.float32)
  forward[..., 0] = 3
  error, seen = temporal.warped_difference(frame, following, forward, -forward)
  assert not seen[:, 37:].any() and seen[:, :37].all()
  assert np.abs(error[seen]).max() == 0
  # Where the flow back says otherwise, a pixel is hidden.
  back = -forward
  back[10:20] = 3
  _, seen = temporal.warped_difference(frame, following, forward, back)
  assert not seen[10:20].any() and seen[:10, :37].all()


def test_half_a_pixel_is_interpolated():
  frame = np.zeros((4, 6, 3), np.uint8)
  following = np.broadcast_to(
    20 * np.arange(6, dtype=np.uint8)[None, :, None], (4, 6, 3)
  )
  forward = np.zeros((4, 6, 2), np.float32)
  forward[..., 0] = 0.5
  error, seen = temporal.warped_difference(frame, following, forward, -forward)
  want = -(20 * np.arange(5) + 10) / 255
  np.testing.assert_allclose(error[0, :5, 1], want, rtol=1e-12)
  assert seen[:, :5].all() and not seen[:, 5].any()


def test_small_frames_are_an_error():
  with pytest.raises(errors.InputError, match="frames of 15x40"):
    temporal.warp_error(_noise(size=(15, 40)))
  assert temporal.warp_error(_noise(size=(16, 16))) > 0


def test_without_opencv_it_is_one_line(monkeypatch):
  monkeypatch.setitem(sys.modules, "cv2", None)
  with pytest.raises(errors.InputError, match="pip install opencv-python"):
    temporal.warp_error(_noise())
