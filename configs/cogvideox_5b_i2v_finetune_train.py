r"""All of CogVideoX-5b-I2V's transformer, fine-tuned on a folder of videos.

vidgen prepare --dataset=video_folder --source=my_videos --data_dir=data
vidgen train --config=configs/cogvideox_5b_i2v_finetune_train.py \
    --workdir=runs/5b_i2v_finetune
"""

from vidgen import optimizers, train
from vidgen.data import buckets, loader
from vidgen.tasks import diffusion, noising, sources


def get_config() -> train.TrainConfig:
  """Returns the run."""
  return train.TrainConfig(
    task=diffusion.DiffusionTaskConfig(
      source=sources.Source(checkpoint="THUDM/CogVideoX-5b-I2V"),
      noising=noising.NoisingConfig(image_dropout=0.05),
      dtype="bfloat16",
      remat="full",
    ),
    stages=(
      train.Stage(
        num_steps=1000,
        data=loader.DataConfig(
          dataset="video_folder",
          data_dir="data",
          fps=8.0,
          buckets=(buckets.Bucket(49, 480, 720, 16),),
          threads=16,
        ),
        rate=optimizers.Rate(2e-5, warmup_steps=100, schedule="constant"),
      ),
    ),
    optimizers={"transformer": optimizers.OptimizerConfig()},
    accumulate=2,
    ema_decay=0.99,
    mesh={"fsdp": 8},
    checkpoint_every=250,
    sample_every=0,
  )
