r"""The small model itself, T5 and expert DiT, from moving shapes alone.

vidgen train --config=configs/demo_vae_train.py --workdir=runs/demo_vae
vidgen train --config=configs/demo_vae_longer_train.py \
    --workdir=runs/demo_vae_longer
vidgen train --config=configs/demo_decoder_train.py --workdir=runs/demo_decoder
vidgen encode --config=configs/demo_dit_train.py --out=runs/demo_cache
vidgen train --config=configs/demo_dit_train.py --workdir=runs/demo_dit

Hardware: 2 CPU cores, 4 GB.
Cost: see README.md, "A small model on two cores".
Expect: demo_dit_longer_train.py goes on from here, to the figures of README.md;
`python tests/bench/demo_report.py --checkpoint=runs/demo_dit/published` prints
those of this one.
Stages: motion binds to its words on black backgrounds first, where the shape is
always the brighter thing; noise levels are mostly high, where the text decides.
Then all motions, then all backgrounds, then two shapes, then all levels alike.
The model that ships had the first seven stages on latents of an earlier
autoencoder, whose details were lost in the denoiser's error (README.md), and
all but the last two in float32.
"""

from typing import Any

from vidgen import optimizers, train
from vidgen.data import buckets, loader, moving_shapes
from vidgen.encoders import word_tokenizer
from vidgen.models import cogvideox
from vidgen.tasks import diffusion, noising, sources

_HIGH = ((0, 600, 0.15), (600, 1000, 0.85))
_FIRST = ("right", "left", "up", "down", "still")


def _data(**where: Any) -> loader.DataConfig:
  return loader.DataConfig(
    dataset="moving_shapes",
    data_dir="data",
    buckets=(buckets.Bucket(17, 64, 64, 16),),
    cache="runs/demo_cache",
    where=where,
  )


def get_config() -> train.TrainConfig:
  """Returns the run."""
  words = tuple(moving_shapes.words())
  rate = optimizers.Rate
  hot = rate(1.5e-3, schedule="constant")
  down = rate(1.5e-3, schedule="linear", final=0.02)
  even = {"timesteps": ((0, 1000, 1.0),)}
  return train.TrainConfig(
    task=diffusion.DiffusionTaskConfig(
      source=sources.Source(
        model=cogvideox.config_demo(word_tokenizer.vocab_size(words)),
        parts={"vae": "runs/demo_decoder/published"},
        scratch=("transformer", "text_encoder"),
        words=words,
      ),
      noising=noising.NoisingConfig(timesteps=_HIGH),
      train_text_encoder=True,
      # A step takes processors with AMX 0.35 s, not 0.54. The autoencoder stays
      # as exact as the latents it makes.
      dtype="bfloat16",
      vae_dtype="float32",
      unroll=6,
      samples=diffusion.SampleSettings(
        prompts=(
          "A red circle moves to the right.",
          "A small blue star moves down on a white background.",
          "A green square stays still.",
          "The yellow triangle spins on a grey background.",
        ),
        num_steps=25,
      ),
    ),
    stages=(
      train.Stage(
        1500,
        _data(background="black", motions=_FIRST, things=1),
        rate(1.5e-3, warmup_steps=50, schedule="constant"),
      ),
      train.Stage(1500, _data(background="black", things=1), hot),
      train.Stage(1800, _data(things=1), hot),
      train.Stage(1700, _data(), hot),
      train.Stage(3500, _data(), down, options=even),
      # A second round of the last stage.
      train.Stage(
        3500,
        _data(),
        rate(1.5e-3, warmup_steps=200, schedule="constant"),
        options=even,
      ),
      train.Stage(3000, _data(), down, options=even),
      # A third, on the latents that `demo_decoder_train.py` makes.
      train.Stage(
        3500,
        _data(),
        rate(1.5e-3, warmup_steps=100, schedule="constant"),
        options=even,
      ),
      train.Stage(4500, _data(), down, options=even),
      # A fourth: one shape first, which has more to say about shapes.
      train.Stage(
        6000,
        _data(things=1),
        rate(1.5e-3, warmup_steps=100, schedule="constant"),
        options=even,
      ),
      train.Stage(9500, _data(), down, options=even),
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
    ema_decay=0.997,
    checkpoint_every=200,
    sample_every=500,
  )
