"""Which mesh to use: named ones, and one that is chosen for a model."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from vidgen import errors, meshes, sharding

AUTO = "auto"

# Names for meshes that fit any number of devices; see `sharding`.
PRESETS: dict[str, dict[str, int]] = {
  "data": {"data": -1},
  "fsdp": {"fsdp": -1},
  "context": {"context": -1},
  "ring": {"ring": -1},
  "tensor": {"tensor": -1},
  "cfg_context": {"cfg": 2, "context": -1},
  "cfg_ring": {"cfg": 2, "ring": -1},
  "cfg_fsdp": {"cfg": 2, "fsdp": -1},
  "cfg_tensor": {"cfg": 2, "tensor": -1},
}

# What a ring costs beyond trading tokens for heads, for each time that it is
# doubled: smaller blocks, and more to send.
_RING_COST = 0.08

# The share of a device's memory that whole copies of what is stored may take.
_COPIES = 0.4


@dataclasses.dataclass
class Need:
  """What a mesh is chosen by.

  Attributes:
    heads: Heads of the model's attention.
    batch: Clips of a call, or samples of a training step.
    guided: Whether each clip has two branches.
    stored_bytes: Of weights, with the optimiser's state in training.
    device_bytes: Memory of a device; None is not known.
    training: Whether gradients are taken.
  """

  heads: int
  batch: int = 1
  guided: bool = False
  stored_bytes: int = 0
  device_bytes: int | None = None
  training: bool = False


class Choice(NamedTuple):
  """A mesh, as `sharding.make_mesh` takes it, and why it is this, in a line."""

  sizes: dict[str, int]
  why: str


def named(mesh: str | Mapping[str, int] | None) -> Any:
  """Returns the sizes that a config's mesh stands for; None if chosen later.

  Args:
    mesh: "auto", the name of a preset, or sizes, which stay as they are.

  Raises:
    InputError: An unknown name.
  """
  if not isinstance(mesh, str):
    return mesh or {}
  if mesh == AUTO:
    return None
  if mesh not in PRESETS:
    raise errors.InputError(
      f"mesh: {mesh!r} is unknown; give {AUTO}, one of {', '.join(PRESETS)}, "
      "or the size of each axis."
    )
  return dict(PRESETS[mesh])


def make(
  mesh: str | Mapping[str, int] | None,
  need: Callable[[], Need],
  devices: Sequence[Any] | None = None,
) -> tuple[Mesh, str]:
  """Returns the mesh of a config, and why it is this if it was chosen.

  Args:
    mesh: As `named` takes it; none is one device.
    need: Says what "auto" chooses by; is not asked otherwise.
    devices: All there are by default.

  Raises:
    InputError: A mesh that is unknown or does not fit the devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes, why = named(mesh), ""
  if sizes is None:
    sizes, why = auto(len(devices), need())
  return meshes.make(sizes or None, devices), why


def memory_of(device: Any) -> int | None:
  """Returns the bytes of memory of a device; None where it does not say."""
  return (device.memory_stats() or {}).get("bytes_limit")


def auto(devices: int, need: Need) -> Choice:
  """Chooses the sizes of a mesh, all devices used.

  What needs no exchange comes first: the branches of guidance, then the batch.
  What is left splits tokens: over heads as long as few of them are made up to
  divide, else around a ring, too.
  """
  sizes, reasons, left = {}, [], devices
  if need.guided and left % 2 == 0:
    sizes["cfg"] = 2
    left //= 2
    reasons.append("one branch of guidance on each half")
  batch = max(n for n in _divisors(left) if need.batch % n == 0)
  copies = _copies_fit(need)
  axis = "fsdp" if need.training and not copies else "data"
  if batch > 1:
    sizes[axis] = batch
    left //= batch
    reasons.append(f"{need.batch // batch} of {need.batch} clips on a part")
  if left > 1:
    ring, context = _split_tokens(left, need.heads)
    over = context * math.ceil(need.heads / context)
    reasons.append(f"tokens over {left}, {need.heads} heads over {context}")
    if over > need.heads:
      reasons[-1] += f" (made up to {over})"
    # Weights are split over fsdp, which takes tokens where no batch is left.
    whole = copies or need.training
    parts = {"ring": ring, "context" if whole else "fsdp": context}
    sizes |= {name: size for name, size in parts.items() if size > 1}
  if not copies and "fsdp" in sizes:
    size = need.stored_bytes / 2**30
    reasons.append(f"{size:.1f} GiB of weights over {sizes['fsdp']}")
  chosen = ", ".join(f"{name}={size}" for name, size in sizes.items())
  why = f"mesh: auto chose {chosen or 'one device'} for {devices} devices"
  return Choice(sizes, f"{why}: {'; '.join(reasons)}" if reasons else why)


def _copies_fit(need: Need) -> bool:
  """Says whether each device has room for all that is stored."""
  if need.device_bytes is None:
    return not need.training
  return need.stored_bytes <= _COPIES * need.device_bytes


def _split_tokens(parts: int, heads: int) -> tuple[int, int]:
  """Returns the sizes of the ring and of the context that cost least."""

  def cost(context: int) -> float:
    made_up = context * math.ceil(heads / context) / heads
    return made_up * (1 + _RING_COST * math.log2(parts / context))

  context = min((n for n in _divisors(parts) if n <= heads), key=cost)
  return parts // context, context


def _divisors(number: int) -> list[int]:
  return [n for n in range(1, number + 1) if number % n == 0]


def check_heads(heads: int, batch: int) -> None:
  """Raises InputError if the mesh in force has more parts than heads.

  Fewer parts that do not divide the heads get heads of zeros.
  """
  split = sharding.parts(batch, "activation_heads") * sharding.trades(batch)
  if split > heads:
    nearest = meshes.nearest_divisor(heads, split)
    raise errors.InputError(
      f"mesh: context (and fsdp, where the batch does not divide) times tensor "
      f"splits {heads} heads {split} times; the nearest that divides them is "
      f"{nearest}; ring takes any number."
    )
