"""Frames between frames, by a model that is given both ends of a clip."""

from typing import Any

import numpy as np
from jaxtyping import UInt8

from vidgen import arguments, errors, video
from vidgen.models import base
from vidgen.pipeline import Pipeline

# The frames that a clip of such a model is given.
_ENDS = (0, -1)


def interpolate(
  pipeline: Pipeline,
  frames: Any,
  passes: int = 1,
  *,
  fps: float,
  seed: int = 0,
  batch_size: int = 8,
  **options: Any,
) -> tuple[UInt8[np.ndarray, "F H W 3"], float]:
  """Returns a video with frames made between its own, and its new rate.

  Each pass has k frames for every pair of neighbours, k - 1 being by how much
  the rate rises: 4 for a model of 5 frames. The frames that are there stay.
  Blattmann et al., https://arxiv.org/abs/2311.15127, section 4.4.

  Args:
    pipeline: Of a model that is given both ends of a clip.
    frames: The video: a path or an array `F H W 3`, at least two frames.
    passes: How often it is done; each works on what the last one made.
    fps: The video's frames a second.
    seed: With a pair's number and the pass it decides the noise.
    batch_size: Pairs at a time.
    **options: Of `Pipeline.sample`.

  Raises:
    InputError: The model is another one, or the video too short.
  """
  given = pipeline.model.training.image_frames
  if given != _ENDS:
    raise errors.InputError(
      "video: this checkpoint makes no frames between two; use one that is "
      "given both ends of a clip."
    )
  if passes < 1:
    raise errors.InputError(f"passes: {passes} is less than 1.")
  (read,) = arguments.videos(frames, 1, None)
  if len(read) < 2:
    raise errors.InputError("video: needs two frames or more.")
  known = np.stack([_bytes(frame) for frame in read])
  request = base.Request(num_frames=options.get("num_frames"), image=True)
  rise = pipeline.model.plan(request).num_frames - 1
  for number in range(passes):
    # The model is told the rate of what it makes, as in training.
    fps *= rise
    made = _between(
      pipeline, known, seed + number, batch_size, options | {"fps": fps}
    )
    # The last frame of a clip is the first one of the next.
    made[:, 0], made[:, -1] = known[:-1], known[1:]
    known = np.concatenate([*made[:, :-1], known[-1:]])
  return known, fps


def _between(pipeline, known, seed, batch_size, options):
  """A clip for each pair of neighbours, `pairs k H W 3`."""
  height, width = known.shape[1:3]
  options = {"height": height, "width": width, **options}
  parts = []
  for start in range(0, len(known) - 1, batch_size):
    ends = range(start, min(start + batch_size, len(known) - 1))
    images = [known[i + j] for i in ends for j in (0, 1)]
    parts.append(
      pipeline.sample(image=images, seed=seed, clips=list(ends), **options)
    )
  return np.concatenate(parts)


def _bytes(frame: Any) -> UInt8[np.ndarray, "H W 3"]:
  return np.asarray(video.read_image(frame))
