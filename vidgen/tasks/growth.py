"""A network that starts as a smaller one, which was trained before.

What the smaller one has is read from its files. Kernels that read more channels
than its own have zeros for those: at first they change nothing. All else starts
as a new network does. So does what is to be learnt anew of a network that was
trained before.
"""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Key, PyTree

from vidgen import checkpoint, errors, tensorfile, weights
from vidgen.models import base


def load(
  folder: pathlib.Path,
  component: base.Component,
  places: PyTree,
  dtype: DTypeLike,
  key: Key[Array, ""],
) -> PyTree:
  """Returns the parameters of a component, in `places`.

  Args:
    folder: A checkpoint that has some of them, in the published layout.
    component: The network; the tables of it say what the files are.
    places: The sharding of each parameter.
    dtype: Of the parameters.
    key: Decides those that no file has.

  Raises:
    InputError: The folder has another layout.
    CorruptError: A tensor is none of the network's, or does not fit it.
  """
  home = folder / component.name
  if (home / checkpoint.ORBAX).is_dir():
    raise errors.InputError(
      f"{home}: a network grows from the published layout; convert it with "
      "--layout=published."
    )
  files = tensorfile.open_folder(home)
  shapes = weights.flatten(base.shapes(component))
  table, found = _cover(files, component, shapes)
  # The shapes of the files, where a kernel has fewer inputs.
  theirs = {path: _their_shape(files, table, path, shapes) for path in found}
  read = weights.load(files, table, theirs, dtype=dtype)
  spots = weights.flatten(places)
  missing = {p: spots[p] for p in spots if p not in read}
  params = _new(component, missing, key)
  for path in found:
    whole = _widened(np.asarray(read.pop(path)), shapes[path].shape)
    params[path] = jax.device_put(whole.astype(dtype), spots[path])
  cast = {path: jnp.asarray(x, dtype) for path, x in params.items()}
  return weights.unflatten(cast, places)


def renew(
  component: base.Component,
  params: PyTree,
  places: PyTree,
  parts: Sequence[str],
  dtype: DTypeLike,
  key: Key[Array, ""],
) -> PyTree:
  """Returns the parameters, of which some parts are as a new network has them.

  Args:
    component: The network.
    params: What it has so far.
    places: The sharding of each parameter.
    parts: Paths of parameters, or what these begin with.
    dtype: Of the parameters.
    key: Decides them.

  Raises:
    InputError: No parameter has such a path.
  """
  spots, again = weights.flatten(places), {}
  for part in parts:
    of_part = {p: x for p, x in spots.items() if f"{p}/".startswith(f"{part}/")}
    if not of_part:
      raise errors.InputError(
        f"config: scratch: {component.name} has no {part}; it has "
        f"{', '.join(sorted({p.split('/')[0] for p in spots}))}."
      )
    again |= of_part
  new = {p: x.astype(dtype) for p, x in _new(component, again, key).items()}
  return weights.unflatten(weights.flatten(params) | new, places)


def _new(
  component: base.Component, places: dict[str, Any], key: Key[Array, ""]
) -> dict[str, Any]:
  """Parameters as a new network has them, of some paths, in their places."""

  def make(key):
    leaves = weights.flatten(nn.unbox(component.init(key)))
    return {path: leaves[path] for path in places}

  return jax.jit(make, out_shardings=places)(key)


def _cover(
  files: Mapping[str, Any],
  component: base.Component,
  shapes: dict[str, jax.ShapeDtypeStruct],
) -> tuple[weights.Table, list[str]]:
  """The table that knows the files, and the parameters that are in them."""
  best: tuple[weights.Table, list[str]] = ((), [])
  for table in (component.table, component.grows_from):
    found = [
      path
      for path, leaf in shapes.items()
      if (names := weights.names(table, path, leaf.shape))
      and all(any(n in files for n in several) for several in names)
    ]
    if len(found) > len(best[1]):
      best = table, found
  return best


def _their_shape(files, table, path, shapes):
  """The shape of a parameter in the files: ours, but for fewer inputs."""
  leaf = shapes[path]
  (several,) = weights.names(table, path, leaf.shape)[:1]
  name = next(n for n in several if n in files)
  axes = weights.axes_of(table, path)
  shape = tuple(files[name].shape)
  shape = shape if axes is None else tuple(shape[i] for i in axes)
  fits = len(shape) == len(leaf.shape) > 1 and all(
    a == b or (i == len(shape) - 2 and a < b)
    for i, (a, b) in enumerate(zip(shape, leaf.shape, strict=True))
  )
  return jax.ShapeDtypeStruct(shape if fits else leaf.shape, leaf.dtype)


def _widened(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
  """Adds inputs of zeros to a kernel, behind its own."""
  if x.shape == shape:
    return x
  more = [(0, to - have) for have, to in zip(x.shape, shape, strict=True)]
  return np.pad(x, more)
