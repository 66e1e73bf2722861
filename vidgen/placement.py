"""Arrays onto their devices, and layers into stacks that are there already."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import (
  NamedSharding,
  PartitionSpec,
  Sharding,
  SingleDeviceSharding,
)
from jaxtyping import Array, Integer, Shaped


def put(
  array: Shaped[np.ndarray, "..."], place: Sharding
) -> Shaped[Array, "..."]:
  """Returns `array` on its devices; each process gives its own part."""
  return jax.block_until_ready(
    jax.make_array_from_callback(array.shape, place, lambda i: array[i])
  )


def to_host(array: Shaped[Array, "..."]) -> Shaped[np.ndarray, "..."]:
  """Returns all of an array; of several processes, all must ask for it."""
  if array.is_fully_addressable or array.is_fully_replicated:
    return np.asarray(array)
  return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def replicated(place: Sharding) -> Sharding:
  """Returns the sharding that puts a full copy on each device of `place`."""
  if isinstance(place, NamedSharding):
    return NamedSharding(place.mesh, PartitionSpec())
  if isinstance(place, SingleDeviceSharding):
    return place
  raise TypeError(f"Weights load to NamedShardings, not to {place}.")


def raw_sharding(
  place: Sharding, axes: tuple[int, ...] | None, rank: int
) -> Sharding:
  """Returns the sharding of a published layer that lands as `place` has it."""
  if not isinstance(place, NamedSharding):
    return replicated(place)
  spec = tuple(place.spec) + (None,) * (rank - len(place.spec))
  layer = spec[1:]
  if axes is not None:
    layer = tuple(layer[axes.index(i)] for i in range(len(axes)))
  return NamedSharding(place.mesh, PartitionSpec(*layer))


@jax.jit
def take_layer(
  stack: Shaped[Array, "layers ..."], layer: Integer[Array, ""] | int
) -> Shaped[Array, "..."]:
  """Returns one layer of a stack."""
  return jax.lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False)


@functools.lru_cache(maxsize=256)
def inserter(axes: tuple[int, ...] | None, place: Sharding) -> Any:
  """Returns the compiled function that fills a layer of a donated stack."""

  def insert(stack, raw, layer):
    new = raw if axes is None else raw.transpose(axes)
    new = new.astype(stack.dtype)
    stack = jax.lax.dynamic_update_index_in_dim(stack, new, layer, 0)
    return stack, jnp.isfinite(new).all()

  return jax.jit(
    insert, donate_argnums=0, out_shardings=(place, replicated(place))
  )


@functools.lru_cache(maxsize=256)
def adder(
  axes: tuple[int, ...] | None, shape: tuple[int, ...], place: Sharding
) -> Any:
  """Returns the compiled function that adds to a donated parameter."""

  def add(param, down, up, layer, factor):
    delta = jnp.matmul(up, down, precision=jax.lax.Precision.HIGHEST)
    delta = (factor * delta).reshape(shape)
    delta = delta if axes is None else delta.transpose(axes)
    old = param if layer is None else take_layer(param, layer)
    new = (old.astype(jnp.float32) + delta).astype(param.dtype)
    if layer is None:
      return new
    return jax.lax.dynamic_update_index_in_dim(param, new, layer, 0)

  return jax.jit(add, donate_argnums=0, out_shardings=place)
