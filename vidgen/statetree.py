"""The arrays of a run's state by path, and copies of them on the host."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from vidgen import tensorfile, weights


def named(state: PyTree) -> dict[str, Any]:
  """Returns the leaves of a state by path.

  Raises:
    ValueError: Two leaves have the same path, or one has no element, which
      Orbax does not keep.
  """
  leaves = weights.flatten(state)
  if len(leaves) != len(jax.tree.leaves(state)):
    raise ValueError("Two arrays of the state have the same path.")
  if empty := [name for name, leaf in leaves.items() if 0 in np.shape(leaf)]:
    raise ValueError(f"Arrays of the state without an element: {empty}.")
  return leaves


def on_host(leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Returns copies of the arrays that no donation reaches."""
  return {name: _copy(name, leaf) for name, leaf in leaves.items()}


def _copy(name: str, leaf: Any) -> np.ndarray:
  if not isinstance(leaf, jax.Array):
    array = np.asarray(leaf)
    kind = jax.dtypes.canonicalize_dtype(array.dtype)
    if kind != array.dtype and not np.array_equal(array.astype(kind), array):
      raise TypeError(f"{name}: {array.dtype} does not fit {kind}.")
    return np.array(array, kind)
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    raise TypeError(f"{name}: a state holds jax.random.key_data of its keys.")
  array = tensorfile.empty(leaf.shape, np.dtype(leaf.dtype))
  # By shard: jax keeps what np.asarray makes of a whole array.
  shards = [s for s in leaf.addressable_shards if s.replica_id == 0]
  for shard in shards:
    shard.data.copy_to_host_async()
  for shard in shards:
    array[shard.index] = np.asarray(shard.data)
  return array
