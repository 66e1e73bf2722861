import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from vidgen import errors, prepare
from vidgen.cli import main
from vidgen.data import builders, codec, moving_shapes, records, workers

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))


def run(folder, num_clips=4, dataset="moving_shapes", **kwargs):
  return prepare.run(
    prepare.PrepareConfig(dataset, str(folder), num_clips=num_clips, **kwargs)
  )


def test_moving_shapes_is_what_the_grammar_says(shapes_dir):
  for split, count in (("train", 60), ("validation", 3), ("held_out", 3)):
    data = records.Split("moving_shapes", shapes_dir, split)
    assert len(data) == count
    for number in range(count):
      clip, labels = data.read(number), data.index.labels[number]
      scene, captions = builders.moving_shapes_scene(
        builders.MovingShapesOptions(), split, number
      )
      assert clip.captions == captions and len(captions) == 4
      assert labels["background"] == scene.background
      assert labels["things"] == len(scene.things) == len(labels["motions"])
      held_out = [
        moving_shapes.is_held_out(t.shape, t.colour, t.motion)
        for t in scene.things
      ]
      assert held_out[0] == (split == "held_out") and not any(held_out[1:])
      if number < 3:
        frames = codec.read(clip.video, np.arange(17), clip.id)
        np.testing.assert_array_equal(frames, moving_shapes.render(scene))


def test_a_clip_depends_on_seed_split_and_number_alone(shapes_dir):
  few = builders.MovingShapesOptions(num_clips=2)
  data = records.Split("moving_shapes", shapes_dir, "train")
  assert (
    builders.moving_shapes_record(few, "train", 1).video == data.read(1).video
  )
  other = builders.MovingShapesOptions(seed=1)
  makes = [(few, "train", 1), (few, "validation", 1), (other, "train", 1)]
  videos = {builders.moving_shapes_record(*make).video for make in makes}
  assert len(videos) == 3


def test_share_of_two_things(tmp_path):
  for share, counts in ((0.0, {1}), (1.0, {2})):
    options = builders.MovingShapesOptions(two_share=share)
    scenes = [
      builders.moving_shapes_scene(options, "train", i)[0] for i in range(20)
    ]
    assert {len(scene.things) for scene in scenes} == counts


def test_prepares_and_reads_without_tensorflow(tmp_path):
  code = f"""
import sys

class Hide:
  def __init__(self, finder):
    self.finder = finder
  def __getattr__(self, name):
    return getattr(self.finder, name)
  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] not in ("tensorflow", "torch"):
      return self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Hide, sys.meta_path)
from vidgen.data import loader
assert not {{"tensorflow_datasets", "grain"}} & sys.modules.keys()
from vidgen import prepare
folder = {str(tmp_path)!r}
prepare.run(prepare.PrepareConfig("moving_shapes", folder, num_clips=4))
config = loader.DataConfig(
  data_dir=folder, buckets=(loader.Bucket(17, 64, 64, 2),))
batch, = loader.batches(config, seed=0, start=0, stop=1)
assert batch.video.shape == (2, 17, 64, 64, 3)
assert "tensorflow" not in sys.modules
"""
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_a_second_run_says_so(tmp_path):
  first, second = run(tmp_path), run(tmp_path)
  assert not first.was_there and second.was_there
  assert "already prepared" in str(second) and "train 4" in str(second)
  with pytest.raises(errors.InputError, match="num_clips=4, not 5"):
    run(tmp_path, num_clips=5)


def test_a_failed_run_leaves_nothing(tmp_path, monkeypatch):
  def fail(options, split, index):
    if index == 2:
      raise OSError(28, "No space left on device")
    return make(options, split, index)

  make = builders.moving_shapes_record
  monkeypatch.setattr(builders, "moving_shapes_record", fail)
  with pytest.raises(errors.StorageError, match="No space left"):
    run(tmp_path)
  assert not list(tmp_path.iterdir())
  monkeypatch.undo()
  assert run(tmp_path).clips["train"] == 4


def test_a_file_that_cannot_be_written(tmp_path):
  with pytest.raises(errors.StorageError, match=r"nowhere/a\.array_record"):
    builders._Writer(file_format=None).write(
      tmp_path / "nowhere" / "a.array_record", iter([])
    )
  (tmp_path / "file").write_text("")
  with pytest.raises(errors.StorageError, match="cannot write"):
    run(tmp_path / "file")


def test_a_killed_run_is_run_again(tmp_path):
  code = f"""
from vidgen import prepare
prepare.run(
  prepare.PrepareConfig("moving_shapes", {str(tmp_path)!r}, num_clips=100000))
"""
  process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
  draft = tmp_path / "moving_shapes" / ".draft"
  end = time.monotonic() + 120
  while not list(draft.glob("**/index-train.jsonl")):
    assert process.poll() is None and time.monotonic() < end
    time.sleep(0.05)
  process.send_signal(signal.SIGKILL)
  process.wait()
  assert draft.exists() and not (draft.parent / records.VERSION).exists()
  assert run(tmp_path).clips["train"] == 4
  assert os.listdir(draft.parent) == [records.VERSION]


def test_two_runs_at_a_time(tmp_path):
  (tmp_path / "moving_shapes").mkdir()
  descriptor = os.open(tmp_path / "moving_shapes", os.O_RDONLY)
  fcntl.flock(descriptor, fcntl.LOCK_EX)
  with pytest.raises(errors.InputError, match="another run"):
    run(tmp_path)
  os.close(descriptor)
  run(tmp_path)


@pytest.mark.parametrize(
  "fields, word",
  [
    ({"dataset": "kinetics"}, "kinetics"),
    ({"source": "videos"}, "source: is for video_folder only"),
    ({"max_frames": 4}, "max_frames: is for video_folder only"),
    ({"dataset": "video_folder"}, "source: name the folder"),
    ({"dataset": "video_folder", "num_clips": 4}, "for moving_shapes only"),
    ({"num_clips": 0}, "num_clips"),
    ({"two_share": 1.5}, "two_share"),
    ({"two_share": float("nan")}, "two_share"),
    ({"seed": -1}, "seed"),
  ],
)
def test_wrong_options(tmp_path, fields, word):
  config = prepare.PrepareConfig(data_dir=str(tmp_path), **fields)
  with pytest.raises(errors.InputError, match=word):
    prepare.run(config)
  assert not list(tmp_path.iterdir())


@pytest.fixture
def command(monkeypatch):
  commands = {**main.COMMANDS, "prepare": ("vidgen.cli.prepare", "")}
  monkeypatch.setattr(main, "COMMANDS", commands)


def test_the_command(tmp_path, capsys, command):
  argv = ["prepare", "--dataset=moving_shapes", f"--data_dir={tmp_path}"]
  assert main.main([*argv, "--num_clips=3", "--seed=5"]) == 0
  out, err = capsys.readouterr()
  assert out.count("\n") == 1 and "is prepared" in out and "train 3" in out
  assert "write took" in err
  options = json.loads(
    (tmp_path / "moving_shapes" / records.VERSION / prepare.OPTIONS).read_text()
  )
  assert options["seed"] == 5 and options["num_clips"] == 3
  assert main.main([*argv, "--num_clips=3", "--seed=5"]) == 0
  assert "already" in capsys.readouterr().out


@pytest.mark.parametrize(
  "argv, word",
  [
    (["--data_dir=x"], "--dataset is missing"),
    (["--dataset=moving_shapes"], "--data_dir is missing"),
    (
      ["--dataset=other", "--data_dir=x"],
      "moving_shapes|orbiting_solids|video_folder",
    ),
    (
      ["--dataset=video_folder", "--data_dir=x", "--source=no"],
      "no such folder",
    ),
  ],
)
def test_mistakes_on_the_command_line(
  tmp_path, capsys, monkeypatch, command, argv, word
):
  monkeypatch.chdir(tmp_path)
  assert main.main(["prepare", *argv]) == 2
  err = capsys.readouterr().err.splitlines()
  assert word in err[-1] and err[-1].startswith("vidgen: error: ")
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dataset", ["moving_shapes", "orbiting_solids"])
def test_processes_make_the_same_clips(tmp_path, dataset):
  one, two = (
    run(tmp_path / str(count), 20, dataset=dataset, workers=count).folder
    for count in (1, 2)
  )
  files = sorted(p.name for p in one.iterdir() if "array_record" in p.name)
  files += sorted(p.name for p in one.glob("index-*"))
  assert len(files) == 6
  for name in files:
    assert (one / name).read_bytes() == (two / name).read_bytes(), name


def _killed(item):
  os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_told():
  with (
    pytest.raises(errors.StorageError, match="one of 2 processes was killed"),
    workers.mapping(2) as each,
  ):
    list(each(_killed, range(3)))


def test_processes_that_are_of_no_use(tmp_path):
  with pytest.raises(errors.InputError, match="workers: 0 is not positive"):
    run(tmp_path, workers=0)
  config = prepare.PrepareConfig("video_folder", str(tmp_path), workers=2)
  with pytest.raises(errors.InputError, match="clips that are made; drop it"):
    prepare.run(config)
