r"""Image to video with Stable Video Diffusion: 14 frames of 576x1024.

vidgen sample --config=configs/svd_sample.py --image=panda.png --out=samples

It takes no prompt. --config.fps=12 asks for another rate, and the files play at
it; --config.options.motion_bucket_id=90 asks for less motion.

Hardware: not measured. Weights are 4.5 GB in bfloat16, and a step is 86 TFLOP,
both branches of guidance together, as `vidgen compile` counts them.
--config.residency=stage and --config.options.decode_chunk=8 need less memory.
Cost: 25 steps.
Expect: a video that starts near the image, which is resized to 576x1024
whatever its aspect.
"""

from vidgen import sample


def get_config() -> sample.SampleConfig:
  """Returns the published model's own settings."""
  return sample.SampleConfig(
    checkpoint="stabilityai/stable-video-diffusion-img2vid",
    dtype="bfloat16",
    num_frames=14,
    height=576,
    width=1024,
    num_steps=25,
    guidance_scale=3.0,
    fps=7.0,
    options={"min_guidance_scale": 1.0, "motion_bucket_id": 127.0},
  )
