"""Compiles a job for TPUs that need not be here, and says whether it fits.

usage: vidgen compile --config=FILE --topology=NAME [flags]

  --config=FILE       a config of `vidgen sample` or `vidgen train`; see
                      configs/
  --topology=NAME     slices of TPUs: v5e:2x4, v6e:16x16, v5p:4x4x4; two of
                      them are 2*v6e:16x16; local is what is here, GPUs too
  --json=FILE         writes the figures there too
  --save=DIR          keeps what was compiled, if it fits: with
                      --config.executables=DIR a job on such devices does not
                      compile again, and is refused on any others

any field of the config, --config.FIELD=VALUE

Of each program: the memory that a device needs for arguments, temporaries and
code, beside weights of others that stay; how many collectives it runs and what
they move; and the seconds that compute, memory and links would each take alone.
No weights are read, and those of a published checkpoint need not be here. Exit
code 1 says that the job does not fit; then changes are tried until one does.

example
  vidgen compile --config=configs/cogvideox_5b_sample.py --topology=v5e:2x4
"""

import os
import pathlib
import tempfile

from absl import flags

from vidgen import errors
from vidgen.cli import parse


def define(values: flags.FlagValues, argv: list[str]) -> None:
  """Defines the flags of this command."""
  if not any(argument.endswith("topology=local") for argument in argv):
    # Before jax looks for devices: those here are of no use.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
  from vidgen import sample, train

  parse.require_config(argv, "configs/cogvideox_5b_sample.py", "a job")
  kinds = (sample.SampleConfig, train.TrainConfig)
  parse.define_config(values, argv, kinds, "")
  for name in ("topology", "json", "save"):
    flags.DEFINE_string(name, None, "", flag_values=values)


def run(values: flags.FlagValues) -> int:
  """Compiles, and prints what that told."""
  from vidgen import compile as compiling
  from vidgen import programs, sample

  if not values["topology"].value:
    raise errors.InputError(
      "--topology is missing; name the slice, for example --topology=v5e:2x4."
    )
  config = values["config"].value
  is_sample = isinstance(config, sample.SampleConfig)
  kind = programs.SampleJob if is_sample else programs.TrainJob
  with tempfile.TemporaryDirectory(prefix="vidgen-") as folder:
    job = kind(config, pathlib.Path(folder))
    report = compiling.run(job, values["topology"].value, values["save"].value)
  if values["json"].value is not None:
    compiling.write_json(values["json"].value, report)
  print(report)
  return 0 if report.fits else 1
