r"""CogVideoX-2b from random weights: 256x384, then 480x720, then 768x1360.

vidgen prepare --dataset=video_folder --source=my_videos --data_dir=data
vidgen train --config=configs/cogvideox_2b_train.py --workdir=runs/2b

Hardware: 64 GPUs of 80 GB. By count of parameters a device holds 4 GB of
weights, gradients, Adam's moments and averages, and 1 GB of T5 and autoencoder;
by count of tokens the inputs of the 30 blocks are at most 9 GB, and all else is
computed again.
Cost: an estimate, nothing of it was run. 1.6e23 FLOP by `model.flops`, or with
what is computed again, T5 and the autoencoder 2.9e23: 8500 H100-days (3000,
3300 and 2200 by stage) at 40 % of 989 TFLOP/s. Upstream's samples reach 37 %:
90 s for 50 guided steps of the 5b.
Expect: no figures of ours. Stages, steps, videos of a batch, AdamW and clipping
are the paper's (Yang et al., https://arxiv.org/abs/2408.06072, tables 5 and 6).
Of the learning rate it tells the cosine alone: its peaks and warm-up here are
our choice, as is how often a batch is of 49 frames, 17 or 1 (images). Every
batch has one shape, with as many tokens as the paper's number of 49 frames; the
paper packs shapes together, and its last stage is of 10 s, which this model's
positions were not made for. Its fourth stage, on the best fifth of its data, is
a fine-tuning: see cogvideox_5b_finetune_train.py.
"""

from vidgen import optimizers, train
from vidgen.data import buckets, loader
from vidgen.tasks import diffusion, sources

_MESH = {"data": 8, "fsdp": 8}
_ACCUMULATE = 4
# What a batch is a multiple of.
_PARTS = 64 * _ACCUMULATE

# Frames and how often: the longest clips, short ones, images.
_LENGTHS = ((49, 2.0), (17, 1.0), (1, 1.0))


def _data(height: int, width: int, batch_size: int) -> loader.DataConfig:
  """Every bucket has the tokens of `batch_size` clips of 49 frames."""
  tokens = 13 * (height // 16) * (width // 16)
  return loader.DataConfig(
    dataset="video_folder",
    data_dir="data",
    fps=8.0,
    buckets=tuple(
      buckets.Bucket(frames, height, width, 0, weight)
      for frames, weight in _LENGTHS
    ),
    token_budget=batch_size * tokens,
    batch_multiple=_PARTS,
    threads=16,
    prefetch=1,
  )


def get_config() -> train.TrainConfig:
  """Returns the run."""
  rate = optimizers.Rate
  return train.TrainConfig(
    task=diffusion.DiffusionTaskConfig(
      # The autoencoder and T5 are the published ones, and stay as they are.
      source=sources.Source(
        checkpoint="THUDM/CogVideoX-2b", scratch=("transformer",)
      ),
      dtype="bfloat16",
      remat="full",
      samples=diffusion.SampleSettings(
        prompts=("A panda plays the guitar.", "Waves roll onto a beach.")
      ),
    ),
    stages=(
      train.Stage(
        400_000,
        _data(256, 384, 2048),
        rate(2e-4, warmup_steps=2000, final=0.5),
      ),
      train.Stage(220_000, _data(480, 720, 1024), rate(1e-4, final=0.5)),
      train.Stage(120_000, _data(768, 1360, 256), rate(5e-5)),
    ),
    optimizers={"transformer": optimizers.OptimizerConfig()},
    accumulate=_ACCUMULATE,
    mesh=_MESH,
    sample_every=5000,
  )
