"""Compiles a job for TPUs that are not here: does it fit, what does it move."""

import contextlib
import dataclasses
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from vidgen import checkpoint, errors, executables, hlo, topology, video

_GIB = 2**30
# Of a device's memory, what least effort may be off by: 1 % was the most seen.
_DOUBT = 0.1
_TOO_LARGE = re.compile(
  r"(?:total memory required|Used).*?\(?([\d.]+)([GMK])\)? (?:exceeds|of)"
)


@dataclasses.dataclass
class Program:
  """A program of a job, lowered when it is asked for.

  Attributes:
    name: Of the stage: "denoise step", "train step 17x64x64".
    lower: Returns it lowered, a `jax.stages.Lowered`.
    key: Under which a job looks for it among executables.
    resident_bytes: Of one device: weights of other programs that stay there.
    given_bytes: Of one device: what the program is called with. What of that it
      does not read is no argument of what is compiled, but there all the same.
    model_flops: Of one run on all devices, by the model's own count; 0 where
      none is kept.
    runs: How often the job runs it for a clip, or a step.
  """

  name: str
  lower: Callable[[], Any]
  key: str = ""
  resident_bytes: int = 0
  given_bytes: int = 0
  model_flops: float = 0.0
  runs: int = 1


@dataclasses.dataclass
class Result:
  """What compiling a program told; bytes are of one device.

  Attributes:
    name: Of the program.
    fits: Whether it has room.
    hbm_bytes: All that it needs, resident weights too.
    argument_bytes: Weights and what else goes in.
    temporary_bytes: What it needs as it runs.
    output_bytes: What comes out and is not written over an argument.
    code_bytes: The program itself.
    resident_bytes: What stays there and is not read.
    collectives: By kind, how many run and the bytes of their results.
    wire_bytes: What a device sends.
    model_flops: As of `Program`.
    bound_seconds: What compute, memory and interconnect would each take alone:
      the model's operations at peak, one reading of the arguments and writing
      of the outputs, and what is sent over two links. Between slices it takes
      longer: the network of the data centre is not known here.
    runs: As of `Program`.
    compile_seconds: What compiling took.
    effort: "full", as a job compiles it; "least" takes a fraction of the time,
      moves the same, and its sizes are about right.
  """

  name: str
  fits: bool
  hbm_bytes: int
  argument_bytes: int = 0
  temporary_bytes: int = 0
  output_bytes: int = 0
  code_bytes: int = 0
  resident_bytes: int = 0
  collectives: dict[str, dict[str, int]] = dataclasses.field(
    default_factory=dict
  )
  wire_bytes: float = 0.0
  model_flops: float = 0.0
  bound_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
  runs: int = 1
  compile_seconds: float = 0.0
  effort: str = "full"


@dataclasses.dataclass
class Report:
  """What compiling a job told.

  Attributes:
    topology: Its name.
    devices: How many.
    mesh: The size of each axis that is split.
    hbm_limit_bytes: What a device has.
    why_mesh: Why it is this mesh, where it was chosen.
    programs: One after another.
    advice: What would make it fit, when it does not; empty when nothing tried
      would.
  """

  topology: str
  devices: int
  mesh: dict[str, int]
  hbm_limit_bytes: int
  programs: list[Result]
  why_mesh: str = ""
  advice: str = ""

  @property
  def fits(self) -> bool:
    """Says whether every program has room."""
    return all(program.fits for program in self.programs)

  @property
  def main(self) -> Result:
    """The program that takes the most operations."""
    return max(self.programs, key=lambda p: p.model_flops * p.runs)

  def as_json(self) -> dict[str, Any]:
    """Returns what --json writes; the figures of the job are sums over runs.

    But for the collectives, which are those of one run of the main program.
    """
    seconds = {"compute": 0.0, "memory": 0.0, "interconnect": 0.0}
    for program in self.programs:
      for name, value in program.bound_seconds.items():
        seconds[name] += value * program.runs
    return {
      "fits": self.fits,
      "hbm_bytes": max(program.hbm_bytes for program in self.programs),
      "hbm_limit_bytes": self.hbm_limit_bytes,
      "collectives": self.main.collectives,
      "model_flops": sum(p.model_flops * p.runs for p in self.programs),
      "bound_seconds": seconds,
      "mfu_bound": _mfu_bound(self.main.bound_seconds),
      "compile_seconds": sum(p.compile_seconds for p in self.programs),
      "topology": self.topology,
      "devices": self.devices,
      "mesh": self.mesh,
      "advice": self.advice,
      "programs": [dataclasses.asdict(program) for program in self.programs],
    }

  def __str__(self) -> str:
    """Returns a table for people."""
    mesh = ", ".join(f"{k} {n}" for k, n in self.mesh.items()) or "one device"
    limit = f"{self.hbm_limit_bytes / _GIB:.2f} GiB"
    head = f"{'program':{_NAME}}" + "".join(f"{c:>{_WIDTH}}" for c in _COLUMNS)
    lines = [
      f"{self.topology}: {self.devices} devices of {limit}; mesh: {mesh}",
      *([self.why_mesh] if self.why_mesh else []),
      "",
      head,
      *(_row(program) for program in self.programs),
      "",
      "GiB of a device. Seconds of one run, were compute (of the denoiser),",
      "memory or links all that took time; the slowest bounds the MFU.",
      *([_SLICES] if "*" in self.topology else []),
      *([_LEAST] if any(p.effort == "least" for p in self.programs) else []),
      "",
    ]
    for program in self.programs:
      lines += _moves(program)
    fits = "It fits." if self.fits else "It does not fit."
    return "\n".join([*lines, f"{fits} {self.advice}".rstrip()])


_SLICES = "Links: what crosses slices is taken to go as fast as within one."
_LEAST = (
  "Compiled with least effort (*), but for what nearly fits or nearly does not."
)
_NAME, _WIDTH = 30, 9
_COLUMNS = (
  *("args", "temp", "code", "others", "total", "fits"),
  *("compute", "memory", "links", "MFU <=", "compile"),
)


def _row(program: Result) -> str:
  """A line of the table."""
  sizes = (
    program.argument_bytes + program.output_bytes,
    program.temporary_bytes,
    program.code_bytes,
    program.resident_bytes,
    program.hbm_bytes,
  )
  bound = program.bound_seconds
  has_mfu = bool(bound and program.model_flops)
  cells = [f"{size / _GIB:.2f}" for size in sizes]
  cells += ["yes" if program.fits else "NO"]
  seconds = [f"{s:.3g}" for s in bound.values()] or ["-"] * 3
  # What is no denoiser's is not counted.
  cells += seconds if program.model_flops else ["-", *seconds[1:]]
  cells += [f"{_mfu_bound(bound):.0%}" if has_mfu else "-"]
  star = "*" if program.effort == "least" else ""
  cells += [f"{program.compile_seconds:.1f} s{star}"]
  name = f"{program.name[: _NAME - 1]:{_NAME}}"
  return name + "".join(f"{cell:>{_WIDTH}}" for cell in cells)


def _moves(program: Result) -> list[str]:
  """Lines on the collectives of a program."""
  if not program.collectives:
    return []
  kinds = ", ".join(
    f"{one['count']} {kind} of {one['bytes'] / 1e9:.3g} GB"
    for kind, one in program.collectives.items()
  )
  sent = program.wire_bytes / 1e9
  return [f"{program.name}: {kinds}; a device sends {sent:.3g} GB"]


def _mfu_bound(bound: dict[str, float]) -> float:
  """Returns the share of the peak that is left by the slowest bound."""
  slowest = max(bound.values(), default=0.0)
  return bound["compute"] / slowest if slowest else 0.0


def measure(
  program: Program,
  where: topology.Topology,
  devices: int,
  kept: dict[str, jax.stages.Compiled] | None = None,
) -> Result:
  """Compiles a program and reads what the compiler says of it.

  What nobody will run is compiled with least effort, which is enough to tell
  that it fits by far, or that it does not.

  Args:
    program: The program.
    where: What it is compiled for.
    devices: Of the mesh.
    kept: Takes what was compiled, by key; what is compiled is run, then.
  """
  if kept is None and where.name != topology.LOCAL:
    with _least_effort():
      result = _measure(program, where, devices)
    result.effort = "least"
    off = abs(result.hbm_bytes / where.chip.hbm_bytes - 1)
    if off > _DOUBT:
      return result
  return _measure(program, where, devices, kept)


def _measure(program, where, devices, kept=None) -> Result:
  """Compiles a program as things are set, and reads what that tells."""
  start = time.perf_counter()
  try:
    compiled = program.lower().compile()
  except Exception as error:  # The runtime's own types differ by version.
    needed = _too_large(str(error))
    if needed is None:
      raise
    return Result(
      program.name,
      False,
      needed + program.resident_bytes,
      resident_bytes=program.resident_bytes,
      model_flops=program.model_flops,
      runs=program.runs,
      compile_seconds=time.perf_counter() - start,
    )
  seconds = time.perf_counter() - start
  if kept is not None:
    kept[program.key] = compiled
  stats, text = compiled.memory_analysis(), compiled.as_text()
  found = hlo.collectives(text)
  unread = max(0, program.given_bytes - hlo.parameter_bytes(text))
  resident = program.resident_bytes + unread
  wire = math.fsum(one.wire_bytes for one in found)
  output = stats.output_size_in_bytes - stats.alias_size_in_bytes
  own = (
    stats.argument_size_in_bytes
    + stats.temp_size_in_bytes
    + output
    + stats.generated_code_size_in_bytes
  )
  chip = where.chip
  traffic = stats.argument_size_in_bytes + stats.output_size_in_bytes
  return Result(
    name=program.name,
    fits=own + resident <= chip.hbm_bytes,
    hbm_bytes=own + resident,
    argument_bytes=stats.argument_size_in_bytes,
    temporary_bytes=stats.temp_size_in_bytes,
    output_bytes=output,
    code_bytes=stats.generated_code_size_in_bytes,
    resident_bytes=resident,
    collectives=hlo.total(found),
    wire_bytes=wire,
    model_flops=program.model_flops,
    bound_seconds={
      "compute": program.model_flops / (chip.flops * devices),
      "memory": traffic / chip.hbm_bandwidth,
      "interconnect": wire / chip.link_bandwidth,
    },
    runs=program.runs,
    compile_seconds=seconds,
  )


def _too_large(text: str) -> int | None:
  """Returns the bytes that a program would need, if that is what failed it."""
  if "RESOURCE_EXHAUSTED" not in text or "HBM" not in text.upper():
    return None
  match = _TOO_LARGE.search(text)
  if match is None:
    return 2**63 - 1
  unit = {"G": 2**30, "M": 2**20, "K": 2**10}[match[2]]
  return int(float(match[1]) * unit)


def write_json(path: str | os.PathLike, report: Report) -> None:
  """Writes a report; the file appears whole."""
  text = json.dumps(report.as_json(), indent=2) + "\n"
  with video.atomic(path) as draft:
    draft.write_text(text, encoding="utf-8")


@runtime_checkable
class Job(Protocol):
  """A job that can say what it would run; see `vidgen.programs`."""

  why_mesh: str

  def programs(
    self, devices: Sequence[Any], device_bytes: int | None = None
  ) -> tuple[Mesh, list[Program]]:
    """Returns the mesh it lays over devices, and its programs on that.

    Of a mesh that it chose itself, by the memory of a device, `why_mesh` then
    says why.
    """

  def alternatives(self) -> Iterator[tuple[str, "Job"]]:
    """Yields changes that save memory, what costs least first."""


def run(job: Job, name: str, save: str | os.PathLike | None = None) -> Report:
  """Compiles every program of a job for a topology.

  Where one does not fit, changes are tried until one does.

  Args:
    job: The job.
    name: Of the topology.
    save: A folder for the executables, new or empty; None keeps none.

  Raises:
    InputError: An unknown topology, a job that cannot be laid out on it, or
      executables of a job that would not read them.
    StorageError: The executables cannot be written.
  """
  where = topology.find(name)
  if save is not None and not hasattr(job, "model"):
    raise errors.InputError(
      "save: only vidgen sample reads executables; a training run keeps what "
      "it compiles in the cache ($VIDGEN_CACHE), for its next start."
    )
  if save is not None:
    checkpoint.new_folder(save)  # Before minutes of compiling, not after.
  kept = {} if save is not None else None
  report, mesh = _compile(job, where, kept)
  if report.fits:
    if kept is not None:
      devices = list(mesh.devices.flat)
      identity = executables.identity(job.model, devices, mesh.shape)
      executables.save(save, kept, identity)
    return report
  tried = []
  for change, other in job.alternatives():
    try:
      if _compile(other, where)[0].fits:
        report.advice = f"It would with {change}."
        return report
    except errors.InputError:
      continue  # This change cannot be laid out here.
    tried.append(change)
  report.advice = f"Nor would it with any of: {'; '.join(tried) or 'nothing'}."
  return report


def _compile(job, where, kept=None) -> tuple[Report, Mesh]:
  mesh, programs = job.programs(where.devices, where.chip.hbm_bytes)
  with _without_cache():
    results = [measure(one, where, mesh.size, kept) for one in programs]
  sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}
  limit = where.chip.hbm_bytes
  report = Report(where.name, mesh.size, sizes, limit, results, job.why_mesh)
  return report, mesh


@contextlib.contextmanager
def _least_effort() -> Iterator[None]:
  """Compiles with the least of the compiler's effort."""
  before = jax.config.jax_exec_time_optimization_effort
  jax.config.update("jax_exec_time_optimization_effort", -1.0)
  try:
    yield
  finally:
    jax.config.update("jax_exec_time_optimization_effort", before)


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
  """Compiles anew: what comes from the persistent cache cannot be saved again.

  Nor can it be read for devices that are not here.
  """
  before = jax.config.jax_enable_compilation_cache
  jax.config.update("jax_enable_compilation_cache", False)
  # It is asked once whether there is a cache, and remembered.
  compilation_cache.reset_cache()
  try:
    yield
  finally:
    jax.config.update("jax_enable_compilation_cache", before)
    compilation_cache.reset_cache()
