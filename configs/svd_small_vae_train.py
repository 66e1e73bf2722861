r"""The autoencoder of the small models, from moving shapes or from solids.

vidgen prepare --dataset=moving_shapes --data_dir=data --num_clips=3000
vidgen train --config=configs/svd_small_vae_train.py \
    --workdir=runs/svd_small_vae
vidgen prepare --dataset=orbiting_solids --data_dir=data --num_clips=2000
vidgen train --config=configs/svd_small_vae_train.py:orbiting_solids \
    --workdir=runs/svd_small_vae_solids

Hardware: 2 CPU cores, 2 GB.
Cost: see vidgen/models/svd/README.md, "Small models".
Expect: 29.9 dB PSNR on validation clips of moving shapes, 27.0 dB on orbits.
Its decoder is one of images. In the second stage there is noise on the latents:
what a denoiser leaves is a little off.
"""

from vidgen import optimizers, train
from vidgen.data import buckets, loader
from vidgen.models import svd
from vidgen.tasks import autoencoder, autoencoding


def get_config(dataset: str = "moving_shapes") -> train.TrainConfig:
  """Returns the run, on one of the two datasets."""

  def data(batch_size: int) -> loader.DataConfig:
    return loader.DataConfig(
      dataset=dataset,
      data_dir="data",
      buckets=(buckets.Bucket(1, 32, 32, batch_size),),
    )

  return train.TrainConfig(
    task=autoencoding.AutoencoderTaskConfig(
      model=svd.config_small(num_frames=9),
      # Flat backgrounds would drown the shapes: what differs from the mean of
      # its frame weighs more.
      loss=autoencoder.AutoencoderLossConfig(
        l1=1.0, mse=1.0, gradient=0.5, contrast=4.0, lpips=0.0, kl=1e-4
      ),
    ),
    stages=(
      train.Stage(
        num_steps=900,
        data=data(8),
        rate=optimizers.Rate(3e-3, warmup_steps=50, final=0.1),
      ),
      train.Stage(
        num_steps=150,
        data=data(8),
        rate=optimizers.Rate(3e-4, warmup_steps=10, final=0.1),
        options={"latent_noise": 0.1},
      ),
    ),
    optimizers={
      "vae": optimizers.OptimizerConfig(
        name="adam", options={"b1": 0.9, "b2": 0.98}
      )
    },
    ema_decay=0.99,
    spike_sigmas=0.0,
    checkpoint_every=300,
    sample_every=0,
  )
