"""Whole pipelines against diffusers': 50 steps, every draw injected."""

import functools

import diffusers
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import torch

import vidgen
from tests import tiny_cogvideox
from tests.parity import compare
from vidgen import samplers

TOLERANCE = 1e-4
PROMPT = "a panda plays the guitar by the river"
SECOND = "a red ball rolls down the hill"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  """Returns (folder, diffusers pipeline, our pipeline) of a variant."""

  @functools.cache
  def make(variant):
    folder = tmp_path_factory.mktemp(variant)
    theirs = tiny_cogvideox.write(folder, variant)
    folder = folder / "checkpoint"
    return folder, theirs, vidgen.load(folder, dtype="float32")

  return make


class Draws:
  """The same noise for both sides, whatever they ask for it."""

  def __init__(self, shape, steps, monkeypatch):
    """`shape` is that of the latents, `b f h w c`."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    self.initial = draw(*shape)
    self.steps = draw(steps, *shape)
    self.posterior = draw(*shape)
    self._monkeypatch = monkeypatch
    self._step = -1

  def torch_initial(self):
    return torch.from_numpy(self.initial).permute(0, 1, 4, 2, 3).clone()

  def inject(self, pipeline):
    """Patches diffusers' and our random numbers."""
    self._step = -1
    step = type(pipeline.scheduler).step

    def counted(scheduler, *args, **kwargs):
      self._step += 1
      return step(scheduler, *args, **kwargs)

    patch = self._monkeypatch.setattr
    patch(type(pipeline.scheduler), "step", counted)
    patch(
      "diffusers.schedulers.scheduling_dpm_cogvideox.randn_tensor",
      lambda *args, **kwargs: torch.from_numpy(self.steps[self._step]).permute(
        0, 1, 4, 2, 3
      ),
    )
    count = {"posterior": 0}

    def posterior(shape, **kwargs):
      i, count["posterior"] = count["posterior"], count["posterior"] + 1
      noise = self.posterior[i : i + 1, : shape[2]]
      return torch.from_numpy(noise).permute(0, 4, 1, 2, 3)

    patch("diffusers.models.autoencoders.vae.randn_tensor", posterior)
    patch(
      samplers, "step_noise", lambda keys, i, shape: jnp.asarray(self.steps)[i]
    )
    patch(
      samplers,
      "normal",
      lambda keys, shape: jnp.asarray(self.posterior)[:, : shape[0]],
    )


def fresh(ours):
  """A pipeline with nothing compiled, so that patches are traced."""
  return type(ours)(ours.model, ours.params, ours.mesh)


def compare_frames(case, got, want):
  compare.check("pipeline", case, got, want, TOLERANCE)
  as_uint8 = lambda x: np.round(np.asarray(x) * 255).astype(np.uint8)
  difference = as_uint8(got).astype(int) - as_uint8(want).astype(int)
  assert np.abs(difference).max() <= 1


def use_scheduler(theirs, variant, name):
  theirs.scheduler = tiny_cogvideox.scheduler(variant, name)
  return {"DDIM": "ddim", "DPM": "dpmpp_2m_sde"}[name]


TEXT_TO_VIDEO = [
  ("2b", "DDIM", False, (64, 96)),
  ("2b", "DPM", True, (64, 96)),
  ("5b", "DPM", False, (64, 96)),
  ("5b", "DDIM", True, (96, 64)),
  ("1.5-5b", "DPM", True, (64, 64)),
  ("1.5-5b", "DDIM", False, (64, 112)),
]


@pytest.mark.parametrize(
  ("variant", "scheduler", "dynamic", "size"), TEXT_TO_VIDEO
)
def test_text_to_video(
  variant, scheduler, dynamic, size, checkpoint, monkeypatch
):
  _, theirs, ours = checkpoint(variant)
  sampler = use_scheduler(theirs, variant, scheduler)
  f = 4 if variant.startswith("1.5") else 3
  shape = (1, f, size[0] // 8, size[1] // 8, 4)
  draws = Draws(shape, 50, monkeypatch)
  draws.inject(theirs)
  call = {"height": size[0], "width": size[1], "num_frames": 9}
  want = theirs(
    PROMPT,
    negative_prompt="blurry",
    use_dynamic_cfg=dynamic,
    latents=draws.torch_initial(),
    output_type="np",
    max_sequence_length=32,
    **call,
  ).frames
  got = fresh(ours).sample(
    PROMPT,
    "blurry",
    sampler=sampler,
    latents=draws.initial,
    output="float",
    dynamic_guidance=dynamic,
    **call,
  )
  guidance = "dynamic" if dynamic else "static"
  case = f"T2V {variant}, {scheduler}, {guidance}, {size[0]}x{size[1]}"
  compare_frames(case, got, want)


def test_two_prompts_at_once(checkpoint, monkeypatch):
  _, theirs, ours = checkpoint("5b")
  sampler = use_scheduler(theirs, "5b", "DPM")
  draws = Draws((2, 3, 8, 12, 4), 50, monkeypatch)
  draws.inject(theirs)
  prompts = [PROMPT, SECOND]
  want = theirs(
    prompts,
    num_frames=9,
    latents=draws.torch_initial(),
    output_type="np",
    max_sequence_length=32,
  ).frames
  got = fresh(ours).sample(
    prompts, sampler=sampler, latents=draws.initial, output="float"
  )
  compare_frames("T2V 5b, two prompts", got, want)
  assert compare.error(got[0], got[1]) > 0.01


def image():
  pixels = np.random.default_rng(1).integers(0, 256, (50, 75, 3), np.uint8)
  return PIL.Image.fromarray(pixels).resize((150, 90), PIL.Image.BICUBIC)


@pytest.mark.parametrize(
  ("variant", "scheduler"), [("5b-i2v", "DDIM"), ("1.5-5b-i2v", "DPM")]
)
def test_image_to_video(variant, scheduler, checkpoint, monkeypatch):
  _, theirs, ours = checkpoint(variant)
  sampler = use_scheduler(theirs, variant, scheduler)
  f = 4 if variant.startswith("1.5") else 3
  draws = Draws((1, f, 8, 12, 4), 50, monkeypatch)
  draws.inject(theirs)
  call = {"height": 64, "width": 96, "num_frames": 9}
  want = theirs(
    image(),
    PROMPT,
    latents=draws.torch_initial(),
    output_type="np",
    max_sequence_length=32,
    **call,
  ).frames
  got = fresh(ours).sample(
    PROMPT,
    image=image(),
    sampler=sampler,
    latents=draws.initial,
    output="float",
    **call,
  )
  compare_frames(f"I2V {variant}, {scheduler}", got, want)


@pytest.mark.parametrize(
  ("variant", "scheduler", "dynamic"),
  [("2b", "DDIM", True), ("5b", "DPM", False)],
)
def test_video_to_video(variant, scheduler, dynamic, checkpoint, monkeypatch):
  _, text_to_video, ours = checkpoint(variant)
  sampler = use_scheduler(text_to_video, variant, scheduler)
  theirs = diffusers.CogVideoXVideoToVideoPipeline(**text_to_video.components)
  theirs.set_progress_bar_config(disable=True)
  draws = Draws((1, 3, 8, 12, 4), 50, monkeypatch)
  draws.inject(theirs)
  monkeypatch.setattr(
    "diffusers.pipelines.cogvideo.pipeline_cogvideox_video2video.randn_tensor",
    lambda *args, **kwargs: draws.torch_initial(),
  )
  rng = np.random.default_rng(2)
  frames = [
    image().crop((i, i, 100 + i, 60 + i)) for i in rng.integers(0, 30, 9)
  ]
  want = theirs(
    video=frames,
    prompt=PROMPT,
    strength=0.6,
    use_dynamic_cfg=dynamic,
    height=64,
    width=96,
    output_type="np",
    max_sequence_length=32,
  ).frames
  got = fresh(ours).sample(
    PROMPT,
    video=[np.asarray(frame) for frame in frames],
    strength=0.6,
    height=64,
    width=96,
    sampler=sampler,
    latents=draws.initial,
    output="float",
    dynamic_guidance=dynamic,
  )
  compare_frames(f"V2V {variant}, {scheduler}, strength 0.6", got, want)


@pytest.mark.parametrize(
  "variant", [pytest.param("2b", marks=pytest.mark.slow), "5b"]
)
def test_bfloat16_is_no_worse_than_theirs(variant, checkpoint, monkeypatch):
  folder, theirs, _ = checkpoint(variant)
  use_scheduler(theirs, variant, "DDIM")
  draws = Draws((1, 3, 8, 12, 4), 50, monkeypatch)
  call = {"num_frames": 9, "max_sequence_length": 32, "output_type": "np"}
  run = lambda pipeline: (
    pipeline(
      PROMPT,
      latents=draws.torch_initial().to(pipeline.transformer.dtype),
      **call,
    ).frames
  )
  want = run(theirs)
  low = type(theirs).from_pretrained(folder, dtype=torch.bfloat16)
  low.set_progress_bar_config(disable=True)
  low.scheduler = theirs.scheduler
  got = vidgen.load(folder, dtype="bfloat16").sample(
    PROMPT, sampler="ddim", latents=draws.initial, output="float"
  )
  psnr = lambda x: -10 * np.log10(np.mean((np.asarray(x) - want) ** 2))
  their_psnr, our_psnr = psnr(run(low)), psnr(got)
  compare.note("pipeline, bfloat16 PSNR", f"{variant}, diffusers", their_psnr)
  compare.note("pipeline, bfloat16 PSNR", f"{variant}, vidgen", our_psnr)
  assert our_psnr >= their_psnr
