import tempfile

import av
import numpy as np
import pytest

from vidgen import prepare


@pytest.fixture(scope="session")
def shapes_dir(tmp_path_factory):
  """A data_dir with 60 clips of moving shapes."""
  folder = tmp_path_factory.mktemp("shapes")
  prepare.run(prepare.PrepareConfig("moving_shapes", str(folder), num_clips=60))
  return str(folder)


def make_frames(count=10, height=32, width=48, step=8):
  """Grey frames whose level counts them, with a bright corner."""
  frames = np.zeros((count, height, width, 3), np.uint8)
  frames += (step * np.arange(count) % 200).astype(np.uint8)[
    :, None, None, None
  ]
  frames[:, : height // 4, : width // 4] = [230, 220, 210]
  return frames


def encode(
  frames,
  codec="libx264",
  container="mp4",
  pix_fmt="yuv420p",
  fps=8,
  rotation=0,
  **options,
):
  """The bytes of a video in the codec."""
  # An mp4 is written again to have its index first: that needs a file.
  flags = {"movflags": "+faststart"} if container == "mp4" else {}
  with (
    tempfile.NamedTemporaryFile() as target,
    av.open(target.name, "w", container, options=flags) as file,
  ):
    stream = file.add_stream(codec, rate=fps)
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt, stream.options = pix_fmt, options
    stream.codec_context.thread_count = 1
    if rotation:
      stream.set_display_rotation(rotation)
    for pixels in frames:
      file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
    file.mux(stream.encode())
    file.close()
    return target.read()
