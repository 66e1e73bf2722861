"""Times vidgen on this machine: one cold clip, then warm ones.

usage: vidgen bench [--config=FILE] [flags]

  --config=FILE       a config of `vidgen sample`; any of its fields can be
                      overridden by --config.FIELD=VALUE
  --checkpoint=NAME   a folder in either layout, or a hub id
  --runs=N            warm clips, 3 by default; medians are told
  --json=FILE         writes the figures there too

example
  vidgen bench --config=configs/cogvideox_2b_sample.py --json=bench.json
"""

import os
import sys

from absl import flags

from vidgen import bench, progress, sample
from vidgen.cli import cache, default_sample_config, parse


def define(values: flags.FlagValues, argv: list[str]) -> None:
  """Defines the flags of this command."""
  default = os.path.abspath(default_sample_config.__file__)
  parse.define_config(values, argv, sample.SampleConfig, default)
  flags.DEFINE_string("checkpoint", None, "", flag_values=values)
  flags.DEFINE_string("json", None, "", flag_values=values)
  flags.DEFINE_integer("runs", 3, "", flag_values=values)


def run(values: flags.FlagValues) -> None:
  """Runs the benchmark and prints its figures."""
  config = values["config"].value
  if values["checkpoint"].value is not None:
    config.checkpoint = values["checkpoint"].value
  cache.enable()
  report = bench.run(
    config, runs=values["runs"].value, progress=progress.create(sys.stderr)
  )
  if values["json"].value is not None:
    bench.write_json(values["json"].value, report)
  print(report)
