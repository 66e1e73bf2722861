r"""Image to video with CogVideoX-5b-I2V: 49 frames of 480x720 at 8 fps.

vidgen sample --config=configs/cogvideox_5b_i2v_sample.py \
    --image=panda.png \
    --prompt="A panda plays the guitar." --out=samples

Hardware: upstream in PyTorch needs 26 GB (SAT, bfloat16).
--config.residency=stage and --config.tiling=true need less than without.
Cost: upstream publishes about 180 s a video on an A100 and 90 s on an H100, for
50 steps (README of zai-org/CogVideo).
Expect: a video that starts from the image, which is resized to 480x720 whatever
its aspect. The checkpoint's learned positions fit this size only.
"""

from vidgen import sample


def get_config() -> sample.SampleConfig:
  """Returns the published model's own settings."""
  return sample.SampleConfig(
    checkpoint="THUDM/CogVideoX-5b-I2V",
    dtype="bfloat16",
    num_frames=49,
    height=480,
    width=720,
    num_steps=50,
    guidance_scale=6.0,
    sampler="dpmpp_2m_sde",
    options={"dynamic_guidance": True},
  )
