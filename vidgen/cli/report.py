"""Shows runs on a page for a browser: videos, curves, metrics.

usage: vidgen report DIR [DIR ...] [flags]

  DIR                 what a sampling job or a training run left, its --out or
                      its --workdir; of several, the videos of the same prompt
                      and seed stand side by side
  --out=FILE          the page; DIR/report.html by default, of the first DIR
  --noposters         make no small pictures of the first frames (DIR/posters)

The page is one file that needs no network; it refers to the videos where they
are, so move them together. It may be written while a run is at work.

example
  vidgen report samples_a samples_b --out=compared.html
"""

from absl import flags

from vidgen import errors
from vidgen.cli import parse


def define(values: flags.FlagValues, argv: list[str]) -> None:
  """Defines the flags of this command."""
  del argv
  flags.DEFINE_string("out", None, "", flag_values=values)
  flags.DEFINE_boolean("posters", True, "", flag_values=values)


def run(values: flags.FlagValues) -> None:
  """Writes the page, and says where it is."""
  from vidgen import report

  folders = parse.rest(values)
  if not folders:
    raise errors.InputError(
      "no folder is named; name that of a run, vidgen report runs/NAME."
    )
  path = report.write(
    *folders, out=values["out"].value, posters=values["posters"].value
  )
  print(path)
