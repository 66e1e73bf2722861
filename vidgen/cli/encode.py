"""Encodes the clips of a training run once, for its steps to read.

usage: vidgen encode --config=FILE --out=DIR [flags]

  --config=FILE       the config of the run, of a diffusion model
  --out=DIR           the cache, a new folder; it appears whole, at the end
  --dtype=NAME        of what is stored: float32 by default, bfloat16, float16
  --windows=K         windows of each clip that is longer than its bucket, and
                      frames of it for a bucket of images: K of them, spread
                      evenly, 1 by default
  --batch_size=N      clips that are encoded at once; by default as many as a
                      step of their bucket has

any field of the config, --config.FIELD=VALUE; see vidgen train --help

The latents of every stage and bucket are kept, what stages share once, and the
embeddings of all captions unless the run trains its text encoder. Set the
config's `data.cache` to DIR, and vidgen train reads that. Every run checks that
the cache is of its data and its encoders. A command that was stopped goes on
where it ended; exit code 75 says that it was asked to stop.

example
  vidgen encode --config=configs/demo_dit_train.py --out=runs/demo_cache
"""

import sys

from absl import flags

from vidgen import errors
from vidgen.cli import cache, parse


def define(values: flags.FlagValues, argv: list[str]) -> None:
  """Defines the flags of this command."""
  # Imported here: --help needs none of it.
  from vidgen import encode, train
  from vidgen.data import cache as caches

  parse.require_config(argv, "configs/demo_dit_train.py", "a training run")
  parse.define_config(values, argv, train.TrainConfig, "")
  options = encode.Options()
  flags.DEFINE_string("out", None, "", flag_values=values)
  flags.DEFINE_enum(
    "dtype", options.dtype, caches.DTYPES, "", flag_values=values
  )
  flags.DEFINE_integer("windows", options.windows, "", flag_values=values)
  flags.DEFINE_integer("batch_size", None, "", flag_values=values)


def run(values: flags.FlagValues) -> None:
  """Encodes, and says what is where."""
  from vidgen import encode, progress

  if not values["out"].value:
    raise errors.InputError(
      "--out is missing; name the cache's folder, --out=runs/NAME_cache."
    )
  cache.enable()
  options = encode.Options(
    values["dtype"].value,
    values["windows"].value,
    values["batch_size"].value,
  )
  with progress.create(sys.stderr) as told:
    report = encode.run(
      values["config"].value, values["out"].value, options, told
    )
  print(report)
