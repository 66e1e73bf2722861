r"""Stage I of Stable Video Diffusion: an image model in EDM's framework.

vidgen prepare --dataset=video_folder --source=my_images --data_dir=data
vidgen train --config=configs/svd_image_pretrain_train.py \
    --workdir=runs/svd_image_pretrain

Hardware: 8 GPUs of 80 GB. By count of parameters a device holds 2 GB of
weights, gradients, Adam's moments and averages, and 1 GB of the text encoder
and the autoencoder; what a block computes is computed again.
Cost: an estimate, nothing of it was run. At most 0.4 TFLOP an image of 256x384
by `model.flops`, which counts layers over time, or 1.7 with the way back and
what is computed again: 9 hours at 40 % of the 989 TFLOP/s of an H100.
Expect: no figures of ours. Blattmann et al.,
https://arxiv.org/abs/2311.15127, appendix D.2: Stable Diffusion 2.1 is told
ln(sigma) / 4 instead of one of 1000 levels. At first the embedding of the noise
level alone learns that, 1000 steps at 512x512; then all layers, 30000 steps at
256x384. The paper tells neither the learning rates nor the size of a batch:
they are our choice. "Videos" of a single frame, or any of videos, will do.
"""

from vidgen import optimizers, train
from vidgen.data import buckets, loader
from vidgen.models import svd
from vidgen.tasks import diffusion, noising, sources


def _data(height: int, width: int, batch_size: int) -> loader.DataConfig:
  return loader.DataConfig(
    dataset="video_folder",
    data_dir="data",
    buckets=(buckets.Bucket(1, height, width, batch_size),),
    threads=16,
  )


def get_config() -> train.TrainConfig:
  """Returns the run."""
  rate = optimizers.Rate
  return train.TrainConfig(
    task=diffusion.DiffusionTaskConfig(
      source=sources.Source(
        checkpoint="stabilityai/stable-diffusion-2-1-base",
        model=svd.config_image(),
      ),
      noising=noising.NoisingConfig(log_sigma=(-1.2, 1.0), text_dropout=0.15),
      remat="full",
    ),
    stages=(
      train.Stage(
        1_000,
        _data(512, 512, 1024),
        rate(1e-4, warmup_steps=100, schedule="constant"),
        trainable=("unet/time_embedding/",),
      ),
      train.Stage(
        30_000,
        _data(256, 384, 2048),
        rate(1e-4, warmup_steps=1000, schedule="constant"),
      ),
    ),
    optimizers={"unet": optimizers.OptimizerConfig()},
    accumulate=8,
    mesh={"fsdp": 8},
    sample_every=0,
  )
