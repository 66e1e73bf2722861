r"""Image to video: the base at 320x576, then 14 or 25 frames of 576x1024.

vidgen prepare --dataset=video_folder --source=my_videos --data_dir=data
vidgen train --config=configs/svd_i2v_train.py --workdir=runs/svd_i2v
vidgen train --config=configs/svd_i2v_train.py:25 --workdir=runs/svd_i2v_xt

Hardware: 64 GPUs of 80 GB; it starts from what svd_video_pretrain_train.py
makes.
Cost: an estimate, nothing of it was run. 11.6, then 43 TFLOP a clip by
`model.flops` (25 frames: 77), or four times as much with the way back and what
is computed again: 8.4e21 FLOP, or 250 H100-days at 40 % of 989 TFLOP/s (25
frames: 1.4e22, 400), and the encoders.
Expect: videos that go on from the image, as the published Stable Video
Diffusion and its XT; no figures of ours. Blattmann et al.,
https://arxiv.org/abs/2311.15127, section 4.2 and appendix D.4: CLIP's embedding
of the image stands where the text's stood, and the image's latents beside the
noisy ones, with noise of ln(sigma) ~ N(-3, 0.5²) on its pixels. Steps, sizes,
batches, noise and the peak of the learning rate are the paper's; it tells no
rate for the first, and not how often conditions are left out: each of the three
ways has one clip in ten, as community trainers have it. The autoencoder has the
published decoder over time. Both stages may read other data: set
--config.stages[1].data.data_dir to the better videos.
"""

from vidgen import optimizers, train
from vidgen.data import buckets, loader
from vidgen.models import svd
from vidgen.tasks import diffusion, noising, sources


def _data(
  num_frames: int, height: int, width: int, batch_size: int
) -> loader.DataConfig:
  return loader.DataConfig(
    dataset="video_folder",
    data_dir="data",
    fps=6.0,
    buckets=(buckets.Bucket(num_frames, height, width, batch_size),),
    threads=16,
    prefetch=1,
  )


def get_config(num_frames: str = "14") -> train.TrainConfig:
  """Returns the run, for 14 or 25 frames."""
  frames = int(num_frames)
  model = svd.config_svd()
  model.unet.num_frames = frames
  rate = optimizers.Rate
  return train.TrainConfig(
    task=diffusion.DiffusionTaskConfig(
      source=sources.Source(
        checkpoint="stabilityai/stable-video-diffusion-img2vid",
        model=model,
        parts={"unet": "runs/svd_video_pretrain/published"},
        grow=("unet",),
      ),
      noising=noising.NoisingConfig(
        log_sigma=(0.7, 1.6),
        image_dropouts=(0.1, 0.1, 0.1),
        image_noise=(-3.0, 0.5),
      ),
      remat="full",
    ),
    stages=(
      train.Stage(
        50_000,
        _data(14, 320, 576, 768),
        rate(3e-5, warmup_steps=1000, schedule="constant"),
      ),
      train.Stage(
        50_000,
        _data(frames, 576, 1024, 768),
        rate(3e-5, schedule="constant"),
        options={"log_sigma": (1.0, 1.6)},
      ),
    ),
    optimizers={"unet": optimizers.OptimizerConfig()},
    accumulate=12,
    ema_decay=0.9999,
    mesh={"data": 8, "fsdp": 8},
    sample_every=0,
  )
