"""Trains a model.

usage: vidgen train --config=FILE --workdir=DIR [flags]

  --config=FILE       a Python file whose get_config() returns the run; see
                      configs/*_train.py
  --workdir=DIR       the run's folder: its config, checkpoints, metrics,
                      samples, manifest.json, and at the end DIR/published

any field of the config, --config.FIELD=VALUE
  seed num_steps accumulate ema_decay mesh.AXIS checkpoint_every keep
  sample_every log_every spike_sigmas max_skipped task.FIELD ...
  stages[0].num_steps stages[0].data.FIELD stages[0].rate.FIELD ...

The same command goes on where the last one ended. It ends with exit code 0 when
done, 75 when it was asked to stop (SIGTERM) and saved, and 4 when training
diverged.

On several hosts it is started on each; launch/README.md says how. TPU slices,
GKE and SLURM tell each process its place; elsewhere VIDGEN_PROCESS=I of
VIDGEN_PROCESSES=N, and VIDGEN_COORDINATOR=HOST:PORT of process 0, do. One that
is lost ends the others within VIDGEN_HEARTBEAT seconds (60), with exit code 75.

example
  vidgen train --config=configs/demo_vae_train.py --workdir=runs/demo_vae
"""

import dataclasses
import os

from absl import flags

from vidgen import errors
from vidgen.cli import cache, origin, parse


def define(values: flags.FlagValues, argv: list[str]) -> None:
  """Defines the flags of this command."""
  # Imported here: --help needs none of it.
  from vidgen import train

  parse.require_config(argv, "configs/demo_vae_train.py", "a training run")
  parse.define_config(values, argv, train.TrainConfig, "")
  flags.DEFINE_string("workdir", None, "", flag_values=values)


def run(values: flags.FlagValues) -> None:
  """Trains, and says where the result is."""
  from vidgen import joining, train

  if not values["workdir"].value:
    raise errors.InputError(
      "--workdir is missing; name the run's folder, --workdir=runs/NAME."
    )
  cache.enable()
  config, workdir = values["config"].value, values["workdir"].value
  what = {"config": dataclasses.asdict(config), "workdir": workdir}
  with joining.joined(os.environ, what):
    published = train.run(config, workdir, origin.of(values, "workdir"))
  print(f"Trained; the result is in {published}.")
