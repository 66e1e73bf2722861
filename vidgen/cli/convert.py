"""Changes the layout of a checkpoint.

usage: vidgen convert --source=NAME --target=DIR --layout=published|orbax

  --source=NAME       a folder in either layout, or a hub id
  --target=DIR        a folder that is new or empty
  --layout=LAYOUT     published: as diffusers reads it; orbax: as runs save it

example
  vidgen convert --source=THUDM/CogVideoX-2b --target=2b --layout=orbax
"""

from absl import flags

from vidgen import checkpoint, errors

LAYOUTS = ("published", "orbax")


def define(values: flags.FlagValues, argv: list[str]) -> None:
  """Defines the flags of this command."""
  del argv
  flags.DEFINE_string("source", None, "", flag_values=values)
  flags.DEFINE_string("target", None, "", flag_values=values)
  flags.DEFINE_enum("layout", None, LAYOUTS, "", flag_values=values)


def run(values: flags.FlagValues) -> None:
  """Converts the checkpoint."""
  for name in ("source", "target", "layout"):
    if not values[name].value:
      raise errors.InputError(f"--{name} is missing; see --help.")
  source, target = values["source"].value, values["target"].value
  checkpoint.convert(source, target, values["layout"].value)
  print(f"{source} is now in {target}, in the {values['layout'].value} layout.")
