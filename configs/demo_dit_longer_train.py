r"""The small model, trained on until it reads the order of words.

vidgen encode --config=configs/demo_dit_train.py --out=runs/demo_cache
vidgen train --config=configs/demo_dit_train.py --workdir=runs/demo_dit
vidgen train --config=configs/demo_dit_longer_train.py \
    --workdir=runs/demo_dit_longer

Hardware: 2 CPU cores, 4 GB.
Cost: see README.md, "A small model on two cores".
Expect: the figures of README.md, which `python tests/bench/demo_report.py
--checkpoint=runs/demo_dit_longer/published` prints.
Only the text encoder tells the denoiser where a word stands. When the model
that ships had its stages of `demo_dit_train.py`, a T5 from scratch began with
attention that what the words are had saturated: "from left to right" went
either way, and of two shapes either was anywhere. So its attention starts anew.
Stages: captions whose order matters first, on black backgrounds; then one
shape; then small ones, of which there are two in a clip; then all. Of the model
that ships the last two stages were a run of their own, which went on from the
averages of the first four.
"""

import dataclasses
from typing import Any

from vidgen import optimizers, train
from vidgen.data import buckets, loader
from vidgen.tasks import diffusion, noising, sources

_CARDINAL = ("right", "left", "up", "down")


def _data(prefer: str | None = None, **where: Any) -> loader.DataConfig:
  return loader.DataConfig(
    dataset="moving_shapes",
    data_dir="data",
    buckets=(buckets.Bucket(17, 64, 64, 16),),
    cache="runs/demo_cache",
    where=where,
    prefer=prefer,
  )


def get_config() -> train.TrainConfig:
  """Returns the run."""
  rate = optimizers.Rate
  hot = rate(1.5e-3, schedule="constant")
  muon = optimizers.OptimizerConfig(
    name="muon",
    options={
      "adam_b1": 0.9,
      "adam_b2": 0.98,
      "consistent_rms": 0.2,
      "weight_decay": 0.01,
    },
  )
  return train.TrainConfig(
    task=diffusion.DiffusionTaskConfig(
      source=sources.Source(
        checkpoint="runs/demo_dit/published",
        parts={"vae": "runs/demo_decoder/published"},
        scratch=("text_encoder/blocks/attention", "text_encoder/position_bias"),
      ),
      noising=noising.NoisingConfig(timesteps=((0, 1000, 1.0),)),
      train_text_encoder=True,
      dtype="bfloat16",
      vae_dtype="float32",
      unroll=6,
      samples=diffusion.SampleSettings(
        prompts=(
          "A red circle moves from left to right.",
          "The small blue star flies from the top to the bottom.",
          "A green square stays still on a white background.",
          "A red star moves right and a blue circle moves left.",
        ),
        num_steps=25,
      ),
    ),
    stages=(
      train.Stage(
        1000,
        _data(
          prefer=r"\bfrom\b", background="black", motions=_CARDINAL, things=1
        ),
        dataclasses.replace(hot, warmup_steps=100),
        # Mostly high, where the text decides.
        options={"timesteps": ((0, 600, 0.15), (600, 1000, 0.85))},
      ),
      train.Stage(
        2500,
        _data(things=1),
        hot,
        options={"timesteps": ((0, 600, 0.35), (600, 1000, 0.65))},
      ),
      train.Stage(3500, _data(sizes="small"), hot),
      train.Stage(5500, _data(), rate(1.5e-3, schedule="linear", final=0.02)),
    ),
    optimizers={"transformer": muon, "text_encoder": muon},
    ema_decay=0.997,
    checkpoint_every=200,
    sample_every=500,
    seed=304,
  )
