"""Flags and configs of a command line; each mistake in them is one line."""

import ast
import dataclasses
import os
import pydoc
import re
import sys
import types
import typing
import warnings
from collections.abc import Callable, Container, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from vidgen import errors, prompts

# How config_flags says so, at the end of a path and on the way.
_NO_FIELD = (
  r"Field (?P<name>\w+) not found on dataclass <class '(?P<kind>[\w.]+)'>",
  r"Attribute <class '(?P<kind>[\w.]+)'>\.(?P<name>\w+) does not exist",
)

Define = Callable[[flags.FlagValues, list[str]], None]


class _Values(flags.FlagValues):
  """Flags that know the command line that set them."""

  def __init__(self):
    super().__init__()
    # The class takes attributes for flags.
    self.__dict__["_said"], self.__dict__["_rest"] = (), ()


def said(values: flags.FlagValues) -> tuple[str, ...]:
  """Returns the command line of flags that `parse` gave, without "vidgen"."""
  return values.__dict__["_said"]


def rest(values: flags.FlagValues) -> tuple[str, ...]:
  """Returns the arguments of the command line that are no flags."""
  return values.__dict__["_rest"]


def config_path(argv: Sequence[str]) -> str | None:
  """Returns the config file that a command line names; None for none."""
  named = _take(list(argv), r"config")
  return named[-1][1] if named else None


def parse(
  define: Define, command: str, argv: Sequence[str], takes_rest: bool = False
) -> flags.FlagValues:
  """Returns the flags that `define` defines, as `argv` sets them.

  Each command has flag values of its own, so that several may run in one
  process.

  Raises:
    InputError: An unknown flag, a value of another type, a bad config file, or
      an argument that is no flag.
  """
  values = _Values()
  values.set_gnu_getopt(True)
  values.__dict__["_said"] = (command.split()[-1], *argv)
  argv = [command, *argv]
  try:
    define(values, argv)
    others = values(argv)[1:]
  except flags.UnrecognizedFlagError as error:
    raise errors.InputError(_unknown(error.flagname, values)) from error
  except flags.Error as error:
    raise errors.InputError(_of_flag(str(error))) from error
  values.__dict__["_rest"] = tuple(others)
  if others and not takes_rest:
    raise errors.InputError(
      f"{others[0]!r} is no flag, and {command} takes flags only; text with "
      "spaces needs quotes."
    )
  return values


def _of_flag(text: str) -> str:
  """Returns what absl says of a flag, a number's type by its usual name."""
  text = text.removeprefix("flag ")
  return re.sub(
    r"(?:invalid literal for int\(\) with base 10|could not convert string to "
    r"float): .*",
    lambda m: f"must be {'a whole ' if 'int' in m[0] else 'a '}number.",
    text,
  )


def define_config(
  values: flags.FlagValues,
  argv: list[str],
  config_type: type | tuple[type, ...],
  default: str,
) -> None:
  """Defines --config, a file whose get_config() returns a `config_type`.

  `--config.FIELD=VALUE` overrides a field, `--config.FIELD.KEY=VALUE` an entry
  of a dict, which need not be there yet.

  Args:
    values: Where the flags go.
    argv: The command line; what is dealt with here is taken out of it.
    config_type: A dataclass, or several of which it is one.
    default: The config file when none is named.
  """
  # Taken out, so that overrides may stand before it.
  named = _take(argv, r"config")
  path = named[-1][1] if named else default
  if not os.path.isfile(path.split(":")[0]):
    raise errors.InputError(f"--config={path}: there is no such file.")
  kinds = config_type if isinstance(config_type, tuple) else (config_type,)
  fields = {f.name: f.type for t in kinds for f in dataclasses.fields(t)}
  dicts = {n: d for n, t in fields.items() if (d := _dict_of(t)) is not None}
  entries = _take(argv, rf"config\.(?:{'|'.join(dicts)})\.[^=]+")
  # Some stand for a dict by a name.
  named = [n for n in dicts if dicts[n] is not fields[n]]
  names = _take(argv, rf"config\.(?:{'|'.join(named)})") if named else []
  _check_overrides(argv, fields, dicts)
  try:
    with warnings.catch_warnings():
      # config_flags loads files with a function that importlib deprecates,
      # into a module whose old names would stay.
      warnings.simplefilter("ignore", DeprecationWarning)
      sys.modules.pop("config_config", None)
      config_flags.DEFINE_config_file(
        "config", path, "", flag_values=values, sys_argv=argv
      )
  except Exception as error:  # A config is a program: it may raise anything.
    raise errors.InputError(_explain(path.split(":")[0], error)) from error
  config = values["config"].value
  if not isinstance(config, kinds):
    expected = " or a ".join(kind.__name__ for kind in kinds)
    raise errors.InputError(
      f"{path}: get_config() must return a {expected}, not a "
      f"{type(config).__name__}."
    )
  for name, text in names:
    setattr(config, name.split(".")[1], text)
  for name, text in entries:
    _, field, key = name.split(".", 2)
    kind = typing.get_args(dicts[field])[1]
    if not isinstance(getattr(config, field), dict):
      setattr(config, field, {})
    getattr(config, field)[key] = _entry(name, kind, text)


def require_config(argv: list[str], example: str, kind: str) -> None:
  """Checks that a config is named, of which there is no default.

  Args:
    argv: The command line.
    example: The path of a config that would do.
    kind: What it is a config of.

  Raises:
    InputError: None is.
  """
  names = (a.lstrip("-").split("=")[0] for a in argv[1:] if a.startswith("-"))
  if "config" not in names:
    raise errors.InputError(
      f"--config is missing; name the config of {kind}, for example "
      f"--config={example}."
    )


def _take(argv: list[str], pattern: str) -> list[tuple[str, str]]:
  """Takes the flags whose names match out of `argv`, as (name, value)."""
  flag = re.compile(rf"--?({pattern})(?:=(.*))?", re.DOTALL)
  found, kept, rest = [], [], iter(argv)
  for argument in rest:
    if argument == "--":
      kept += [argument, *rest]
    elif not (match := flag.fullmatch(argument)):
      kept.append(argument)
    else:
      name, value = match.groups()
      value = next(rest, None) if value is None else value
      if value is None:
        raise errors.InputError(f"--{name}: has no value.")
      found.append((name, value))
  argv[:] = kept
  return found


def _check_overrides(
  argv: list[str], fields: dict[str, Any], dicts: Container[str]
) -> None:
  """Checks that the fields to override exist."""
  for argument in argv:
    match = re.match(r"--?(?:no)?config\.([^=]*)", argument)
    if not match:
      continue
    path = re.fullmatch(r"([^.[]*)(\[\d+\])?(?:\.(.*))?", match[1])
    name, index, below = path.groups() if path else (match[1], None, None)
    if name not in fields:
      raise errors.InputError(
        f"--config.{match[1]}: the config has no such field."
        f"{prompts.closest(name, fields)}"
      )
    if not index and _is_list(fields[name]):
      below = re.sub(r"^\d+\.", "", below or "") or "FIELD"
      raise errors.InputError(
        f"--config.{match[1]}: {name} holds several; set a field of one, "
        f"--config.{name}[0].{below}=VALUE."
      )
    if below and not (_is_nested(fields[name]) or index):
      raise errors.InputError(
        f"--config.{match[1]}: {name} is one value; set --config.{name}."
      )
    if name in dicts:
      raise errors.InputError(
        f"--config.{name}: set its entries, --config.{name}.NAME=VALUE."
      )


def _dict_of(kind: Any) -> Any:
  """Returns the dict that a field may be, or None."""
  kinds = (kind, *typing.get_args(kind)) if _is_union(kind) else (kind,)
  return next((k for k in kinds if typing.get_origin(k) is dict), None)


def _is_union(kind: Any) -> bool:
  return isinstance(kind, types.UnionType)


def _is_nested(kind: Any) -> bool:
  """Says whether a field may have fields of its own."""
  return kind is Any or dataclasses.is_dataclass(kind)


def _is_list(kind: Any) -> bool:
  """Says whether a field holds several values with fields of their own."""
  kinds = typing.get_args(kind)
  return typing.get_origin(kind) is tuple and dataclasses.is_dataclass(kinds[0])


def _entry(name: str, kind: Any, text: str) -> Any:
  """Returns the value of a dict's entry: of `kind`, or as Python reads it."""
  if kind not in (int, float, str) and text.lower() in ("true", "false"):
    return text.lower() == "true"
  try:
    return kind(text) if kind in (int, float, str) else ast.literal_eval(text)
  except (ValueError, SyntaxError) as error:
    if kind not in (int, float):
      return text
    raise errors.InputError(
      f"--{name}={text}: must be of type {kind.__name__}."
    ) from error


def _explain(path: str, error: Exception) -> str:
  """Returns one line on why a config could not be loaded."""
  if isinstance(error, SyntaxError):
    return f"{error.filename}:{error.lineno}: {error.msg}."
  text = str(error)
  # config_flags passes errors on as the text of their traceback.
  at = re.findall(rf'File "{re.escape(path)}", line (\d+)', text)
  trace = error.__traceback__
  while trace is not None:
    if trace.tb_frame.f_code.co_filename == path:
      at.append(trace.tb_lineno)
    trace = trace.tb_next
  last = text.strip().splitlines()[-1] if text.strip() else ""
  for pattern in _NO_FIELD:
    if found := re.search(pattern, text):
      kind = pydoc.locate(found["kind"])
      there = [f.name for f in dataclasses.fields(kind)] if kind else []
      return (
        f"--config: {found['kind'].split('.')[-1]} has no field "
        f"{found['name']!r}; see {path}.{prompts.closest(found['name'], there)}"
      )
  if not at and isinstance(error, flags.Error):
    return last.removeprefix("flag ")
  if not at and isinstance(error, IndexError):
    return f"{path}: a --config.FIELD[N] counts from 0, and has no such N."
  if not isinstance(error, flags.Error):
    last = f"{type(error).__name__}: {last}"
  return f"{path}{f':{at[-1]}' if at else ''}: {last}"


def _unknown(name: str, values: flags.FlagValues) -> str:
  """Returns the line for a flag that there isn't."""
  names = [f"--{known}" for known in values if "." not in known]
  if "config" in values:
    fields = dataclasses.fields(values["config"].value)
    names += [f"--config.{field.name}" for field in fields]
    if f"--config.{name}" in names:
      return f"--{name}: there is no such flag. Use --config.{name}=VALUE."
  hint = prompts.closest(f"--{name}", names) or " See --help."
  return f"--{name}: there is no such flag.{hint}"
