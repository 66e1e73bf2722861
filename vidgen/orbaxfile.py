"""One component's parameters as an Orbax checkpoint.

Orbax checks no tree against another and casts without a word; here a tree that
differs is an error, and a dtype changes only where it is asked for.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.typing import DTypeLike
from jaxtyping import PyTree

from vidgen import errors, weights

# A chunk is decoded whole, next to the array that it is a part of.
_CHUNK_BYTES = 2**26


def save(path: pathlib.Path, params: PyTree) -> None:
  """Writes `params` into the new folder `path`.

  Raises:
    StorageError: The disk is full, or writing fails otherwise.
  """
  options = jax.tree.map(
    lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), params
  )
  params = _borrowed(params)
  try:
    with ocp.Checkpointer(_handler(params)) as checkpointer:
      checkpointer.save(
        path.absolute(), args=ocp.args.PyTreeSave(params, save_args=options)
      )
  # A full disk comes out of its storage layer as one of several kinds.
  except (OSError, ValueError, RuntimeError) as e:
    raise errors.StorageError(
      f"{path}: cannot write the checkpoint: {_line(e)}"
    ) from e


def restore(
  path: pathlib.Path,
  shapes: PyTree,
  shardings: PyTree | None = None,
  dtype: DTypeLike | None = None,
) -> PyTree:
  """Returns the parameters in the folder `path`, straight to their shardings.

  Args:
    path: The folder.
    shapes: The shape of each parameter, unboxed.
    shardings: The sharding of each parameter; None gives arrays of numpy.
    dtype: Of the floating-point parameters; None keeps that of the file.

  Raises:
    CorruptError: It is no such checkpoint, or of other parameters.
  """
  path = path.absolute()
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      saved = checkpointer.metadata(path).item_metadata
  except (OSError, ValueError, RuntimeError, KeyError, TypeError) as e:
    raise errors.CorruptError(f"{path}: no Orbax checkpoint: {_line(e)}") from e
  if saved is None:
    raise errors.CorruptError(f"{path}: no Orbax checkpoint.")
  held = weights.flatten(saved.tree)
  _check(path, held, weights.flatten(shapes))
  places = weights.flatten(shardings) if shardings is not None else {}
  args, target = {}, {}
  for name, leaf in held.items():
    kind = np.dtype(leaf.dtype)
    if dtype is not None and jnp.issubdtype(kind, jnp.floating):
      kind = np.dtype(dtype)
    target[name] = jax.ShapeDtypeStruct(leaf.shape, kind)
    if shardings is None:
      args[name] = ocp.RestoreArgs(restore_type=np.ndarray, dtype=kind)
    else:
      args[name] = ocp.ArrayRestoreArgs(
        sharding=places[name], global_shape=leaf.shape, dtype=kind
      )
  try:
    with ocp.Checkpointer(_handler(target)) as checkpointer:
      return checkpointer.restore(
        path,
        args=ocp.args.PyTreeRestore(
          item=weights.unflatten(target, shapes),
          restore_args=weights.unflatten(args, shapes),
        ),
      )
  except (OSError, ValueError, RuntimeError, KeyError, TypeError) as e:
    raise errors.CorruptError(f"{path}: cannot be read: {_line(e)}") from e


def _borrowed(params: PyTree) -> PyTree:
  """Returns `params` with numpy's arrays as JAX's, which Orbax does not copy.

  Of numpy's it holds all, and twice, until the last is written.
  """
  try:
    cpu = jax.local_devices(backend="cpu")[0]
  except RuntimeError:  # JAX was told to use an accelerator alone.
    return params

  def borrow(x: Any) -> Any:
    is_narrow = jax.dtypes.canonicalize_dtype(x.dtype) == x.dtype
    is_ours = isinstance(x, np.ndarray) and is_narrow
    return jax.device_put(x, cpu) if is_ours else x

  return jax.tree.map(borrow, params)


def _handler(params: PyTree) -> ocp.PyTreeCheckpointHandler:
  """Returns a handler that has about one large parameter in flight.

  Orbax would start on all of them at once.
  """
  sizes = [x.size * x.dtype.itemsize for x in jax.tree.leaves(params)]
  limit = max(sizes, default=0) // 10**9 + 1
  return ocp.PyTreeCheckpointHandler(
    save_concurrent_gb=limit,
    save_device_host_concurrent_gb=limit,
    restore_concurrent_gb=limit,
  )


def _check(path: pathlib.Path, held: dict, wanted: dict) -> None:
  """Raises unless names and shapes are those wanted."""
  found = {
    "missing": sorted(wanted.keys() - held.keys()),
    "extra": sorted(held.keys() - wanted.keys()),
    "misshapen": [
      f"{name} {list(held[name].shape)} instead of {list(leaf.shape)}"
      for name, leaf in wanted.items()
      if name in held and tuple(held[name].shape) != leaf.shape
    ],
  }
  weights.refuse(str(path), found)


def _line(error: Exception) -> str:
  """Returns the first line of an error's text."""
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:300]
