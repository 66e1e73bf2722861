"""Changes the layout of a checkpoint, or its precision.

usage: vidgen convert --source=NAME --target=DIR --layout=LAYOUT [flags]

  --source=NAME       a folder in either layout, or a hub id
  --target=DIR        a folder that is new or empty
  --layout=LAYOUT     published: as diffusers reads it; orbax: as runs save it
  --dtype=NAME        of the weights: float32, bfloat16 or float16; without it
                      they keep their bits

example
  vidgen convert --source=THUDM/CogVideoX-2b --target=2b --layout=orbax
"""

from absl import flags

from vidgen import checkpoint, errors

LAYOUTS = ("published", "orbax")
DTYPES = ("float32", "bfloat16", "float16")


def define(values: flags.FlagValues, argv: list[str]) -> None:
  """Defines the flags of this command."""
  del argv
  flags.DEFINE_string("source", None, "", flag_values=values)
  flags.DEFINE_string("target", None, "", flag_values=values)
  flags.DEFINE_enum("layout", None, LAYOUTS, "", flag_values=values)
  flags.DEFINE_enum("dtype", None, DTYPES, "", flag_values=values)


def run(values: flags.FlagValues) -> None:
  """Converts the checkpoint."""
  for name in ("source", "target", "layout"):
    if not values[name].value:
      raise errors.InputError(f"--{name} is missing; see --help.")
  source, target = values["source"].value, values["target"].value
  checkpoint.convert(
    source, target, values["layout"].value, values["dtype"].value
  )
  print(f"{source} is now in {target}, in the {values['layout'].value} layout.")
