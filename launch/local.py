"""Runs a command as several processes of one run on this machine.

usage: python launch/local.py --processes=N [flags] -- COMMAND

  --processes=N       how many
  --devices=N         CPU devices of each; without it they see what the machine
                      has: the GPUs shared out among them, or its TPU chips
  --restarts=N        starts after the first (default 100), where all may go on:
                      exit code 75
  --heartbeat=N       seconds without an answer after which a process is lost

The processes find each other at a free port of this machine. It ends with
exit code 0 once all have, and else with that of a process that cannot go on.
Ctrl-C or SIGTERM asks all to save and stop; a second one ends them at once.

example
  python launch/local.py --processes=2 --devices=4 -- \\
      vidgen train --config=configs/demo_dit_train.py --workdir=runs/demo_dit
"""

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

AGAIN = 75


def main(argv: Sequence[str]) -> int:
  """Reads the flags, runs, and returns the exit code."""
  arguments, command = _parse(list(argv))
  stop = _Stop()
  for start in range(arguments.restarts + 1):
    code = _once(arguments, command, stop)
    if code != AGAIN or stop.noted:
      return code
    if start < arguments.restarts:
      # What a process has left behind, a port for one, is gone by then.
      _tell(f"starting again ({start + 1} of {arguments.restarts})")
      stop.wait(1)
      if stop.noted:
        return AGAIN
  _tell(f"started {arguments.restarts + 1} times; given up.")
  return AGAIN


class _Stop:
  """Passes SIGTERM and SIGINT on to the processes."""

  def __init__(self):
    self.noted: list[int] = []
    self.children: list[subprocess.Popen] = []
    for number in (signal.SIGTERM, signal.SIGINT):
      signal.signal(number, self._note)

  def _note(self, number, frame):
    self.noted.append(number)
    for child in self.children:
      if child.poll() is None:
        child.send_signal(signal.SIGTERM)

  def wait(self, seconds: float) -> None:
    """Waits, unless told to stop."""
    until = time.monotonic() + seconds
    while not self.noted and time.monotonic() < until:
      time.sleep(0.05)


def _once(
  arguments: argparse.Namespace, command: list[str], stop: _Stop
) -> int:
  """Runs the processes to their end; returns the exit code of the run."""
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  shares = _share_gpus(os.environ, arguments.processes)
  threads = []
  stop.children = []
  try:
    for process in range(arguments.processes):
      environ = {
        **os.environ,
        **shares[process],
        "VIDGEN_COORDINATOR": f"localhost:{port}",
        "VIDGEN_PROCESSES": str(arguments.processes),
        "VIDGEN_PROCESS": str(process),
      }
      if arguments.heartbeat:
        environ["VIDGEN_HEARTBEAT"] = str(arguments.heartbeat)
      if arguments.devices:
        environ["JAX_PLATFORMS"] = "cpu"
        environ["JAX_NUM_CPU_DEVICES"] = str(arguments.devices)
      child = _start(command, environ)
      stop.children.append(child)
      if stop.noted:
        child.send_signal(signal.SIGTERM)
      threads.append(threading.Thread(target=_copy, args=(child, process)))
      threads[-1].start()
    codes = [child.wait() for child in stop.children]
  finally:
    for child in stop.children:
      if child.poll() is None:
        child.kill()
    for thread in threads:
      thread.join()
  return judge(codes)


def _start(command: list[str], environ: dict[str, str]) -> subprocess.Popen:
  """Starts one process."""
  try:
    return subprocess.Popen(
      command,
      env=environ,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      # Ctrl-C comes here, and goes on to them once.
      start_new_session=True,
    )
  except OSError as e:
    _fail(f"{command[0]}: cannot be started: {e.strerror}.")


def judge(codes: Sequence[int]) -> int:
  """Returns the exit code of a run, of those of its processes.

  One that cannot go on decides; else it may go on if one may or was killed.
  """
  final = [code for code in codes if code > 0 and code != AGAIN]
  if final:
    return final[0]
  return AGAIN if any(codes) else 0


def _copy(child: subprocess.Popen, process: int) -> None:
  """Copies what a process writes, each line with its number."""
  for line in child.stdout:
    sys.stdout.buffer.write(f"[{process}] ".encode() + line)
    sys.stdout.buffer.flush()


def _share_gpus(
  environ: Mapping[str, str], processes: int
) -> list[dict[str, str]]:
  """Returns what tells each process its part of the GPUs."""
  given = environ.get("CUDA_VISIBLE_DEVICES")
  if given is None:
    numbers = sorted(
      int(name[6:])
      for name in os.listdir("/dev")
      if re.fullmatch(r"nvidia\d+", name)
    )
    devices = [str(number) for number in numbers]
  else:
    devices = [name for name in given.split(",") if name]
  if not devices:
    return [{}] * processes
  if len(devices) % processes:
    _fail(
      f"{len(devices)} GPUs cannot be shared by {processes} processes; choose "
      "--processes that divide them."
    )
  each = len(devices) // processes
  return [
    {"CUDA_VISIBLE_DEVICES": ",".join(devices[i * each : (i + 1) * each])}
    for i in range(processes)
  ]


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
  """Takes the flags and the command apart."""
  if not argv or argv[0] in ("-h", "--help"):
    print(__doc__.strip())
    sys.exit(0)
  if "--" not in argv or argv[-1] == "--":
    _fail("no command; write it after --, see --help.")
  where = argv.index("--")
  parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
  for name, default in (
    ("processes", None),
    ("devices", 0),
    ("restarts", 100),
    ("heartbeat", 0),
  ):
    parser.add_argument(f"--{name}", type=int, default=default)
  parser.error = _fail
  try:
    arguments = parser.parse_args(argv[:where])
  except argparse.ArgumentError as e:
    _fail(str(e))
  if arguments.processes is None or arguments.processes < 1:
    _fail("--processes is missing; give their number, such as --processes=2.")
  if min(arguments.devices, arguments.restarts, arguments.heartbeat) < 0:
    _fail("--devices, --restarts and --heartbeat are 0 or more.")
  return arguments, argv[where + 1 :]


def _tell(text: str) -> None:
  print(f"launch: {text}", file=sys.stderr, flush=True)


def _fail(text: str) -> None:
  _tell(f"error: {text}")
  sys.exit(2)


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
