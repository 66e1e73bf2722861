"""Meshes: named axes over devices, in the order of their links."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from vidgen import errors

# Of guidance, with the prompt and without.
_BRANCHES = 2

# From the slowest to the fastest links; `sharding` says what each is for.
AXES = ("cfg", "data", "fsdp", "ring", "context", "tensor")


def make(
  sizes: Mapping[str, int] | Any | None,
  devices: Sequence[Any] | None = None,
) -> Mesh:
  """Returns a mesh of `sizes`; axes that are not named have size 1.

  Where the devices are several slices, the outermost axis that the number of
  slices divides is laid over them.

  Args:
    sizes: Mesh axis name to size, for example `{"cfg": 2, "tensor": 4}`. One
      size may be -1: it takes what is left of the devices. None is one device.
    devices: All there are by default.

  Raises:
    InputError: An unknown axis, or sizes that do not fit the devices.
  """
  if sizes is not None and not isinstance(sizes, Mapping):
    raise errors.InputError(f"mesh: {sizes!r} does not map axes to sizes.")
  sizes = dict(sizes or {})
  devices = jax.devices() if devices is None else list(devices)
  shape = _shape(sizes, len(devices))
  count = math.prod(shape)
  if count > len(devices):
    raise errors.InputError(
      f"mesh: {sizes} needs {count} devices, there are {len(devices)}; give "
      "sizes that multiply to no more, or auto."
    )
  together = "processes" if jax.process_count() > 1 else None
  if count > 1 and devices[0].platform == "tpu":
    together = "TPUs"
  if count < len(devices) and together:
    raise errors.InputError(
      f"mesh: {sizes} takes {count} of {len(devices)} devices, but {together} "
      "that run together must use all; let one axis be -1."
    )
  devices = _arrange(shape, devices[:count])
  return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _shape(sizes: dict[str, Any], count: int) -> list[int]:
  """The size of each axis, the -1 filled in."""
  if unknown := sizes.keys() - set(AXES):
    raise errors.InputError(
      f"mesh: unknown axes {sorted(unknown)}; the axes are {', '.join(AXES)}."
    )
  shape = [sizes.get(axis, 1) for axis in AXES]
  if not all(type(size) is int for size in shape):
    raise errors.InputError(f"mesh: sizes must be whole numbers: {sizes}.")
  if shape.count(-1) > 1 or any(n < 1 and n != -1 for n in shape):
    raise errors.InputError(
      f"mesh: sizes must be positive, one may be -1: {sizes}."
    )
  if -1 in shape:
    known = -math.prod(shape)
    if count % known:
      raise errors.InputError(
        f"mesh: the sizes in {sizes} multiply to {known}, which does not "
        f"divide the {count} devices; the nearest that does is "
        f"{nearest_divisor(count, known)}."
      )
    shape[shape.index(-1)] = count // known
  if (cfg := shape[AXES.index("cfg")]) > _BRANCHES:
    raise errors.InputError(
      f"mesh: cfg={cfg}, but guidance has {_BRANCHES} branches; split a batch "
      "by data."
    )
  return shape


def nearest_divisor(number: int, wanted: int) -> int:
  """Returns the divisor of `number` nearest to `wanted`, the smaller of two."""
  divisors = [n for n in range(1, number + 1) if number % n == 0]
  return min(divisors, key=lambda n: (abs(n - wanted), n))


def _arrange(shape: list[int], devices: list[Any]) -> np.ndarray:
  """Lays axes along the links of the devices."""
  slices = len({getattr(device, "slice_index", 0) for device in devices})
  if slices == 1:
    return mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  outer = next((i for i, n in enumerate(shape) if n % slices == 0), None)
  if outer is None:
    raise errors.InputError(
      f"mesh: no axis of {dict(zip(AXES, shape, strict=True))} is a "
      f"multiple of the {slices} slices; let data be one."
    )
  between = [slices if i == outer else 1 for i in range(len(shape))]
  within = [n // m for n, m in zip(shape, between, strict=True)]
  return mesh_utils.create_hybrid_device_mesh(
    within, between, devices, allow_split_physical_axes=True
  )


class Grid(NamedTuple):
  """Rows and columns of devices, made of axes of a mesh that are taken apart.

  Attributes:
    mesh: A finer view of the mesh: each axis as what is left of it, its part of
      the rows, and its part of the columns.
    parts: Of each axis that is taken apart, the sizes of the two parts.
  """

  mesh: AbstractMesh
  parts: dict[str, tuple[int, int]]

  @property
  def rows(self) -> int:
    """How many there are."""
    return math.prod(rows for rows, _ in self.parts.values())

  @property
  def columns(self) -> int:
    """How many there are."""
    return math.prod(columns for _, columns in self.parts.values())

  @property
  def axes(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes of the finer mesh that the rows are, and the columns."""
    return tuple(tuple(f"{name}_{i}" for name in self.parts) for i in (0, 1))


# What is smaller than a convolution's window is not split. XLA's partitioner
# takes such a convolution for the gradient of one, and where the batch is split
# as well, it adds the same part up as often as there are parts of the batch.
_WINDOW = 3


def grid(
  mesh: Mesh | AbstractMesh, taken: Sequence[str], height: int, width: int
) -> Grid:
  """Returns a grid that divides height and width, with the shortest edges.

  As many devices as can be are in it; axes that stay whole are preferred.

  Args:
    mesh: The mesh.
    taken: Axes that are not to be used.
    height: What the rows must divide; below a window it stays whole.
    width: What the columns must divide, likewise.
  """
  free = [n for n in mesh.axis_names if n not in taken and mesh.shape[n] > 1]

  def cost(choice):
    rows = math.prod(r for r, _ in choice)
    columns = math.prod(c for _, c in choice)
    if height % rows or width % columns:
      return (0, 0, 0)
    if (rows > 1 and height < _WINDOW) or (columns > 1 and width < _WINDOW):
      return (0, 0, 0)
    edge = (rows > 1) * width / columns + (columns > 1) * height / rows
    return (-rows * columns, edge, sum(r > 1 < c for r, c in choice))

  choices = itertools.product(*(_factors(mesh.shape[n]) for n in free))
  best = dict(zip(free, min(choices, key=cost), strict=True))
  names, sizes = [], []
  for name in mesh.axis_names:
    rows, columns = best.get(name, (1, 1))
    names += [name, f"{name}_0", f"{name}_1"]
    sizes += [mesh.shape[name] // (rows * columns), rows, columns]
  types = (AxisType.Auto,) * len(names)
  return Grid(AbstractMesh(tuple(sizes), tuple(names), axis_types=types), best)


def _factors(size: int) -> list[tuple[int, int]]:
  """The pairs of numbers whose product divides `size`."""
  ways = [n for n in range(1, size + 1) if size % n == 0]
  return [(r, c) for r in ways for c in ways if size % (r * c) == 0]
