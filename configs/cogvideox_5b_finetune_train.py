r"""CogVideoX-5b, all of its transformer, fine-tuned on a folder of videos.

vidgen prepare --dataset=video_folder --source=my_videos --data_dir=data
vidgen train --config=configs/cogvideox_5b_finetune_train.py \
    --workdir=runs/5b_finetune

Hardware: 8 GPUs of 80 GB. By count of parameters a device holds 14 GB of
weights, gradients, Adam's moments and averages, and 1 GB of T5 and autoencoder;
by count of tokens the inputs of the 42 blocks are 5 GB, and all else is
computed again. Upstream needs 42 GB a device, with ZeRO (finetune/README.md of
zai-org/CogVideo).
Cost: an estimate: 24 PFLOP a step by `model.flops` with what is computed again
and the autoencoder, or 7.5 s a step and 2 hours in all at 40 % of the 989
TFLOP/s of an H100. With --config.stages[0].data.cache=DIR, which `vidgen
encode` makes of the same config, a step is a tenth shorter.
Expect: videos in the manner of the folder's. The learning rate is that of
upstream's finetune/schemas/args.py; how many steps are right depends on the
videos: look at the samples.
"""

from vidgen import optimizers, train
from vidgen.data import buckets, loader
from vidgen.tasks import diffusion, sources


def get_config() -> train.TrainConfig:
  """Returns the run."""
  return train.TrainConfig(
    task=diffusion.DiffusionTaskConfig(
      source=sources.Source(checkpoint="THUDM/CogVideoX-5b"),
      dtype="bfloat16",
      remat="full",
      samples=diffusion.SampleSettings(prompts=("A panda plays the guitar.",)),
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
    sample_every=250,
  )
