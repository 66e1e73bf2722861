r"""CogVideoX's autoencoder from random weights: L1, LPIPS, KL, then a critic.

vidgen prepare --dataset=video_folder --source=my_videos --data_dir=data
vidgen train --config=configs/cogvideox_vae_train.py --workdir=runs/vae

Hardware: 8 GPUs of 80 GB, by count: nothing of it was run. The 216 million
parameters, their gradients, moments and averages are 0.5 GB of each device. The
inputs of residual blocks, which the backward pass keeps, are by tracing 12 kB
for each pixel of a frame: 27 GB for two clips of 17 frames, 38 GB for one of
49. All else within the blocks is computed again; kept, it would be 12 times as
much.
Cost: an estimate: 1.9 PFLOP a step of 16 clips of 17 frames, LPIPS and critic
left out, which is 0.6 s at 40 % of the 989 TFLOP/s of 8 H100, and two and a
half days for all steps; convolutions of so few channels may well reach less.
Expect: no figures of ours; the published one has 29.1 dB PSNR on its authors'
clips (Yang et al., https://arxiv.org/abs/2408.06072, table 2). The losses, 17
frames of 256x256 first and the critic after some thousand steps are the paper's
(section 2.1). Its weights, rates and numbers of steps are not published: they
are our choice, as are images among the clips. Its long clips have 161 frames,
over which it splits devices; here they have 49. It draws 8 or 16 frames a
second by chance, here the stages have one each.
"""

from vidgen import optimizers, train
from vidgen.data import buckets, loader
from vidgen.models import cogvideox
from vidgen.tasks import autoencoder, autoencoding


def _data(
  *shapes: tuple[int, int, float], **fields: float
) -> loader.DataConfig:
  return loader.DataConfig(
    dataset="video_folder",
    data_dir="data",
    buckets=tuple(
      buckets.Bucket(frames, 256, 256, size, weight)
      for frames, size, weight in shapes
    ),
    threads=16,
    **fields,
  )


def get_config() -> train.TrainConfig:
  """Returns the run."""
  adam = optimizers.OptimizerConfig(name="adam", options={"b1": 0.5, "b2": 0.9})
  return train.TrainConfig(
    task=autoencoding.AutoencoderTaskConfig(
      model=cogvideox.config_5b(),
      loss=autoencoder.AutoencoderLossConfig(
        l1=1.0,
        lpips=1.0,
        kl=1e-6,
        adversarial=0.5,
        adversarial_start=5000,
      ),
      dtype="bfloat16",
      remat=True,
    ),
    stages=(
      train.Stage(
        300_000,
        _data((17, 16, 2.0), (1, 128, 1.0), fps=16.0),
        optimizers.Rate(1e-4, warmup_steps=1000, final=0.5),
      ),
      train.Stage(50_000, _data((49, 8, 1.0), fps=8.0), optimizers.Rate(5e-5)),
    ),
    optimizers={"vae": adam, "discriminator": adam},
    mesh={"fsdp": 8},
    sample_every=0,
  )
