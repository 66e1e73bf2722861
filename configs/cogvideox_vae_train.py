r"""CogVideoX's autoencoder from random weights: L1, LPIPS, KL, then a critic.

vidgen prepare --dataset=video_folder --source=my_videos --data_dir=data
vidgen train --config=configs/cogvideox_vae_train.py --workdir=runs/vae
"""

from vidgen import optimizers, train
from vidgen.data import buckets, loader
from vidgen.models import cogvideox
from vidgen.tasks import autoencoder, autoencoding


def _data(
  *shapes: tuple[int, int, float], **fields: float
) -> loader.DataConfig:
  return loader.DataConfig(
    dataset="video_folder",
    data_dir="data",
    buckets=tuple(
      buckets.Bucket(frames, 256, 256, size, weight)
      for frames, size, weight in shapes
    ),
    threads=16,
    **fields,
  )


def get_config() -> train.TrainConfig:
  """Returns the run."""
  adam = optimizers.OptimizerConfig(name="adam", options={"b1": 0.5, "b2": 0.9})
  return train.TrainConfig(
    task=autoencoding.AutoencoderTaskConfig(
      model=cogvideox.config_5b(),
      loss=autoencoder.AutoencoderLossConfig(
        l1=1.0,
        lpips=1.0,
        kl=1e-6,
        adversarial=0.5,
        adversarial_start=5000,
      ),
      dtype="bfloat16",
    ),
    stages=(
      train.Stage(
        300_000,
        _data((17, 16, 2.0), (1, 128, 1.0), fps=16.0),
        optimizers.Rate(1e-4, warmup_steps=1000, final=0.5),
      ),
      train.Stage(50_000, _data((49, 8, 1.0), fps=8.0), optimizers.Rate(5e-5)),
    ),
    optimizers={"vae": adam, "discriminator": adam},
    mesh={"fsdp": 8},
    sample_every=0,
  )
