"""The files of a cache: what is kept, what is read, what is refused."""

import dataclasses
import pickle
import shutil

import ml_dtypes
import numpy as np
import pytest

from vidgen import errors
from vidgen.data import buckets, cache, draft, loader, records

ENCODERS = cache.Encoders("vae-hash", "text-hash", "float32", False)
BUCKETS = (buckets.Bucket(9, 64, 64, 4), buckets.Bucket(17, 64, 64, 2))
WINDOWS = 3
ONE = {"things": 1}


def config_of(shapes_dir, folder=None, shapes=BUCKETS, **fields):
  cached = None if folder is None else str(folder)
  fields = {"where": ONE, "buckets": shapes, "threads": 1, **fields}
  return loader.DataConfig(data_dir=shapes_dir, cache=cached, **fields)


def row(split, number, size, start, dtype):
  """A record whose latents tell its clip and its window."""
  latents = np.full((2, 3), 100 * number + start, dtype)
  clip = split.read(number)
  return cache.Row(clip.id, list(clip.captions), {"latents": latents})


def write(shapes_dir, out, dtype=np.float32, encoders=ENCODERS, per_file=7):
  """Writes a cache of the clips of one thing, as the job does without nets."""
  split = records.Split("moving_shapes", shapes_dir, "train")
  job, groups = draft.Draft(out), []
  clips = records.select(split.index, ONE, "train")
  mark = records.fingerprint(split)
  name = "moving_shapes/train"
  for i, b in enumerate(BUCKETS):
    size = (b.num_frames, b.height, b.width)
    groups.append(
      cache.Group(
        f"latents-{i:02d}",
        cache.LATENTS,
        name,
        mark,
        None,
        size,
        clips,
        per_file,
      )
    )
  groups.append(
    cache.Group("text-02", cache.TEXT, name, mark, None, (), clips, per_file)
  )
  facts = cache.facts(encoders, groups, np.dtype(dtype).name, WINDOWS)
  with job.locked():
    job.begin(facts)
    for group in groups:
      for file, path in enumerate(group.files):
        counts = []
        with job.writing(path) as append:
          for number in group.within(file).tolist():
            rows = list(_rows(split, group, number, dtype))
            counts.append(len(rows))
            for one in rows:
              append(cache.pack(one))
          job.count(path, counts)
    job.finish(groups, facts)
  return groups


def _rows(split, group, number, dtype):
  if group.kind == cache.TEXT:
    for i, caption in enumerate(split.read(number).captions):
      text = np.full((4,), 10 * number + i, dtype)
      yield cache.Row(split.index.ids[number], [caption], {"text": text})
    return
  one = np.array([number])
  (room,) = cache.rooms(split.index, one, group.size[0], None)
  for start in cache.starts(int(room), WINDOWS).tolist():
    yield row(split, number, group.size, start, dtype)


@pytest.fixture(scope="module")
def folder(shapes_dir, tmp_path_factory):
  out = tmp_path_factory.mktemp("caches") / "cache"
  write(shapes_dir, out)
  return out


def batches(config, start=0, stop=6, index=0, count=1, seed=3):
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


def test_starts():
  assert cache.starts(1, 4).tolist() == [0]
  assert cache.starts(9, 1).tolist() == [4]
  assert cache.starts(9, 3).tolist() == [1, 4, 7]
  for room in (1, 2, 5, 9):
    assert cache.starts(room, 9).tolist() == list(range(room))
  for windows in range(1, 20):
    kept = cache.starts(17, windows)
    assert len(set(kept.tolist())) == len(kept) == min(17, windows)
    assert kept.min() >= 0 and kept.max() < 17


@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
def test_records_come_back(dtype):
  arrays = {
    "latents": np.arange(6).reshape(2, 3).astype(dtype),
    "image": np.full((1, 2, 2, 3), 200, np.uint8),
  }
  want = cache.Row("a/é.mp4#1", ["one", 'two "words"'], arrays)
  got = cache.unpack(cache.pack(want), "here")
  assert (got.id, got.captions) == (want.id, want.captions)
  for name, x in arrays.items():
    assert got.arrays[name].dtype == x.dtype
    np.testing.assert_array_equal(got.arrays[name], x)
  for data in (
    b"",
    b"\xff" * 40,
    cache.pack(want)[:-1],
    b"\2" + bytes(7) + b"{}",
  ):
    with pytest.raises(errors.CorruptError, match="here"):
      cache.unpack(data, "here")


@pytest.mark.parametrize("prefer", [None, r"\b(to|on)\b"])
def test_order_is_that_of_the_videos(shapes_dir, folder, prefer):
  def config(*cache):
    return dataclasses.replace(config_of(shapes_dir, *cache), prefer=prefer)

  videos, cached = batches(config()), batches(config(folder))
  index = records.Split("moving_shapes", shapes_dir, "train").index
  number = {id: i for i, id in enumerate(index.ids)}
  seen = set()
  for one, other in zip(videos, cached, strict=True):
    assert one[:2] == other[:2] and one[3:5] == other[3:5]
    assert other.video.size == 0 and len(other.video) == len(other.ids)
    assert other.made_by == ENCODERS and one.made_by is None
    clips = [number[id] for id in other.ids]
    latents = other.arrays["latents"][:, 0, 0].astype(int)
    assert (latents // 100).tolist() == clips
    starts = {9: {1, 4, 7}, 17: {0}}[other.bucket.num_frames]
    assert set(latents % 100) <= starts
    seen |= {(other.bucket.num_frames, s) for s in latents % 100}
    text = other.arrays["text"][:, 0].astype(int)
    assert (text // 10).tolist() == clips
  assert len(seen) == 4
  split = records.Split("moving_shapes", shapes_dir, "train")
  for other in cached:
    for caption, text in zip(
      other.captions, other.arrays["text"][:, 0].tolist(), strict=True
    ):
      assert split.read(int(text) // 10).captions[int(text) % 10] == caption


def assert_same(one, other):
  assert len(one) == len(other)
  for a, b in zip(one, other, strict=True):
    assert a[:2] == b[:2] and a[3:5] == b[3:5] and a.made_by == b.made_by
    assert a.arrays.keys() == b.arrays.keys()
    for name in a.arrays:
      assert a.arrays[name].dtype == b.arrays[name].dtype
      np.testing.assert_array_equal(a.arrays[name], b.arrays[name])


def test_hosts_starts_and_threads_change_nothing(shapes_dir, folder):
  config = config_of(shapes_dir, folder)
  whole = batches(config)
  assert_same(batches(config, start=4), whole[4:])
  more = dataclasses.replace(config, threads=4, prefetch=8)
  assert_same(batches(more), whole)
  parts = [batches(config, index=i, count=2) for i in range(2)]
  for batch, *shares in zip(whole, *parts, strict=True):
    for name, x in batch.arrays.items():
      np.testing.assert_array_equal(
        x, np.concatenate([share.arrays[name] for share in shares])
      )
  steps = loader.Steps(config, 3, 0, 6, 0, 1)
  steps[0]
  assert_same([pickle.loads(pickle.dumps(steps))[1]], [whole[1]])


def test_workers_send_bfloat16(shapes_dir, tmp_path):
  write(shapes_dir, tmp_path / "cache", ml_dtypes.bfloat16)
  config = config_of(shapes_dir, tmp_path / "cache")
  want = batches(config, stop=3)
  assert_same(batches(dataclasses.replace(config, workers=1), stop=3), want)
  assert want[0].arrays["latents"].dtype == ml_dtypes.bfloat16


def test_an_image_bucket_of_slow_clips_has_windows(shapes_dir):
  index = records.Split("moving_shapes", shapes_dir, "train").index
  rooms = cache.rooms(index, np.arange(3), 1, 1000.0)
  assert rooms.tolist() == [17] * 3
  assert cache.rooms(index, np.arange(3), 9, 4.0).tolist() == [1] * 3


@pytest.mark.parametrize(
  "fields, word",
  [
    ({"shapes": (buckets.Bucket(9, 32, 32, 2),)}, "another size: 17x64x64, 9x"),
    ({"fps": 8.0}, "other data: frames at fps=None"),
    ({"split": "validation"}, "other data: moving_shapes/train, not"),
    ({"where": {}}, r"data: of bucket 9x64x64 it lacks \d+ of 60 clips"),
  ],
)
def test_other_data(shapes_dir, folder, fields, word):
  config = config_of(shapes_dir, folder, **fields)
  with pytest.raises(errors.InputError, match=word) as error:
    batches(config)
  assert "vidgen encode" in str(error.value) and "\n" not in str(error.value)


def test_data_that_was_prepared_anew(shapes_dir, folder, monkeypatch):
  monkeypatch.setattr(records, "fingerprint", lambda split: "0" * 32)
  with pytest.raises(errors.InputError, match="train as it was before"):
    batches(config_of(shapes_dir, folder))


def test_other_encoders():
  same = dataclasses.replace(ENCODERS, folder="there")
  cache.check_encoders(same, ENCODERS)
  cache.check_encoders(same, dataclasses.replace(ENCODERS, text=None))
  cache.check_encoders(dataclasses.replace(same, text=None), ENCODERS)
  cache.check_encoders(dataclasses.replace(same, image=True), ENCODERS)
  for field, value, word in (
    ("vae", "x", r"model \(vae\)"),
    ("text", "x", r"model \(text_encoder or tokenizer\)"),
    ("dtype", "bfloat16", r"dtype \(float32 there, bfloat16 here\)"),
    ("image", True, r"model \(one without images\)"),
  ):
    here = dataclasses.replace(ENCODERS, **{field: value})
    with pytest.raises(errors.InputError, match=f"there: .*another {word};"):
      cache.check_encoders(same, here)


@pytest.mark.parametrize("image", [False, True])
def test_what_else_encoders_keep(image):
  """A cache without motion is not for a model that is told it, text or not."""
  same = dataclasses.replace(ENCODERS, folder="there", image=image)
  told = dataclasses.replace(ENCODERS, image=image, kept="motion")
  with pytest.raises(errors.InputError, match="reads other images, or no mo"):
    cache.check_encoders(same, told)
  cache.check_encoders(dataclasses.replace(same, kept="motion"), told)
  plain = dataclasses.replace(ENCODERS, kept="")
  cache.check_encoders(dataclasses.replace(same, kept="motion"), plain)


@pytest.fixture
def broken(folder, tmp_path):
  shutil.copytree(folder, tmp_path / "broken")
  return tmp_path / "broken"


def test_a_file_that_is_cut_short_or_missing(shapes_dir, broken):
  path = broken / "latents-00-00001.array_record"
  path.write_bytes(path.read_bytes()[:-1])
  with pytest.raises(errors.CorruptError, match=f"{path.name}: has"):
    batches(config_of(shapes_dir, broken))
  path.unlink()
  with pytest.raises(errors.CorruptError, match=f"{path.name}: missing"):
    batches(config_of(shapes_dir, broken))
  (broken / "MANIFEST.json").unlink()
  with pytest.raises(errors.CorruptError, match=r"MANIFEST\.json: missing"):
    batches(config_of(shapes_dir, broken))


def test_a_flipped_bit_is_found(shapes_dir, broken):
  path = broken / "latents-01-00001.array_record"
  data = bytearray(path.read_bytes())
  at = bytes(data).index(b"__metadata__") + 20
  data[at] ^= 1
  path.write_bytes(data)
  with pytest.raises(errors.CorruptError, match=rf"{path.name}: record \d+"):
    batches(config_of(shapes_dir, broken), stop=80)


def test_files_that_changed_places(shapes_dir, broken):
  one, other = (broken / f"latents-01-0000{i}.array_record" for i in (0, 1))
  data = one.read_bytes()
  assert len(data) == other.stat().st_size
  one.write_bytes(other.read_bytes())
  other.write_bytes(data)
  with pytest.raises(errors.CorruptError, match=r"of train-.*, not of train"):
    batches(config_of(shapes_dir, broken), stop=40)


def test_what_is_no_cache(shapes_dir, tmp_path, broken):
  with pytest.raises(errors.InputError, match="no finished cache; run `vidgen"):
    batches(config_of(shapes_dir, tmp_path / "nothing"))
  path = broken / cache.NAME
  text = path.read_text()
  path.write_text(text.replace('"version": 1', '"version": 2'))
  with pytest.raises(errors.InputError, match="of version 2, not 1"):
    batches(config_of(shapes_dir, broken))
  path.write_text(text.replace('"dtype"', '"dtypo"'))
  with pytest.raises(errors.CorruptError, match=cache.NAME):
    batches(config_of(shapes_dir, broken))


def test_a_draft_goes_on_or_is_of_another_cache(tmp_path):
  job = draft.Draft(tmp_path / "cache")
  with job.locked():
    job.begin({"key": "a"})
    # Nothing is whole yet: another cache may take the place.
    job.begin({"key": "b", "dtype": "float32"})
    with pytest.raises(ZeroDivisionError), job.writing("x") as append:
      append(b"1")
      raise ZeroDivisionError
    assert not job.holds("x")
    with job.writing("x") as append:
      append(b"1")
    assert job.holds("x")
    job.begin({"key": "b", "dtype": "float32"})
    with pytest.raises(errors.InputError, match=r"unfinished .* dtype;"):
      job.begin({"key": "c", "dtype": "float16"})
    again = draft.Draft(tmp_path / "cache")
    with (
      pytest.raises(errors.InputError, match="another run is encoding"),
      again.locked(),
    ):
      raise AssertionError


def test_a_full_disk_is_told(tmp_path):
  job = draft.Draft(tmp_path / "cache")
  with job.locked():
    job.begin({"key": "a"})
    with (
      pytest.raises(errors.StorageError, match="array_record: cannot write"),
      job.writing("no/where.array_record") as append,
    ):
      append(b"1")
