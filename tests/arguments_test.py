"""What callers may write, and one line for what they may not."""

import numpy as np
import pytest

from vidgen import arguments, errors, sharding, video

WRONG = {
  "prompt": lambda: arguments.prompts(5, ""),
  "prompt 2": lambda: arguments.prompts(["a", 5], ""),
  "prompt 3": lambda: arguments.prompts(None, ""),
  "negative_prompt": lambda: arguments.prompts("a", 5),
  "height": lambda: arguments.whole("height", 64.0),
  "num_frames": lambda: arguments.whole("num_frames", "9"),
  "num_steps": lambda: arguments.whole("num_steps", True),
  "guidance_scale": lambda: arguments.number("guidance_scale", "6"),
  "strength": lambda: arguments.number("strength", [0.5]),
  "sampler": lambda: arguments.request({}, None, ["ddim"], None, None, {}),
  "seed": lambda: arguments.seeds(1.5, 1),
  "seed 2": lambda: arguments.seeds(None, 2),
  "seed 3": lambda: arguments.seeds(2**32, 1),
  "seed 4": lambda: arguments.seeds([0, 1], 3),
  "seed 5": lambda: arguments.seeds([0, -1], 2),
  "clips": lambda: arguments.clips([1.7], 1),
  "clips 2": lambda: arguments.clips("a", 1),
  "clips 3": lambda: arguments.clips([-1], 1),
  "tiling": lambda: arguments.flags(tiling="no"),
  "latents": lambda: arguments.latents("x", (1,)),
  "video": lambda: arguments.videos(object(), 1, None),
  "video 2": lambda: arguments.videos(np.zeros((1, 1001, 2, 2, 3)), 1, None),
  "image": lambda: video.fit(object(), 8, 8),
  "mesh": lambda: sharding.make_mesh([2]),
  "mesh 2": lambda: sharding.make_mesh({"data": 1.9}),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_one_line(name):
  with pytest.raises(errors.InputError) as raised:
    WRONG[name]()
  assert str(raised.value).startswith(name.split()[0])
  assert "\n" not in str(raised.value)


def test_numbers_of_numpy_are_numbers():
  assert arguments.whole("n", np.int64(3)) == 3
  assert arguments.whole("n", None) is None
  assert arguments.number("n", np.float32(0.5)) == 0.5
  assert arguments.number("n", 6) == 6.0
  assert arguments.seeds(np.uint8(3), 2).tolist() == [3, 3]
  assert arguments.seeds(np.array(3), 2).tolist() == [3, 3]
  assert arguments.seeds(np.array([3, 4]), 2).tolist() == [3, 4]
  assert arguments.seeds((2**32 - 1, 0), 2).tolist() == [2**32 - 1, 0]


def test_one_video_serves_all_and_is_cut():
  frames = np.arange(12, dtype=np.uint8).reshape(3, 1, 2, 2)
  frames = np.repeat(frames[..., None, :1], 3, axis=-1).reshape(3, 1, 2, 3)
  read = arguments.videos(frames, 2, 2)
  assert len(read) == 2 and read[0].shape == (2, 1, 2, 3)
  assert len(arguments.videos([frames, frames], 2, None)) == 2
  assert len(arguments.videos(list(frames), 1, None)[0]) == 3
