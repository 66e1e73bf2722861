"""A trained model in the published layout, for diffusers and for vidgen."""

import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import PyTree

from vidgen import checkpoint, errors, tensorfile, weights
from vidgen.models import base


def publish(
  folder: str | os.PathLike,
  model: base.Model,
  params: dict[str, PyTree],
  *,
  tokenizer: str | os.PathLike | None,
  dtype: DTypeLike | Mapping[str, DTypeLike] | None = None,
) -> None:
  """Writes a model so that diffusers' `from_pretrained` opens it.

  Args:
    folder: Is new or empty. It appears whole, at the end.
    model: The model.
    params: The parameters of each of its components, unboxed.
    tokenizer: The folder of the tokenizer's files, which are copied; None for
      a model that takes no text.
    dtype: Of the weights in the files, or that of each component; None keeps
      that of the parameters.

  Raises:
    InputError: The folder holds something, there is no tokenizer, or a weight
      is no finite number in this dtype.
    CorruptError: The parameters are not those of the model.
    StorageError: The disk is full, or writing fails otherwise.
  """
  folder = checkpoint.new_folder(folder)
  if tokenizer is not None:
    tokenizer = pathlib.Path(tokenizer).expanduser().absolute()
    if not tokenizer.is_dir():
      raise errors.InputError(
        f"{tokenizer}: no folder with a tokenizer's files."
      )
  configs = model.published_configs()
  with checkpoint.drafted(folder) as draft:
    if tokenizer is not None:
      checkpoint.copy_small(tokenizer.parent, tokenizer.name, draft)
      (draft / tokenizer.name).rename(draft / "tokenizer")
    for name, config in configs.items():
      _write_json(draft / name, config)
    for component in model.components:
      tree = params[component.name]
      config = configs[f"{component.name}/config.json"]
      own = dtype[component.name] if isinstance(dtype, Mapping) else dtype
      _write_weights(draft, component, config, tree, own)


def publish_component(
  folder: str | os.PathLike,
  component: base.Component,
  configs: dict[str, dict[str, Any]],
  params: PyTree,
  *,
  dtype: DTypeLike | None = None,
) -> None:
  """Writes one network, as `from_pretrained(folder, subfolder=name)` has it.

  Args:
    folder: Is new or empty. It appears whole, at the end.
    component: The network.
    configs: Of its model, by path.
    params: Its parameters, unboxed.
    dtype: As of `publish`.

  Raises:
    InputError, CorruptError, StorageError: As `publish`.
  """
  name = f"{component.name}/config.json"
  with checkpoint.drafted(checkpoint.new_folder(folder)) as draft:
    _write_json(draft / name, configs[name])
    _write_weights(draft, component, configs[name], params, dtype)


def _write_json(path: pathlib.Path, value: dict[str, Any]) -> None:
  path.parent.mkdir(exist_ok=True)
  text = json.dumps(value, indent=2, sort_keys=True) + "\n"
  path.write_text(text, encoding="utf-8")


def _write_weights(
  draft: pathlib.Path,
  component: base.Component,
  config: dict[str, Any],
  params: PyTree,
  dtype: DTypeLike | None,
) -> None:
  """Writes a component's weights, checked against its own shapes."""
  table = component.table
  shapes = weights.published_shapes(params, table, dtype)
  weights.match(
    {name: shape.shape for name, shape in shapes.items()},
    table,
    base.shapes(component),
    where=component.name,
  )
  tensorfile.write(
    draft / component.name,
    checkpoint.stem(config),
    shapes,
    _finite(weights.export(params, table, dtype), component.name),
  )


def _finite(
  tensors: Iterable[tuple[str, np.ndarray]], component: str
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields what comes, and refuses what nobody could load again."""
  for name, array in tensors:
    if not weights.is_finite(array):
      raise errors.InputError(
        f"{component}: {name} holds NaN or infinity as {array.dtype}; publish "
        "an earlier step, or in bfloat16 or float32."
      )
    yield name, array
