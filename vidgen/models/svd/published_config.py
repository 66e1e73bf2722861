"""Reading fields of a config from a published config.json."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from vidgen import errors


def pick(
  published: Mapping[str, Any], config: type, where: str, leave: str
) -> dict[str, Any]:
  """Returns the fields of `config` that are published, with types checked.

  Args:
    published: The content of the file; null is as good as absent.
    config: A dataclass.
    where: What an error calls the file.
    leave: A field of ours that is not published.

  Raises:
    InputError: A value of another type.
  """
  found = {}
  for field in dataclasses.fields(config):
    value = published.get(field.name)
    if value is None or field.name == leave:
      continue
    value = tuple(value) if isinstance(value, list) else value
    if field.type is float and type(value) is int:
      value = float(value)
    if not _fits(value, field.type):
      kind = getattr(field.type, "__name__", field.type)
      if typing.get_origin(field.type) is tuple:
        kind = f"list of {typing.get_args(field.type)[0].__name__}"
      raise errors.InputError(
        f"{where}: {field.name} = {value!r} is not supported, only one {kind}."
      )
    found[field.name] = value
  return found


def _fits(value: Any, kind: Any) -> bool:
  if typing.get_origin(kind) is tuple:
    item = typing.get_args(kind)[0]
    return type(value) is tuple and all(type(x) is item for x in value)
  return type(value) is kind
