"""Processes on several hosts that make one run: who each of them is.

Each process of a run is a worker under a supervisor of its own
(`vidgen.supervisor`), which keeps in touch with the other supervisors and ends
the worker when another is lost: JAX's own client would abort with a stack.
"""

import dataclasses
import glob
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import Any

from vidgen import errors, links

# What a process is told of its place by hand; see launch/README.md.
COORDINATOR = "VIDGEN_COORDINATOR"
PROCESSES = "VIDGEN_PROCESSES"
PROCESS = "VIDGEN_PROCESS"
HEARTBEAT = "VIDGEN_HEARTBEAT"
JOIN_TIMEOUT = "VIDGEN_JOIN_TIMEOUT"

PORT = 8476

_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/"


class JoinError(errors.VidgenError, OSError):
  """The processes of a run did not find each other: exit code 74."""

  exit_code = 74


@dataclasses.dataclass(frozen=True)
class Place:
  """The place of a process among those of its run.

  Attributes:
    host: Where process 0 can be reached.
    port: Of the supervisor of process 0.
    processes: How many there are.
    process: Which one this is, from 0.
    local_devices: The devices of this host that it has; None is all.
    heartbeat: Seconds without an answer after which a process is lost.
    join_timeout: Seconds that processes wait for each other at the start.
  """

  host: str
  port: int
  processes: int
  process: int
  local_devices: tuple[int, ...] | None = None
  heartbeat: float = 60.0
  join_timeout: float = 600.0


def find(
  environ: Mapping[str, str],
  metadata: Callable[[str], str | None] | None = None,
) -> Place | None:
  """Returns the place that the cluster gives this process; None alone.

  In this order: VIDGEN_COORDINATOR with its count and number (or that of a
  Kubernetes job), a TPU slice of GKE, a TPU VM slice, and SLURM, as
  jax/_src/clusters reads them. VIDGEN_PROCESSES=1 is alone wherever it is, and
  a worker has its place already.

  Args:
    environ: The environment.
    metadata: Reads a value of the instance; None asks Google's server where
      there are TPU chips, and nothing elsewhere.

  Raises:
    InputError: A place that makes no sense.
  """
  if environ.get(PROCESSES, "") == "1" or links.LINK in environ:
    return None
  if metadata is None:
    metadata = _metadata if _has_tpu(environ) else lambda name: None
  found = (
    _by_hand(environ)
    or _of_gke(environ)
    or _of_tpu_vm(environ, metadata)
    or _of_slurm(environ)
  )
  if found is None or found["processes"] == 1:
    return None
  if not 0 <= found["process"] < found["processes"]:
    raise errors.InputError(
      f"{PROCESS}: {found['process']} of {found['processes']} processes; "
      "count them from 0."
    )
  for name, field in ((HEARTBEAT, "heartbeat"), (JOIN_TIMEOUT, "join_timeout")):
    if name in environ:
      found[field] = float(_number(environ, name, least=1))
  return Place(**found)


def part(environ: Mapping[str, str]) -> str | None:
  """Returns "i/n", this process's part of work that is done apart; None alone.

  Raises:
    InputError: It is one of several hosts of a TPU slice, whose chips do not
      work without one another.
  """
  place = find(environ)
  if place is None:
    return None
  if _has_tpu(environ):
    raise errors.InputError(
      f"sample: this is one of {place.processes} hosts of a TPU slice, whose "
      "chips start together only; take slices of one host, and give each "
      f"--shard=i/n and {PROCESSES}=1."
    )
  return f"{place.process}/{place.processes}"


def _by_hand(environ: Mapping[str, str]) -> dict[str, Any] | None:
  """A place of plain addresses."""
  if COORDINATOR not in environ:
    if given := [n for n in (PROCESSES, PROCESS) if n in environ]:
      raise errors.InputError(
        f"{given[0]} is set, and {COORDINATOR} is not; set it to HOST:PORT of "
        "process 0."
      )
    return None
  host, port = _address(environ[COORDINATOR])
  index = PROCESS
  if PROCESS not in environ and "JOB_COMPLETION_INDEX" in environ:
    index = "JOB_COMPLETION_INDEX"
  return {
    "host": host,
    "port": port,
    "processes": _number(environ, PROCESSES, least=1),
    "process": _number(environ, index),
  }


def _of_gke(environ: Mapping[str, str]) -> dict[str, Any] | None:
  """A TPU slice of GKE, or several."""
  names = environ.get("TPU_PROCESS_ADDRESSES") or environ.get(
    "TPU_WORKER_HOSTNAMES", ""
  )
  if not names or environ.get("JAX_PLATFORMS", "") == "cpu":
    return None
  hosts = [name.split(":")[0] for name in names.split(",")]
  return _of_slices(environ, hosts, _number(environ, "TPU_WORKER_ID"))


def _of_tpu_vm(
  environ: Mapping[str, str], metadata: Callable[[str], str | None]
) -> dict[str, Any] | None:
  """A slice of TPU VMs, or several."""
  number = metadata("attributes/agent-worker-number")
  workers = metadata("attributes/worker-network-endpoints")
  if number is None or workers is None:
    return None
  # Names, or the older name:id:address.
  hosts = [worker.split(":")[-1] for worker in workers.split(",")]
  lines = (metadata("attributes/tpu-env") or "").splitlines()
  pairs = (line.split(":", 1) for line in lines if ":" in line)
  env = {name.strip(): value.strip().strip("'") for name, value in pairs}
  return _of_slices({**env, **environ}, hosts, int(number))


def _of_slices(
  environ: Mapping[str, str], hosts: list[str], worker: int
) -> dict[str, Any]:
  """The place of a worker of a slice, which may be one of several."""
  slices = int(environ.get("MEGASCALE_NUM_SLICES") or 1)
  number = int(environ.get("MEGASCALE_SLICE_ID") or 0)
  first = environ.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]
  return {
    "host": first.split(":")[0],
    "port": PORT,
    "processes": len(hosts) * slices,
    "process": worker + number * len(hosts),
  }


def _of_slurm(environ: Mapping[str, str]) -> dict[str, Any] | None:
  """A task of a step of SLURM."""
  names = ("SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID")
  if not all(name in environ for name in ("SLURM_JOB_ID", *names)):
    return None
  nodes = re.match(r"([^,\[]+)(?:\[(\d+))?", environ["SLURM_STEP_NODELIST"])
  return {
    "host": "".join(part or "" for part in nodes.groups()),
    # Jobs that share a node have ports of their own.
    "port": 61440 + _number(environ, "SLURM_JOB_ID") % 4096,
    "processes": _number(environ, "SLURM_NTASKS", least=1),
    "process": _number(environ, "SLURM_PROCID"),
    "local_devices": _share(environ),
  }


def _share(environ: Mapping[str, str]) -> tuple[int, ...] | None:
  """The GPUs of a task of SLURM, counted among those it sees; None is all.

  Where SLURM binds none to its tasks (`--gpus-per-task` does), all tasks of a
  node see the same ones, and each takes an even share. JAX's own rule, which
  `jax.distributed` has for SLURM, is the GPU of the number SLURM_LOCALID, so
  that two tasks of a node of eight would leave six idle.
  """
  tasks = _tasks_here(environ)
  visible = environ.get("CUDA_VISIBLE_DEVICES", "")
  seen = [name for name in visible.split(",") if name]
  if tasks == 1 or not seen or environ.get("JAX_PLATFORMS", "") == "cpu":
    return None
  if environ.get("SLURM_GPUS_PER_TASK", "").split(":")[-1] == str(len(seen)):
    return None
  # All that the step has on this node. Unless it says so, one is a task's own.
  known = environ.get("SLURM_GPUS_ON_NODE", "")
  held = int(known) if known.isdigit() else max(len(seen), 2)
  if len(seen) < held:
    return None
  each = len(seen) // tasks
  if not each:
    raise errors.InputError(
      f"SLURM: this node has {tasks} tasks, which see the same GPUs, "
      f"{len(seen)} in all; start no more than that on a node "
      f"(--ntasks-per-node={len(seen)})."
    )
  first = each * _number(environ, "SLURM_LOCALID")
  return tuple(range(first, first + each))


def _tasks_here(environ: Mapping[str, str]) -> int:
  """How many tasks of a step of SLURM this node has, of "4(x2),3" for one."""
  text = environ.get("SLURM_STEP_TASKS_PER_NODE", "1")
  counts = []
  for tasks, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
    counts += [int(tasks)] * int(nodes or 1)
  node = int(environ.get("SLURM_NODEID") or 0)
  return counts[node] if node < len(counts) else 1


def take_devices(environ: Mapping[str, str]) -> None:
  """Leaves a task of SLURM its share of the GPUs that its node's tasks see.

  For work that is done apart; `joined` does it by itself. To be called before
  JAX looks for its devices.

  Raises:
    InputError: There are more tasks than GPUs.
  """
  if environ.get(PROCESSES, "") == "1":
    return
  devices = (_of_slurm(environ) or {}).get("local_devices")
  if devices is not None:
    import jax

    visible = ",".join(map(str, devices))
    jax.config.update("jax_cuda_visible_devices", visible)


def _address(text: str) -> tuple[str, int]:
  """Takes HOST:PORT apart; an IPv6 address stands in brackets."""
  match = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\s]+):(\d{1,5})", text.strip())
  if not match or not 0 < int(match[2]) < 65536:
    raise errors.InputError(
      f"{COORDINATOR}: {text!r} is no HOST:PORT; give that of process 0, such "
      "as 10.0.0.1:8476."
    )
  return match[1].strip("[]"), int(match[2])


def _number(environ: Mapping[str, str], name: str, least: int = 0) -> int:
  """Returns a whole number of the environment."""
  text = environ.get(name, "")
  if not re.fullmatch(r"\d{1,9}", text) or int(text) < least:
    what = f"is {text!r}" if name in environ else "is not set"
    raise errors.InputError(f"{name} {what}; set a number, {least} or more.")
  return int(text)


def _has_tpu(environ: Mapping[str, str]) -> bool:
  """Says whether this machine has TPU chips that JAX would take."""
  if environ.get("TPU_SKIP_MDS_QUERY") or (
    environ.get("JAX_PLATFORMS", "") == "cpu"
  ):
    return False
  return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def _metadata(name: str) -> str | None:
  """Asks the metadata server of Google's machines."""
  headers = {"Metadata-Flavor": "Google"}
  request = urllib.request.Request(_METADATA + name, headers=headers)
  try:
    with urllib.request.urlopen(request, timeout=5) as answer:
      return answer.read().decode()
  except (urllib.error.URLError, TimeoutError):
    return None
