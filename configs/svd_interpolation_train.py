r"""Frame interpolation: two frames in, the three between them out.

vidgen prepare --dataset=video_folder --source=my_videos --data_dir=data
vidgen train --config=configs/svd_interpolation_train.py \
    --workdir=runs/svd_interpolation

Hardware: 32 GPUs of 80 GB; it starts from what svd_t2v_finetune_train.py makes.
Cost: an estimate, nothing of it was run. 15 TFLOP a clip by `model.flops`, or
62 with the way back and what is computed again: 1.6e20 FLOP in all, or 5
H100-days at 40 % of 989 TFLOP/s, and the encoders.
Expect: videos at four times the rate, and again with each pass; no figures of
ours at this size. Blattmann et al., https://arxiv.org/abs/2311.15127, section
4.4 and appendix D.5: 9 channels, of which one says which frames are given, a
learned embedding of latents where none is, noise on given latents, and CLIP's
embeddings of both as context. Steps, batch, noise, average and learning rate
are the paper's. The learned embedding is 72x128 latents, the size in training;
the paper prints a height of 52, which no 576 pixels give.
"""

from vidgen import optimizers, train
from vidgen.data import buckets, loader
from vidgen.models import svd
from vidgen.tasks import diffusion, noising, sources


def get_config() -> train.TrainConfig:
  """Returns the run."""
  return train.TrainConfig(
    task=diffusion.DiffusionTaskConfig(
      source=sources.Source(
        checkpoint="stabilityai/stable-video-diffusion-img2vid",
        model=svd.config_interpolation(),
        parts={"unet": "runs/svd_t2v_finetune/published"},
        grow=("unet",),
      ),
      noising=noising.NoisingConfig(log_sigma=(1.0, 1.2)),
      remat="full",
    ),
    stages=(
      train.Stage(
        10_000,
        loader.DataConfig(
          dataset="video_folder",
          data_dir="data",
          fps=24.0,
          buckets=(buckets.Bucket(5, 576, 1024, 256),),
          threads=16,
        ),
        optimizers.Rate(1e-4, warmup_steps=500, schedule="constant"),
      ),
    ),
    optimizers={"unet": optimizers.OptimizerConfig()},
    accumulate=4,
    ema_decay=0.9999,
    mesh={"data": 4, "fsdp": 8},
    sample_every=0,
  )
