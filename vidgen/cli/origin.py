"""How a job was called, for its manifest."""

import pathlib

from absl import flags

from vidgen import provenance
from vidgen.cli import cache, parse


def of(values: flags.FlagValues, out_flag: str) -> provenance.Origin:
  """Returns the command line that set these flags, and the config it named.

  Args:
    values: From `parse.parse`.
    out_flag: The flag that names the folder that the job writes to.
  """
  argv = parse.said(values)
  path = parse.config_path(argv)
  text = None
  if path is not None:
    file = pathlib.Path(path.split(":")[0])
    text = file.read_text(encoding="utf-8", errors="replace")
  return provenance.Origin(argv, out_flag, path, text, cache.hashes())
