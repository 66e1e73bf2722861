r"""CogVideoX-5b with a LoRA of rank 128, trained on a folder of videos.

vidgen prepare --dataset=video_folder --source=my_videos --data_dir=data
vidgen train --config=configs/cogvideox_5b_lora_train.py --workdir=runs/5b_lora

Hardware: one GPU of 80 GB. By count of parameters it holds 21 GB of frozen
weights and 3 GB for the 132 million of the LoRA, gradients and Adam's moments
among them; by count of tokens the inputs of the 42 blocks are 5 GB, and all
else is computed again. Upstream needs 24 GB, with T5 and the autoencoder put
away (finetune/README.md of zai-org/CogVideo).
Cost: an estimate: 4.6 PFLOP a step of 4 videos by `model.flops` with what is
computed again and the autoencoder, or 12 s a step and 3 hours in all at 40 % of
the 989 TFLOP/s of an H100. With --config.stages[0].data.cache=DIR, which
`vidgen encode` makes of the same config, a step is an eighth shorter.
Expect: videos in the manner of the folder's, by --config.lora=FILE of `vidgen
sample`, FILE being runs/5b_lora/published/pytorch_lora_weights.safetensors, and
by `load_lora_weights` of diffusers. Rank and alpha are those of upstream's
finetune/schemas/args.py; the learning rate is our choice, within what its
authors name.
"""

from vidgen import adapters, optimizers, train
from vidgen.data import buckets, loader
from vidgen.tasks import diffusion, sources


def get_config() -> train.TrainConfig:
  """Returns the run."""
  return train.TrainConfig(
    task=diffusion.DiffusionTaskConfig(
      source=sources.Source(checkpoint="THUDM/CogVideoX-5b"),
      lora=adapters.LoraConfig(rank=128, alpha=64.0),
      dtype="bfloat16",
      remat="full",
      samples=diffusion.SampleSettings(prompts=("A panda plays the guitar.",)),
    ),
    stages=(
      train.Stage(
        num_steps=1000,
        data=loader.DataConfig(
          dataset="video_folder",
          data_dir="data",
          fps=8.0,
          buckets=(buckets.Bucket(49, 480, 720, 4),),
        ),
        rate=optimizers.Rate(2e-4, warmup_steps=100, schedule="constant"),
      ),
    ),
    optimizers={"transformer_lora": optimizers.OptimizerConfig()},
    accumulate=4,
    ema_decay=0.99,
    checkpoint_every=250,
    sample_every=250,
  )
