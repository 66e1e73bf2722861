import dataclasses

import numpy as np
import pytest

from vidgen import errors
from vidgen.data import buckets, records
from vidgen.data.buckets import Bucket


def make_index(*clips):
  """An index of clips given as (frames, height, width, fps)."""
  columns = [np.array(column) for column in zip(*clips, strict=True)]
  ids = [f"clip{i}" for i in range(len(clips))]
  return records.Index(
    ids,
    *(column.astype(np.int32) for column in columns[:3]),
    columns[3].astype(np.float64),
    ids,
    [{}] * len(clips),
  )


def assign(shapes, index, fps=None):
  numbers = np.arange(len(index.ids))
  found = buckets.assign(tuple(shapes), index, numbers, fps, "set/train")
  return [clips.tolist() for clips in found]


def test_token_budget():
  # CogVideoX-2b: 13 latent frames of 30 x 45 tokens.
  assert buckets.token_budget(49, 480, 720, 17550) == 1
  assert buckets.token_budget(49, 480, 720, 17550 * 5 + 1) == 5
  assert buckets.token_budget(49, 480, 720, 17550 * 7, multiple=4) == 4
  assert buckets.token_budget(1, 64, 64, 160) == 10


def test_token_budget_that_holds_nothing():
  with pytest.raises(errors.InputError, match=r"49x480x720.*17550"):
    buckets.token_budget(49, 480, 720, 17549)


def test_a_bucket_is_a_key_and_can_be_changed():
  bucket = Bucket(17, 64, 64, 8)
  assert {bucket: 1}[Bucket(17, 64, 64, 8)] == 1
  bucket.batch_size = 4
  assert bucket == dataclasses.replace(Bucket(17, 64, 64, 8), batch_size=4)


@pytest.mark.parametrize(
  "bucket, word",
  [
    (Bucket(0, 64, 64, 1), "num_frames"),
    (Bucket(17, -1, 64, 1), "height"),
    (Bucket(17, 64, 64, -2), "batch_size"),
    (Bucket(17, 64, 64, 1, 0.0), "weight"),
    (Bucket(17, 64, 64, 1, float("nan")), "weight"),
  ],
)
def test_absurd_buckets(bucket, word):
  with pytest.raises(errors.InputError, match=word):
    buckets.check((bucket,))


def test_no_bucket():
  with pytest.raises(errors.InputError, match="at least one"):
    buckets.check(())


def test_aspect_ratio_goes_before_duration_and_size():
  index = make_index(
    (50, 480, 854, 8), (50, 854, 480, 8), (20, 480, 854, 8), (50, 240, 427, 8)
  )
  shapes = [
    Bucket(17, 432, 768, 1),
    Bucket(49, 432, 768, 1),
    Bucket(17, 768, 432, 1),
    Bucket(49, 216, 384, 1),
  ]
  assert assign(shapes, index) == [[2], [0], [1], [3]]


def test_images_come_from_every_clip_besides():
  index = make_index((50, 48, 64, 8), (1, 64, 48, 1), (3, 48, 64, 8))
  shapes = [Bucket(17, 48, 64, 1), Bucket(1, 48, 64, 1), Bucket(1, 64, 48, 1)]
  assert assign(shapes, index) == [[0], [0, 2], [1]]


def test_a_bucket_that_nobody_prefers_is_shared():
  index = make_index((50, 64, 64, 8), (50, 64, 64, 8))
  shapes = [Bucket(49, 64, 64, 1), Bucket(17, 64, 64, 1)]
  assert assign(shapes, index) == [[0, 1], [0, 1]]


def test_frames_at_a_rate():
  # Two seconds each; the fourth is too slow, the last but a little.
  index = make_index(
    (17, 8, 8, 8), (48, 8, 8, 24), (60, 8, 8, 30), (9, 8, 8, 4), (17, 8, 8, 7.5)
  )
  with pytest.warns(UserWarning, match="1 clips.*clip3"):
    assert assign([Bucket(16, 8, 8, 1)], index, 8.0) == [[0, 1, 2, 4]]
  assert buckets.strides(index.fps, 8.0).tolist() == [1, 3, 3.75, 0, 1]
  assert buckets.strides(index.fps, None).tolist() == [1] * 5
  assert buckets.frames(4, 3.75).tolist() == [0, 4, 8, 11]


def test_just_enough_frames():
  index = make_index((46, 8, 8, 24), (45, 8, 8, 24))
  with pytest.warns(UserWarning, match="1 clips have too few.*clip1"):
    assert assign([Bucket(16, 8, 8, 1)], index, 8.0) == [[0]]


def test_short_clips_are_told():
  index = make_index((17, 8, 8, 8), (3, 8, 8, 8), (4, 8, 8, 8))
  with pytest.warns(UserWarning, match="2 clips have too few.*clip1, clip2"):
    assert assign([Bucket(17, 8, 8, 1)], index) == [[0]]


def test_a_bucket_without_clips_names_the_nearest():
  index = make_index((17, 8, 8, 8), (30, 8, 8, 8))
  shapes = [Bucket(17, 8, 8, 1), Bucket(49, 8, 8, 1)]
  with pytest.raises(errors.InputError, match=r"49x8x8.*clip1, has 30 at 8\."):
    assign(shapes, index)
  with pytest.raises(errors.InputError, match="at 24 frames per second"):
    assign([Bucket(17, 8, 8, 1)], index, 24.0)
