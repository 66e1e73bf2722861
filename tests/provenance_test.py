import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest

from vidgen import environment, errors, provenance, sharding

ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass
class Config:
  num_steps: int = 5
  out: str = "here"


def read(folder, name="manifest.json"):
  return json.loads((folder / name).read_text())


def test_a_run_that_is_done(tmp_path):
  config = Config(out=os.fspath(tmp_path))
  origin = provenance.Origin(
    ("sample", "--seed=3"), "out", "c.py", "text\n", tmp_path / "hashes.json"
  )
  weights = tmp_path / "weights" / "vae"
  weights.mkdir(parents=True)
  (weights / "a.safetensors").write_bytes(b"x")
  (tmp_path / "p.txt").write_text("A star.\n")
  (tmp_path / "images").mkdir()
  (tmp_path / "images" / "a.png").write_bytes(b"x")
  with provenance.recording(
    tmp_path, "sample", config, origin=origin, planned=4
  ) as record:
    told = read(tmp_path)
    assert told["planned"] == 4
    assert told["exit"] == {"reason": "running", "code": None}
    assert told["end"] is told["outputs"] is None
    record.mesh(sharding.make_mesh({"data": 2, "context": 2}))
    record.seeds(seed=3)
    record.weights(tmp_path / "weights")
    record.inputs(tmp_path / "p.txt", "prompts")
    record.inputs(tmp_path / "images", "image")
    known = {"images/a.png": None, "b.png": "ff"}
    record.files(tmp_path, known, "lines")
    record.data("stages.0", lambda: "0123")
    record.outputs({"kind": "metrics", "metrics": {"psnr": 1.0}})
  told = read(tmp_path)
  assert told["exit"] == {"reason": "done", "code": 0}
  assert told["argv"] == ["sample", "--seed=3"]
  assert told["config"] == {"num_steps": 5, "out": os.fspath(tmp_path)}
  assert told["config_text"] == "text\n"
  assert told["mesh"] == {"axes": {"data": 2, "context": 2}, "devices": 4}
  assert told["seeds"] == {"seed": 3}
  assert list(told["weights"]["checkpoint"]["sha256"]) == ["vae"]
  assert list(told["inputs"]["prompts"]["sha256"]) == ["p.txt"]
  assert list(told["inputs"]["image"]["sha256"]) == ["a.png"]
  mark = told["inputs"]["image"]["sha256"]["a.png"]
  assert told["inputs"]["lines"] == {
    "path": os.fspath(tmp_path),
    "sha256": {"images/a.png": mark, "b.png": "ff"},
    "listed": True,
  }
  assert told["data"] == {"stages.0": "0123"}
  assert told["outputs"]["metrics"] == {"psnr": 1.0}
  assert told["versions"]["jax"] == jax.__version__
  assert told["devices"]["count"] == 8
  assert told["unknown"] == {}
  assert told["start"] < told["end"]
  assert 0 <= told["seconds"] < 60
  assert [a["exit"]["reason"] for a in told["attempts"]] == ["done"]


@pytest.mark.parametrize(
  ("error", "reason", "code"),
  [
    (errors.PreemptedError("stopped."), "preempted", 75),
    (errors.StorageError("a:\nfull."), "failed: a: full.", 74),
    (ValueError("of ours"), "failed: ValueError: of ours", 1),
    (KeyboardInterrupt(), "interrupted", 130),
    (SystemExit(3), "ended", 3),
  ],
)
def test_a_run_that_fails_says_why(tmp_path, error, reason, code):
  with (
    pytest.raises(type(error)),
    provenance.recording(tmp_path, "train", Config()) as record,
  ):
    record.outputs(lambda: {"kind": "clips", "clips": []})
    record.end("done, but for some", 2)
    raise error
  told = read(tmp_path)
  assert told["exit"] == {"reason": reason, "code": code}
  assert told["outputs"] == {"kind": "clips", "clips": []}


def test_a_job_can_say_how_it_ends(tmp_path):
  with provenance.recording(tmp_path, "sample", Config()) as record:
    record.end("3 clips failed", 2)
  assert read(tmp_path)["exit"] == {"reason": "3 clips failed", "code": 2}


def test_another_attempt_keeps_what_was_told_of_the_first(tmp_path):
  with (
    pytest.raises(errors.PreemptedError),
    provenance.recording(tmp_path, "train", Config()),
  ):
    raise errors.PreemptedError("stopped.")
  first = read(tmp_path)
  with provenance.recording(tmp_path, "train", Config(num_steps=6)) as record:
    record.mesh(sharding.make_mesh({"data": 2}))
  told = read(tmp_path)
  reasons = [attempt["exit"]["reason"] for attempt in told["attempts"]]
  assert reasons == ["preempted", "done"]
  assert told["attempts"][0] == first["attempts"][0]
  assert told["attempts"][0]["mesh"] is None
  assert told["attempts"][1]["mesh"]["devices"] == 2
  marks = [a["config_fingerprint"] for a in told["attempts"]]
  assert marks == [first["config_fingerprint"], told["config_fingerprint"]]
  assert marks[0] != marks[1]


_CHILD = """
import pathlib, sys, time
from vidgen import provenance
with provenance.recording(sys.argv[1], "sample", {"a": 1}):
  print("in", flush=True)
  time.sleep(60)
"""


def test_a_killed_run_stays_running(tmp_path):
  child = subprocess.Popen(
    [sys.executable, "-c", _CHILD, os.fspath(tmp_path)],
    stdout=subprocess.PIPE,
    cwd=ROOT,
  )
  with child:
    assert child.stdout.readline() == b"in\n"
    child.send_signal(signal.SIGKILL)
  assert read(tmp_path)["exit"]["reason"] == "running"
  assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


def test_what_cannot_be_found_out_fails_nobody(tmp_path, monkeypatch, capsys):
  def fails():
    raise LookupError("no such thing")

  monkeypatch.setenv("PATH", "/nowhere")
  with provenance.recording(tmp_path, "sample", Config()) as record:
    record.weights(tmp_path / "missing")
    record.data("a", fails)
    record.outputs(fails)
  told = read(tmp_path)
  assert told["exit"]["reason"] == "done"
  assert told["code"]["commit"] is None
  assert told["weights"]["checkpoint"]["sha256"] is None
  assert "No such file" in told["unknown"]["weights.checkpoint"]
  assert told["unknown"]["data.a"] == "no such thing"
  assert told["unknown"]["outputs"] == "no such thing"
  err = capsys.readouterr().err
  assert "has no outputs: no such thing" in err
  assert err.count("WARNING") == 3


def test_a_stopped_run_does_not_wait_for_hashes(tmp_path, monkeypatch):
  read_once, go, begun = (threading.Event() for _ in range(3))
  real = provenance.filehashes.Hashes._digest

  def slow(self, file):
    read_once.set()
    go.wait(20)
    return real(self, file)

  monkeypatch.setattr(provenance.filehashes.Hashes, "_digest", slow)
  for name in "abc":
    (tmp_path / f"{name}.txt").write_text(name)
  since = time.monotonic()
  with (
    pytest.raises(errors.PreemptedError),
    provenance.recording(tmp_path, "train", Config()) as record,
  ):
    for name in "abc":
      record.inputs(tmp_path / f"{name}.txt", name)
    record.data("d", begun.set)
    read_once.wait(20)
    threading.Timer(0.2, go.set).start()
    raise errors.PreemptedError("stopped.")
  assert time.monotonic() - since < 15
  told = read(tmp_path)
  assert told["exit"]["reason"] == "preempted"
  assert {v["sha256"] for v in told["inputs"].values()} == {None}
  assert set(told["unknown"].values()) == {"the run ended before"}
  assert not begun.is_set()


def test_hashes_are_made_while_the_run_goes_on(tmp_path):
  (tmp_path / "a.txt").write_text("a")
  with provenance.recording(tmp_path, "sample", Config()) as record:
    done = threading.Event()
    record.inputs(tmp_path / "a.txt", "a")
    record.data("b", done.set)
    assert done.wait(20)


def test_other_processes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  with provenance.recording(tmp_path, "train", Config()) as record:
    record.mesh(sharding.make_mesh({"data": 2}))
    record.seeds(seed=1)
    record.weights(tmp_path / "missing")
    record.data("a", lambda: 1 / 0)
    record.outputs({"kind": "metrics", "metrics": {}})
    record.end("x", 1)
  assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_unless_the_run_fails_itself(tmp_path, monkeypatch):
  def full(self):
    raise errors.StorageError("full.")

  with (
    pytest.raises(errors.StorageError, match="full"),
    provenance.recording(tmp_path, "train", Config()),
  ):
    monkeypatch.setattr(provenance.Record, "write", full)
  monkeypatch.undo()
  with (
    pytest.raises(errors.DivergedError),
    provenance.recording(tmp_path, "train", Config()),
  ):
    monkeypatch.setattr(provenance.Record, "write", full)
    raise errors.DivergedError("loss.")


def test_a_folder_that_cannot_be_written(tmp_path):
  with (
    pytest.raises(errors.StorageError, match="cannot write"),
    provenance.recording(tmp_path / "missing", "train", Config()),
  ):
    pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"attempts": 3}'])
def test_a_damaged_manifest_is_told(tmp_path, capsys, text):
  (tmp_path / "manifest.json").write_text(text)
  with provenance.recording(tmp_path, "sample", Config()):
    pass
  assert "earlier attempts is lost" in capsys.readouterr().err
  assert len(read(tmp_path)["attempts"]) == 1


def test_shards_have_a_manifest_each(tmp_path):
  for shard in (1, 2):
    name = f"manifest-0000{shard}-of-00002.json"
    with provenance.recording(tmp_path, "sample", Config(), name=name):
      pass
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "manifest-00001-of-00002.json",
    "manifest-00002-of-00002.json",
  ]


def test_same_code_as_the_package(tmp_path):
  with provenance.recording(tmp_path, "sample", Config()):
    pass
  assert read(tmp_path)["code"] == environment.code()
