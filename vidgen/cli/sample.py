"""Makes videos from prompts and images.

usage: vidgen sample --prompt=TEXT | --prompts=FILE | --image=FILE [flags]

What is there already is not made again: a job that was killed goes on where it
was, by the same command.

what to make
  --prompt=TEXT       one prompt
  --prompts=FILE      many: a .txt with a prompt a line, or a .csv or .jsonl
                      whose columns or keys may override fields, line by line;
                      an .array_record of such lines; or DIR:SPLIT of a TFDS
                      data set, of which the captions are taken
  --image=FILE        the first frame, for checkpoints that start from one; a
                      folder makes a clip of each image in it. Checkpoints that
                      take no text need no prompt
  --last_image=FILE   the last frame, for checkpoints that make what is between
  --video=FILE        a video to change, by --config.strength=0.8
  --seed=N            0 by default; the same seed gives the same video

with what, and where to
  --checkpoint=NAME   a folder in either layout, or a hub id; demo, the small
                      model that vidgen carries, by default
  --out=DIR           samples by default; DIR/clips.jsonl says what became of
                      each video
  --shard=i/n         part i of n, counted from 0: jobs that share a DIR. On
                      several hosts each takes its own part
  --verify            read what is there again, and make anew what is damaged
  --config=FILE       a Python file whose get_config() returns all of this;
                      see configs/

any field of the config, --config.FIELD=VALUE
  size     num_frames height width fps videos_per_prompt
  sampler  num_steps guidance_scale sampler negative_prompt strength
  model    revision dtype lora lora.FILE=WEIGHT lora_scale options.NAME
  memory   mesh.AXIS residency tiling executables
  files    formats (some of mp4,gif,png,npz)
  batches  batch_size
  as above prompt prompts image last_image video seed checkpoint out shard

example
  vidgen sample --prompt="A small red circle moves to the right."
  vidgen sample --checkpoint=THUDM/CogVideoX-2b --prompt="A panda plays."
  vidgen sample --checkpoint=DIR --image=panda.png --config.fps=12
"""

import os
import sys

from absl import flags

from vidgen import hosts, progress, sample
from vidgen.cli import cache, default_sample_config, origin, parse

# Flags that set a field of the config, for they are used so often.
_TEXT = (
  *("prompt", "prompts", "checkpoint", "out"),
  *("image", "last_image", "video", "shard"),
)


def define(values: flags.FlagValues, argv: list[str]) -> None:
  """Defines the flags of this command."""
  default = os.path.abspath(default_sample_config.__file__)
  parse.define_config(values, argv, sample.SampleConfig, default)
  for name in _TEXT:
    flags.DEFINE_string(name, None, "", flag_values=values)
  flags.DEFINE_integer("seed", None, "", flag_values=values)
  flags.DEFINE_bool("verify", False, "", flag_values=values)


def run(values: flags.FlagValues) -> None:
  """Runs the sampling job and prints what it took."""
  config = values["config"].value
  given = {name: values[name].value for name in (*_TEXT, "seed")}
  given = {name: value for name, value in given.items() if value is not None}
  # What the command line names takes the place of what the config names.
  for one, other in (("prompt", "prompts"), ("image", "video")):
    if one in given or other in given:
      setattr(config, one, None)
      setattr(config, other, None)
  if "video" in given:
    config.last_image = None
  for name, value in given.items():
    setattr(config, name, value)
  hosts.take_devices(os.environ)
  # A config may say, too, which part this is.
  whole = sample.SampleConfig.shard
  if config.shard == whole and "shard" not in given:
    config.shard = hosts.part(os.environ) or whole
  cache.enable()
  told = progress.create(sys.stderr)
  summary = sample.run(
    config,
    told,
    verify=values["verify"].value,
    origin=origin.of(values, "out"),
  )
  print(summary, flush=True)
  summary.check()
