"""Weights: from the published layout to ours and back, strictly, by table."""

import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jax.typing import DTypeLike
from jaxtyping import PyTree

from vidgen import errors, lora, placement, tensorfile, tensorheader

LINEAR = (1, 0)  # [out, in] -> [in, out]
CONV2D = (2, 3, 1, 0)  # [o, i, h, w] -> [h, w, i, o]
CONV3D = (2, 3, 4, 1, 0)  # [o, i, t, h, w] -> [t, h, w, i, o]

# Bytes up to which layers are stacked on the host: one transfer, no program.
_SMALL = 2**22


class Rule(NamedTuple):
  """How a published tensor becomes a parameter.

  Both names are templates. `{layer}` is the index into the leading axis of a
  parameter whose layers are stacked, and stands in `published` alone; any other
  `{name}` is a number that stands in both.

  Attributes:
    published: "transformer_blocks.{layer}.attn1.to_q.weight".
    ours: "blocks/attention/query/kernel".
    axes: ours = transpose(published, axes); None leaves it as it is.
    alias: Another published name of the parameter, read if the first is absent.
  """

  published: str
  ours: str
  axes: tuple[int, ...] | None = None
  alias: bool = False


Table = tuple[Rule, ...]


class Target(NamedTuple):
  """Where a published tensor goes: `layer` of the parameter `path`, or all."""

  path: str
  layer: int | None
  axes: tuple[int, ...] | None


def match(
  published: Mapping[str, tuple[int, ...]],
  table: Table,
  shapes: PyTree,
  *,
  where: str = "checkpoint",
) -> dict[str, Target]:
  """Returns the target of each published tensor.

  Args:
    published: Shapes by published name.
    table: The rules.
    shapes: Anything with a shape at each of our parameters.
    where: What the error calls the checkpoint.

  Raises:
    CorruptError: Tensors are missing, extra or misshapen; it lists them.
  """
  targets, spare, missing, misshapen = {}, set(), [], []
  for path, leaf in flatten(shapes).items():
    for names, target, shape in _published(table, path, leaf.shape):
      name = next((n for n in names if n in published), None)
      spare.update(names)
      if name is None:
        missing.append(names[0])
        continue
      targets[name] = target
      if tuple(published[name]) != shape:
        got = list(published[name])
        misshapen.append(f"{name} {got} instead of {list(shape)}")
  extra = [name for name in published if name not in spare]
  refuse(where, {"missing": missing, "extra": extra, "misshapen": misshapen})
  return targets


def refuse(where: str, found: Mapping[str, list[str]]) -> None:
  """Raises CorruptError if any kind of fault, "missing", has been found."""
  lists = "; ".join(
    f"{kind}: {tensorheader.listed(sorted(names))}"
    for kind, names in found.items()
    if names
  )
  if lists:
    raise errors.CorruptError(f"{where}: its tensors do not fit: {lists}.")


def load(
  files: tensorfile.TensorFiles,
  table: Table,
  shapes: PyTree,
  *,
  shardings: PyTree | None = None,
  dtype: DTypeLike | None = None,
) -> PyTree:
  """Returns the parameters, each tensor read once, to its own devices.

  Next to what is loaded, one tensor is in memory at a time, and what small
  stacks of layers there are.

  Args:
    files: The published tensors.
    table: The rules.
    shapes: The shape of each parameter, unboxed.
    shardings: The sharding of each parameter; None gives arrays of numpy.
    dtype: Of the floating-point parameters; None keeps that of the file.

  Raises:
    CorruptError: The tensors do not fit, or one holds NaN or infinity.
  """
  published = {name: entry.shape for name, entry in files.items()}
  targets = match(published, table, shapes, where=str(files.where))
  leaves = flatten(shapes)
  places = flatten(shardings) if shardings is not None else {}
  dtypes = _dtypes(files, targets, dtype, on_device=shardings is not None)
  params = {}
  on_host = lambda path: (
    path not in places
    or math.prod(leaves[path].shape) * dtypes[path].itemsize <= _SMALL
  )
  order = lambda name: (files[name].file, files[name].offset)
  for name in sorted(targets, key=order):
    path, layer, axes = targets[name]
    place, kind = places.get(path), dtypes[path]
    if layer is None:
      array = _arranged(files, name, axes, kind)
      params[path] = array if place is None else placement.put(array, place)
      del array
      jax.block_until_ready(params[path])
      continue
    if path not in params:
      shape = leaves[path].shape
      params[path] = (
        tensorfile.empty(shape, kind)
        if on_host(path)
        else jnp.zeros(shape, kind, device=place)
      )
    if on_host(path):
      params[path][layer] = _arranged(files, name, axes, kind)
    else:
      params[path] = _insert(params[path], files, name, targets[name], place)
  for path, place in places.items():
    if isinstance(params[path], np.ndarray):
      params[path] = placement.put(params[path], place)
  return unflatten(params, shapes)


def published_targets(shapes: PyTree, table: Table) -> dict[str, Target]:
  """Returns the target of each published tensor, by its main name."""
  return {
    names[0]: target
    for path, leaf in flatten(shapes).items()
    for names, target, _ in _published(table, path, leaf.shape)
  }


def names(table: Table, path: str, shape: tuple[int, ...]) -> list[list[str]]:
  """Returns the published names of a parameter, layer by layer.

  Each layer has its main name first. Without a rule there are none.
  """
  if not any(_pattern(rule.ours).fullmatch(path) for rule in table):
    return []
  return [found for found, _, _ in _published(table, path, shape)]


def axes_of(table: Table, path: str) -> tuple[int, ...] | None:
  """Returns how published axes become those of a parameter."""
  rules = [rule for rule in table if _pattern(rule.ours).fullmatch(path)]
  return rules[0].axes


def published_shapes(
  params: PyTree, table: Table, dtype: DTypeLike | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shape and dtype of each tensor that `export` gives."""
  return {
    names[0]: jax.ShapeDtypeStruct(shape, _cast_to(leaf.dtype, dtype))
    for path, leaf in flatten(params).items()
    for names, _, shape in _published(table, path, leaf.shape)
  }


def export(
  params: PyTree, table: Table, dtype: DTypeLike | None = None
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields the published tensors of `params`, one at a time, on the host.

  Args:
    params: The parameters.
    table: The rules.
    dtype: Of the floating-point tensors; None keeps that of the parameters.
  """
  for path, leaf in flatten(params).items():
    for names, (_, layer, axes), _ in _published(table, path, leaf.shape):
      array = leaf
      if layer is not None:
        host = isinstance(leaf, np.ndarray)
        array = leaf[layer] if host else placement.take_layer(leaf, layer)
      array = np.asarray(array)
      if axes is not None:
        array = array.transpose(np.argsort(axes))
      with np.errstate(over="ignore"):
        array = array.astype(_cast_to(array.dtype, dtype), copy=False)
      yield names[0], np.ascontiguousarray(array)


def merge_lora(
  params: PyTree,
  files: tensorfile.TensorFiles,
  table: Table,
  *,
  prefix: str = "transformer.",
  scale: float = 1.0,
) -> PyTree:
  """Returns `params` with a LoRA added: W + scale (alpha / r) B A.

  The sum is in float32. `params` is consumed: its arrays are donated, or
  written to where they are numpy's.

  Args:
    params: The parameters, on the host or on devices.
    files: The LoRA file, in the diffusers layout.
    table: The rules of the parameters.
    prefix: What the names of this network begin with in the file.
    scale: The strength; 1 is as trained.

  Raises:
    InputError: The file is for another network, or of another kind.
    CorruptError: It is incomplete.
  """
  leaves, targets, shapes = flatten(params), {}, {}
  for path, leaf in leaves.items():
    for names, target, shape in _published(table, path, leaf.shape):
      targets[names[0]], shapes[names[0]] = target, shape
  updates = lora.read(files, prefix)
  wrong = [
    update.name
    for update in updates
    if not _lora_fits(files, update, shapes.get(update.name))
  ]
  if wrong:
    raise errors.InputError(
      f"{files.where}: this LoRA is for another model; these it would "
      f"change are not there, or have another shape: "
      f"{tensorheader.listed(wrong)}."
    )
  for update in updates:
    path = targets[update.name].path
    leaves[path] = _add(
      leaves[path],
      targets[update.name],
      shapes[update.name],
      [_matrix(files, update.down), _matrix(files, update.up)],
      scale * update.factor,
    )
  return unflatten(leaves, params)


def flatten(tree: PyTree) -> dict[str, Any]:
  """Returns the leaves of a tree by their path, "blocks/attention/bias"."""
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in leaves
  }


def unflatten(leaves: Mapping[str, Any], like: PyTree) -> PyTree:
  """Returns a tree built as `like`, with `leaves` by their path."""
  structure = jax.tree.structure(like)
  return jax.tree.unflatten(structure, [leaves[path] for path in flatten(like)])


def _published(
  table: Table, path: str, shape: tuple[int, ...]
) -> list[tuple[list[str], Target, tuple[int, ...]]]:
  """Returns what fills the parameter `path`, layer by layer.

  Each is the published names it may have, the main one first, the target, and
  the published shape.
  """
  found = [
    (rule, numbers.groupdict())
    for rule in table
    if (numbers := _pattern(rule.ours).fullmatch(path))
  ]
  found.sort(key=lambda item: item[0].alias)
  if [rule.alias for rule, _ in found[:2]] not in ([False], [False, True]):
    raise ValueError(f"{path} needs one rule, and has {[r for r, _ in found]}.")
  axes = found[0][0].axes
  stacked = "{layer}" in found[0][0].published
  ours = shape[1:] if stacked else shape
  theirs = tuple(ours if axes is None else np.take(ours, np.argsort(axes)))
  return [
    (
      [rule.published.format(layer=layer, **at) for rule, at in found],
      Target(path, layer if stacked else None, axes),
      tuple(int(n) for n in theirs),
    )
    for layer in range(shape[0] if stacked else 1)
  ]


@functools.lru_cache(maxsize=4096)
def _pattern(template: str) -> re.Pattern[str]:
  """Returns the pattern of the names that a template stands for."""
  parts = re.split(r"\{(\w+)\}", template)
  known, pattern = set(), ""
  for i, part in enumerate(parts):
    if i % 2 == 0:
      pattern += re.escape(part)
    elif part in known:
      pattern += f"(?P={part})"
    else:
      pattern += f"(?P<{part}>0|[1-9][0-9]*)"
      known.add(part)
  return re.compile(pattern)


def _cast_to(source: np.dtype, dtype: DTypeLike | None) -> np.dtype:
  """Returns the dtype of what is cast to `dtype` if it is a float."""
  if dtype is not None and jnp.issubdtype(source, jnp.floating):
    return np.dtype(dtype)
  return np.dtype(source)


def _dtypes(
  files: tensorfile.TensorFiles,
  targets: Mapping[str, Target],
  dtype: DTypeLike | None,
  *,
  on_device: bool,
) -> dict[str, np.dtype]:
  """Returns the dtype of each parameter; that of a stack holds every layer."""
  dtypes = {}
  for name, target in targets.items():
    kind = _cast_to(files[name].dtype, dtype)
    if on_device:
      kind = np.dtype(jax.dtypes.canonicalize_dtype(kind))
    known = dtypes.get(target.path, kind)
    dtypes[target.path] = np.dtype(jnp.promote_types(known, kind))
  return dtypes


def _arranged(
  files: tensorfile.TensorFiles,
  name: str,
  axes: tuple[int, ...] | None,
  dtype: np.dtype,
) -> np.ndarray:
  """Returns one tensor, read, checked, transposed and cast on the host."""
  array = files.read(name)
  source = array if axes is None else array.transpose(axes)
  if axes is not None or array.dtype != dtype:
    array = tensorfile.empty(source.shape, dtype)
    with np.errstate(over="ignore"):
      np.copyto(array, source, casting="unsafe")
  if not is_finite(array):
    raise _not_finite(files, name, dtype)
  return array


def _insert(
  stack: jax.Array,
  files: tensorfile.TensorFiles,
  name: str,
  target: Target,
  place: Sharding,
) -> jax.Array:
  """Returns `stack` with one layer filled; the old one is donated."""
  array = files.read(name)
  if array.dtype.itemsize == 8:
    array = array.astype(jax.dtypes.canonicalize_dtype(array.dtype))
  raw = placement.put(
    array, placement.raw_sharding(place, target.axes, stack.ndim)
  )
  del array
  insert = placement.inserter(target.axes, place)
  stack, finite = insert(stack, raw, np.int32(target.layer))
  # Waits: reading ahead would hold more than one tensor.
  if not bool(finite):
    raise _not_finite(files, name, stack.dtype)
  return stack


def _lora_fits(
  files: tensorfile.TensorFiles,
  update: lora.Update,
  shape: tuple[int, ...] | None,
) -> bool:
  """Whether B A has the published `shape`; a convolution's B is 1 x 1."""
  if shape is None or len(shape) < 2:
    return False
  down, up = files[update.down].shape, files[update.up].shape
  ones = (1,) * (len(shape) - 2)
  return down == (down[0], *shape[1:]) and up == (shape[0], down[0], *ones)


def _matrix(files: tensorfile.TensorFiles, name: str) -> np.ndarray:
  """Returns A or B in float32 as a matrix."""
  array = _arranged(files, name, None, np.dtype(np.float32))
  return array.reshape(array.shape[0], -1)


def _add(
  param: Any,
  target: Target,
  shape: tuple[int, ...],
  pair: list[np.ndarray],
  factor: float,
) -> Any:
  """Returns a parameter with factor B A added to it, or to a layer of it."""
  if isinstance(param, np.ndarray):
    delta = (np.float32(factor) * (pair[1] @ pair[0])).reshape(shape)
    if target.axes is not None:
      delta = delta.transpose(target.axes)
    param = param if param.flags.writeable else param.copy()
    view = param if target.layer is None else param[target.layer]
    view[...] = view.astype(np.float32) + delta
    return param
  place = param.sharding
  down, up = (
    placement.put(matrix, placement.replicated(place)) for matrix in pair
  )
  layer = None if target.layer is None else np.int32(target.layer)
  add = placement.adder(target.axes, shape, place)
  return jax.block_until_ready(add(param, down, up, layer, np.float32(factor)))


def is_finite(array: np.ndarray) -> bool:
  """Whether all is finite; in pieces, as the answers take memory too."""
  if not jnp.issubdtype(array.dtype, jnp.floating):
    return True
  flat, piece = array.reshape(-1), 2**22
  return all(
    np.isfinite(flat[i : i + piece]).all() for i in range(0, flat.size, piece)
  )


def _not_finite(
  files: tensorfile.TensorFiles, name: str, dtype: Any
) -> errors.CorruptError:
  return errors.CorruptError(
    f"{files[name].file}: {name} holds NaN or infinity as {dtype}; fetch the "
    "file again, or load it in float32."
  )
