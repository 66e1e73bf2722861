import errno
import os
import pathlib

import numpy as np
import PIL.Image
import pytest

from tests import report_runs
from vidgen import errors, posters, video


def test_the_first_frame(tmp_path):
  frames = report_runs.frames(1, size=64)
  video.write_mp4(tmp_path / "a.mp4", frames, 8)
  assert posters.make([tmp_path / "a.mp4"], tmp_path / "p") == {"a.jpg"}
  with PIL.Image.open(tmp_path / "p" / "a.jpg") as image:
    assert image.format == "JPEG"
    off = np.abs(np.asarray(image, float) - frames[0]).mean()
  assert off < 6


def test_large_videos_have_small_posters(tmp_path):
  posters.write(tmp_path / "a.jpg", np.zeros((480, 720, 3), np.uint8))
  with PIL.Image.open(tmp_path / "a.jpg") as image:
    assert image.size == (320, 213)
  assert os.listdir(tmp_path) == ["a.jpg"]


def test_only_what_is_new_is_made(tmp_path):
  paths = [tmp_path / "a.mp4", tmp_path / "b.mp4"]
  for i, path in enumerate(paths):
    video.write_mp4(path, report_runs.frames(i), 8)
  folder = tmp_path / "p"
  posters.make(paths, folder)
  times = [(folder / n).stat().st_mtime_ns for n in ("a.jpg", "b.jpg")]
  assert posters.make(paths, folder) == {"a.jpg", "b.jpg"}
  assert times == [(folder / n).stat().st_mtime_ns for n in ("a.jpg", "b.jpg")]
  os.utime(paths[0], ns=(times[0] + 10**9, times[0] + 10**9))
  (folder / "b.jpg").write_bytes(b"")
  posters.make(paths, folder)
  assert (folder / "b.jpg").stat().st_size
  assert (folder / "a.jpg").stat().st_mtime_ns > times[0]


def test_what_is_no_video_has_no_poster(tmp_path):
  (tmp_path / "a.mp4").write_bytes(b"no video")
  assert posters.make([tmp_path / "a.mp4"], tmp_path / "p") == set()
  with pytest.raises(errors.InputError, match=r"a\.mp4"):
    posters.probe(tmp_path / "a.mp4")


@pytest.mark.parametrize(
  ("number", "ends"), [(errno.EROFS, False), (errno.ENOSPC, True)]
)
def test_a_folder_that_takes_nothing(tmp_path, monkeypatch, number, ends):
  video.write_mp4(tmp_path / "a.mp4", report_runs.frames(0), 8)

  def fail(*args, **kwargs):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(pathlib.Path, "replace", fail)
  if ends:
    with pytest.raises(errors.StorageError, match="No space left"):
      posters.make([tmp_path / "a.mp4"], tmp_path / "p")
  else:
    assert posters.make([tmp_path / "a.mp4"], tmp_path / "p") == set()
  assert not os.listdir(tmp_path / "p")
