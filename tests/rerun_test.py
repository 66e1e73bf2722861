"""Runs that are made again from their manifest."""

import json
import os
import pathlib
import types

import pytest

from tests import tiny_training, toy_sampling
from vidgen import environment, errors, repro, rerun
from vidgen.cli import main

_CONFIG = """
from tests import toy_training


def get_config():
  return toy_training.config({data!r}, 4)
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """A folder with a run that a command has made, of a config that is gone."""
  home = tmp_path_factory.mktemp("home")
  data = tiny_training.shapes(home)
  config = home / "config.py"
  config.write_text(_CONFIG.format(data=data))
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("VIDGEN_CACHE", os.fspath(home / "cache"))
    code = main.main(
      [
        "train",
        f"--config={config}",
        "--workdir",
        os.fspath(home / "run"),
        "--config.num_steps=3",
        "--config.seed=5",
      ]
    )
  assert code == 0
  config.unlink()
  return home


@pytest.fixture
def cache(home, monkeypatch):
  monkeypatch.setenv("VIDGEN_CACHE", os.fspath(home / "cache"))


def manifest(folder):
  return json.loads((folder / "manifest.json").read_text())


def test_a_manifest_has_the_command(home):
  told = manifest(home / "run")
  assert told["argv"][:2] == ["train", f"--config={home / 'config.py'}"]
  assert told["argv"][-1] == "--config.seed=5"
  assert "toy_training.config" in told["config_text"]
  assert told["out_flag"] == "workdir"
  assert told["directory"] == os.getcwd()
  assert told["seeds"] == {"seed": 5}


def test_a_run_made_again_is_identical(home, cache, tmp_path, capfd):
  again = tmp_path / "again"
  run = os.fspath(home / "run")
  assert main.main(["repro", "rerun", run, f"--out={again}"]) == 0
  out, err = capfd.readouterr()
  last = out.splitlines()[-1]
  assert last == "identical: the final states are equal to the bit."
  assert "warning" not in err
  told = manifest(again)
  assert told["config_text"] == manifest(home / "run")["config_text"]
  assert told["config"]["num_steps"] == 3
  assert told["devices"]["count"] == 8
  # What is made again can be made again.
  argv = rerun.arguments(told, "x", tmp_path / "third")
  assert f"--workdir={tmp_path / 'third'}" in argv
  assert f"--config={tmp_path / 'third' / rerun.CONFIG}" in argv
  assert os.fspath(again) not in " ".join(argv)


def test_a_run_that_fails_when_made_again(home, tmp_path, monkeypatch):
  seen = []

  def fails(argv, *, cwd, env):
    seen.append((argv[3:], cwd))
    return types.SimpleNamespace(returncode=74)

  monkeypatch.setattr(rerun, "_call", fails)
  told = []
  with pytest.raises(errors.VidgenError, match="ended with exit code 74"):
    rerun.run(home / "run", tmp_path / "b", warn=told.append)
  assert told == []
  ((argv, cwd),) = seen
  assert argv[0] == "train"
  assert cwd == pathlib.Path.cwd()
  assert (tmp_path / "b" / rerun.CONFIG).read_text().startswith("\nfrom tests")


def test_what_was_read_must_be_there(home, tmp_path, monkeypatch):
  """The place of the run has moved, and a file of its prompts is gone."""
  ended = types.SimpleNamespace(returncode=74)
  monkeypatch.setattr(rerun, "_call", lambda *a, **k: ended)
  here = tmp_path / "here"
  here.mkdir()
  (here / "p.txt").write_text("A star.\n")
  (here / "0.png").write_bytes(b"0")
  hashes = rerun.filehashes.Hashes()
  there = tmp_path / "there"
  told = manifest(home / "run") | {
    "directory": os.fspath(there),
    "inputs": {
      "prompts": {
        "path": os.fspath(there / "p.txt"),
        "sha256": hashes.path(here / "p.txt"),
      },
      "lines": {
        "path": os.fspath(there),
        "sha256": hashes.files(here, ["0.png"]),
        "listed": True,
      },
    },
  }
  path = tmp_path / "manifest.json"
  path.write_text(json.dumps(told))
  monkeypatch.chdir(here)

  def fails(kind, match):
    said = []
    with pytest.raises(kind, match=match):
      rerun.run(path, tmp_path / "again", warn=said.append)
    return said

  (line,) = fails(errors.VidgenError, "exit code 74")
  assert "names of files count from here" in line
  (tmp_path / "again" / rerun.CONFIG).unlink()
  (here / "p.txt").write_text("A dog.\n")
  _, line = fails(errors.VidgenError, "exit code 74")
  mark = told["inputs"]["prompts"]["sha256"]["p.txt"]
  assert line.startswith(f"inputs: prompts/p.txt: {mark} then, ")
  (tmp_path / "again" / rerun.CONFIG).unlink()
  (here / "0.png").unlink()
  mark = told["inputs"]["lines"]["sha256"]["0.png"]
  text = f"{here}/0.png: is gone, and the run read it as lines; put back the "
  fails(errors.InputError, f"{text}file of SHA-256 {mark}.")
  (here / "p.txt").unlink()
  fails(errors.InputError, r"p\.txt: is gone, .* as prompts; put back the file")
  assert not list((tmp_path / "again").iterdir())


def test_what_has_changed_is_told(home, cache, tmp_path):
  weights = tmp_path / "vae" / "a.safetensors"
  weights.parent.mkdir()
  weights.write_bytes(b"weights")
  told = manifest(home / "run")
  assert rerun.changes(told) == []
  hashes = rerun.filehashes.Hashes().path(tmp_path)
  told["weights"] = {
    "checkpoint": {"path": os.fspath(tmp_path), "sha256": hashes},
    "unknown": {"path": os.fspath(tmp_path), "sha256": None},
  }
  assert rerun.changes(told) == []
  weights.write_bytes(b"WEIGHTS")
  told["versions"]["jax"] = "0.0.1"
  told["code"]["source"] = "ff"
  told["system"]["cpu"] = "another"
  told["inputs"]["prompts"] = {"path": "/gone", "sha256": {"p.txt": "ff"}}
  found = {(d.kind, d.name) for d in rerun.changes(told)}
  assert found >= {
    ("weights", "checkpoint/vae"),
    ("inputs", "prompts/p.txt"),
    ("code", "source"),
    ("versions", "jax"),
    ("device", "cpu"),
  }


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"argv": None}, "was made from Python"),
    ({"argv": ["train", 3]}, "was made from Python"),
    ({"argv": []}, "of another command"),
    ({"argv": ["repro", "rerun"]}, "of another command"),
    ({"devices": {"processes": 2}}, "several processes"),
  ],
)
def test_what_cannot_be_made_again(home, tmp_path, change, message):
  told = {**manifest(home / "run"), **change}
  with pytest.raises(errors.InputError, match=message):
    rerun.arguments(told, "x", tmp_path)


def test_a_run_from_python_starts_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(rerun, "_call", lambda *a, **k: 1 / 0)
  folder = toy_sampling.run(tmp_path / "a", count=1)
  with pytest.raises(errors.InputError, match="made from Python"):
    rerun.run(folder, tmp_path / "b")
  assert not (tmp_path / "b").exists()


def test_the_folder_must_be_new(home, tmp_path, monkeypatch):
  monkeypatch.setattr(rerun, "_call", lambda *a, **k: 1 / 0)
  (tmp_path / "file").write_text("")
  for out in (tmp_path, tmp_path / "file"):
    with pytest.raises(errors.InputError, match="holds something"):
      rerun.run(home / "run", out)


def test_flags_that_are_replaced():
  told = {
    "command": "sample",
    "out_flag": "out",
    "config_file": "configs/a.py:big",
    "devices": {"processes": 1},
    "argv": [
      "sample", "--out", "old", "--config.out=old", "-out=old",
      "--config", "configs/a.py:big", "--prompt", "--config=c", "--seed=3",
      "--prompt=out=x", "--config.mesh.cfg=2", "--notout=1",
    ],
  }  # fmt: skip
  argv = rerun.arguments(told, "x", pathlib.Path("/new"))
  assert argv == [
    "sample", "--prompt", "--seed=3", "--prompt=out=x",
    "--config.mesh.cfg=2", "--notout=1", "--config=/new/rerun_config.py:big",
    "--out=/new",
  ]  # fmt: skip


def test_a_part_is_made_again_as_it_was_and_all_parts_as_one(tmp_path):
  text = toy_sampling.run(tmp_path / "a", count=1) / "manifest.json"
  for part in range(2):
    told = json.loads(text.read_text())
    # Of the second part, hosts said which it is.
    told["argv"] = ["sample", *(["--shard", "0/2"] if part == 0 else [])]
    told["config"]["shard"] = f"{part}/2"
    path = tmp_path / "a" / f"manifest-{part:05d}-of-00002.json"
    path.write_text(json.dumps(told))
  text.unlink()
  for place, shard in ((tmp_path / "a", "0/1"), (path, "1/2")):
    side = repro.read(place)
    argv = rerun.arguments(side.manifest, "x", pathlib.Path("/new"))
    assert argv == ["sample", f"--shard={shard}", "--out=/new"]


def test_flags_of_the_environment_are_as_they_were():
  told = {
    "flags": {
      "LIBTPU_INIT_ARGS": "--a",
      "jax_enable_x64": "False",
      "jax_default_matmul_precision": None,
      "jax_random_seed_offset": "0",
      "LD_PRELOAD": "/evil.so",
    },
    "devices": {"platform": "cpu", "count": 4},
  }
  here = {"XLA_FLAGS": "--b", "HOME": "/h", "PYTHONPATH": "/p"}
  here["JAX_DEFAULT_MATMUL_PRECISION"] = "bfloat16"
  got = rerun.environ(told, here)
  root = os.fspath(environment.ROOT.parent)
  assert got == {
    "HOME": "/h",
    "PYTHONPATH": f"{root}{os.pathsep}/p",
    "PYTHONSAFEPATH": "1",
    "LIBTPU_INIT_ARGS": "--a",
    "JAX_ENABLE_X64": "False",
    "JAX_RANDOM_SEED_OFFSET": "0",
    "JAX_NUM_CPU_DEVICES": "4",
  }
  told["flags"]["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
  assert "JAX_NUM_CPU_DEVICES" not in rerun.environ(told, here)
