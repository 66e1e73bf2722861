"""What a compiled program moves between devices, read from its HLO text."""

import math
import re
from typing import NamedTuple

# XLA's names of the collectives; of an asynchronous pair the start counts.
KINDS = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-broadcast",
  "collective-permute",
  "ragged-all-to-all",
  "reduce-scatter",
)

_BITS = {"pred": 8, "token": 0}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_OPCODE = re.compile(
  rf"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ({'|'.join(KINDS)})(-start)?\("
)
_WHILE = re.compile(r"\bwhile\(.*?condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_PARAMETER = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) parameter\(\d+\)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLS = re.compile(
  r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_MANY = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_SCATTERS = "all-reduce-scatter"  # How a TPU's fused ones are called.
_BESIDE = 'chain_id="'
_STARTS = 'custom_call_target="AsyncCollectiveStart"'
_CONSTANT = re.compile(r"s(?:32|64)\[\]\S* constant\((\d+)\)")


class Collective(NamedTuple):
  """One collective of a program.

  Attributes:
    kind: One of `KINDS`.
    count: How often a run of the program has it: the product of the trip
      counts of the loops around it, where a count that the program decides as
      it runs is taken for 1.
    result_bytes: Of one device, each time.
    group: Devices that take part with one another.
    where: The name of the instruction.
  """

  kind: str
  count: int
  result_bytes: int
  group: int
  where: str

  @property
  def wire_bytes(self) -> float:
    """What one device sends in all, by the algorithms of a ring."""
    return self.count * self.result_bytes * _SENT[self.kind](self.group)


# Bytes that a device sends for each byte of its result, in a group of n.
_SENT = {
  "all-gather": lambda n: (n - 1) / n,
  "all-reduce": lambda n: 2 * (n - 1) / n,
  "all-to-all": lambda n: (n - 1) / n,
  "collective-broadcast": lambda n: 1.0,
  "collective-permute": lambda n: 1.0,
  "ragged-all-to-all": lambda n: (n - 1) / n,
  "reduce-scatter": lambda n: float(n - 1),
}


def collectives(text: str) -> list[Collective]:
  """Returns the collectives of a compiled program that move anything.

  Args:
    text: As `jax.stages.Compiled.as_text()` has it.
  """
  bodies, entry = _computations(text)
  counts = _counts(bodies, entry)
  devices = _devices(text)
  found = []
  for name, lines in bodies.items():
    if not counts.get(name):
      continue
    starts = any(_STARTS in line for line in lines)
    for line in lines:
      match = _OPCODE.match(line)
      # What runs beside other work is printed where it starts, where it ends,
      # and in each step of that work, which a loop may run more often.
      if match is None or (_BESIDE in line and not starts):
        continue
      where, shape, kind, is_start = match.groups()
      group = _group(line, kind, devices)
      if group < 2:
        continue
      size = _size(shape, kind, bool(is_start))
      if name.startswith(_SCATTERS):
        # Printed as what it would be without its own cut after it.
        kind, size = "reduce-scatter", size // group
      found.append(Collective(kind, counts[name], size, group, where))
  return found


def total(found: list[Collective]) -> dict[str, dict[str, int]]:
  """Returns of each kind how often it is run and the bytes of its results."""
  result: dict[str, dict[str, int]] = {}
  for one in found:
    kind = result.setdefault(one.kind, {"count": 0, "bytes": 0})
    kind["count"] += one.count
    kind["bytes"] += one.count * one.result_bytes
  return dict(sorted(result.items()))


def parameter_bytes(text: str) -> int:
  """Returns the bytes of what a compiled program reads, of one device.

  Args:
    text: As of `collectives`.
  """
  bodies, entry = _computations(text)
  shapes = (_PARAMETER.match(line) for line in bodies.get(entry, ()))
  arrays = [_ARRAY.findall(match[1]) for match in shapes if match]
  return sum(_bytes(*one) for found in arrays for one in found)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  """Returns the lines of each computation, and the name of the first to run."""
  bodies: dict[str, list[str]] = {}
  entry, current = "", None
  for line in text.splitlines():
    if match := _COMPUTATION.match(line):
      current = match[2]
      bodies[current] = []
      if match[1]:
        entry = current
    elif current is not None:
      bodies[current].append(line)
  return bodies, entry


def _counts(bodies: dict[str, list[str]], entry: str) -> dict[str, int]:
  """Returns how often each computation runs when the program runs once."""
  counts: dict[str, int] = {}

  def visit(name: str, times: int) -> None:
    if name not in bodies:
      return
    counts[name] = counts.get(name, 0) + times
    for line in bodies[name]:
      if loop := _WHILE.search(line):
        condition, body = loop.groups()
        visit(body, times * _trips(line, bodies.get(condition, [])))
        continue
      for called in _CALLS.findall(line):
        visit(called, times)
      for many in _MANY.findall(line):
        for called in many.split(","):
          visit(called.strip().lstrip("%"), times)

  visit(entry, 1)
  return counts


def _trips(line: str, condition: list[str]) -> int:
  """Returns the trip count of a loop; 1 where the program decides it.

  A backend that does not note it down has it as the one constant that the
  condition compares its counter with.
  """
  if known := _TRIPS.search(line):
    return int(known[1])
  constants = [int(c) for row in condition for c in _CONSTANT.findall(row)]
  return constants[0] if len(constants) == 1 and constants[0] else 1


def _devices(text: str) -> int:
  """Returns how many devices a program runs on."""
  head = text.split("\n", 1)[0]
  sizes = [
    int(n) for n in re.findall(r"(?:num_partitions|replica_count)=(\d+)", head)
  ]
  return math.prod(sizes)


def _group(line: str, kind: str, devices: int) -> int:
  """Returns how many devices exchange data with one another."""
  if kind == "collective-permute":
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", line)
    ends = re.findall(r"(\d+),(\d+)", pairs[1]) if pairs else []
    return 2 if any(a != b for a, b in ends) else 1
  # [groups, size]<=[...] is an iota; {{0,1},{2,3}} lists them.
  if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line):
    return int(iota[2])
  if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
    return len(listed[1].split(","))
  if mesh := re.search(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(.*?\)+)?\s*\{([^}]*)\}",
    line,
  ):
    sizes = dict(re.findall(r"'?([\w.]+)'?=(\d+)", mesh[1]))
    # Of an axis that is split again, 'axis_0':(1)2 is a part of two.
    axes = re.findall(r"'([\w.]+)'(?::\(\d+\)(\d+))?", mesh[2])
    return math.prod(int(part or sizes[axis]) for axis, part in axes)
  return devices


def _size(shape: str, kind: str, is_start: bool) -> int:
  """Returns the bytes of a collective's result.

  The start of an asynchronous one gives its operands and its results, and
  those of some kinds a few numbers more.
  """
  sizes = [_bytes(*array) for array in _ARRAY.findall(shape)]
  if not is_start or not shape.startswith("("):
    return sum(sizes)
  if kind == "all-reduce":
    return sum(sizes)  # It gives its results alone.
  sizes = [size for size in sizes if size > 8] or sizes
  half = len(sizes) // 2
  return sum(sizes[half:]) if len(sizes) > 1 else sum(sizes)


def _bytes(kind: str, dimensions: str) -> int:
  """Returns the bytes of an array, `f32[2,3]` as ("f32", "2,3")."""
  if kind in _BITS:
    bits = _BITS[kind]
  elif match := re.match(r"[a-z]+?(\d+)", kind):
    bits = int(match[1])
  else:
    return 0
  count = math.prod(int(n) for n in dimensions.split(",") if n)
  return math.ceil(count * bits / 8)
