"""Prepares a dataset for training.

usage: vidgen prepare --dataset=NAME --data_dir=DIR [flags]

  --dataset=NAME           moving_shapes: made here, of any number; its splits
                           are train, validation (the same combinations of
                           shape, colour and motion) and held_out (others).
                           orbiting_solids: made here too, once around a solid
                           from a known height; the same splits.
                           video_folder: your own videos; train, validation
  --data_dir=DIR           where all prepared datasets are
  --seed=N                 of all that is drawn, 0 by default
  --workers=N              processes that make clips, 1 by default; the clips
                           are the same. Not for video_folder

moving_shapes
  --num_clips=N            of train, 1000 by default; a twentieth of it is made
                           for each of the other two
  --two_share=X            the share of clips with two shapes, 0.25 by default

orbiting_solids
  --num_clips=N            as above
  --num_frames=N           views of an orbit, 21 by default

video_folder
  --source=FOLDER          videos, in any codec of FFmpeg, and their captions:
                           a.txt beside a.mp4, one caption a line, or one .csv
                           (columns file, caption) or .jsonl ({"file": "a.mp4",
                           "caption": "..."}) for all. What cannot be used is
                           listed in quarantine.jsonl, with reasons
  --validation_share=X     the share of videos for validation, 0 by default
  --max_frames=N           cuts longer videos into clips of N frames

The dataset appears whole, at the end; a run that was killed is run again.

example
  vidgen prepare --dataset=moving_shapes --data_dir=data --num_clips=10000
"""

import sys

from absl import flags

from vidgen import errors, prepare, progress
from vidgen.data import records


def define(values: flags.FlagValues, argv: list[str]) -> None:
  """Defines the flags of this command."""
  del argv
  flags.DEFINE_enum("dataset", None, records.NAMES, "", flag_values=values)
  for name in ("data_dir", "source"):
    flags.DEFINE_string(name, None, "", flag_values=values)
  for name in ("num_clips", "num_frames", "max_frames"):
    flags.DEFINE_integer(name, None, "", flag_values=values)
  for name in ("two_share", "validation_share"):
    flags.DEFINE_float(name, None, "", flag_values=values)
  flags.DEFINE_integer("seed", 0, "", flag_values=values)
  flags.DEFINE_integer("workers", 1, "", flag_values=values)


def run(values: flags.FlagValues) -> None:
  """Prepares the dataset."""
  for name in ("dataset", "data_dir"):
    if not values[name].value:
      raise errors.InputError(f"--{name} is missing; see --help.")
  config = prepare.PrepareConfig(
    **{
      name: values[name].value
      for name in (
        "dataset", "data_dir", "source", "num_clips", "two_share",
        "num_frames", "validation_share", "max_frames", "seed",
        "workers",
      )
    }
  )  # fmt: skip
  with progress.create(sys.stderr) as told:
    report = prepare.run(config, told)
  print(report)
