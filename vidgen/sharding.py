"""The mesh and the rules that map logical axes to it.

Networks name logical axes ("embed", "heads", ...); this module and `configs/`
alone know the axes of the mesh.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from vidgen import errors

MESH_AXES = ("data", "cfg", "fsdp", "context", "tensor")

Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]

# Logical axis -> mesh axes. An axis that is not listed is an error.
RULES: Rules = (
  # Activations.
  ("batch", ("data", "cfg", "fsdp")),
  ("tokens", "context"),
  ("activation_heads", "tensor"),
  ("activation_mlp", "tensor"),
  ("activation_embed", None),
  # Weights.
  ("embed", "fsdp"),
  ("mlp", "tensor"),
  ("heads", "tensor"),
  ("head_dim", None),
  ("vocab", "tensor"),
  ("conditioning", "fsdp"),
  ("conv_in", None),
  ("conv_out", "fsdp"),
  ("norm", None),
  ("layers", None),
)


_rules: contextvars.ContextVar[Rules] = contextvars.ContextVar(
  "rules", default=RULES
)


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules = RULES) -> Iterator[None]:
  """Runs what is within on `mesh`, where `constrain` follows `rules`."""
  token = _rules.set(rules)
  try:
    with jax.set_mesh(mesh):
      yield
  finally:
    _rules.reset(token)


def make_mesh(sizes: Mapping[str, int] | Any | None) -> Mesh:
  """Returns a mesh of `sizes`; axes that are not named have size 1.

  Args:
    sizes: Mesh axis name to size, for example `{"cfg": 2, "tensor": 4}`. One
      size may be -1: it takes what is left of the devices. None is one device.

  Raises:
    InputError: An unknown axis, or more devices than there are.
  """
  if sizes is not None and not isinstance(sizes, Mapping):
    raise errors.InputError(f"mesh: {sizes!r} does not map axes to sizes.")
  sizes = dict(sizes or {})
  if unknown := sizes.keys() - set(MESH_AXES):
    raise errors.InputError(
      f"mesh: unknown axes {sorted(unknown)}; the axes are {MESH_AXES}."
    )
  devices = jax.devices()
  shape = [sizes.get(axis, 1) for axis in MESH_AXES]
  if not all(type(size) is int for size in shape):
    raise errors.InputError(f"mesh: sizes must be whole numbers: {sizes}.")
  if shape.count(-1) > 1 or any(n < 1 and n != -1 for n in shape):
    raise errors.InputError(
      f"mesh: sizes must be positive, one may be -1: {sizes}."
    )
  if -1 in shape:
    shape[shape.index(-1)] = max(1, len(devices) // -int(np.prod(shape)))
  count = int(np.prod(shape))
  if count > len(devices):
    raise errors.InputError(
      f"mesh: {sizes} needs {count} devices, this machine has {len(devices)}."
    )
  return jax.make_mesh(
    shape,
    MESH_AXES,
    devices=devices[:count],
    axis_types=(AxisType.Auto,) * len(MESH_AXES),
  )


def _spec(
  shape: tuple[int, ...], axes: Sequence[str | None], mesh: Any, rules: Rules
) -> PartitionSpec:
  """Returns where each dimension goes; what the mesh can't divide stays whole.

  Of the mesh axes that a rule names, the leading ones that divide are taken.

  Raises:
    ValueError: A logical axis without a rule.
  """
  table = dict(rules)
  if unknown := {axis for axis in axes if axis is not None} - table.keys():
    raise ValueError(f"No rule for the logical axes {sorted(unknown)}.")
  spec, taken = [], set()
  for size, axis in zip(shape, axes, strict=True):
    names = table.get(axis)
    names = (names,) if isinstance(names, str) else tuple(names or ())
    use, count = [], 1
    for name in names:
      if name in taken or mesh.shape[name] == 1:
        continue
      if size % (count * mesh.shape[name]):
        break
      use.append(name)
      count *= mesh.shape[name]
    taken.update(use)
    spec.append(tuple(use) or None)
  return PartitionSpec(*spec)


def split(axis: str) -> bool:
  """Says whether the logical `axis` is split over devices here."""
  mesh = jax.sharding.get_abstract_mesh()
  names = dict(_rules.get())[axis]
  names = (names,) if isinstance(names, str) else tuple(names or ())
  return not mesh.empty and any(mesh.shape[name] > 1 for name in names)


def constrain(x: Array, *axes: str | None) -> Array:
  """Asks for `x` to be laid out along the logical `axes`; a no-op off a mesh.

  Raises:
    ValueError: A logical axis without a rule.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  spec = _spec(x.shape, axes, mesh, _rules.get())
  return jax.lax.with_sharding_constraint(x, spec)


def shardings(boxed: PyTree, mesh: Mesh, rules: Rules = RULES) -> PyTree:
  """Returns the sharding of each parameter of a boxed tree.

  Args:
    boxed: Shapes with logical axes, as `jax.eval_shape(module.init, ...)` gives
      them.
    mesh: The mesh.
    rules: Logical axis to mesh axes.

  Raises:
    ValueError: A logical axis without a rule.
  """

  def one(leaf: Any) -> NamedSharding:
    is_boxed = isinstance(leaf, nn.Partitioned)
    value = leaf.value if is_boxed else leaf
    names = leaf.names if is_boxed else (None,) * len(value.shape)
    return NamedSharding(mesh, _spec(value.shape, names, mesh, rules))

  is_box = lambda leaf: isinstance(leaf, nn.Partitioned)
  return jax.tree.map(one, boxed, is_leaf=is_box)


def batch_sharding(mesh: Mesh, batch: int) -> NamedSharding:
  """Returns the sharding that splits the leading axis over the data axis."""
  axes = "data" if batch % mesh.shape["data"] == 0 else None
  return NamedSharding(mesh, PartitionSpec(axes))


def training_batch(mesh: Mesh, batch: int) -> NamedSharding:
  """Returns the sharding of a training batch: over all of the batch's axes.

  Raises:
    InputError: The batch does not divide; padding would weigh samples twice.
  """
  names = dict(RULES)["batch"]
  shards = int(np.prod([mesh.shape[name] for name in names]))
  if batch % shards:
    raise errors.InputError(
      f"batch_size: {batch} does not divide over the mesh's {shards} parts "
      f"({', '.join(f'{n}={mesh.shape[n]}' for n in names)}); the nearest is "
      f"{max(1, round(batch / shards)) * shards}."
    )
  return NamedSharding(mesh, PartitionSpec(names))
