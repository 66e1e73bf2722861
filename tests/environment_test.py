import os
import subprocess

import jax
import numpy as np
import pytest

from vidgen import environment, version


def git(folder, *arguments):
  subprocess.run(
    ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
    cwd=folder,
    check=True,
    capture_output=True,
  )


@pytest.fixture
def clone(tmp_path, monkeypatch):
  """A repository with a package in it, which is taken for ours."""
  root = tmp_path / "clone" / "vidgen"
  root.mkdir(parents=True)
  (root / "a.py").write_text("x = 1\n")
  (root.parent / "notes.md").write_text("Notes.\n")
  git(root.parent, "init", "-q")
  git(root.parent, "add", ".")
  git(root.parent, "commit", "-qm", "first")
  monkeypatch.setattr(environment, "ROOT", root)
  return root


def test_versions():
  found = environment.versions()
  assert found["jax"] == jax.__version__
  assert found["numpy"] == np.__version__
  assert found["vidgen"] == version.VERSION
  for name in ("python", "jaxlib", "flax", "optax", "orbax-checkpoint", "av"):
    assert found[name]
  assert found["libavcodec"].count(".") == 2


def test_versions_of_what_runs_gpus(tmp_path, monkeypatch):
  for name in ("nvidia_cudnn_cu12-9.10.2.21", "jax_cuda12_plugin-0.10.2"):
    (tmp_path / f"{name}.dist-info").mkdir()
  (tmp_path / "nvidia").mkdir()
  monkeypatch.syspath_prepend(tmp_path)
  found = environment.versions()
  assert found["nvidia-cudnn-cu12"] == "9.10.2.21"
  assert found["jax-cuda12-plugin"] == "0.10.2"


def test_code_of_a_clean_and_of_a_changed_clone(clone):
  clean = environment.code()
  assert len(clean["commit"]) == 40
  assert clean["dirty"] is None
  (clone.parent / "notes.md").write_text("Other notes.\n")
  noted = environment.code()
  assert noted["source"] == clean["source"]
  assert noted["dirty"] is not None
  (clone / "a.py").write_text("x = 2\n")
  changed = environment.code()
  assert changed["commit"] == clean["commit"]
  assert changed["source"] != clean["source"]
  assert changed["dirty"] != noted["dirty"]
  # A file that git does not know is code, too.
  (clone / "b.py").write_text("")
  assert environment.code()["source"] != changed["source"]


def test_code_within_a_repository_of_somebody_else(clone, monkeypatch):
  inner = clone / "site-packages" / "vidgen"
  inner.mkdir(parents=True)
  monkeypatch.setattr(environment, "ROOT", inner)
  found = environment.code()
  assert found["commit"] is found["dirty"] is None
  assert found["source"]


def test_git_of_a_hook_is_not_asked(clone, monkeypatch):
  commit = environment.code()["commit"]
  monkeypatch.setenv("GIT_DIR", "/nowhere")
  assert environment.code()["commit"] == commit


def test_without_git(clone, monkeypatch):
  monkeypatch.setenv("PATH", "/nowhere")
  found = environment.code()
  assert found["commit"] is found["dirty"] is None


def test_processor(tmp_path):
  path = tmp_path / "cpuinfo"
  path.write_text("processor\t: 0\nmodel name\t: A fast one: 3\n\nprocessor")
  assert environment._cpu(path) == "A fast one: 3"
  path.write_bytes(b"\xff\xfe nothing of the kind")
  environment._cpu(path)
  environment._cpu(tmp_path / "missing")


def test_devices():
  assert environment.devices() == {
    "platform": "cpu",
    "kind": "cpu",
    "count": 8,
    "processes": 1,
    "driver": "cpu",
  }
  assert environment.system()["cpus"] == len(os.sched_getaffinity(0))


def test_flags(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_a=1")
  found = environment.flags()
  assert found["XLA_FLAGS"] == "--xla_a=1"
  assert found["jax_threefry_partitionable"] == "True"
  assert "LIBTPU_INIT_ARGS" not in found
  with jax.enable_x64(True):
    assert environment.flags()["jax_enable_x64"] == "True"
  assert environment.flags()["jax_enable_x64"] == "False"
