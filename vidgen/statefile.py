"""The state of a run in a folder: arrays in Orbax's format, and a manifest.

The arrays are one flat dictionary by path, "opt/transformer/0/mu/norm/scale",
so that what Orbax makes of tuples and empty nodes does not matter. Orbax checks
neither its data nor dtypes; here both are checked.
"""

import os
import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from vidgen import errors, manifest, statetree, tensorheader, weights

NAME = "state"


def verify(folder: pathlib.Path) -> None:
  """Checks every file of one checkpoint.

  Raises:
    CorruptError: One is missing, or not as it was written.
  """
  manifest.verify(folder, NAME)
  held(folder)


def read(folder: pathlib.Path, shapes: PyTree, under: str = "") -> PyTree:
  """Returns the arrays below `under`, each straight to its sharding."""
  named = statetree.named(shapes)
  wanted = {under + name: leaf for name, leaf in named.items()}
  arrays = held(folder).items()
  there = {n: x for n, x in arrays if n.startswith(under)}
  _match(folder, there, wanted)
  args, target = {}, {}
  for name, leaf in wanted.items():
    kind = np.dtype(there[name].dtype)
    target[name] = jax.ShapeDtypeStruct(there[name].shape, kind)
    if isinstance(leaf, np.ndarray | np.generic):
      args[name] = ocp.RestoreArgs(restore_type=np.ndarray, dtype=kind)
      continue
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
      sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    args[name] = ocp.ArrayRestoreArgs(
      sharding=sharding, global_shape=there[name].shape, dtype=kind
    )
  # About one large array on the host at a time; Orbax would read all at once.
  sizes = [x.size * x.dtype.itemsize for x in target.values()]
  handler = ocp.PyTreeCheckpointHandler(
    restore_concurrent_gb=max(sizes, default=0) // 10**9 + 1
  )
  try:
    with ocp.Checkpointer(handler) as checkpointer:
      leaves = checkpointer.restore(
        folder / NAME,
        args=ocp.args.PyTreeRestore(
          item=target, restore_args=args, partial_restore=True
        ),
      )
  except (OSError, ValueError, RuntimeError, LookupError, TypeError) as e:
    raise errors.CorruptError(f"{folder}: cannot be read: {e}.") from e
  names = {n: leaves[under + n] for n in weights.flatten(shapes)}
  return weights.unflatten(names, shapes)


def read_part(folder: str | os.PathLike, under: str, shapes: PyTree) -> PyTree:
  """Returns a part of the state in a checkpoint, the EMA for one, verified.

  Args:
    folder: The checkpoint, "run/checkpoints/000000050".
    under: Where the part is, "ema/transformer".
    shapes: As for `Run.restore`, of that part.

  Raises:
    InputError: The part is not there, or is another.
    CorruptError: The checkpoint is damaged.
  """
  path = pathlib.Path(folder).expanduser().absolute()
  if not path.is_dir():
    raise errors.InputError(f"{path}: no such checkpoint.")
  verify(path)
  return read(path, shapes, f"{under}/")


def held(folder: pathlib.Path) -> dict[str, Any]:
  """Returns shape and dtype of each array of a checkpoint."""
  path = folder / NAME
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      return weights.flatten(checkpointer.metadata(path).item_metadata.tree)
  except (OSError, ValueError, RuntimeError, LookupError, TypeError) as e:
    raise errors.CorruptError(f"{path}: no Orbax checkpoint: {e}.") from e
  except AttributeError as e:
    raise errors.CorruptError(f"{path}: no Orbax checkpoint.") from e


def _match(folder: pathlib.Path, held: dict, wanted: dict) -> None:
  """Raises InputError unless names, shapes and dtypes are those wanted."""
  kind = lambda x: np.dtype(jax.dtypes.canonicalize_dtype(x.dtype))
  both = [name for name in sorted(wanted) if name in held]
  arrays = {
    n: x if hasattr(x, "dtype") else np.asarray(x) for n, x in wanted.items()
  }
  found = {
    "not in the checkpoint": sorted(wanted.keys() - held.keys()),
    "in the checkpoint only": sorted(held.keys() - wanted.keys()),
    "of another shape": [
      f"{n} {list(held[n].shape)} instead of {list(arrays[n].shape)}"
      for n in both
      if tuple(held[n].shape) != tuple(arrays[n].shape)
    ],
    "of another dtype": [
      f"{n} {held[n].dtype} instead of {kind(arrays[n])}"
      for n in both
      if np.dtype(held[n].dtype) != kind(arrays[n])
    ],
  }
  lists = "; ".join(
    f"{what}: {tensorheader.listed(names, 8)}"
    for what, names in found.items()
    if names
  )
  if lists:
    raise errors.InputError(
      f"{folder}: is of another state: {lists}; use the config it was made "
      "with, or another --workdir."
    )
