r"""Stage III of Stable Video Diffusion: text to video, 576x1024, fine videos.

vidgen prepare --dataset=video_folder --source=my_best_videos --data_dir=data
vidgen train --config=configs/svd_t2v_finetune_train.py \
    --workdir=runs/svd_t2v_finetune

Hardware: 64 GPUs of 80 GB; see svd_video_pretrain_train.py, which makes what
this one starts from.
Cost: an estimate, nothing of it was run. 43 TFLOP a clip by `model.flops`, or
172 with the way back and what is computed again: 6.6e21 FLOP in all, or 190
H100-days at 40 % of 989 TFLOP/s, and the encoders.
Expect: no figures of ours. Blattmann et al.,
https://arxiv.org/abs/2311.15127, section 4.3 and appendix D.2, which has about
a million videos of high quality; steps, batch, noise, average and the peak of
the learning rate are the paper's.
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
        checkpoint="stabilityai/stable-diffusion-2-1-base",
        model=svd.config_text_to_video(),
        parts={"unet": "runs/svd_video_pretrain/published"},
      ),
      noising=noising.NoisingConfig(log_sigma=(0.5, 1.4), text_dropout=0.15),
      remat="full",
      samples=diffusion.SampleSettings(
        prompts=("A panda plays the guitar.", "Waves roll onto a beach.")
      ),
    ),
    stages=(
      train.Stage(
        50_000,
        loader.DataConfig(
          dataset="video_folder",
          data_dir="data",
          fps=6.0,
          buckets=(buckets.Bucket(14, 576, 1024, 768),),
          threads=16,
          prefetch=1,
        ),
        optimizers.Rate(3e-5, warmup_steps=1000, schedule="constant"),
      ),
    ),
    optimizers={"unet": optimizers.OptimizerConfig()},
    accumulate=12,
    ema_decay=0.9999,
    mesh={"data": 8, "fsdp": 8},
    sample_every=5000,
  )
