r"""The small model's decoder, trained on for latents of mean 0 and deviation 1.

vidgen train --config=configs/demo_vae_train.py --workdir=runs/demo_vae
vidgen train --config=configs/demo_decoder_train.py --workdir=runs/demo_decoder

Hardware: 2 CPU cores, 4 GB.
Cost: see README.md, "A small model on two cores".
Expect: a decoder that reads latents with noise; clean ones come back 0.2 dB
worse. The model that ships has its first step alone (README.md).
The encoder's last layer is scaled before the first step, and stays as it is.
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
      checkpoint="runs/demo_vae/published",
      normalise=_data(17, 16),
      loss=autoencoder.AutoencoderLossConfig(
        l1=1.0,
        mse=0.5,
        gradient=0.5,
        contrast=6.0,
        lpips=0.0,
        kl=0.0,
        freeze_encoder=True,
        latent_noise=0.25,
      ),
    ),
    stages=(
      train.Stage(
        num_steps=1300,
        data=_data(9, 2),
        rate=optimizers.Rate(6e-4, warmup_steps=100, final=0.02),
      ),
    ),
    optimizers={
      "vae": optimizers.OptimizerConfig(
        name="adam", options={"b1": 0.9, "b2": 0.99}
      )
    },
    ema_decay=0.99,
    # Two clips are a small batch, whose losses differ a lot.
    spike_sigmas=0.0,
    checkpoint_every=300,
    sample_every=1000,
  )
