import errno
import io
import os
import subprocess

import av
import diffusers.video_processor
import numpy as np
import PIL.Image
import pytest

from vidgen import errors, video


def make_frames(count=5, height=32, width=48):
  """Bands of three colours, brighter from frame to frame."""
  frames = np.zeros((count, height, width, 3), np.uint8)
  frames[:, :, : width // 3] = [200, 30, 40]
  frames[:, :, width // 3 : 2 * width // 3] = [20, 190, 60]
  frames[:, :, 2 * width // 3 :] = [30, 60, 210]
  return frames + 5 * np.arange(count, dtype=np.uint8)[:, None, None, None]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_mp4_plays_back_the_same_colours(tmp_path, count):
  frames = make_frames(count)
  path = tmp_path / "a.mp4"
  video.write_mp4(path, frames, 8)
  got = video.read_video(path)
  assert got.shape == frames.shape
  # Chroma has half the resolution: leave out the edges of the bands.
  inner = [4, 8, 12, 20, 24, 28, 36, 40, 44]
  difference = got[:, :, inner].astype(int) - frames[:, :, inner]
  assert np.abs(difference).max() <= 4
  assert os.listdir(tmp_path) == ["a.mp4"]


def test_mp4_is_h264_at_the_rate_and_reproducible(tmp_path):
  for name in ("a.mp4", "b.mp4"):
    video.write_mp4(tmp_path / name, make_frames(), 7.5)
  assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
  # x264 notes its settings in the file; more threads change the bytes.
  assert b" threads=1 " in (tmp_path / "a.mp4").read_bytes()
  with av.open(str(tmp_path / "a.mp4")) as file:
    stream = file.streams.video[0]
    assert stream.codec_context.name == "h264"
    assert stream.pix_fmt == "yuv420p"
    assert stream.average_rate == 7.5
    assert float(stream.duration * stream.time_base) == pytest.approx(5 / 7.5)


def test_mp4_refuses_odd_sizes_and_no_frames(tmp_path):
  with pytest.raises(errors.InputError, match="33x48"):
    video.write_mp4(tmp_path / "a.mp4", make_frames(height=33), 8)
  with pytest.raises(errors.InputError, match="at least one"):
    video.write_mp4(tmp_path / "a.mp4", make_frames(count=0), 8)
  assert not os.listdir(tmp_path)


def test_gif_loops_and_keeps_time(tmp_path):
  video.write_gif(tmp_path / "a.gif", make_frames(9), 8)
  with PIL.Image.open(tmp_path / "a.gif") as image:
    assert image.info["loop"] == 0
    assert image.n_frames == 9
    total = 0
    for i in range(image.n_frames):
      image.seek(i)
      total += image.info["duration"]
  # 9 frames at 8 fps are 1.125 s; GIF counts hundredths.
  assert total == 1120
  got = video.read_video(tmp_path / "a.gif")
  assert np.abs(got[0].astype(int) - make_frames(9)[0]).mean() < 8


def gif_frames(path):
  """The frames of a GIF, and for how long each is shown, in milliseconds."""
  frames, shown = [], []
  with PIL.Image.open(path) as image:
    for i in range(image.n_frames):
      image.seek(i)
      shown.append(image.info["duration"])
      frames.append(np.asarray(image.convert("RGB")))
  return np.stack(frames), shown


@pytest.mark.parametrize("fps", [8, 12.5, 30, 50])
@pytest.mark.parametrize("order", [[0] * 9, [0, 1, 1, 1, 2, 0, 0, 3, 3], [0]])
def test_a_gif_has_every_frame_however_alike_they_are(tmp_path, order, fps):
  path = tmp_path / "a.gif"
  video.write_gif(path, make_frames(4)[order], fps)
  frames, shown = gif_frames(path)
  assert len(frames) == len(order)
  assert sum(shown) == 10 * round(100 * len(order) / fps)
  # Alike are those that were.
  for one, first in enumerate(order):
    assert np.abs(frames[one].astype(int) - make_frames(4)[first]).mean() < 8
    np.testing.assert_array_equal(frames[one], frames[order.index(first)])
  assert len(video.read_video(path)) == len(order)


def test_a_gif_faster_than_it_can_count_keeps_its_time(tmp_path):
  path = tmp_path / "a.gif"
  video.write_gif(path, make_frames(25), 250)
  frames, shown = gif_frames(path)
  # A hundredth of a second has 2.5 frames.
  assert (len(frames), sum(shown)) == (10, 100)
  video.write_gif(path, make_frames(2), 1000)
  assert gif_frames(path)[1] == [10]


def test_png_frames_are_exact_and_replace_a_folder(tmp_path):
  frames = make_frames(3)
  for count in (3, 2):
    video.write_png_frames(tmp_path / "a", frames[:count])
    names = sorted(os.listdir(tmp_path / "a"))
    assert names == [f"{i:06d}.png" for i in range(count)]
  got = np.asarray(video.read_image(tmp_path / "a/000001.png"))
  np.testing.assert_array_equal(got, frames[1])
  assert os.listdir(tmp_path) == ["a"]


def test_latents_round_trip(tmp_path):
  latents = np.random.default_rng(0).normal(size=(3, 4, 6, 16))
  video.write_latents(tmp_path / "a.npz", latents.astype(np.float32))
  with np.load(tmp_path / "a.npz") as file:
    np.testing.assert_array_equal(file["latents"], latents.astype(np.float32))


WRITERS = {
  "a.mp4": lambda path: video.write_mp4(path, noise(), 8),
  "a.gif": lambda path: video.write_gif(path, noise(), 8),
  "a": lambda path: video.write_png_frames(path, noise()),
  "a.npz": lambda path: video.write_latents(path, latents()),
}


def noise():
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (12, 128, 128, 3), dtype=np.uint8)


def latents():
  return np.zeros((16, 64, 64, 16), np.float32)


@pytest.mark.parametrize("name", WRITERS)
def test_a_failed_flush_leaves_nothing(tmp_path, monkeypatch, name):
  def fail(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(os, "fsync", fail)
  with pytest.raises(errors.StorageError, match=r"No space left.*--out"):
    WRITERS[name](tmp_path / name)
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_leaves_nothing(tmp_path, name):
  command = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", tmp_path]
  if subprocess.run(command, capture_output=True, check=False).returncode:
    pytest.skip("only root may mount")
  try:
    with pytest.raises(errors.StorageError, match="No space left") as caught:
      WRITERS[name](tmp_path / name)
    assert caught.value.exit_code == 74
    assert "\n" not in str(caught.value)
    assert not os.listdir(tmp_path)
  finally:
    subprocess.run(["umount", tmp_path], check=True)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / "a.npz"
  video.write_latents(path, latents()[:1])
  old = path.read_bytes()
  monkeypatch.setattr(os, "replace", fail_to_rename)
  with pytest.raises(errors.StorageError):
    video.write_latents(path, latents())
  assert path.read_bytes() == old
  assert os.listdir(tmp_path) == ["a.npz"]


def fail_to_rename(source, target):
  raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_writing_into_no_folder_says_so(tmp_path):
  with pytest.raises(errors.StorageError, match="folder exists"):
    video.write_mp4(tmp_path / "no/a.mp4", make_frames(), 8)


@pytest.mark.parametrize(
  ("codec", "suffix", "tolerance"),
  [("ffv1", "mkv", 3), ("libvpx-vp9", "webm", 12), ("mpeg4", "avi", 12)],
)
def test_reads_other_codecs(tmp_path, codec, suffix, tolerance):
  frames = make_frames(4)
  path = tmp_path / f"a.{suffix}"
  with av.open(str(path), "w") as file:
    stream = file.add_stream(codec, rate=8)
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
    for pixels in frames:
      file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
    file.mux(stream.encode())
  got = video.read_video(path)
  assert got.shape == frames.shape
  middle = got[:, 16, [8, 24, 40]].astype(int) - frames[:, 16, [8, 24, 40]]
  assert np.abs(middle).max() <= tolerance
  np.testing.assert_array_equal(video.read_video(path, limit=2), got[:2])


def test_turns_a_video_as_its_file_says(tmp_path):
  frames = make_frames(3)
  video.write_mp4(tmp_path / "a.mp4", frames, 8)
  # 90 degrees counter-clockwise in the track's matrix, as a phone writes it.
  data = (tmp_path / "a.mp4").read_bytes()
  upright = matrix(1, 0, 0, 1)
  assert data.count(upright) == 2  # The movie's and the track's.
  at = data.rindex(upright)
  data = data[:at] + matrix(0, -1, 1, 0) + data[at + len(upright) :]
  (tmp_path / "b.mp4").write_bytes(data)
  want = np.rot90(video.read_video(tmp_path / "a.mp4"), axes=(1, 2))
  np.testing.assert_array_equal(video.read_video(tmp_path / "b.mp4"), want)


def matrix(a, b, c, d):
  """A display matrix of the MP4 format."""
  one = 1 << 16
  rows = [(a * one, b * one, 0), (c * one, d * one, 0), (0, 0, 1 << 30)]
  return b"".join(x.to_bytes(4, "big", signed=True) for r in rows for x in r)


def cut(tmp_path):
  video.write_mp4(tmp_path / "whole.mp4", make_frames(), 8)
  return (tmp_path / "whole.mp4").read_bytes()[:700]


@pytest.mark.parametrize("name", ["a.mp4", "a.txt", "a.avi", "a.gif"])
@pytest.mark.parametrize(
  "data", [b"", b"A panda.\n" * 4000, b"\x00" * 999, b"\x80\x04pickle.", cut]
)
def test_unreadable_videos_are_one_line(tmp_path, name, data):
  data = data(tmp_path) if callable(data) else data
  (tmp_path / name).write_bytes(data)
  with pytest.raises(errors.InputError) as caught:
    video.read_video(tmp_path / name)
  assert name in str(caught.value)
  assert "\n" not in str(caught.value)


def test_a_missing_video_and_a_folder_are_no_videos(tmp_path):
  for path in (tmp_path, tmp_path / "no.mp4", "http://localhost/a.mp4"):
    with pytest.raises(errors.InputError, match="no such video"):
      video.read_video(path)


@pytest.mark.parametrize("size", [(32, 48), (33, 47), (7, 5), (301, 199)])
@pytest.mark.parametrize("target", [(32, 48), (64, 16), (480, 720)])
def test_fit_equals_diffusers(size, target):
  rng = np.random.default_rng(0)
  array = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
  image = PIL.Image.fromarray(array)
  processor = diffusers.video_processor.VideoProcessor(vae_scale_factor=8)
  want = processor.preprocess(image, height=target[0], width=target[1])
  want = want[0].permute(1, 2, 0).numpy()
  for source in (image, array):
    got = video.fit(source, *target)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, want)


def test_fit_equals_diffusers_on_videos():
  frames = make_frames(3, 41, 57)
  images = [PIL.Image.fromarray(frame) for frame in frames]
  processor = diffusers.video_processor.VideoProcessor(vae_scale_factor=8)
  want = processor.preprocess_video(images, height=32, width=48)
  got = np.stack([video.fit(frame, 32, 48) for frame in frames])
  np.testing.assert_array_equal(got, want[0].permute(1, 2, 3, 0).numpy())


def test_read_image_modes(tmp_path):
  rgb = make_frames(1)[0]
  want = PIL.Image.fromarray(rgb)
  for mode in ("RGBA", "CMYK", "L", "LA", "P", "1"):
    got = video.read_image(want.convert(mode))
    assert (got.mode, got.size) == ("RGB", want.size)
  alpha = np.concatenate([rgb, rgb[..., :1]], axis=-1)
  np.testing.assert_array_equal(np.asarray(video.read_image(alpha)), rgb)
  gray = np.full((4, 6), 0x80FF, np.uint16)
  PIL.Image.fromarray(gray).save(tmp_path / "16.png")
  assert (np.asarray(video.read_image(tmp_path / "16.png")) == 128).all()
  half = np.asarray(video.read_image(np.full((4, 6, 3), 0.5)))
  assert (half == 128).all()


def test_read_image_honours_exif(tmp_path):
  image = PIL.Image.fromarray(make_frames(1)[0])
  exif = image.getexif()
  exif[0x0112] = 6  # Turn 90 degrees clockwise to show.
  image.save(tmp_path / "a.png", exif=exif)
  want = np.rot90(make_frames(1)[0], -1)
  got = np.asarray(video.read_image(str(tmp_path / "a.png")))
  np.testing.assert_array_equal(got, want)


def encoded(**kwargs):
  data = io.BytesIO()
  PIL.Image.fromarray(noise()[0]).save(data, **kwargs)
  return data.getvalue()


@pytest.mark.parametrize(
  "data",
  [
    b"",
    b"A panda.",
    b"\x80\x04\x95pickle.",
    encoded(format="PNG")[:300],
    encoded(format="JPEG")[:300],
    encoded(format="PNG").replace(b"IDAT", b"JDAT"),
  ],
)
def test_no_image_is_one_line(tmp_path, data):
  (tmp_path / "a.png").write_bytes(data)
  with pytest.raises(errors.InputError, match=r"a\.png") as caught:
    video.read_image(tmp_path / "a.png")
  assert "\n" not in str(caught.value)


def test_a_bomb_is_refused(tmp_path):
  # 10,000 x 10,000: where Pillow only warns.
  PIL.Image.new("1", (10_000, 10_000)).save(tmp_path / "a.png")
  with pytest.raises(errors.InputError, match="exceeds limit"):
    video.read_image(tmp_path / "a.png")


@pytest.mark.parametrize(
  "array",
  [
    np.zeros((4, 4, 5), np.uint8),
    np.zeros((0, 4, 3), np.uint8),
    np.zeros((4, 4, 3), np.int64),
    np.full((4, 4, 3), 2.0),
    np.full((4, 4, 3), np.nan),
    np.zeros(3),
  ],
)
def test_no_image_array(array):
  with pytest.raises(errors.InputError, match="array"):
    video.read_image(array)
