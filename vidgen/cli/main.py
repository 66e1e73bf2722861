"""The `vidgen` command: finds the command and turns errors into one line.

A command is a module with a docstring (its help), `define(flags, argv)`, which
defines its flags, and `run(flags)`, which calls the job and returns its exit
code, where None is 0.
"""

import errno
import importlib
import os
import sys
import types
import warnings
from collections.abc import Sequence

from vidgen import errors, version

# What each command is for; imported only when called, so that help is quick.
COMMANDS = {
  "sample": ("vidgen.cli.sample", "make videos from prompts"),
  "prepare": ("vidgen.cli.prepare", "make a dataset for training"),
  "encode": ("vidgen.cli.encode", "cache what a run would encode each step"),
  "train": ("vidgen.cli.train", "train a model"),
  "compile": ("vidgen.cli.compile", "say whether a job fits a TPU slice"),
  "convert": ("vidgen.cli.convert", "change a checkpoint's layout"),
  "evaluate": ("vidgen.cli.evaluate", "measure videos"),
  "report": ("vidgen.cli.report", "show runs on a page for a browser"),
  "bench": ("vidgen.cli.bench", "time vidgen on this machine"),
  "repro": ("vidgen.cli.repro", "say whether two runs gave the same"),
}

# Those that are given names besides flags.
NAMING = ("repro", "report")

# Those that run as one job in several processes; see `vidgen.hosts`.
JOINING = ("train",)

USAGE = """usage: vidgen COMMAND [flags]

Text and image to video in JAX.

{commands}

vidgen COMMAND --help tells more; vidgen --version tells the version.
"""


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a command and returns its exit code."""
  argv = list(sys.argv[1:] if argv is None else argv)
  with warnings.catch_warnings():
    warnings.showwarning = _show_warning
    try:
      return _dispatch(argv)
    except errors.VidgenError as error:
      _say("error", str(error))
      return error.exit_code
    except KeyboardInterrupt:
      _say("error", "interrupted.")
      return 130
    except BrokenPipeError:
      # Whoever read our output (head, less) has enough of it. Python would
      # complain once more when it closes standard output.
      os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
      return 1
    except Exception as error:
      if not _disk_is_full(error):
        raise
      _say("error", f"{_one_line(str(error))}; free some disk space.")
      return errors.StorageError.exit_code


def _dispatch(argv: list[str]) -> int:
  if not argv or argv[0] in ("help", "--help", "-h", "-help"):
    lines = [f"  {name:9}{about}" for name, (_, about) in COMMANDS.items()]
    print(USAGE.format(commands="\n".join(lines)), end="")
    return 0
  if argv[0] in ("--version", "-version"):
    print(f"vidgen {version.VERSION}")
    return 0
  name, *rest = argv
  if name not in COMMANDS:
    raise errors.InputError(_unknown(name))
  command = importlib.import_module(COMMANDS[name][0])
  if any(flag in ("--help", "-h", "-help", "--helpfull") for flag in rest):
    print(command.__doc__.strip())
    return 0
  if name in JOINING:
    from vidgen import hosts, supervisor

    if (place := hosts.find(os.environ)) is not None:
      again = [sys.executable, "-m", "vidgen.cli.main", *argv]
      return supervisor.run(place, again, os.environ)
  return _run(command, name, rest)


def _run(command: types.ModuleType, name: str, argv: list[str]) -> int:
  """Parses the flags of a command and calls it."""
  # Imported here: --help needs none of it.
  from absl import logging

  from vidgen.cli import parse

  # Libraries tell their own news at levels below.
  logging.set_verbosity(logging.ERROR)
  values = parse.parse(
    command.define, f"vidgen {name}", argv, takes_rest=name in NAMING
  )
  return command.run(values) or 0


def _unknown(name: str) -> str:
  """Returns the line for a command that there isn't."""
  if name.startswith("-"):
    return f"{name}: a command comes first; see vidgen --help."
  import difflib

  close = difflib.get_close_matches(name, COMMANDS, n=1)
  hint = f"did you mean {close[0]}?" if close else "see vidgen --help."
  return f"there is no command {name!r}; {hint}"


def _disk_is_full(error: BaseException | None) -> bool:
  """Says whether a full disk is at the bottom of an error."""
  while error is not None:
    if isinstance(error, OSError) and error.errno in (
      errno.ENOSPC,
      errno.EDQUOT,
    ):
      return True
    # TensorStore tells it in words.
    if os.strerror(errno.ENOSPC) in str(error):
      return True
    error = error.__cause__ or error.__context__
  return False


def _show_warning(message, category, filename, lineno, file=None, line=None):
  """Shows a warning as one line (the signature is Python's)."""
  del category, filename, lineno, file, line
  _say("warning", str(message))


def _say(kind: str, text: str) -> None:
  print(f"vidgen: {kind}: {_one_line(text)}", file=sys.stderr, flush=True)


def _one_line(text: str) -> str:
  return " ".join(text.split())


if __name__ == "__main__":
  sys.exit(main())
