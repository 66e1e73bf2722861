r"""A small image-to-video model, of one moving shape.

vidgen prepare --dataset=moving_shapes --data_dir=data --num_clips=3000
vidgen train --config=configs/svd_small_vae_train.py \
    --workdir=runs/svd_small_vae
vidgen train --config=configs/svd_small_decoder_train.py \
    --workdir=runs/svd_small_decoder
vidgen encode --config=configs/svd_small_i2v_train.py \
    --out=runs/svd_small_i2v_cache
vidgen train --config=configs/svd_small_i2v_train.py \
    --workdir=runs/svd_small_i2v

Hardware: 2 CPU cores, 2 GB.
Cost: see vidgen/models/svd/README.md, "Small models".
Expect: the first frame is the image, and the shape moves.
`python tests/bench/svd_small.py i2v` prints the figures.
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
        model=svd.config_small(num_frames=9),
        parts={"vae": "runs/svd_small_decoder/published"},
        scratch=("unet", "image_encoder"),
      ),
      noising=noising.NoisingConfig(
        log_sigma=(1.0, 1.6), image_dropouts=(0.0, 0.05, 0.0)
      ),
      # What it sees of the image is learned along.
      train_along=("image_encoder",),
      dtype="float32",
    ),
    stages=(
      train.Stage(
        2400,
        loader.DataConfig(
          dataset="moving_shapes",
          data_dir="data",
          fps=4.0,
          buckets=(buckets.Bucket(9, 32, 32, 8),),
          where={"things": 1},
          cache="runs/svd_small_i2v_cache",
        ),
        optimizers.Rate(
          1.5e-3, warmup_steps=100, schedule="linear", final=0.02
        ),
      ),
    ),
    optimizers={
      name: optimizers.OptimizerConfig(
        name="adamw",
        options={"b1": 0.9, "b2": 0.98, "weight_decay": 0.01},
      )
      for name in ("unet", "image_encoder")
    },
    ema_decay=0.995,
    checkpoint_every=250,
    sample_every=0,
  )
