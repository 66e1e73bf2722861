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
  """Our own noise of each clip, handed to diffusers wherever it draws."""

  def __init__(self, shape, monkeypatch, *, seed=7, clips=(4, 9)):
    """`shape` is that of the latents, `b f h w c`."""
    self.call = {"seed": seed, "clips": list(clips[: shape[0]])}
    self._shape = shape[1:]
    self._keys = lambda purpose: samplers.keys(
      seed, np.asarray(self.call["clips"], np.uint32), purpose
    )
    self._monkeypatch = monkeypatch
    self.initial = np.asarray(
      samplers.normal(self._keys(samplers.INITIAL), self._shape)
    )

  def torch_initial(self):
    return torch.from_numpy(self.initial.copy()).permute(0, 1, 4, 2, 3)

  def inject(self, pipeline):
    """Patches the places where diffusers draws."""
    count = {"step": -1, "posterior": 0}
    step = type(pipeline.scheduler).step

    def counted(scheduler, *args, **kwargs):
      count["step"] += 1
      return step(scheduler, *args, **kwargs)

    def step_noise(*args, **kwargs):
      keys = self._keys(samplers.STEP)
      noise = samplers.step_noise(keys, jnp.asarray(count["step"]), self._shape)
      return torch.from_numpy(np.array(noise)).permute(0, 1, 4, 2, 3)

    def posterior(shape, **kwargs):
      i, count["posterior"] = count["posterior"], count["posterior"] + 1
      keys = self._keys(samplers.POSTERIOR)[i : i + 1]
      noise = samplers.normal(keys, (*shape[2:], shape[1]))
      return torch.from_numpy(np.array(noise)).permute(0, 4, 1, 2, 3)

    patch = self._monkeypatch.setattr
    patch(type(pipeline.scheduler), "step", counted)
    schedulers = "diffusers.schedulers.scheduling_dpm_cogvideox"
    patch(f"{schedulers}.randn_tensor", step_noise)
    patch("diffusers.models.autoencoders.vae.randn_tensor", posterior)
    pipelines = "diffusers.pipelines.cogvideo.pipeline_cogvideox"
    patch(
      f"{pipelines}_video2video.randn_tensor",
      lambda *args, **kwargs: self.torch_initial(),
    )


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
  pytest.param("5b", "DPM", False, (64, 96), marks=pytest.mark.slow),
  ("5b", "DDIM", True, (96, 64)),
  pytest.param("1.5-5b", "DPM", True, (64, 64), marks=pytest.mark.slow),
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
  draws = Draws(shape, monkeypatch)
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
  got = ours.sample(
    PROMPT,
    "blurry",
    sampler=sampler,
    output="float",
    **draws.call,
    dynamic_guidance=dynamic,
    **call,
  )
  guidance = "dynamic" if dynamic else "static"
  case = f"T2V {variant}, {scheduler}, {guidance}, {size[0]}x{size[1]}"
  compare_frames(case, got, want)


def test_two_prompts_at_once(checkpoint, monkeypatch):
  _, theirs, ours = checkpoint("5b")
  sampler = use_scheduler(theirs, "5b", "DPM")
  draws = Draws((2, 3, 8, 12, 4), monkeypatch)
  draws.inject(theirs)
  prompts = [PROMPT, SECOND]
  want = theirs(
    prompts,
    num_frames=9,
    latents=draws.torch_initial(),
    output_type="np",
    max_sequence_length=32,
  ).frames
  got = ours.sample(prompts, sampler=sampler, output="float", **draws.call)
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
  draws = Draws((1, f, 8, 12, 4), monkeypatch)
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
  got = ours.sample(
    PROMPT,
    image=image(),
    sampler=sampler,
    output="float",
    **draws.call,
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
  draws = Draws((1, 3, 8, 12, 4), monkeypatch)
  draws.inject(theirs)
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
  got = ours.sample(
    PROMPT,
    video=[np.asarray(frame) for frame in frames],
    strength=0.6,
    height=64,
    width=96,
    sampler=sampler,
    output="float",
    **draws.call,
    dynamic_guidance=dynamic,
  )
  compare_frames(f"V2V {variant}, {scheduler}, strength 0.6", got, want)


@pytest.mark.slow
def test_one_image_serves_two_prompts_in_tiles(checkpoint, monkeypatch):
  """Each clip has its own posterior noise; tiling concerns the image too."""
  _, theirs, ours = checkpoint("5b-i2v")
  sampler = use_scheduler(theirs, "5b-i2v", "DPM")
  draws = Draws((2, 3, 8, 12, 4), monkeypatch)
  draws.inject(theirs)
  theirs.vae.enable_tiling()
  prompts = [PROMPT, SECOND]
  want = theirs(
    [image(), image()],
    prompts,
    num_frames=9,
    height=64,
    width=96,
    num_inference_steps=6,
    latents=draws.torch_initial(),
    output_type="np",
    max_sequence_length=32,
  ).frames
  theirs.vae.disable_tiling()
  got = ours.sample(
    prompts,
    image=image(),
    num_steps=6,
    sampler=sampler,
    output="float",
    tiling=True,
    **draws.call,
  )
  compare_frames("I2V 5b-i2v, two prompts, tiles", got, want)


@pytest.mark.slow
def test_even_latents_of_a_video_without_guidance(checkpoint, monkeypatch):
  """CogVideoX 1.5 takes 4 latents of 13 frames and returns 16 frames."""
  _, text_to_video, ours = checkpoint("1.5-5b")
  sampler = use_scheduler(text_to_video, "1.5-5b", "DPM")
  theirs = diffusers.CogVideoXVideoToVideoPipeline(**text_to_video.components)
  theirs.set_progress_bar_config(disable=True)
  draws = Draws((1, 4, 8, 12, 4), monkeypatch)
  draws.inject(theirs)
  frames = [image().crop((i, i, 100 + i, 60 + i)) for i in range(13)]
  call = {"strength": 0.7, "height": 64, "width": 96, "guidance_scale": 1.0}
  want = theirs(
    video=frames,
    prompt=PROMPT,
    num_inference_steps=9,
    output_type="np",
    max_sequence_length=32,
    **call,
  ).frames
  got = ours.sample(
    PROMPT,
    video=frames,
    num_steps=9,
    sampler=sampler,
    output="float",
    **call,
    **draws.call,
  )
  assert got.shape[1] == 16
  compare_frames("V2V 1.5-5b, 4 latents, no guidance", got, want)


@pytest.mark.parametrize(
  "variant", [pytest.param("2b", marks=pytest.mark.slow), "5b"]
)
def test_bfloat16_is_no_worse_than_theirs(variant, checkpoint, monkeypatch):
  folder, theirs, _ = checkpoint(variant)
  use_scheduler(theirs, variant, "DDIM")
  draws = Draws((1, 3, 8, 12, 4), monkeypatch)
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
