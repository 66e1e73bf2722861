r"""A LoRA of rank 128 for CogVideoX1.5-5B-I2V, from a folder of videos.

vidgen prepare --dataset=video_folder --source=my_videos --data_dir=data
vidgen train --config=configs/cogvideox_1_5_5b_i2v_lora_train.py \
    --workdir=runs/1_5_lora
"""

from vidgen import adapters, optimizers, train
from vidgen.data import buckets, loader
from vidgen.tasks import diffusion, noising, sources


def get_config() -> train.TrainConfig:
  """Returns the run."""
  return train.TrainConfig(
    task=diffusion.DiffusionTaskConfig(
      source=sources.Source(checkpoint="THUDM/CogVideoX1.5-5B-I2V"),
      noising=noising.NoisingConfig(image_dropout=0.05),
      lora=adapters.LoraConfig(rank=128, alpha=64.0),
      dtype="bfloat16",
      remat="full",
    ),
    stages=(
      train.Stage(
        num_steps=1000,
        data=loader.DataConfig(
          dataset="video_folder",
          data_dir="data",
          fps=16.0,
          buckets=(buckets.Bucket(81, 768, 1360, 4),),
          prefetch=2,
        ),
        rate=optimizers.Rate(2e-4, warmup_steps=100, schedule="constant"),
      ),
    ),
    optimizers={"transformer_lora": optimizers.OptimizerConfig()},
    accumulate=4,
    ema_decay=0.99,
    checkpoint_every=250,
    sample_every=0,
  )
