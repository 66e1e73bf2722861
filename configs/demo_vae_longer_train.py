r"""The small model's autoencoder, trained on in larger batches.

vidgen train --config=configs/demo_vae_train.py --workdir=runs/demo_vae
vidgen train --config=configs/demo_vae_longer_train.py \
    --workdir=runs/demo_vae_longer

Hardware: one GPU.
Cost: see README.md, "A small model on two cores".
Expect: two dB more than it starts from, 32.8 dB PSNR of one shape.
Before the first step its latents get mean 0 and deviation 1.
"""

from vidgen import optimizers, train
from vidgen.data import buckets, loader, moving_shapes
from vidgen.encoders import word_tokenizer
from vidgen.models import cogvideox
from vidgen.tasks import autoencoder, autoencoding


def _data(num_frames: int) -> loader.DataConfig:
  return loader.DataConfig(
    dataset="moving_shapes",
    data_dir="data",
    buckets=(buckets.Bucket(num_frames, 64, 64, 16),),
  )


def get_config() -> train.TrainConfig:
  """Returns the run."""
  words = moving_shapes.words()
  return train.TrainConfig(
    task=autoencoding.AutoencoderTaskConfig(
      model=cogvideox.config_demo(word_tokenizer.vocab_size(words)),
      checkpoint="runs/demo_vae/published",
      normalise=_data(17),
      # Flat backgrounds would drown the shapes; see demo_vae_train.py.
      loss=autoencoder.AutoencoderLossConfig(
        l1=1.0, mse=0.5, gradient=0.5, contrast=6.0, lpips=0.0, kl=1e-4
      ),
    ),
    stages=(
      train.Stage(
        num_steps=1342,
        data=_data(9),
        rate=optimizers.Rate(8e-4, warmup_steps=100, final=0.01),
      ),
    ),
    optimizers={
      "vae": optimizers.OptimizerConfig(
        name="adam", options={"b1": 0.9, "b2": 0.99}
      )
    },
    ema_decay=0.995,
    spike_sigmas=0.0,
    checkpoint_every=1000,
    sample_every=0,
  )
