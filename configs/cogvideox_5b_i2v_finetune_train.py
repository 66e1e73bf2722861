r"""CogVideoX-5b-I2V, all of its transformer, fine-tuned on a folder of videos.

vidgen prepare --dataset=video_folder --source=my_videos --data_dir=data
vidgen train --config=configs/cogvideox_5b_i2v_finetune_train.py \
    --workdir=runs/5b_i2v_finetune

Hardware: 8 GPUs of 80 GB. By count of parameters a device holds 14 GB of
weights, gradients, Adam's moments and averages, and 1 GB of T5 and autoencoder;
by count of tokens the inputs of the 42 blocks are 5 GB, and all else is
computed again.
Cost: an estimate: 24 PFLOP a step by `model.flops` with what is computed again
and the autoencoder, or 7.5 s a step and 2 hours in all at 40 % of the 989
TFLOP/s of an H100.
Expect: videos in the manner of the folder's, from their first frame. It is
noised, and left out of one in 20 videos, as in the paper's appendix D. The size
is the only one that the model has positions for. To see samples, name images:
--config.task.samples needs one for each prompt.
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
