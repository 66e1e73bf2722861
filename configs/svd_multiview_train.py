r"""Multi-view: an image of an object in, 21 views around it out.

vidgen prepare --dataset=orbiting_solids --data_dir=data --num_clips=100000
vidgen train --config=configs/svd_multiview_train.py \
    --workdir=runs/svd_multiview

Hardware: 8 GPUs of 80 GB. By count of parameters a device holds 4 GB of
weights, gradients, Adam's moments and averages, and 2 GB of CLIP and the
autoencoder; what a block computes is computed again.
Cost: an estimate. 33 TFLOP a clip by `model.flops`, or 133 with the way back
and what is computed again: 2.5e19 FLOP in all, or 2.2 hours on 8 H100 at 40 %
of 989 TFLOP/s, and the encoders; the paper took 16 hours on 8 A100.
Expect: an orbit at the height that is asked for; no figures of ours at this
size. Blattmann et al., https://arxiv.org/abs/2311.15127, section 4.5 and
appendix D.6: from the image-to-video model of 25 frames, 12000 steps of 16
clips at 1e-5; the network is told the camera's elevation beside the others.
The paper does not tell the noise: it is that of the model it starts from. It
renders Objaverse. Videos of your own need a label `elevation`, in degrees, and
go around once, evenly; solids are rendered in 64x64 and serve as an example.
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
        checkpoint="stabilityai/stable-video-diffusion-img2vid-xt",
        model=svd.config_multiview(),
        grow=("unet",),
      ),
      noising=noising.NoisingConfig(log_sigma=(1.0, 1.6)),
      remat="full",
    ),
    stages=(
      train.Stage(
        12_000,
        loader.DataConfig(
          dataset="orbiting_solids",
          data_dir="data",
          buckets=(buckets.Bucket(21, 576, 576, 16),),
          threads=16,
        ),
        optimizers.Rate(1e-5, warmup_steps=100, schedule="constant"),
      ),
    ),
    optimizers={"unet": optimizers.OptimizerConfig()},
    accumulate=2,
    ema_decay=0.9999,
    mesh={"fsdp": 8},
    sample_every=0,
  )
