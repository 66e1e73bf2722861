r"""The autoencoder of the small model, from moving shapes alone.

vidgen prepare --dataset=moving_shapes --data_dir=data
vidgen train --config=configs/demo_vae_train.py --workdir=runs/demo_vae

Hardware: 2 CPU cores, 4 GB.
Cost: see README.md, "A small model on two cores".
Expect: at least 30 dB PSNR on validation clips.
Stages: single frames first, in which the past taps of the causal kernels stay
zero, then clips of 9 frames, at last with small steps. Clips of 17 take twice
as long and come out no better.
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
      init_past_taps="zeros",
      # Flat backgrounds would drown the shapes: what differs from the mean of
      # its frame weighs up to 13 times as much.
      loss=autoencoder.AutoencoderLossConfig(
        l1=1.0, mse=0.5, gradient=0.5, contrast=6.0, lpips=0.0, kl=1e-4
      ),
    ),
    stages=(
      train.Stage(
        num_steps=2500,
        data=_data(1, 4),
        rate=optimizers.Rate(2e-3, warmup_steps=100, final=0.3),
        options={"freeze_past_taps": True},
      ),
      train.Stage(
        num_steps=1800,
        data=_data(9, 2),
        rate=optimizers.Rate(6e-4, warmup_steps=100, final=0.3),
      ),
      train.Stage(
        num_steps=600,
        data=_data(9, 2),
        rate=optimizers.Rate(3e-4, warmup_steps=50, final=0.05),
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
