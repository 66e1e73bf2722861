"""Frames between frames, with a stub in the place of a model."""

import types

import numpy as np
import pytest

from vidgen import errors, interpolation, loading
from vidgen.models import base


class Blend:
  """Makes five frames evenly between two, and says what it was asked for."""

  def __init__(self, given=(0, -1)):
    training = base.Training(image_frames=given)
    plan = lambda request: types.SimpleNamespace(num_frames=5)
    self.model = types.SimpleNamespace(training=training, plan=plan)
    self.calls = []

  def sample(self, image, **options):
    self.calls.append(options)
    ends = np.stack(image).reshape(-1, 2, *image[0].shape).astype(float)
    weight = np.linspace(0, 1, 5).reshape(1, 5, 1, 1, 1)
    made = (1 - weight) * ends[:, :1] + weight * ends[:, 1:]
    # What a model makes of the given frames is near them, not equal.
    made[:, [0, -1]] += 1
    return made.round().astype(np.uint8)


def ramp(frames):
  video = np.zeros((frames, 4, 6, 3), np.uint8)
  return video + 64 * np.arange(frames, dtype=np.uint8)[:, None, None, None]


def interpolate(pipeline, *args, **kwargs):
  # The annotation asks for a Pipeline, which a stub is not.
  return interpolation.interpolate.__wrapped__(pipeline, *args, **kwargs)


@pytest.mark.parametrize(("passes", "step"), [(1, 16), (2, 4)])
def test_each_pass_has_four_times_the_rate(passes, step):
  pipeline = Blend()
  made, fps = interpolate(pipeline, ramp(3), passes, fps=2.0)
  np.testing.assert_array_equal(made[:, 0, 0, 0], np.arange(0, 129, step))
  assert made.shape[1:] == (4, 6, 3) and fps == 2.0 * 4**passes
  # The rate that a model is told is that of what it makes.
  told = [call["fps"] for call in pipeline.calls]
  assert told == [2.0 * 4 ** (i + 1) for i in range(passes)]


def test_pairs_in_batches_are_pairs_at_once():
  several, one = Blend(), Blend()
  want, _ = interpolate(several, ramp(4), fps=2.0, height=8, width=8)
  got, _ = interpolate(one, ramp(4), fps=2.0, batch_size=1)
  np.testing.assert_array_equal(got, want)
  assert [call["clips"] for call in one.calls] == [[0], [1], [2]]
  assert several.calls[0]["height"] == 8


@pytest.mark.parametrize(
  ("pipeline", "frames", "passes", "match"),
  [
    (Blend((0,)), 3, 1, "no frames between two"),
    (Blend(), 1, 1, "two frames or more"),
    (Blend(), 3, 0, "passes: 0"),
  ],
)
def test_what_cannot_be(pipeline, frames, passes, match):
  with pytest.raises(errors.InputError, match=match):
    interpolate(pipeline, ramp(frames), passes, fps=2.0)


def test_weights_of_loras():
  assert loading._loras(None) == {}
  assert loading._loras("a.safetensors") == {"a.safetensors": 1.0}
  both = {"zoom.safetensors": 0.5, "pan.safetensors": -1.0}
  assert loading._loras(both) == both
  with pytest.raises(errors.InputError, match="has the weight nan"):
    loading._loras({"zoom.safetensors": float("nan")})
