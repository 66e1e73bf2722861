"""Runs again what a manifest tells of."""

import contextlib
import copy
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from vidgen import environment, errors, filehashes, repro
from vidgen.repro import Difference

# What of a manifest names files.
_FILES = ("weights", "tokenizer", "inputs")

# What starts a run.
_call = subprocess.run

# The config file of a run that is made again, in its folder.
CONFIG = "rerun_config.py"


def run(
  manifest: str | os.PathLike,
  out: str | os.PathLike,
  *,
  tolerance: float | None = None,
  memory: pathlib.Path | None = None,
  warn: Callable[[str], None] | None = None,
) -> repro.Report:
  """Runs a recorded command again, and compares what came of it.

  A config is a program: the manifest should be one of your own, or of somebody
  whose programs you would run.

  The config's recorded text and the recorded flags are used, in the recorded
  directory, with another folder to write to. What differs from then, as far as
  it shows before devices are started, is told first.

  Args:
    manifest: Of the run, or its folder.
    out: A folder that is new or empty.
    tolerance: As `repro.check` takes it.
    memory: Remembers the hashes of large files.
    warn: Is told a line for each thing that differs; None writes to standard
      error.

  Raises:
    InputError: The run cannot be made again, what it read is gone, or the
      folder holds something.
    VidgenError: It ended with another exit code than it should.
  """
  warn = _print if warn is None else warn
  side = repro.read(manifest)
  target = pathlib.Path(out).expanduser().absolute()
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise errors.InputError(f"--out={out}: holds something; name a new folder.")
  argv = arguments(side.manifest, side.name, target)
  place = pathlib.Path(str(side.manifest.get("directory")))
  if not place.is_dir():
    warn(f"{place}: is not there any more; names of files count from here.")
    place = pathlib.Path.cwd()
    side = side._replace(manifest=_moved(side.manifest, place))
  _need_inputs(side.manifest)
  for difference in changes(side.manifest, memory):
    warn(
      f"{difference.kind}: {difference.name}: {difference.first} then, "
      f"{difference.second} now"
    )
  target.mkdir(parents=True, exist_ok=True)
  if side.manifest.get("config_file") is not None:
    text = str(side.manifest.get("config_text"))
    (target / CONFIG).write_text(text, encoding="utf-8")
  code = _call(
    [sys.executable, "-m", "vidgen.cli.main", *argv],
    cwd=place,
    env=environ(side.manifest, os.environ),
  ).returncode
  if code not in (0, side.manifest["exit"].get("code")):
    raise errors.VidgenError(
      f"{target}: the run ended with exit code {code}; see its lines above."
    )
  return repro.check(manifest, target, tolerance)


def arguments(
  manifest: Mapping[str, Any], name: str, target: pathlib.Path
) -> list[str]:
  """Returns the command line that makes a run again, to `target`.

  Raises:
    InputError: It was not made by a command, or by several processes.
  """
  argv, flag = manifest.get("argv"), str(manifest.get("out_flag"))
  if not isinstance(argv, list) or not all(isinstance(a, str) for a in argv):
    raise errors.InputError(
      f"{name}: was made from Python, not by a command; call it there again, "
      "then vidgen repro check."
    )
  if not argv or argv[0] != manifest["command"]:
    raise errors.InputError(f"{name}: its command line is of another command.")
  if manifest["devices"].get("processes") != 1:
    raise errors.InputError(
      f"{name}: was made by several processes; start them as "
      "launch/README.md says, then vidgen repro check."
    )
  kept = _without(argv[1:], {flag, f"config.{flag}", "config"})
  shard = manifest.get("config", {}).get("shard")
  if isinstance(shard, str):
    # Hosts may have said it, and say another one here.
    kept = _without(kept, {"shard", "config.shard"})
    kept.append(f"--shard={shard}")
  config = manifest.get("config_file")
  if config is not None:
    # What stands after a colon is an argument of the config's.
    _, colon, argument = str(config).partition(":")
    kept.append(f"--config={target / CONFIG}{colon}{argument}")
  return [argv[0], *kept, f"--{flag}={target}"]


def _without(argv: list[str], names: set[str]) -> list[str]:
  """Returns the flags but for some, which may have their value behind them."""
  flag = re.compile(r"--?([^=]+)(=.*)?", re.DOTALL)
  kept, rest = [], iter(argv)
  for argument in rest:
    match = flag.fullmatch(argument)
    if match is None or match[1] not in names:
      kept.append(argument)
    elif match[2] is None:
      next(rest, None)
  return kept


def environ(
  manifest: Mapping[str, Any], here: Mapping[str, str]
) -> dict[str, str]:
  """Returns the environment of a run made again: its flags as they were."""
  settings = {name.upper() for name in environment.SETTINGS}
  dropped = settings.union(environment.VARIABLES)
  kept = {n: v for n, v in here.items() if n not in dropped}
  for name, value in manifest["flags"].items():
    if value is None:
      continue
    if name in environment.VARIABLES:
      kept[name] = str(value)
    elif name in environment.SETTINGS:
      kept[name.upper()] = str(value)
  forced = "xla_force_host_platform_device_count"
  devices = manifest["devices"]
  if devices.get("platform") == "cpu" and forced not in kept.get(
    "XLA_FLAGS", ""
  ):
    kept["JAX_NUM_CPU_DEVICES"] = str(devices.get("count", 1))
  # This vidgen, not one that lies in the directory of the run.
  paths = [os.fspath(environment.ROOT.parent), here.get("PYTHONPATH", "")]
  kept["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
  kept["PYTHONSAFEPATH"] = "1"
  return kept


def changes(
  manifest: dict[str, Any], memory: pathlib.Path | None = None
) -> list[Difference]:
  """Returns what decides numbers and is not as it was when a run was made.

  Looked at are the code, the versions, the processor and the files of weights,
  words and inputs; devices and data sets show once it is made again.
  """
  now = copy.deepcopy(manifest)
  now["code"] = environment.code()
  now["versions"] = environment.versions()
  now["system"] = environment.system()
  hashes = filehashes.Hashes(memory)
  for kind in _FILES:
    for item in now[kind].values():
      # What was not known then cannot have changed.
      if item["sha256"] is not None:
        item["sha256"] = _hashed(hashes, item, kind == "inputs")
  hashes.remember()
  found = repro.differences(manifest, now)
  return [difference for difference in found if difference.kind != repro.OTHER]


def _moved(manifest: dict[str, Any], place: pathlib.Path) -> dict[str, Any]:
  """Returns a manifest whose files lie in `place`, not in its directory."""
  moved = copy.deepcopy(manifest)
  for kind in _FILES:
    for item in moved[kind].values():
      path = pathlib.Path(item["path"])
      if path.is_relative_to(manifest["directory"]):
        item["path"] = os.fspath(
          place / path.relative_to(manifest["directory"])
        )
  return moved


def _need_inputs(manifest: Mapping[str, Any]) -> None:
  """Raises InputError where prompts, images or videos are gone."""
  for name, item in manifest["inputs"].items():
    path, marks = item["path"], item["sha256"] or {}
    files = {path: marks.get(os.path.basename(path))}
    if item.get("listed"):
      files = {os.path.join(path, file): mark for file, mark in marks.items()}
    gone = [file for file in files if not os.path.exists(file)]
    if gone:
      mark = files[gone[0]]
      raise errors.InputError(
        f"{gone[0]}: is gone, and the run read it as {name}; put back the file"
        f"{f' of SHA-256 {mark}' if mark else ''}"
        f"{f', and {len(gone) - 1} more' if len(gone) > 1 else ''}."
      )


def _hashed(
  hashes: filehashes.Hashes, item: Mapping[str, Any], every: bool
) -> dict[str, str] | None:
  """Returns the hashes of what is there; None where there is nothing."""
  found = {}
  if not item.get("listed"):
    with contextlib.suppress(errors.StorageError, OSError):
      found = hashes.path(item["path"], every)
  for name in item["sha256"] if item.get("listed") else ():
    with contextlib.suppress(errors.StorageError, OSError):
      found |= hashes.files(item["path"], [name])
  return found or None


def _print(text: str) -> None:
  print(f"vidgen: warning: {text}", file=sys.stderr, flush=True)
