import resource
import struct
import zlib

import numpy as np
import pytest

from tests.data.conftest import encode, make_frames
from vidgen import errors, video
from vidgen.data import codec, moving_shapes


def noisy(count, height, width, seed=0):
  shape = (count, height, width, 3)
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("size", [(64, 64), (33, 47)])
def test_what_is_encoded_keeps_its_bits(size):
  frames = noisy(5, *size)
  data = codec.encode(frames, 8)
  got = codec.read(data, np.arange(5), "x")
  np.testing.assert_array_equal(got, frames)
  assert codec.check(data, "x") == codec.Facts(5, *size, 8.0)
  assert codec.encode(frames, 8) == data


@pytest.mark.parametrize(
  "name, container, pix_fmt",
  [
    ("libx264", "mp4", "yuv420p"),
    ("libx264", "matroska", "yuv444p"),
    ("libvpx-vp9", "webm", "yuv420p"),
    ("mpeg4", "avi", "yuv420p"),
    ("mjpeg", "mov", "yuvj420p"),
    ("libx264", "mpegts", "yuv420p"),
    ("gif", "gif", "rgb8"),
  ],
)
def test_frames_are_those_of_read_video(tmp_path, name, container, pix_fmt):
  frames = make_frames(90)
  data = encode(frames, name, container, pix_fmt, fps=10, g="12")
  (tmp_path / "a").write_bytes(data)
  want = video.read_video(tmp_path / "a")
  facts = codec.check(data, "x")
  assert facts[:3] == (90, 32, 48)
  assert facts.fps == pytest.approx(10, rel=1e-3)
  np.testing.assert_array_equal(np.stack(list(codec.frames(data, "x"))), want)
  # From the start, from a key frame, frames apart, frames twice.
  for indices in ([0, 1, 2], [50, 51, 58], [70, 70, 71], [89]):
    got = codec.read(data, np.array(indices), "x")
    np.testing.assert_array_equal(got, want[indices])


def test_a_late_window_is_decoded_from_its_key_frame():
  data = encode(make_frames(90), g="12")
  assert codec._read_from_key(data, np.array([60, 61]), "x") is not None
  # The only key frame is the first: nothing to gain.
  data = encode(make_frames(90, step=1), g="250")
  assert codec._read_from_key(data, np.array([60, 61]), "x") is None


def test_a_turned_video_is_turned():
  frames = make_frames(3)
  data = encode(frames, rotation=90)
  assert codec.check(data, "x")[:3] == (3, 48, 32)
  assert codec.read(data, np.arange(3), "x").shape == (3, 48, 32, 3)


def test_too_few_frames():
  data = codec.encode(make_frames(4), 8)
  with pytest.raises(errors.InputError, match="4 frames decode, not 6"):
    codec.read(data, np.array([3, 5]), "x")


@pytest.mark.parametrize(
  "name, container",
  [("libx264", "mp4"), ("mpeg4", "avi"), ("libx264", "matroska")],
)
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_a_video_cut_short_is_refused(name, container, share):
  data = encode(noisy(20, 32, 48), name, container)
  assert codec.check(data, "x").num_frames == 20
  with pytest.raises(errors.InputError, match=r"^x: ") as error:
    codec.check(data[: int(share * len(data))], "x")
  assert "\n" not in str(error.value)


def test_a_damaged_video_is_refused():
  data = bytearray(encode(noisy(20, 32, 48), "mpeg4", "mp4"))
  middle = len(data) // 2
  data[middle : middle + 300] = np.random.default_rng(0).bytes(300)
  with pytest.raises(errors.InputError, match=r"damaged|cannot be read"):
    codec.check(bytes(data), "x")


@pytest.mark.parametrize(
  "data",
  [
    b"",
    b"a text, which FFmpeg would paint as a terminal does\n" * 50,
    np.random.default_rng(1).bytes(5000),
    b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    b"ffconcat version 1.0\nfile a.mp4\n",
  ],
  ids=["empty", "text", "garbage", "playlist", "concat"],
)
def test_what_is_no_video_is_refused(data):
  with pytest.raises(errors.InputError, match=r"^x: "):
    codec.check(data, "x")


def huge_png():
  def chunk(kind, data):
    crc = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + crc

  header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
  content = zlib.compress(bytes(100_000))
  return (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", header)
    + chunk(b"IDAT", content)
    + chunk(b"IEND", b"")
  )


@pytest.mark.parametrize(
  "data",
  [b"YUV4MPEG2 W60000 H60000 F25:1\nFRAME\n" + bytes(1000), huge_png()],
  ids=["y4m", "png"],
)
def test_a_huge_header_takes_no_memory(data):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  with pytest.raises(errors.InputError, match=r"^x: "):
    codec.check(data, "x")
  after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  assert after - before < 200_000  # Kibibytes; a frame has 10 million.


def test_cover_keeps_bits_and_crops_the_middle():
  frames = noisy(2, 32, 48)
  assert codec.cover(frames, 32, 48) is frames
  # Columns of one colour each: what is left of them is the middle.
  columns = np.zeros((1, 20, 60, 3), np.uint8)
  columns[:, :, :20], columns[:, :, 20:40], columns[:, :, 40:] = 10, 100, 200
  np.testing.assert_array_equal(
    codec.cover(columns, 20, 20), columns[:, :, 20:40]
  )
  assert codec.cover(columns, 40, 40).shape == (1, 40, 40, 3)
  middle = codec.cover(columns, 40, 40)[:, :, 4:-4]
  assert (middle == 100).all()
  assert codec.cover(columns, 30, 7).shape == (1, 30, 7, 3)


def test_moving_shapes_keep_their_bits():
  rng = np.random.default_rng(0)
  for two in (False, True):
    frames = moving_shapes.render(moving_shapes.draw_scene(rng, two=two))
    data = codec.encode(frames, 8)
    np.testing.assert_array_equal(codec.read(data, np.arange(17), "x"), frames)
