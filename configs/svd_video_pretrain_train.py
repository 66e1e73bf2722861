r"""Stage II of Stable Video Diffusion: text to video, 256x384, then 320x576.

vidgen prepare --dataset=video_folder --source=my_videos --data_dir=data
vidgen train --config=configs/svd_image_pretrain_train.py \
    --workdir=runs/svd_image_pretrain
vidgen train --config=configs/svd_video_pretrain_train.py \
    --workdir=runs/svd_video_pretrain

Hardware: 64 GPUs of 80 GB. By count of parameters a device holds 4 GB of
weights, gradients, Adam's moments and averages, and 1 GB of the text encoder
and the autoencoder; what a block computes is computed again.
Cost: an estimate, nothing of it was run. 6.0 and 11.6 TFLOP a clip by
`model.flops`, or four times as much with the way back and what is computed
again: 7.4e21 FLOP in all, or 220 H100-days at 40 % of 989 TFLOP/s, and the
encoders.
Expect: no figures of ours; the paper's base model has an FVD of 242 on UCF-101,
without having seen it. Blattmann et al., https://arxiv.org/abs/2311.15127,
appendix D.2: layers over time join the image model of stage I, which they begin
as, and all layers train. Steps, sizes, batches, noise and the peak of the
learning rate are the paper's; its schedule is our choice, and so is how often a
batch is of images, whose layers over time are switched off. Motion is told by a
rule of ours; see `vidgen.tasks.facts`.
"""

from vidgen import optimizers, train
from vidgen.data import buckets, loader
from vidgen.models import svd
from vidgen.tasks import diffusion, noising, sources


def _data(height: int, width: int, batch_size: int) -> loader.DataConfig:
  return loader.DataConfig(
    dataset="video_folder",
    data_dir="data",
    fps=6.0,
    buckets=(
      buckets.Bucket(14, height, width, batch_size, 4.0),
      buckets.Bucket(1, height, width, batch_size, 1.0),
    ),
    threads=16,
    prefetch=1,
  )


def get_config() -> train.TrainConfig:
  """Returns the run."""
  rate = optimizers.Rate
  return train.TrainConfig(
    task=diffusion.DiffusionTaskConfig(
      # Text encoder and autoencoder are the published ones, and stay so.
      source=sources.Source(
        checkpoint="stabilityai/stable-diffusion-2-1-base",
        model=svd.config_text_to_video(),
        parts={"unet": "runs/svd_image_pretrain/published"},
        grow=("unet",),
      ),
      noising=noising.NoisingConfig(log_sigma=(-1.2, 1.0), text_dropout=0.15),
      remat="full",
      samples=diffusion.SampleSettings(
        prompts=("A panda plays the guitar.", "Waves roll onto a beach."),
        height=320,
        width=576,
      ),
    ),
    stages=(
      train.Stage(
        150_000,
        _data(256, 384, 1536),
        rate(1e-4, warmup_steps=1000, schedule="constant"),
      ),
      train.Stage(
        100_000,
        _data(320, 576, 768),
        rate(1e-4, schedule="constant"),
        options={"log_sigma": (0.0, 1.0)},
      ),
    ),
    optimizers={"unet": optimizers.OptimizerConfig()},
    accumulate=6,
    mesh={"data": 8, "fsdp": 8},
    sample_every=5000,
  )
