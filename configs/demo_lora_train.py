r"""The small model with a LoRA of rank 8, trained on a folder of videos.

vidgen prepare --dataset=video_folder --source=my_videos --data_dir=data
vidgen train --config=configs/demo_lora_train.py --workdir=runs/demo_lora

Hardware: 2 CPU cores, 4 GB.
Cost: as a step of demo_dit_train.py for half as many videos, 200 times; the
frozen text encoder and autoencoder are small.
Expect: videos in the manner of the folder's, by `vidgen sample` with
--config.lora=runs/demo_lora/published/pytorch_lora_weights.safetensors. It
reads the words of moving shapes alone: captions need them. The videos need 17
frames or more, and are shown to it in 64x64.
"""

from vidgen import adapters, optimizers, train
from vidgen.data import buckets, loader
from vidgen.tasks import diffusion, sources


def get_config() -> train.TrainConfig:
  """Returns the run."""
  return train.TrainConfig(
    task=diffusion.DiffusionTaskConfig(
      source=sources.Source(checkpoint="demo"),
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
