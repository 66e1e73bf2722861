"""The small model that the package carries."""

import diffusers
import numpy as np
import pytest
import torch

import vidgen
from tests.bench import demo_report
from tests.parity import compare
from vidgen import checkpoint, errors
from vidgen.data import moving_shapes
from vidgen.metrics import moving_shapes as judge

FOLDER = checkpoint.resolve("demo")


@pytest.fixture(scope="module")
def pipeline():
  return vidgen.load("demo", dtype="float32")


def test_it_is_small():
  sizes = [p.stat().st_size for p in FOLDER.rglob("*") if p.is_file()]
  assert sum(sizes) <= 20e6


def test_its_name_is_no_folder(tmp_path, monkeypatch):
  (tmp_path / "demo").mkdir()
  monkeypatch.chdir(tmp_path)
  assert checkpoint.resolve("demo") == FOLDER
  assert checkpoint.resolve("./demo").samefile(tmp_path / "demo")
  with pytest.raises(errors.InputError, match="no revision main"):
    checkpoint.resolve("demo", "main")


def test_diffusers_samples_the_same(pipeline):
  theirs = diffusers.CogVideoXPipeline.from_pretrained(
    FOLDER, dtype=torch.float32
  )
  theirs.set_progress_bar_config(disable=True)
  prompt = "A small green star moves up on a grey background."
  noise = torch.randn(
    (1, 5, 16, 8, 8), generator=torch.Generator().manual_seed(3)
  )
  want = theirs(
    prompt,
    num_frames=17,
    height=64,
    width=64,
    num_inference_steps=8,
    # diffusers takes its own defaults, those of 2b.
    max_sequence_length=32,
    guidance_scale=pipeline.model.config.guidance_scale,
    latents=noise,
    output_type="np",
  ).frames
  got = pipeline.sample(
    prompt,
    num_steps=8,
    latents=np.moveaxis(noise.numpy(), 2, -1),
    output="float",
  )
  compare.check("pipeline", "the embedded model", got, want, 1e-4)


def test_it_does_what_prompts_say(pipeline):
  pairs = demo_report.prompts(24, seed=5)
  captions, scenes = zip(*pairs, strict=True)
  clips = list(demo_report.sample(pipeline, list(captions)))
  accuracy = demo_report.score(clips, list(scenes))["accuracy"]
  for name in ("background", "colour", "motion", "shape"):
    assert accuracy[name]["rate"] >= 0.8, name


@pytest.mark.slow
def test_it_reads_the_order_of_words(pipeline):
  """Of one shape and of two, of which the first one named is the left one."""
  ways = {
    "right": ("from left to right", "from the left to the right"),
    "left": ("from right to left", "from the right to the left"),
    "up": ("from bottom to top", "from the bottom to the top"),
    "down": ("from top to bottom", "from the top to the bottom"),
  }
  wanted = [way for way in ways for _ in range(2)]
  captions = [
    f"A {colour} circle moves {phrase}."
    for phrases in ways.values()
    for colour, phrase in zip(("red", "cyan"), phrases, strict=True)
  ]
  captions += [
    "A red square moves up and a cyan square moves down.",
    "A cyan square moves up and a red square moves down.",
  ]
  clips = list(demo_report.sample(pipeline, captions, num_steps=8))
  seen = [judge.judge(clip).things for clip in clips]
  assert [things[0].motion for things in seen[:8]] == wanted
  for clip, things, left in zip(
    clips[8:], seen[8:], ("red", "cyan"), strict=True
  ):
    right = "cyan" if left == "red" else "red"
    motions = {thing.colour: thing.motion for thing in things}
    assert motions == {left: "up", right: "down"}
    redness = clip[..., 0] - clip[..., 2].astype(float)
    assert (redness[:, :, :32].mean() > redness[:, :, 32:].mean()) == (
      left == "red"
    )


@pytest.mark.slow
def test_reconstructions(pipeline):
  pairs = demo_report.prompts(16, seed=6)
  scenes = [scene for _, scene in pairs]
  clips = [moving_shapes.render(scene) for scene in scenes]
  made = list(demo_report.reconstruct(pipeline, clips, 8))
  found = [demo_report.psnr(a, b) for a, b in zip(clips, made, strict=True)]
  assert np.mean(found) >= 30
