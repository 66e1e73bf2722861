r"""The small models' autoencoder, its latents decorrelated for a denoiser.

vidgen train --config=configs/svd_small_vae_train.py \
    --workdir=runs/svd_small_vae
vidgen train --config=configs/svd_small_decoder_train.py \
    --workdir=runs/svd_small_decoder
vidgen train --config=configs/svd_small_vae_train.py:orbiting_solids \
    --workdir=runs/svd_small_vae_solids
vidgen train --config=configs/svd_small_decoder_train.py:orbiting_solids \
    --workdir=runs/svd_small_decoder_solids

Hardware: 2 CPU cores, 2 GB.
Cost: see vidgen/models/svd/README.md, "Small models".
Expect: 35.1 dB PSNR on validation clips of moving shapes, 33.0 dB on orbits.
Before, one direction of the latents had 400 times the variance of another,
which a denoiser's error drowns; then it has at most 40 times as much.
"""

from vidgen import optimizers, train
from vidgen.data import buckets, loader
from vidgen.models import svd
from vidgen.tasks import autoencoder, autoencoding

_HOMES = {
  "moving_shapes": "runs/svd_small_vae",
  "orbiting_solids": "runs/svd_small_vae_solids",
}


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
      checkpoint=f"{_HOMES[dataset]}/published",
      normalise=data(64),
      whiten=0.5,
      loss=autoencoder.AutoencoderLossConfig(
        l1=1.0,
        mse=1.0,
        gradient=0.5,
        contrast=4.0,
        lpips=0.0,
        kl=1e-4,
        latent_noise=0.1,
      ),
    ),
    stages=(
      train.Stage(
        num_steps=2000,
        data=data(8),
        rate=optimizers.Rate(1.5e-3, warmup_steps=50, final=0.02),
      ),
    ),
    optimizers={
      "vae": optimizers.OptimizerConfig(
        name="adam", options={"b1": 0.9, "b2": 0.99}
      )
    },
    ema_decay=0.995,
    spike_sigmas=0.0,
    checkpoint_every=500,
    sample_every=0,
  )
