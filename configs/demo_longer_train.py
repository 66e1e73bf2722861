r"""The small model, trained on from where two cores left it.

vidgen prepare --dataset=moving_shapes --data_dir=data --num_clips=24000
vidgen encode --config=configs/demo_longer_train.py --out=runs/demo_longer_cache
vidgen train --config=configs/demo_longer_train.py --workdir=runs/demo_longer

Starts from `runs/demo_dit/published`, which configs/demo_dit_train.py makes.
Hardware: one GPU; two cores would take days.
Cost: see README.md, "A small model on two cores".
Expect: the figures of README.md, which `python tests/bench/demo_report.py
--checkpoint=runs/demo_longer/published` prints.
"""

from vidgen import optimizers, train
from vidgen.data import buckets, loader
from vidgen.tasks import diffusion, noising, sources


def get_config() -> train.TrainConfig:
  """Returns the run."""
  data = loader.DataConfig(
    dataset="moving_shapes",
    data_dir="data",
    buckets=(buckets.Bucket(17, 64, 64, 64),),
    cache="runs/demo_longer_cache",
    workers=4,
  )
  return train.TrainConfig(
    task=diffusion.DiffusionTaskConfig(
      source=sources.Source(checkpoint="runs/demo_dit/published"),
      noising=noising.NoisingConfig(timesteps=((0, 1000, 1.0),)),
      train_text_encoder=True,
      dtype="float32",
    ),
    stages=(
      train.Stage(
        24000, data, optimizers.Rate(1.5e-3, warmup_steps=200, final=0.02)
      ),
    ),
    optimizers={
      name: optimizers.OptimizerConfig(
        name="muon",
        options={
          "adam_b1": 0.9,
          "adam_b2": 0.98,
          "consistent_rms": 0.2,
          "weight_decay": 0.01,
        },
      )
      for name in ("transformer", "text_encoder")
    },
    ema_decay=0.999,
    checkpoint_every=4000,
    sample_every=0,
    log_every=100,
  )
