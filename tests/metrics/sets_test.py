"""Sets of videos: what is found, what is read, what is named as unreadable."""

import hashlib
import json
import os

import numpy as np
import pytest

from vidgen import errors, video
from vidgen.metrics import sets


def frames(seed=0, count=3, size=(16, 24)):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (count, *size, 3), dtype=np.uint8)


def job(folder, clips, formats=("mp4",)):
  """Writes a job's folder; a clip is (prompt, frames), or (prompt, None)."""
  folder.mkdir(exist_ok=True)
  with open(folder / "clips.jsonl", "w", encoding="utf-8") as file:
    for index, (prompt, pixels) in enumerate(clips):
      name = f"{index:06d}_0123456789ab"
      record = {"index": index, "name": name, "prompt": prompt, "seed": 0}
      if pixels is None:
        record |= {"status": "failed", "error": "no such image"}
      else:
        files, sums = [], {}
        if "png" in formats:
          video.write_png_frames(folder / name, pixels)
          files.append(name)
        if "mp4" in formats:
          path = folder / f"{name}.mp4"
          video.write_mp4(path, pixels, 8)
          files.append(path.name)
          sums[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
        record |= {"status": "done", "files": files, "sha256": sums}
      file.write(json.dumps(record) + "\n")
  return folder


def test_a_jobs_clips_come_in_order_with_prompts_and_failures(tmp_path):
  folder = job(tmp_path / "a", [("one", frames()), ("two", None)])
  one, two = sets.find(folder)
  assert (one.index, one.prompt, one.problem) == (0, "one", None)
  assert sets.read_video(one).frames.shape == (3, 16, 24, 3)
  assert (two.index, two.path) == (1, None)
  with pytest.raises(errors.InputError, match="failed: no such image"):
    sets.read_video(two)


def test_what_loses_nothing_is_read_first(tmp_path):
  pixels = frames()
  folder = job(tmp_path / "a", [("one", pixels)], ("png", "mp4"))
  (item,) = sets.find(folder)
  assert item.path.is_dir()
  np.testing.assert_array_equal(sets.read_video(item).frames, pixels)
  (item,) = sets.find(folder, (".mp4",))
  assert item.path.suffix == ".mp4"


def test_a_changed_file_of_a_job_is_refused(tmp_path):
  folder = job(tmp_path / "a", [("one", frames(0)), ("two", frames(1))])
  one, two = sets.find(folder)
  os.replace(one.path, two.path)
  with pytest.raises(errors.InputError, match="SHA-256 differs"):
    sets.read_video(two)
  with pytest.raises(errors.InputError, match="No such file"):
    sets.read_video(one)
  assert sets.find(folder)[0].problem == "its file is not there."


def test_a_folder_of_anything(tmp_path):
  pixels = frames()
  (tmp_path / "deep").mkdir()
  video.write_mp4(tmp_path / "deep" / "b.mp4", pixels, 8)
  video.write_png_frames(tmp_path / "c", pixels)
  np.savez(tmp_path / "a.npz", frames=pixels)
  np.savez(tmp_path / "d.npz", latents=np.zeros((2, 2, 2, 4)))
  (tmp_path / "notes.txt").write_text("no video")
  (tmp_path / ".hidden.mp4").write_bytes(b"")
  items = sets.find(tmp_path)
  assert [item.name for item in items] == ["a", "c", "d", "deep/b"]
  for item in items[:2]:
    np.testing.assert_array_equal(sets.read_video(item).frames, pixels)
    np.testing.assert_array_equal(sets.read_video(item, 2).frames, pixels[:2])
  with pytest.raises(errors.InputError, match="no array `frames`"):
    sets.read_video(items[2])
  assert sets.read_video(items[3], 2).frames.shape == (2, 16, 24, 3)
  (one,) = sets.find(tmp_path / "deep" / "b.mp4")
  assert one.name == "b"
  (one,) = sets.find(tmp_path / "c")
  assert one.name == "c"


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
  many = frames(count=12)
  video.write_png_frames(tmp_path / "padded", many)
  (tmp_path / "plain").mkdir()
  for i, path in enumerate(sorted((tmp_path / "padded").glob("*.png"))):
    path.rename(tmp_path / "plain" / f"{i}.png")
  (item,) = sets.find(tmp_path / "plain")
  np.testing.assert_array_equal(sets.read_video(item).frames, many)


def test_a_video_cut_short_is_refused(tmp_path):
  path = tmp_path / "a.mp4"
  video.write_mp4(path, frames(count=20), 8)
  path.write_bytes(path.read_bytes()[:-2000])
  (item,) = sets.find(tmp_path)
  # Even where the frames that are asked for are whole.
  with pytest.raises(errors.InputError, match="is cut short"):
    sets.read_video(item, 2)


def test_arrays_that_are_no_video_are_refused(tmp_path):
  path = tmp_path / "a.npz"
  item = sets.Item("a", path)
  for array in (np.zeros((2, 4, 4, 3)), np.zeros((4, 4, 3), np.uint8)):
    np.savez(path, frames=array)
    with pytest.raises(errors.InputError, match="of uint8"):
      sets.read_video(item)
  # A pickle in it is not opened.
  np.savez(path, frames=np.array([print], object))
  with pytest.raises(errors.InputError, match=r"is no \.npz file"):
    sets.read_video(item)


def test_nothing_there_is_one_line(tmp_path):
  with pytest.raises(errors.InputError, match="no such file or folder"):
    sets.find(tmp_path / "none")
  with pytest.raises(errors.InputError, match="holds no video"):
    sets.find(tmp_path)


def test_pairs_by_index_or_by_name():
  item = lambda name, index=None: sets.Item(name, None, index)
  x = [item("000000_a", 0), item("000001_a", 1), item("000003_a", 3)]
  y = [item("000001_b", 1), item("000002_b", 2), item("000003_b", 3)]
  pairs, left, right = sets.pair(x, y)
  assert pairs == [(x[1], y[0]), (x[2], y[2])]
  assert (left, right) == (["000002_b"], ["000000_a"])
  x, y = [item("a"), item("b")], [item("b"), item("c", 0)]
  assert sets.pair(x, y) == ([(x[1], y[0])], ["c"], ["a"])
  assert sets.pair(x[:1], y[1:]) == ([(x[0], y[1])], [], [])


def test_indices_that_stand_twice_pair_nothing():
  item = lambda name, index: sets.Item(name, None, index)
  once = [item("p", 0), item("q", 1)]
  # A job that was run again with other settings, in the same folder.
  twice = [item("p", 0), item("r", 0)]
  assert sets.pair(once, twice) == ([(once[0], twice[0])], ["r"], ["q"])
  assert sets.pair(twice, once) == ([(twice[0], once[0])], ["q"], ["r"])
