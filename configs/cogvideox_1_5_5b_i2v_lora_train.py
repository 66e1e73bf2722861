r"""CogVideoX1.5-5B-I2V with a LoRA of rank 128, trained on a folder of videos.

vidgen prepare --dataset=video_folder --source=my_videos --data_dir=data
vidgen train --config=configs/cogvideox_1_5_5b_i2v_lora_train.py \
    --workdir=runs/1_5_lora

Hardware: one GPU of 80 GB. By count of parameters it holds 21 GB of frozen
weights and 3 GB for the 132 million of the LoRA, gradients and Adam's moments
among them; by count of tokens the inputs of the 42 blocks are 12 GB, and all
else is computed again. Upstream needs 35 GB, with T5 and the autoencoder put
away (finetune/README.md of zai-org/CogVideo).
Cost: an estimate: 21 PFLOP a step of 4 videos by `model.flops` with what is
computed again and the autoencoder, or 52 s a step and 15 hours in all at 40 %
of the 989 TFLOP/s of an H100.
Expect: videos in the manner of the folder's, from their first frame. The
image's latents are scaled as the published pipeline does it, by 1 / 0.7, and
not as upstream's own fine-tuning, by 0.7: what is trained fits what samples. To
see samples, name images: --config.task.samples needs one for each prompt.
"""

from vidgen import adapters, optimizers, train
from vidgen.data import buckets, loader
from vidgen.tasks import diffusion, noising, sources


def get_config() -> train.TrainConfig:
  """Returns the run."""
  return train.TrainConfig(
    task=diffusion.DiffusionTaskConfig(
      source=sources.Source(checkpoint="THUDM/CogVideoX1.5-5B-I2V"),
      noising=noising.NoisingConfig(image_dropout=0.05),
      lora=adapters.LoraConfig(rank=128, alpha=64.0),
      dtype="bfloat16",
      remat="full",
    ),
    stages=(
      train.Stage(
        num_steps=1000,
        data=loader.DataConfig(
          dataset="video_folder",
          data_dir="data",
          fps=16.0,
          buckets=(buckets.Bucket(81, 768, 1360, 4),),
          prefetch=2,
        ),
        rate=optimizers.Rate(2e-4, warmup_steps=100, schedule="constant"),
      ),
    ),
    optimizers={"transformer_lora": optimizers.OptimizerConfig()},
    accumulate=4,
    ema_decay=0.99,
    checkpoint_every=250,
    sample_every=0,
  )
