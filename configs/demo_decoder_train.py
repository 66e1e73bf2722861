r"""The small model's autoencoder, its latents decorrelated for a denoiser.

vidgen train --config=configs/demo_vae_train.py --workdir=runs/demo_vae
vidgen train --config=configs/demo_vae_longer_train.py \
    --workdir=runs/demo_vae_longer
vidgen train --config=configs/demo_decoder_train.py --workdir=runs/demo_decoder

Hardware: 2 CPU cores, 4 GB.
Cost: see README.md, "A small model on two cores".
Expect: clips that come back as well as before, and better from latents with
noise: where it is a tenth of their deviation, shapes are told in 93 of 100,
and not in 80. All of it is done before the first step: half of the latents'
directions, which outlines need, had less than a hundredth of the largest one's
variance.
"""

from vidgen import optimizers, train
from vidgen.data import buckets, loader, moving_shapes
from vidgen.encoders import word_tokenizer
from vidgen.models import cogvideox
from vidgen.tasks import autoencoder, autoencoding


def _data(num_frames: int, batch_size: int) -> loader.DataConfig:
  return loader.DataConfig(
    dataset="moving_shapes",
    data_dir="data",
    buckets=(buckets.Bucket(num_frames, 64, 64, batch_size),),
  )


def get_config() -> train.TrainConfig:
  """Returns the run."""
  words = moving_shapes.words()
  return train.TrainConfig(
    task=autoencoding.AutoencoderTaskConfig(
      model=cogvideox.config_demo(word_tokenizer.vocab_size(words)),
      checkpoint="runs/demo_vae_longer/published",
      normalise=_data(17, 16),
      whiten=0.5,
      loss=autoencoder.AutoencoderLossConfig(
        l1=1.0,
        mse=0.5,
        gradient=0.5,
        contrast=6.0,
        lpips=0.0,
        kl=0.0,
        freeze_encoder=True,
        latent_noise=0.2,
      ),
    ),
    stages=(train.Stage(1, _data(9, 4), optimizers.Rate(1e-5)),),
    optimizers={
      "vae": optimizers.OptimizerConfig(
        name="adam", options={"b1": 0.9, "b2": 0.99}
      )
    },
    spike_sigmas=0.0,
    sample_every=0,
  )
