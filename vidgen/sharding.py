"""The mesh and the rules that map logical axes to it.

Networks name logical axes ("embed", "heads", ...); this module and `configs/`
alone know the axes of the mesh:

- `data` splits the batch.
- `cfg` splits the two branches of guidance, the outer half of a batch.
- `fsdp` splits the weights, which are gathered where they are used. It also
  splits the batch or, where that does not divide, the tokens.
- `ring` and `context` split the tokens: attention passes keys and values on
  around the ring, and trades tokens for heads (Ulysses) over the context.
- `tensor` splits heads and hidden units.
"""

import contextlib
import contextvars
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import (
  Mesh,
  NamedSharding,
  PartitionSpec,
)
from jax.typing import DTypeLike
from jaxtyping import Array, PyTree

from vidgen import errors, meshes

MESH_AXES = meshes.AXES
make_mesh = meshes.make

Rules = Sequence[tuple[str, str | tuple[str, ...] | None]]

# Logical axis -> mesh axes. An axis that is not listed is an error.
RULES: Rules = (
  # Activations.
  ("batch", ("cfg", "data", "fsdp")),
  ("tokens", ("ring", "fsdp", "context")),
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

# Frames alone have these; what they map to depends on the size: see `frames`.
_SPACE = ("height", "width")
_RING, _STORED = "ring", "fsdp"


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


def platform() -> str:
  """Returns what the mesh in force is made of: "cpu", "gpu" or "tpu".

  It need not be here: programs compile for devices elsewhere.
  """
  mesh = jax.sharding.get_abstract_mesh()
  device = None if mesh.empty else mesh.abstract_device
  name = jax.default_backend() if device is None else device.platform
  return "gpu" if name in ("cuda", "rocm") else name


def _assign(
  shape: tuple[int | None, ...],
  axes: Sequence[str | None],
  sizes: Mapping[str, int],
  rules: Rules,
) -> list[tuple[str, ...]]:
  """Returns where each dimension goes; what the mesh can't divide stays whole.

  Of the mesh axes that a rule names, those are taken that divide what is left.
  A dimension of None is divided by all.

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
      if name in taken or sizes[name] == 1:
        continue
      if size is not None and size % (count * sizes[name]):
        continue
      use.append(name)
      count *= sizes[name]
    taken.update(use)
    spec.append(tuple(use))
  return spec


def _spec(
  shape: tuple[int, ...],
  axes: Sequence[str | None],
  sizes: Mapping[str, int],
  rules: Rules,
) -> PartitionSpec:
  """Returns the same as JAX wants it."""
  return _as_spec(_assign(shape, axes, sizes, rules))


def _as_spec(names: Iterable[tuple[str, ...]]) -> PartitionSpec:
  return PartitionSpec(*(part or None for part in names))


def _product(sizes: Mapping[str, int], names: tuple[str, ...]) -> int:
  return math.prod(sizes[name] for name in names)


def parts(batch: int, axis: str) -> int:
  """Returns how many parts the logical `axis` is split into here.

  Args:
    batch: Size of the batch, which has the first choice of the mesh's axes.
    axis: Its size must be made a multiple of what is returned.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return 1
  axes = ("batch", axis)
  names = _assign((batch, None), axes, mesh.shape, _rules.get())[1]
  return _product(mesh.shape, names)


def trades(batch: int) -> int:
  """Returns how many devices trade their tokens for heads in attention."""
  split = attention((batch, None, 1, 1))
  return 1 if split is None else split.context_size


def constrain(x: Array, *axes: str | None) -> Array:
  """Asks for `x` to be laid out along the logical `axes`; a no-op off a mesh.

  Raises:
    ValueError: A logical axis without a rule.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  rules = _rules.get()
  if not any(axis in _SPACE for axis in axes):
    spec = _spec(x.shape, axes, mesh.shape, rules)
    return jax.lax.with_sharding_constraint(x, spec)
  grid = _grid.get()
  if grid is None:
    return x
  rules = (*rules, *zip(_SPACE, grid.axes, strict=True))
  spec = _spec(x.shape, axes, grid.mesh.shape, rules)
  return jax.lax.with_sharding_constraint(x, NamedSharding(grid.mesh, spec))


def gathered(x: Array, *axes: str | None) -> Array:
  """Asks for a weight that is stored along `axes` to be whole for its use.

  Axes over which computation is split, too, stay as they are. What flows back
  goes where the weight is stored.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.shape[_STORED] == 1:
    return x
  names = _assign(x.shape, axes, mesh.shape, _rules.get())
  stored = _as_spec(names)
  used = _as_spec(tuple(n for n in part if n != _STORED) for part in names)
  constraint = jax.lax.with_sharding_constraint

  @jax.custom_vjp
  def gather(x):
    return constraint(x, used)

  gather.defvjp(
    lambda x: (gather(x), None), lambda _, d: (constraint(d, stored),)
  )
  return gather(x)


class Split(NamedTuple):
  """How attention is split over devices.

  Attributes:
    qkv: Of `b n heads head_dim`.
    bias: Of `heads n m`.
    scalar: Of a number.
    ring: Mesh axes of the ring, for collectives.
    ring_size: Devices of a ring.
    context: Mesh axes over which tokens are traded for heads.
    context_size: Devices of such a group.
  """

  qkv: PartitionSpec
  bias: PartitionSpec
  scalar: PartitionSpec
  ring: tuple[str, ...]
  ring_size: int
  context: tuple[str, ...]
  context_size: int


def attention(
  shape: tuple[int | None, ...], whole: bool = False
) -> Split | None:
  """Returns how attention over q of `shape` is split; None off a mesh.

  Args:
    shape: `b n heads head_dim`; what does not divide stays whole.
    whole: Keeps the tokens together.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return None
  axes = ("batch", None if whole else "tokens", "activation_heads", None)
  batch, tokens, heads, _ = _assign(shape, axes, mesh.shape, _rules.get())
  ring = tuple(name for name in tokens if name == _RING)
  context = tuple(name for name in tokens if name != _RING)
  # A mesh axis that is named nowhere would be summed over when gradients flow
  # back; those of size 1 cost nothing where they are named.
  single = tuple(name for name in mesh.axis_names if mesh.shape[name] == 1)
  return Split(
    _as_spec(((*batch, *single), tokens, heads)),
    _as_spec((heads,)),
    PartitionSpec(),
    ring,
    _product(mesh.shape, ring),
    context,
    _product(mesh.shape, context),
  )


_grid: contextvars.ContextVar[meshes.Grid | None] = contextvars.ContextVar(
  "grid", default=None
)


@contextlib.contextmanager
def frames(batch: int, height: int, width: int) -> Iterator[None]:
  """Within, "height" and "width" are split over what the batch leaves free.

  The axes of the mesh are taken apart into a grid of devices that divides both,
  the one whose parts have the shortest edges: 4 x 2 for 60 x 90 on 8 devices.

  Args:
    batch: Videos.
    height: At the coarsest level of a network; the others are multiples.
    width: Likewise.
  """
  mesh = jax.sharding.get_abstract_mesh()
  grid = None
  if not mesh.empty and mesh.size > 1:
    taken = _assign((batch,), ("batch",), mesh.shape, _rules.get())[0]
    grid = meshes.grid(mesh, taken, height, width)
  token = _grid.set(grid)
  try:
    yield
  finally:
    _grid.reset(token)


def grid() -> tuple[int, int]:
  """Returns into how many parts height and width are split here."""
  here = _grid.get()
  return (1, 1) if here is None else (here.rows, here.columns)


def covered(height: int, width: int) -> bool:
  """Returns whether frames of that size leave no device without its own part.

  Where they do, some devices hold the same part. Frames that are not split at
  all count as covered; so does, outside of `frames`, what only a batch splits.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return True
  here = _grid.get()
  if here is None:
    batch = dict(_rules.get())["batch"]
    return all(mesh.shape[n] == 1 for n in mesh.axis_names if n not in batch)
  if here.rows * here.columns == 1:
    return True
  is_left = any(here.mesh.shape[name] > 1 for name in here.parts)
  return not (is_left or height % here.rows or width % here.columns)


def settle(x: Array) -> Array:
  """Lays frames out as whole axes of the mesh can say, near to how they are.

  What comes out of a program must be so. An axis that the grid takes apart goes
  to the height, else to the width, as a whole.
  """
  grid, mesh = _grid.get(), jax.sharding.get_abstract_mesh()
  if grid is None:
    return x
  batch = _assign(x.shape[:1], ("batch",), mesh.shape, _rules.get())[0]
  space: tuple[list[str], list[str]] = ([], [])
  whole = lambda pair, size: 1 in pair and math.prod(pair) == size
  order = sorted(
    grid.parts, key=lambda n: not whole(grid.parts[n], mesh.shape[n])
  )
  for name in order:
    size = mesh.shape[name]
    for i in (1, 0) if grid.parts[name][1] == size else (0, 1):
      if x.shape[2 + i] % (size * _product(mesh.shape, tuple(space[i]))) == 0:
        space[i].append(name)
        break
  spec = _as_spec((batch, (), *map(tuple, space)))
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

  def one(leaf: Any) -> Any:
    is_boxed = isinstance(leaf, nn.Partitioned)
    value = leaf.value if is_boxed else leaf
    if not jax.tree.leaves(value):
      # What an optimiser that treats parameters differently has of the others.
      return value
    names = leaf.names if is_boxed else ()
    if len(names) != len(value.shape):
      # Sums of a parameter over an axis, which are small.
      names = (None,) * len(value.shape)
    return NamedSharding(mesh, _spec(value.shape, names, mesh.shape, rules))

  is_box = lambda leaf: isinstance(leaf, nn.Partitioned)
  return jax.tree.map(one, boxed, is_leaf=is_box)


def placed(
  tree: PyTree, places: PyTree, dtype: DTypeLike | None = None
) -> PyTree:
  """Returns the shapes of arrays, each with its sharding.

  Args:
    tree: Arrays, or their shapes.
    places: The sharding of each.
    dtype: Of them all; None keeps each one's own.
  """
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(
      x.shape, dtype or x.dtype, sharding=place
    ),
    tree,
    places,
  )


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


def host_part(mesh: Mesh) -> tuple[int, int]:
  """Returns which part of a training batch this process loads, of how many.

  Processes whose devices share tokens or heads of the same samples load the
  same part.

  Raises:
    InputError: The devices of a process have no whole part.
  """
  names = dict(RULES)["batch"]
  order = [mesh.axis_names.index(name) for name in names]
  order += [i for i in range(mesh.devices.ndim) if i not in order]
  count = _product(mesh.shape, tuple(names))
  rows = mesh.devices.transpose(order).reshape(count, -1)
  mine = jax.process_index()
  own = [
    i for i in range(count) if any(d.process_index == mine for d in rows[i])
  ]
  size = len(own)
  if not own or count % size or own[0] % size or own[-1] - own[0] != size - 1:
    raise errors.InputError(
      f"mesh: process {mine} has parts {own} of the batch's {count}, which is "
      "no whole share; give the axes of the batch other sizes."
    )
  return own[0] // size, count // size
