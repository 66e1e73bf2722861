r"""Text to video with CogVideoX-5b: 49 frames of 480x720 at 8 fps.

vidgen sample --config=configs/cogvideox_5b_sample.py \
    --prompt="A panda plays the guitar." --out=samples

Hardware: upstream in PyTorch needs 26 GB (SAT, bfloat16).
--config.residency=stage and --config.tiling=true need less than without.
Cost: upstream publishes about 180 s a video on an A100 and 90 s on an H100, for
50 steps (README of zai-org/CogVideo).
Expect: the published model's video. float16 gives black frames: it was trained
in bfloat16. Upstream's demo takes this sampler with dynamic guidance.
"""

from vidgen import sample


def get_config() -> sample.SampleConfig:
  """Returns the published model's own settings."""
  return sample.SampleConfig(
    checkpoint="THUDM/CogVideoX-5b",
    dtype="bfloat16",
    num_frames=49,
    height=480,
    width=720,
    num_steps=50,
    guidance_scale=6.0,
    sampler="dpmpp_2m_sde",
    options={"dynamic_guidance": True},
  )
