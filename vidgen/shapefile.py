"""Shapes of networks in files: to trace a network takes a second, to read none.

A file is named by all that shapes come from: this package, JAX and Flax, the
function that makes the parameters, and its config. One that cannot be read, or
written, is made again by tracing.
"""

import contextlib
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import flax
import jax
import numpy as np
from flax import linen as nn
from jaxtyping import PyTree

from vidgen import codehash

# Where files are kept; None: nowhere. The command line says so, no library.
folder: pathlib.Path | None = None


def of(init: Callable[..., PyTree]) -> PyTree:
  """Returns the boxed shapes of what `init` makes of a key.

  Args:
    init: Of a function and its config; of anything else nothing is kept.
  """
  path = _path(init)
  if path is not None:
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
      return _read(path)
  shapes = jax.eval_shape(init, jax.random.key(0))
  if path is not None:
    _write(path, _encode(shapes))
  return shapes


def _path(init: Callable[..., PyTree]) -> pathlib.Path | None:
  if folder is None or not isinstance(init, functools.partial):
    return None
  name = f"{init.func.__module__}.{init.func.__qualname__}"
  parts = [codehash.of_package(), jax.__version__, flax.__version__, name]
  parts += [repr(init.args), repr(sorted(init.keywords.items()))]
  digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
  return folder / f"{digest[:32]}.txt"


def _read(path: pathlib.Path) -> PyTree:
  """Returns shapes; raises ValueError unless they are as they were written."""
  digest, _, text = path.read_text(encoding="utf-8").partition("\n")
  if hashlib.sha256(text.encode()).hexdigest() != digest:
    raise ValueError(f"{path} is damaged.")
  return _decode(json.loads(text))


def _write(path: pathlib.Path, tree: Any) -> None:
  text = json.dumps(tree)
  digest = hashlib.sha256(text.encode()).hexdigest()
  draft = path.with_name(f".{path.name}.{os.getpid()}")
  with contextlib.suppress(OSError):
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      draft.write_text(f"{digest}\n{text}", encoding="utf-8")
      draft.replace(path)
    finally:
      draft.unlink(missing_ok=True)


def _encode(tree: PyTree) -> Any:
  """Returns shapes as JSON has them: a leaf is a list."""
  if isinstance(tree, dict):
    return {name: _encode(below) for name, below in tree.items()}
  names = None
  if isinstance(tree, nn.LogicallyPartitioned):
    names, tree = list(tree.names), tree.value
  return [list(tree.shape), tree.dtype.name, names]


def _decode(tree: Any) -> PyTree:
  if isinstance(tree, dict):
    return {name: _decode(below) for name, below in tree.items()}
  shape, dtype, names = tree
  leaf = jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype))
  return leaf if names is None else nn.LogicallyPartitioned(leaf, tuple(names))
