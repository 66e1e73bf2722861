r"""Text to video with CogVideoX-2b: 49 frames of 480x720 at 8 fps.

vidgen sample --config=configs/cogvideox_2b_sample.py \
    --prompt="A panda plays the guitar." --out=samples

Hardware: upstream in PyTorch needs 18 GB (SAT, float16).
--config.residency=stage and --config.tiling=true need less than without.
Cost: upstream publishes about 90 s a video on an A100 and 45 s on an H100, for
50 steps (README of zai-org/CogVideo).
Expect: the published model's video. It was trained in float16; upstream
recommends DDIM for it.
"""

from vidgen import sample


def get_config() -> sample.SampleConfig:
  """Returns the published model's own settings."""
  return sample.SampleConfig(
    checkpoint="THUDM/CogVideoX-2b",
    dtype="float16",
    num_frames=49,
    height=480,
    width=720,
    num_steps=50,
    guidance_scale=6.0,
    sampler="ddim",
  )
