r"""Image to video with CogVideoX1.5-5B-I2V: 81 frames of 768x1360 at 16 fps.

vidgen sample --config=configs/cogvideox_1_5_5b_i2v_sample.py \
    --image=panda.png \
    --prompt="A panda plays the guitar." --out=samples

Hardware: upstream in PyTorch needs 76 GB (SAT, bfloat16).
--config.residency=stage and --config.tiling=true need less than without.
Cost: upstream publishes about 1000 s a video on an A100 and 550 s on an H100,
for 50 steps (README of zai-org/CogVideo).
Expect: a video that starts from the image, which is resized whatever its
aspect. Set height and width near the image's: the shorter side 768, the longer
up to 1360, both multiples of 16.
"""

from vidgen import sample


def get_config() -> sample.SampleConfig:
  """Returns the published model's own settings."""
  return sample.SampleConfig(
    checkpoint="THUDM/CogVideoX1.5-5B-I2V",
    dtype="bfloat16",
    num_frames=81,
    height=768,
    width=1360,
    num_steps=50,
    guidance_scale=6.0,
    sampler="dpmpp_2m_sde",
    options={"dynamic_guidance": True},
  )
