"""Sampling jobs with a model that loads nothing."""

import json
import os

import numpy as np
import pytest

import vidgen
from vidgen import (
  errors,
  ledger,
  sample,
  sharding,
)


class FakePipeline:
  """Stands in for a loaded model: its pixels say which clip was asked for."""

  fps = 8
  why_mesh = ""
  takes_text, takes_fps, takes_image = True, False, False
  components = ()

  def __init__(self):
    self.calls = []
    self.fail_at = None
    self.model = self
    self.mesh = sharding.make_mesh(None)

  def plan(self, request):
    if request.num_frames == 999:
      raise errors.InputError("num_frames: 999 are too many; at most 49.")

  def sample(self, prompt, *, progress, output, **arguments):
    self.calls.append({"prompt": prompt, "output": output, **arguments})
    if self.fail_at == len(self.calls):
      raise errors.InputError("prompt: holds the number 13.")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if "unlucky" in prompts:
      raise errors.InputError("prompt: is unlucky.")
    with progress.stage("denoise"):
      for done in range(1, 4):
        progress.step(done, 3)
    ids = np.asarray(arguments["clips"])
    value = 10.0 * np.broadcast_to(arguments["seed"], ids.shape) + ids
    latents = np.zeros((len(ids), 2, 4, 4, 16), np.float32)
    latents += value[:, None, None, None, None]
    return latents if output == "latents" else self.decode(latents)

  def decode(self, latents, output="uint8", *, tiling=False, slicing=False):
    assert output == "uint8"
    value = latents[:, 0, 0, 0, 0].astype(np.uint8)
    frames = np.zeros((len(latents), 5, 32, 32, 3), np.uint8)
    return frames + value[:, None, None, None, None]


def fake_pipeline(
  monkeypatch: pytest.MonkeyPatch, folders: pytest.TempPathFactory
) -> FakePipeline:
  """Makes `vidgen.load` give a pipeline that is none."""
  fake = FakePipeline()

  def load(checkpoint, *, check, **arguments):
    # What tells checkpoints apart is what is in their folders.
    folder = folders.mktemp("checkpoint")
    (folder / "scheduler").mkdir()
    config = folder / "scheduler/scheduler_config.json"
    config.write_text(json.dumps({"name": checkpoint}))
    check(fake, folder)
    fake.loaded = {"checkpoint": checkpoint, **arguments}
    return fake

  monkeypatch.setattr(vidgen, "load", load, raising=False)
  return fake


def records(out):
  """Returns the lines of a ledger, as they stand there."""
  text = (out / "clips.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def config(tmp_path, **fields):
  """Returns the config of a job below a folder."""
  return sample.SampleConfig(out=os.fspath(tmp_path / "out"), **fields)


def many(tmp_path, count, **fields):
  """Returns the config of a job of some prompts."""
  path = tmp_path / "many.txt"
  path.write_text("".join(f"prompt {i}\n" for i in range(count)))
  return config(tmp_path, prompts=os.fspath(path), **fields)


def hashes(out):
  """Returns the hash of each clip's frames, by its name."""
  return {r["name"]: r["frames_sha256"] for r in ledger.read(out)}
