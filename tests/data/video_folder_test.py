import json
import os
import pathlib
import warnings

import numpy as np
import pytest

from tests.data.conftest import encode, make_frames
from vidgen import errors, prepare
from vidgen.data import codec, records, video_folder


def write(folder, name, data, caption=None):
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(data)
  if caption is not None:
    path.with_suffix(".txt").write_text(caption, encoding="utf-8")


@pytest.fixture
def source(tmp_path):
  folder = tmp_path / "videos"
  folder.mkdir()
  write(folder, "a.mp4", encode(make_frames(10)), "A grey wall.\n\nA wall.\n")
  write(
    folder, "deep/b.mkv", encode(make_frames(20), container="matroska"), "B"
  )
  return folder


def scan(folder, **kwargs):
  return video_folder.scan(video_folder.Options(str(folder), **kwargs))


def run(source, tmp_path, **kwargs):
  config = prepare.PrepareConfig(
    "video_folder", str(tmp_path / "data"), str(source), **kwargs
  )
  return prepare.run(config)


def test_files_captions_and_bytes_come_through(source, tmp_path):
  report = run(source, tmp_path)
  assert report.clips == {"train": 2} and not report.quarantined
  assert str(report).endswith("is prepared: train 2.")
  split = records.Split("video_folder", str(tmp_path / "data"), "train")
  assert split.index.ids == ["a.mp4", "deep/b.mkv"]
  assert split.index.num_frames.tolist() == [10, 20]
  assert split.index.fps.tolist() == [8, 8]
  clip = split.read(0)
  assert clip.captions == ("A grey wall.", "A wall.")
  assert clip.video == (source / "a.mp4").read_bytes()
  assert split.read(1).captions == ("B",)
  assert os.listdir(tmp_path / "data/video_folder") == [records.VERSION]


@pytest.mark.parametrize(
  "name, text",
  [
    (
      "captions.csv",
      'file,caption\na.mp4,"One, two"\na.mp4,Again\ndeep/b.mkv,Late\n',
    ),
    (
      "any.jsonl",
      '{"file": "a.mp4", "caption": "One, two"}\n\n'
      '{"file": "./a.mp4", "caption": "Again"}\n'
      '{"file": "deep/b.mkv", "caption": "Late"}\n',
    ),
  ],
)
def test_tables_of_captions(source, name, text):
  (source / "a.txt").unlink()
  (source / name).write_text("\ufeff" + text, encoding="utf-8")
  videos = scan(source).splits["train"]
  assert videos[0].captions == ("One, two", "Again")
  assert videos[1].captions == ("Late", "B")


@pytest.mark.parametrize(
  "name, text",
  [
    ("c.csv", 'file,caption\na.mp4,"A red ball\nrolls down."\n'),
    (
      "c.jsonl",
      '{"file": "a.mp4", "caption": "A red ball\u2028rolls down."}\n',
    ),
  ],
)
def test_captions_of_several_lines(source, name, text):
  """As models write them: no word is joined to another, none is lost."""
  (source / "a.txt").unlink()
  (source / name).write_text(text, encoding="utf-8")
  assert scan(source).splits["train"][0].captions == ("A red ball rolls down.",)


def test_what_cannot_be_used_is_quarantined(source, tmp_path):
  whole = encode(
    np.random.default_rng(0).integers(0, 255, (9, 32, 48, 3), np.uint8)
  )
  write(source, "empty.mp4", b"", "x")
  write(source, "cut.mp4", whole[: len(whole) // 2], "x")
  write(source, "garbage.mp4", np.random.default_rng(0).bytes(3000), "x")
  huge = b"YUV4MPEG2 W60000 H60000 F25:1\nFRAME\n" + bytes(1000)
  write(source, "huge.y4m", huge, "x")
  write(source, "silent.mp4", whole)
  write(source, "wordless.mp4", whole, " \n ")
  (source / "lonely.txt").write_text("There is no video.")
  (source / "latin.mp4").write_bytes(whole)
  (source / "latin.txt").write_bytes("Caf\xe9".encode("latin-1"))
  (source / "link.mp4").symlink_to("nowhere.mp4")
  os.mkfifo(source / "pipe.mp4")
  (source / "v.1").mkdir()
  (source / "v.1" / os.fsdecode(b"caf\xe9.mp4")).write_bytes(whole)
  (source / "v.1" / "no_suffix").write_bytes(whole)
  (source / "t.csv").write_text("file,caption\nno.mp4,Gone\n,Nothing\na.mp4\n")
  (source / "README.md").write_text("Not a video.")
  (source / ".hidden").write_text("Not a video.")
  with pytest.warns(UserWarning, match="quarantine.jsonl") as told:
    report = run(source, tmp_path)
  lines = (report.folder / prepare.QUARANTINE).read_text().splitlines()
  reasons = {row["file"]: row["reason"] for row in map(json.loads, lines)}
  words = {
    "empty.mp4": "is empty",
    "cut.mp4": "cut short|cannot be read",
    "garbage.mp4": "not a video|cannot be read",
    "huge.y4m": "60000x60000|cannot be read",
    "silent.mp4": "no caption",
    "wordless.mp4": "no caption",
    "wordless.txt": "without a word",
    "lonely.txt": "not there",
    "latin.mp4": "no caption",
    "latin.txt": "cannot be read as text",
    "link.mp4": "link to nothing",
    "pipe.mp4": "is no file",
    "no.mp4": "no such file",
    "t.csv:3": "not both",
    "t.csv:4": "not both",
    r"v.1/caf\udce9.mp4": "not UTF-8",
    "v.1/no_suffix": "no caption",
  }
  assert reasons.keys() == words.keys()
  for file, word in words.items():
    assert any(w in reasons[file] for w in word.split("|")), reasons[file]
  assert len(told) == 1 and str(told[0].message).startswith("17 files of ")
  assert report.clips == {"train": 2} and report.quarantined == 17


def test_nothing_that_can_be_used(tmp_path):
  folder = tmp_path / "videos"
  with pytest.raises(errors.InputError, match="no such folder"):
    run(folder, tmp_path)
  folder.mkdir()
  with pytest.raises(errors.InputError, match="is empty"):
    run(folder, tmp_path)
  write(folder, "a.mp4", b"", "x")
  write(folder, "b.mp4", encode(make_frames(2)))
  with pytest.raises(errors.InputError) as error:
    run(folder, tmp_path)
  text = str(error.value)
  assert "3 files" in text and "a.mp4 is empty" in text
  assert "b.mp4 has no caption" in text and "\n" not in text
  assert not (tmp_path / "data" / "video_folder").exists()


@pytest.mark.parametrize(
  "name, text, word",
  [
    ("c.csv", "video,text\na.mp4,x\n", "columns file and caption"),
    ("c.csv", "", "columns file and caption"),
  ],
)
def test_a_table_of_other_columns(source, name, text, word):
  (source / name).write_text(text)
  with pytest.raises(errors.InputError, match=word):
    scan(source)


def test_two_tables(source):
  (source / "c.csv").write_text("file,caption\n")
  (source / "d.jsonl").write_text("")
  with pytest.raises(errors.InputError, match=r"c\.csv, d\.jsonl"):
    scan(source)


def test_validation_is_a_share_and_stays(tmp_path):
  data = encode(make_frames(2))
  for i in range(20):
    write(tmp_path, f"{i}.mp4", data, "x")
  names = lambda plan, split: {v.file for v in plan.splits.get(split, [])}
  held = names(scan(tmp_path, validation_share=0.3), "validation")
  assert 1 <= len(held) <= 12
  train = names(scan(tmp_path, validation_share=0.3), "train")
  assert not held & train and len(held | train) == 20
  write(tmp_path, "new.mp4", data, "x")
  again = names(scan(tmp_path, validation_share=0.3), "validation")
  assert again - {"new.mp4"} == held
  assert (
    names(scan(tmp_path, validation_share=0.3, seed=1), "validation") != held
  )
  assert scan(tmp_path).splits.keys() == {"train"}
  # Neither is ever empty by chance.
  assert len(names(scan(tmp_path, validation_share=1e-9), "validation")) == 1
  assert len(names(scan(tmp_path, validation_share=0.999), "train")) == 1


def test_long_videos_are_cut(source, tmp_path):
  report = run(source, tmp_path, max_frames=8)
  assert report.clips == {"train": 5}
  split = records.Split("video_folder", str(tmp_path / "data"), "train")
  assert split.index.num_frames.tolist() == [8, 2, 8, 8, 4]
  assert split.index.ids[:2] == ["a.mp4#00000", "a.mp4#00001"]
  want = codec.read((source / "deep/b.mkv").read_bytes(), np.arange(20), "b")
  got = [
    codec.read(split.read(2 + i).video, np.arange(n), "b")
    for i, n in enumerate((8, 8, 4))
  ]
  difference = np.abs(np.concatenate(got).astype(int) - want)
  assert difference.max() <= 12 and difference.mean() < 1.5


def test_a_file_that_changes_meanwhile(source):
  plan = scan(source)
  (source / "a.mp4").write_bytes(encode(make_frames(12)))
  with pytest.raises(errors.InputError, match=r"a\.mp4: changed"):
    list(video_folder.clips(plan, plan.splits["train"]))
  (source / "a.mp4").unlink()
  with pytest.raises(errors.InputError, match=r"a\.mp4: changed"):
    list(video_folder.clips(plan, plan.splits["train"]))


def test_images_are_videos_of_one_frame(source):
  import PIL.Image

  PIL.Image.fromarray(make_frames(1)[0]).save(source / "p.png")
  (source / "p.txt").write_text("A still.")
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    video = scan(source).splits["train"][-1]
  assert video.file == "p.png" and video.facts[:3] == (1, 32, 48)
  data = pathlib.Path(source / "p.png").read_bytes()
  np.testing.assert_array_equal(
    codec.read(data, np.array([0]), "p"), make_frames(1)
  )
