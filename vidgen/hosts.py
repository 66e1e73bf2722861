"""Processes on several hosts that make one run: who they are, how they join.

Each process of a run is a worker under a supervisor of its own
(`vidgen.supervisor`), which keeps in touch with the other supervisors and ends
the worker when another is lost: JAX's own client would abort with a stack.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import glob
import importlib.metadata
import json
import os
import re
import signal
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vidgen import errors

# What a process is told of its place by hand; see launch/README.md.
COORDINATOR = "VIDGEN_COORDINATOR"
PROCESSES = "VIDGEN_PROCESSES"
PROCESS = "VIDGEN_PROCESS"
HEARTBEAT = "VIDGEN_HEARTBEAT"
JOIN_TIMEOUT = "VIDGEN_JOIN_TIMEOUT"

# A worker's socket to its supervisor, and that one's process: DESCRIPTOR:PID.
LINK = "VIDGEN_LINK"

PORT = 8476

# Devices feel that a host is gone long before it is missed, but not as these.
_OWN_FAULTS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT")

_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/"


class LostError(errors.VidgenError):
  """Another process of the run is lost; run it again to go on: exit code 75."""

  exit_code = 75


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
  if environ.get(PROCESSES, "") == "1" or LINK in environ:
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


@contextlib.contextmanager
def joined(
  environ: Mapping[str, str], what: Mapping[str, Any]
) -> Iterator[None]:
  """Joins the processes of a run, where there are several, for what is within.

  To be entered before JAX looks for its devices.

  Args:
    environ: The environment.
    what: What has to be the same on all, as JSON has it, by name.

  Raises:
    InputError: Another process has another config, or other versions.
  """
  if LINK not in environ:
    yield
    return
  descriptor, parent = map(int, environ[LINK].split(":"))
  with Link(socket.socket(fileno=descriptor)) as link:
    die_with(parent)
    link.send(ready={**what, "versions": versions()})
    go = link.receive()["go"]
    import jax

    jax.distributed.initialize(
      f"{go['host']}:{go['port']}",
      go["processes"],
      go["process"],
      local_device_ids=go["local_devices"],
      cluster_detection_method="deactivate",
      initialization_timeout=int(go["join_timeout"]),
      heartbeat_timeout_seconds=int(go["jax_heartbeat"]),
      # One process may be at work for long after the others, publishing.
      shutdown_timeout_seconds=24 * 3600,
    )
    try:
      yield
    except errors.PreemptedError as error:
      link.send(ending=error.exit_code)
      raise
    except Exception as error:
      # It may come of a process that is lost. Then the supervisor says so, and
      # ends this one.
      link.send(**_failure(error, jax.errors.JaxRuntimeError))
      link.receive()
      atexit.register(_leave, getattr(error, "exit_code", 1))
      raise


def _failure(error: Exception, of_devices: type[Exception]) -> dict[str, Any]:
  """Returns what the supervisor is told of an error."""
  lines = str(error).strip().splitlines() or [""]
  line = lines[0].rstrip(".")[:300]
  if isinstance(error, errors.VidgenError):
    return {"failed": error.exit_code, "text": f"ended: {line}", "late": False}
  return {
    "failed": 1,
    "text": f"failed: {type(error).__name__}: {line}; see there",
    # Devices feel that a host is gone long before it is missed.
    "late": isinstance(error, of_devices) and not line.startswith(_OWN_FAULTS),
  }


def versions() -> dict[str, str]:
  """Returns the versions that all processes must share."""
  names = ("vidgen", "jax", "jaxlib", "flax", "optax")
  found = {}
  for name in names:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[name] = importlib.metadata.version(name)
  return found


class Link:
  """A connection that carries lines of JSON.

  Nothing is lost of a line that comes in pieces; whatever else goes wrong with
  the connection is its end.
  """

  def __init__(self, connection: socket.socket):
    self.connection = connection
    self._rest = b""

  def __enter__(self) -> "Link":
    return self

  def __exit__(self, *exception: Any) -> None:
    self.connection.close()

  def fileno(self) -> int:
    """The descriptor, for selectors."""
    return self.connection.fileno()

  def send(self, **message: Any) -> None:
    """Sends a message; one that nobody takes is dropped."""
    with contextlib.suppress(OSError):
      self.connection.sendall(json.dumps(message).encode() + b"\n")

  def poll(self, longest: int = 1 << 24) -> list[dict[str, Any]] | None:
    """Returns the messages that are there; None at the end.

    Waits for bytes where none are there: ask a selector first. A message of
    more than `longest` bytes is the end too.
    """
    try:
      data = self.connection.recv(1 << 16)
    except BlockingIOError:
      return []
    except OSError:
      data = b""
    if not data or len(self._rest) > longest:
      return None
    *lines, self._rest = (self._rest + data).split(b"\n")
    try:
      messages = [json.loads(line) for line in lines]
    except ValueError:
      return None
    if not all(isinstance(message, dict) for message in messages):
      return None
    return messages

  def receive(self) -> dict[str, Any]:
    """Waits for a message; nothing else may come with it."""
    while not (messages := self.poll()):
      if messages is None:
        raise LostError("the supervisor of this process is gone.")
    return messages[0]


def _leave(code: int) -> None:
  """Ends at once: JAX would wait for the others at its own end."""
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):
      stream.flush()
  os._exit(code)


def die_with(parent: int) -> None:
  """Asks the system to end this process when the one that started it ends."""
  pdeathsig = 1
  ctypes.CDLL(None).prctl(pdeathsig, signal.SIGKILL)
  if os.getppid() != parent:
    raise LostError("the supervisor of this process is gone.")
