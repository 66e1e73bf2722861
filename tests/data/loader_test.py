import dataclasses
import json
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.data.conftest import encode, make_frames
from vidgen import errors, prepare
from vidgen.data import builders, loader, moving_shapes, records
from vidgen.data.buckets import Bucket

BUCKETS = (
  Bucket(17, 64, 64, 8, 2.0),
  Bucket(9, 32, 48, 4),
  Bucket(1, 64, 64, 12),
)


def make_config(shapes_dir, buckets=BUCKETS, **kwargs):
  return loader.DataConfig(data_dir=shapes_dir, buckets=buckets, **kwargs)


def run(config, seed=0, start=0, stop=6, index=0, count=1):
  return list(
    loader.batches(
      config,
      seed=seed,
      start=start,
      stop=stop,
      process_index=index,
      process_count=count,
    )
  )


def assert_same(one, other):
  assert len(one) == len(other)
  for a, b in zip(one, other, strict=True):
    assert (a.step, a.bucket) == (b.step, b.bucket)
    assert (a.captions, a.ids) == (b.captions, b.ids)
    np.testing.assert_array_equal(a.video, b.video)


def test_shapes_and_pixels(shapes_dir):
  batches = run(make_config(shapes_dir), stop=16)
  assert [batch.step for batch in batches] == list(range(16))
  assert {batch.bucket for batch in batches} == set(BUCKETS)
  for batch in batches:
    b = batch.bucket
    shape = (b.batch_size, b.num_frames, b.height, b.width, 3)
    assert batch.video.shape == shape and batch.video.dtype == np.uint8
    assert len(batch.captions) == len(batch.ids) == b.batch_size
  options = builders.MovingShapesOptions()
  whole = next(b for b in batches if b.bucket.num_frames == 17)
  for video, caption, id_ in zip(
    whole.video, whole.captions, whole.ids, strict=True
  ):
    scene, captions = builders.moving_shapes_scene(
      options, "train", int(id_.split("-")[1])
    )
    np.testing.assert_array_equal(video, moving_shapes.render(scene))
    assert caption in captions


def test_windows_and_images_are_of_the_clip(shapes_dir):
  shapes = (Bucket(9, 64, 64, 8), Bucket(1, 64, 64, 8))
  starts = {9: set(), 1: set()}
  for batch in run(make_config(shapes_dir, shapes), stop=8):
    for video, id_ in zip(batch.video, batch.ids, strict=True):
      scene, _ = builders.moving_shapes_scene(
        builders.MovingShapesOptions(), "train", int(id_.split("-")[1])
      )
      frames = moving_shapes.render(scene)
      count = len(video)
      matches = [
        i
        for i in range(18 - count)
        if np.array_equal(frames[i : i + count], video)
      ]
      assert matches
      starts[count].add(matches[0])
  assert len(starts[9]) > 4 and len(starts[1]) > 8


@pytest.mark.parametrize("count", [2, 4])
def test_hosts_share_the_same_batch(shapes_dir, count):
  config = make_config(shapes_dir)
  whole = run(config)
  parts = [run(config, index=i, count=count) for i in range(count)]
  for batch, *shares in zip(whole, *parts, strict=True):
    assert {share.bucket for share in shares} == {batch.bucket}
    video = np.concatenate([share.video for share in shares])
    np.testing.assert_array_equal(video, batch.video)
    assert [i for share in shares for i in share.ids] == batch.ids
    assert [c for share in shares for c in share.captions] == batch.captions


@pytest.mark.parametrize("start", [1, 4, 6])
def test_starts_at_any_step(shapes_dir, start):
  config = make_config(shapes_dir)
  assert_same(run(config, start=start), run(config)[start:])


def test_threads_workers_and_the_end_change_nothing(shapes_dir):
  want = run(make_config(shapes_dir, prefetch=1, threads=1))
  assert_same(
    run(make_config(shapes_dir, prefetch=8, threads=4), stop=9)[:6], want
  )
  assert_same(run(make_config(shapes_dir, workers=2), stop=6), want)


def test_the_seed_changes_the_order(shapes_dir):
  config = make_config(shapes_dir, (Bucket(17, 64, 64, 8),))
  one, other = run(config, stop=2), run(config, seed=1, stop=2)
  assert [b.ids for b in one] != [b.ids for b in other]


def test_an_epoch_of_a_bucket_is_a_permutation(shapes_dir):
  # 7 does not divide 60: an epoch ends within a batch.
  shapes = (Bucket(1, 8, 8, 7), Bucket(1, 8, 16, 5))
  steps = loader.Steps(make_config(shapes_dir, shapes), 0, 0, 60, 0, 1)
  seen = {bucket: [] for bucket in shapes}
  for i in range(len(steps)):
    batch = steps[i]
    seen[batch.bucket] += batch.ids
  ids = sorted(records.Split("moving_shapes", shapes_dir, "train").index.ids)
  orders = []
  for order in seen.values():
    assert len(order) > 60
    for i in range(0, len(order) - 59, 60):
      orders.append(tuple(order[i : i + 60]))
      assert sorted(orders[-1]) == ids
  assert len(set(orders)) == len(orders)


def test_weights(shapes_dir):
  shapes = (Bucket(1, 8, 8, 1, 3.0), Bucket(1, 8, 16, 1, 1.0))
  steps = loader.Steps(make_config(shapes_dir, shapes), 0, 0, 4000, 0, 1)
  assert 0.72 < (steps._schedule == 0).mean() < 0.78


def test_the_order_is_for_ever():
  # Written down: a run must go on the same under another numpy.
  which, ranks = loader._schedule(np.array([1.0, 1.0]), 7, 2, 10)
  assert which.tolist() == WHICH and ranks.tolist() == RANKS
  assert loader._permutation(7, 0, 1, 8).tolist() == ORDER


WHICH, RANKS = [0, 0, 0, 0, 1, 1, 0, 1], [1, 2, 3, 4, 1, 2, 5, 3]
ORDER = [0, 2, 1, 7, 4, 3, 5, 6]


def test_a_filter_on_labels(shapes_dir):
  one = (Bucket(1, 8, 8, 4),)
  where = {"background": "black", "motions": ("left", "right", "still", "up")}
  steps = loader.Steps(make_config(shapes_dir, one, where=where), 0, 0, 1, 0, 1)
  index = records.Split("moving_shapes", shapes_dir, "train").index
  want = [
    i
    for i, labels in enumerate(index.labels)
    if labels["background"] == "black"
    and set(labels["motions"]) <= set(where["motions"])
  ]
  assert want and steps.clips[0].tolist() == want
  for wrong, word in (
    ({"colour": "red"}, "label 'colour'; there are background, colours"),
    ({"colours": "pink"}, "pink.*there are blue"),
    ({"things": (1, 3)}, r"things \[3\]; there are 1, 2"),
    ({"motions": "spin", "shapes": "circle"}, "no record"),
  ):
    with pytest.raises(errors.InputError, match=word):
      run(make_config(shapes_dir, one, where=wrong))


def test_preferred_captions(shapes_dir):
  """Of a clip that has such, only those; of another, any."""
  one = (Bucket(1, 8, 8, 8),)
  split = records.Split("moving_shapes", shapes_dir, "train")
  captions = {
    id: split.read(i).captions for i, id in enumerate(split.index.ids)
  }
  preferred, others, drawn = r"\b(to|on)\b", set(), set()
  for batch in run(make_config(shapes_dir, one, prefer=preferred), stop=40):
    for caption, id in zip(batch.captions, batch.ids, strict=True):
      wanted = [c for c in captions[id] if re.search(preferred, c)]
      assert caption in (wanted or captions[id])
      (drawn if wanted else others).add(caption)
  assert others and len(drawn) > len(split.index.ids)
  with pytest.raises(errors.InputError, match=r"prefer: '\('"):
    run(make_config(shapes_dir, one, prefer="("))


def test_the_token_budget_sizes_batches(shapes_dir):
  shapes = (Bucket(17, 64, 64, 0), Bucket(1, 64, 64, 0))
  config = make_config(shapes_dir, shapes, token_budget=500, batch_multiple=4)
  steps = loader.Steps(config, 0, 0, 1, 0, 1)
  # 5 x 4 x 4 and 4 x 4 tokens.
  assert [b.batch_size for b in steps.buckets] == [4, 28]
  with pytest.raises(errors.InputError, match="token_budget"):
    run(make_config(shapes_dir, shapes))


@pytest.mark.parametrize(
  "changes, arguments, word",
  [
    ({}, {"count": 3}, "17x64x64: 3 hosts cannot share a batch of 8"),
    ({}, {"index": 2, "count": 2}, "process_index"),
    ({}, {"start": 5, "stop": 4}, "from 5 to 4"),
    ({}, {"seed": -1}, "seed"),
    ({"buckets": ()}, {}, "at least one"),
    ({"buckets": (Bucket(18, 64, 64, 1),)}, {}, "18x64x64.*has 17 at 8"),
    ({"fps": 4.0}, {}, "17x64x64: no clip .*has 17 at 8"),
    ({"fps": 0.0}, {}, "fps"),
    ({"threads": 0}, {}, "threads"),
    ({"split": "test"}, {}, "held_out, train, validation"),
    ({"dataset": "kinetics"}, {}, "kinetics"),
    ({"dataset": "video_folder"}, {}, "vidgen prepare --dataset=video_folder"),
  ],
)
def test_mistakes(shapes_dir, changes, arguments, word):
  config = dataclasses.replace(make_config(shapes_dir), **changes)
  # Before the first batch is asked for.
  with pytest.raises(errors.InputError, match=word):
    loader.batches(
      config,
      seed=arguments.get("seed", 0),
      start=arguments.get("start", 0),
      stop=arguments.get("stop", 6),
      process_index=arguments.get("index", 0),
      process_count=arguments.get("count", 1),
    )


def test_no_dataset(tmp_path):
  with pytest.raises(errors.InputError) as error:
    run(make_config(str(tmp_path)))
  assert (
    f"`vidgen prepare --dataset=moving_shapes --data_dir={tmp_path}`"
    in str(error.value)
  )


@pytest.fixture
def broken(shapes_dir, tmp_path):
  """A copy of the dataset, and the file of its training split."""
  shutil.copytree(shapes_dir, tmp_path / "copy")
  folder = tmp_path / "copy" / "moving_shapes" / records.VERSION
  return str(tmp_path / "copy"), next(folder.glob("*train.array_record*"))


def test_a_file_cut_short(broken):
  folder, path = broken
  path.write_bytes(path.read_bytes()[:-5000])
  with pytest.raises(errors.CorruptError, match=path.name):
    run(make_config(folder))
  path.unlink()
  with pytest.raises(errors.CorruptError, match=f"{path.name}: missing"):
    run(make_config(folder))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_record_ends_the_run(broken, workers):
  folder, path = broken
  data = bytearray(path.read_bytes())
  middle = len(data) // 2
  # Not a byte more or less.
  data[middle : middle + 64] = bytes(64)
  path.write_bytes(data)
  config = make_config(folder, (Bucket(1, 64, 64, 60),), workers=workers)
  with pytest.raises(errors.CorruptError, match=rf"{path.name}.*record train-"):
    run(config, stop=2)


def test_a_record_that_does_not_decode(shapes_dir, monkeypatch):
  config = make_config(shapes_dir)
  read = records.Split.read

  def broken(self, number):
    clip = read(self, number)
    return clip._replace(video=clip.video[: len(clip.video) // 3])

  monkeypatch.setattr(records.Split, "read", broken)
  with pytest.raises(errors.CorruptError, match=r"record train-\d{8}: "):
    run(config)


@pytest.mark.parametrize(
  "name, text",
  [
    ("index-train.jsonl", "x"),
    ("dataset_info.json", "{"),
    ("MANIFEST.json", "{"),
    ("index-train.jsonl", None),
  ],
)
def test_damaged_descriptions(broken, name, text):
  folder, path = broken
  path = path.with_name(name)
  if text is None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[1:]))
  else:
    path.write_text(text)
  # The sizes agree, so that what is in the file has to tell.
  listing = path.with_name("MANIFEST.json")
  if name != listing.name:
    files = json.loads(listing.read_text())
    files["files"][name]["size"] = path.stat().st_size
    listing.write_text(json.dumps(files))
  with pytest.raises(errors.CorruptError):
    run(make_config(folder))


def test_records_that_changed_places(broken):
  folder, path = broken
  path = path.with_name("index-train.jsonl")
  path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
  files = json.loads(path.with_name("MANIFEST.json").read_text())
  files["files"][path.name]["size"] = path.stat().st_size
  path.with_name("MANIFEST.json").write_text(json.dumps(files))
  with pytest.raises(errors.CorruptError, match="where the index has"):
    run(make_config(folder))


def test_fingerprint(shapes_dir, broken):
  config = make_config(shapes_dir)
  want = loader.dataset_fingerprint(config)
  assert len(want) == 32
  # Where it lies, the filter and the buckets change nothing.
  moved = make_config(broken[0], (), where={"things": 1})
  assert loader.dataset_fingerprint(moved) == want
  other = dataclasses.replace(config, split="validation")
  assert loader.dataset_fingerprint(other) != want


def test_fingerprint_tells_seeds_apart(shapes_dir, tmp_path):
  prepare.run(
    prepare.PrepareConfig("moving_shapes", str(tmp_path), num_clips=60, seed=1)
  )
  one, other = (make_config(str(folder)) for folder in (shapes_dir, tmp_path))
  assert loader.dataset_fingerprint(one) != loader.dataset_fingerprint(other)


def test_videos_of_any_size_and_rate(tmp_path):
  source = tmp_path / "videos"
  source.mkdir()
  for name, frames, fps in (
    ("wide.mp4", make_frames(40, 36, 64, 4), 24),
    ("tall.mp4", make_frames(40, 64, 36, 4), 24),
    ("short.mp4", make_frames(3, 36, 64), 24),
    ("slow.mp4", make_frames(9, 36, 64), 4),
  ):
    (source / name).write_bytes(encode(frames, fps=fps))
    (source / name).with_suffix(".txt").write_text(name)
  prepare.run(
    prepare.PrepareConfig("video_folder", str(tmp_path / "data"), str(source))
  )
  config = loader.DataConfig(
    "video_folder",
    str(tmp_path / "data"),
    fps=8.0,
    buckets=(Bucket(9, 18, 32, 2), Bucket(9, 32, 18, 2)),
  )
  with pytest.warns(UserWarning, match=r"2 clips.*short\.mp4, slow\.mp4"):
    batches = run(config, stop=8)
  for batch in batches:
    wide = batch.bucket.width > batch.bucket.height
    assert set(batch.ids) == {"wide.mp4" if wide else "tall.mp4"}
    assert batch.captions == batch.ids
    # Every third frame, and each is 4 levels brighter than the last.
    levels = batch.video[:, :, -4:, -4:].astype(float).mean(axis=(2, 3, 4))
    np.testing.assert_allclose(np.diff(levels), 12, atol=3)
  with_images = dataclasses.replace(
    config, buckets=(*config.buckets, Bucket(1, 18, 32, 4))
  )
  batches = run(with_images, stop=20)
  seen = {i for b in batches if b.bucket.num_frames == 1 for i in b.ids}
  assert seen == {"wide.mp4", "tall.mp4", "short.mp4", "slow.mp4"}


def test_steps_go_to_another_process(shapes_dir):
  steps = loader.Steps(make_config(shapes_dir), 0, 0, 2, 0, 1)
  steps[0]
  assert_same([pickle.loads(pickle.dumps(steps))[1]], [steps[1]])


def test_nothing_runs_on_after_the_iterator(shapes_dir):
  import threading

  before = threading.active_count()
  batches = loader.batches(make_config(shapes_dir), seed=0, start=0, stop=10**6)
  next(batches)
  batches.close()
  end = time.monotonic() + 30
  while threading.active_count() > before and time.monotonic() < end:
    time.sleep(0.05)
  assert threading.active_count() <= before


_WORKERS = """
import sys
from vidgen.data import buckets, loader
if __name__ == "__main__":
  config = loader.DataConfig(
    data_dir=sys.argv[1], buckets=(buckets.Bucket(9, 64, 64, 4),), workers=2)
  print(len(list(loader.batches(config, seed=0, start=0, stop=4))))
"""


def test_workers_leave_no_shared_memory(shapes_dir, tmp_path):
  # Workers import what started them.
  script = tmp_path / "read.py"
  script.write_text(_WORKERS)
  root = pathlib.Path(loader.__file__).parents[2]
  done = subprocess.run(
    [sys.executable, script, shapes_dir],
    capture_output=True,
    text=True,
    env={**os.environ, "PYTHONPATH": os.fspath(root)},
  )
  assert (done.stdout, done.returncode) == ("4\n", 0)
  assert "leaked" not in done.stderr


def test_speed(shapes_dir):
  steps = loader.Steps(
    make_config(shapes_dir, (Bucket(17, 64, 64, 50),)), 0, 0, 7, 0, 1
  )
  steps[0]
  start = time.thread_time()
  for i in range(1, 7):
    steps[i]
  seconds = time.thread_time() - start
  print(f"{300 / seconds:.0f} clips/s on one core")
  assert 300 / seconds > 100  # 400 on a free machine.
  assert pathlib.Path(shapes_dir).exists()


def test_rates_and_labels_are_of_the_clips(shapes_dir):
  config = make_config(shapes_dir, (Bucket(5, 64, 64, 8),), fps=2.0)
  (batch,) = run(config, stop=1)
  # The clips have 8 frames a second.
  np.testing.assert_array_equal(batch.fps, [2.0] * 8)
  index = records.Split("moving_shapes", shapes_dir, "train").index
  for id_, labels in zip(batch.ids, batch.labels, strict=True):
    assert labels == index.labels[index.ids.index(id_)]
  blank = loader.blank(config.buckets[0])
  assert blank.video.shape == (1, 5, 64, 64, 3)
  assert blank.labels[0]["elevation"] == 0
