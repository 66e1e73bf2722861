"""Whole pipelines of SVD against diffusers': 25 steps, every draw injected."""

import warnings

import numpy as np
import PIL.Image
import pytest
import torch

import vidgen
from tests import tiny_svd
from tests.parity import compare
from vidgen import samplers

TOLERANCE = 1e-4
SIZE = {"height": 16, "width": 24, "num_frames": 5}
_NOISE = (
  "diffusers.pipelines.stable_video_diffusion"
  ".pipeline_stable_video_diffusion.randn_tensor"
)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
  """Returns (diffusers' pipeline, ours) of one checkpoint."""
  folder = tmp_path_factory.mktemp("svd")
  theirs = tiny_svd.write(folder)
  return theirs, vidgen.load(folder / "checkpoint", dtype="float32")


def image(seed=1, size=(75, 51)):
  """A smooth image of an odd size, whose aspect is not the video's."""
  pixels = np.random.default_rng(seed).integers(0, 256, (9, 13, 3), np.uint8)
  return PIL.Image.fromarray(pixels).resize(size, PIL.Image.BICUBIC)


def channels_last(x):
  return x.permute(0, 1, 3, 4, 2).numpy()


class Draws:
  """Our own noise of each clip, handed to diffusers wherever it draws."""

  def __init__(self, clips, monkeypatch, size=None, seed=7):
    size = {**SIZE, **(size or {})}
    self.call = {"seed": seed, "clips": list(clips)}
    keys = lambda purpose: samplers.keys(
      seed, np.asarray(clips, np.uint32), purpose
    )
    f, h, w = size["num_frames"], size["height"], size["width"]
    initial = samplers.normal(keys(samplers.INITIAL), (f, h // 2, w // 2, 4))
    self.initial = torch.from_numpy(np.array(initial)).permute(0, 1, 4, 2, 3)
    pixels = samplers.normal(keys(samplers.IMAGE), (1, h, w, 3))[:, 0]
    pixels = torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2)
    monkeypatch.setattr(_NOISE, lambda *args, **kwargs: pixels)


def run(pipelines, images, draws, output="latents", theirs=None, ours=None):
  """Returns what ours gives, and what theirs does."""
  diffusers_pipeline, vidgen_pipeline = pipelines
  names = {"latents": "latent", "float": "np"}
  theirs, ours = {**SIZE, **(theirs or {})}, {**SIZE, **(ours or {})}
  with warnings.catch_warnings():
    # diffusers' scheduler asks numpy for what it no longer has.
    warnings.filterwarnings("ignore", "__array__ implementation")
    want = diffusers_pipeline(
      images, latents=draws.initial, output_type=names[output], **theirs
    ).frames
  want = channels_last(want) if output == "latents" else np.asarray(want)
  got = vidgen_pipeline.sample(
    image=images, output=output, **ours, **draws.call
  )
  return got, want


CASES = {
  "defaults": ({}, {}),
  "fps, motion, noise, ramp": (
    {
      "fps": 12,
      "motion_bucket_id": 200,
      "noise_aug_strength": 0.3,
      "min_guidance_scale": 1.5,
      "max_guidance_scale": 4.0,
    },
    {
      "fps": 12,
      "motion_bucket_id": 200,
      "noise_aug_strength": 0.3,
      "min_guidance_scale": 1.5,
      "guidance_scale": 4.0,
    },
  ),
  "no guidance, 7 steps": (
    {"max_guidance_scale": 1.0, "num_inference_steps": 7},
    {"guidance_scale": 1.0, "num_steps": 7},
  ),
  "fps_id": ({"fps": 9}, {"fps_id": 8}),
}


@pytest.mark.parametrize(
  "case",
  [
    pytest.param(case, marks=[pytest.mark.slow] * (case == "fps_id"))
    for case in CASES
  ],
)
def test_an_image(case, pipelines, monkeypatch):
  theirs, ours = CASES[case]
  draws = Draws([4], monkeypatch)
  got, want = run(pipelines, image(), draws, "latents", theirs, ours)
  compare.check("SVD pipeline", f"latents, {case}", got, want, TOLERANCE)
  assert compare.error(got[:, 0], got[:, -1]) > 0.01


@pytest.mark.slow
def test_two_images_become_two_clips(pipelines, monkeypatch):
  """Clips 4 and 9 of the seed; each has its image's embedding and latents."""
  images = [image(1), image(2)]
  draws = Draws([4, 9], monkeypatch)
  got, want = run(pipelines, images, draws)
  compare.check("SVD pipeline", "latents, two images", got, want, TOLERANCE)
  assert compare.error(got[0], got[1]) > 0.1


@pytest.mark.parametrize(
  "chunk", [pytest.param(None, marks=pytest.mark.slow), 2]
)
def test_frames(chunk, pipelines, monkeypatch):
  draws = Draws([4], monkeypatch)
  got, want = run(
    pipelines,
    image(),
    draws,
    "float",
    {"decode_chunk_size": chunk},
    {"decode_chunk": chunk},
  )
  case = "all at once" if chunk is None else f"{chunk} at a time"
  compare.check("SVD pipeline", f"frames, {case}", got, want, TOLERANCE)
  as_uint8 = lambda x: np.round(x * 255).astype(int)
  assert np.abs(as_uint8(got) - as_uint8(want)).max() <= 1
