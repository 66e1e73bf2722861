"""How a worker joins the other processes of its run."""

import atexit
import contextlib
import importlib.metadata
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from vidgen import errors, links

# Devices feel that a host is gone long before it is missed, but not as these.
_OWN_FAULTS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT")


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
  if links.LINK not in environ:
    yield
    return
  descriptor, parent = map(int, environ[links.LINK].split(":"))
  with links.Link(socket.socket(fileno=descriptor)) as link:
    links.die_with(parent)
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


def _leave(code: int) -> None:
  """Ends at once: JAX would wait for the others at its own end."""
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError, ValueError):
      stream.flush()
  os._exit(code)
