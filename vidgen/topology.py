"""TPU slices by name, and what their chips can do."""

import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from vidgen import errors


class Chip(NamedTuple):
  """One device of a slice, as jax counts them.

  A figure that nobody gave is infinity: it bounds nothing.

  Attributes:
    name: As of a topology's name.
    hbm_bytes: What a program can have, as the compiler says it.
    flops: Dense bfloat16 operations a second.
    hbm_bandwidth: Bytes a second.
    link_bandwidth: Bytes a second that two links send, one way: what a ring
      through the device carries in both directions.
    dimensions: Of the torus.
  """

  name: str
  hbm_bytes: int
  flops: float
  hbm_bandwidth: float
  link_bandwidth: float
  dimensions: int

  @property
  def example(self) -> str:
    """A slice that there is."""
    return f"{self.name}:{'2x4' if self.dimensions == 2 else '4x4x4'}"


def _gib(number: float) -> int:
  return int(number * 2**30)


# Peaks from the maker's data sheets; limits of memory from the compiler's own
# words when a program is too large.
CHIPS = {
  chip.name: chip
  for chip in (
    Chip("v5e", _gib(15.75), 197e12, 819e9, 90e9, 2),
    Chip("v5p", _gib(95.74), 459e12, 2765e9, 180e9, 3),
    Chip("v6e", _gib(31.25), 918e12, 1640e9, 180e9, 2),
  )
}
# What libtpu reads when it looks for devices, of which there are none here.
_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v6e-8",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_STDERR_LOG_LEVEL": "3",
  "TPU_MIN_LOG_LEVEL": "3",
}


# The name of the devices of this machine.
LOCAL = "local"


class Topology(NamedTuple):
  """Slices of TPUs, or the devices that are here.

  Attributes:
    name: For example "v6e:2x4", or "2*v6e:16x16" of two slices.
    chip: Their chips.
    devices: Compile-only devices, in order.
  """

  name: str
  chip: Chip
  devices: Sequence[Any]


def parse(name: str) -> tuple[int, Chip, tuple[int, ...]]:
  """Returns slices, chip and the sides of a slice.

  Args:
    name: CHIP:SIDExSIDE[xSIDE], with "N*" before it for N slices.

  Raises:
    InputError: There is no such thing.
  """
  match = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", name)
  chip = CHIPS.get(match[2]) if match else None
  if chip is None:
    raise errors.InputError(
      f"topology: {name!r} is not known; give {', '.join(CHIPS)} and the "
      "sides of a slice, for example v5e:2x4, v6e:16x16 or v5p:4x4x4, and "
      "2*v6e:16x16 for two slices; or local, for the devices that are here."
    )
  sides = tuple(int(side) for side in match[3].split("x"))
  slices = int(match[1] or 1)
  if len(sides) != chip.dimensions or 0 in (*sides, slices):
    raise errors.InputError(
      f"topology: {name!r}: a {chip.name} slice has {chip.dimensions} sides, "
      f"for example {chip.example}."
    )
  return slices, chip, sides


def find(name: str) -> Topology:
  """Returns a topology whose devices programs can be compiled for.

  Args:
    name: As of `parse`, or "local".

  Raises:
    InputError: There is no such topology, or no compiler for it.
  """
  if name == LOCAL:
    return _here()
  slices, chip, sides = parse(name)
  if importlib.util.find_spec("libtpu") is None:
    raise errors.InputError(
      "topology: the TPU compiler is missing; pip install 'vidgen[tpu]'."
    )
  for key, value in _ENVIRONMENT.items():
    os.environ.setdefault(key, value)
  from jax.experimental import topologies

  text = "x".join(map(str, sides))
  options = {"num_slices": slices} if slices > 1 else {}
  # A slice smaller than a host's four chips says so.
  if math.prod(sides) < 4:
    bounds = [*sides, *[1] * (3 - len(sides))]
    options["chips_per_host_bounds"] = bounds
  try:
    description = topologies.get_topology_desc(
      topology_name=f"{chip.name}:{text}", platform="tpu", **options
    )
  except Exception as error:  # The runtime's own types differ by version.
    raise errors.InputError(
      f"topology: {name}: {str(error).splitlines()[0]}; "
      f"there is {chip.example}, for example."
    ) from error
  return Topology(name, chip, list(description.devices))


def _here() -> Topology:
  """The devices of this machine, whatever they are."""
  import jax

  from vidgen import meters

  devices = jax.devices()
  stats = devices[0].memory_stats() or {}
  # Devices that are a CPU's share its memory.
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  limit = stats.get("bytes_limit", memory // len(devices))
  peak = meters.peak_flops(devices[:1])
  unknown = math.inf
  chip = Chip(
    devices[0].device_kind, limit, peak or unknown, unknown, unknown, 0
  )
  return Topology(LOCAL, chip, devices)
