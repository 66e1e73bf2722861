r"""A LoRA for the small model, from a folder of one's own videos.

vidgen prepare --dataset=video_folder --source=my_videos --data_dir=data
vidgen train --config=configs/demo_lora_train.py --workdir=runs/demo_lora
"""

from vidgen import adapters, optimizers, train
from vidgen.data import buckets, loader
from vidgen.tasks import diffusion, sources


def get_config() -> train.TrainConfig:
  """Returns the run."""
  return train.TrainConfig(
    task=diffusion.DiffusionTaskConfig(
      source=sources.Source(checkpoint="runs/demo_dit/published"),
      lora=adapters.LoraConfig(rank=8, alpha=8.0),
      dtype="float32",
      samples=diffusion.SampleSettings(
        prompts=("A red circle moves to the right.",), num_steps=25
      ),
    ),
    stages=(
      train.Stage(
        num_steps=200,
        data=loader.DataConfig(
          dataset="video_folder",
          data_dir="data",
          buckets=(buckets.Bucket(17, 64, 64, 8),),
        ),
        rate=optimizers.Rate(1e-3, warmup_steps=20),
      ),
    ),
    optimizers={"transformer_lora": optimizers.OptimizerConfig()},
    ema_decay=0.98,
    checkpoint_every=100,
    sample_every=100,
  )
