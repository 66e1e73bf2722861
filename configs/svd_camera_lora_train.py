r"""A LoRA for one motion of the camera, on the attention over time alone.

vidgen prepare --dataset=video_folder --source=zooms --data_dir=data/zoom
vidgen train --config=configs/svd_camera_lora_train.py --workdir=runs/svd_zoom \
    --config.stages[0].data.data_dir=data/zoom
vidgen sample --checkpoint=stabilityai/stable-video-diffusion-img2vid \
    --image=photo.jpg \
    --config.lora=runs/svd_zoom/published/pytorch_lora_weights.safetensors

Hardware: 1 GPU of 80 GB: 3 GB of weights in bfloat16, 1 GB of CLIP and the
autoencoder, and the inputs of blocks.
Cost: an estimate, nothing of it was run. 43 TFLOP a clip by `model.flops`, or
172 with the way back and what is computed again: 3.4e18 FLOP in all, or 2.4
hours on an H100 at 40 % of 989 TFLOP/s, and the encoders.
Expect: videos whose camera moves as in the folder's. Blattmann et al.,
https://arxiv.org/abs/2311.15127, section 4.3: horizontal, zooming and static
clips, rank 16, 5000 steps; they tell no more. Several LoRAs go together, each
with a weight of its own: `vidgen.load(..., lora={FILE: WEIGHT, ...})`.
"""

from vidgen import adapters, optimizers, train
from vidgen.data import buckets, loader
from vidgen.tasks import diffusion, noising, sources

_ATTENTION = "temporal_transformer_blocks.0.attn1"
_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


def get_config() -> train.TrainConfig:
  """Returns the run."""
  return train.TrainConfig(
    task=diffusion.DiffusionTaskConfig(
      source=sources.Source(
        checkpoint="stabilityai/stable-video-diffusion-img2vid"
      ),
      noising=noising.NoisingConfig(log_sigma=(1.0, 1.6)),
      lora=adapters.LoraConfig(
        rank=16,
        alpha=16.0,
        targets=tuple(f"{_ATTENTION}.{name}" for name in _LAYERS),
      ),
      remat="full",
    ),
    stages=(
      train.Stage(
        5_000,
        loader.DataConfig(
          dataset="video_folder",
          data_dir="data",
          fps=6.0,
          buckets=(buckets.Bucket(14, 576, 1024, 4),),
        ),
        optimizers.Rate(1e-4, warmup_steps=100),
      ),
    ),
    optimizers={"unet_lora": optimizers.OptimizerConfig()},
    accumulate=4,
    ema_decay=0.99,
    checkpoint_every=500,
    sample_every=0,
  )
