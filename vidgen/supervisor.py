"""A process of a run on several hosts, and the one that watches over it.

The supervisor starts the worker, which is the command itself, keeps in touch
with the other supervisors, passes signals on, and ends the worker with one line
when another process is lost. It imports nothing that takes time or memory.
"""

import contextlib
import dataclasses
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from vidgen import hosts, links, rollcall

# Exit codes that say all there is to say.
_TOLD = (2, 3, 4, 74, 75)

# What JAX says when a process is lost, before it aborts.
_NOISE = re.compile(
  rb"[EFW]\d{4} [\d:.]+ +\d+ "
  rb"(coordination_service|preemption_sync_manager|client\.h)"
)
_FATAL = b"distributed service detected fatal errors"
_SILENT = re.compile(rb"stopped sending heartbeats\):\s+(\d+)")

# Seconds: to answer at the end, and to come where this one ended before process
# 0 was there; to be done after the last word.
_ANSWER, _LAST = 30.0, 10.0


def run(
  place: hosts.Place, command: Sequence[str], environ: Mapping[str, str]
) -> int:
  """Runs a command as a process of a run, and returns its exit code.

  The code is the command's own where it ended by itself; 75 where a process was
  lost, this one or another, and another's where that ended with 1, 2, 3, 4 or
  74.

  Raises:
    JoinError: Process 0 cannot be reached, or its port is taken.
  """
  calls = None if place.process else rollcall.RollCall(place)
  with Signals() as signals, Supervisor(place, signals) as supervisor:
    code = supervisor.watch(command, environ)
  if calls is not None:
    # The others need it until their own end.
    calls.join()
  return code


class Signals:
  """Notes the signals that ask a run to end."""

  def __init__(self):
    self.noted: list[int] = []

  def __enter__(self) -> "Signals":
    numbers = (signal.SIGTERM, signal.SIGINT)
    self._old = {n: signal.signal(n, self._note) for n in numbers}
    return self

  def __exit__(self, *exception: Any) -> None:
    for number, handler in self._old.items():
      signal.signal(number, handler)

  def _note(self, number: int, frame: Any) -> None:
    self.noted.append(number)


class Supervisor:
  """The watch over one worker."""

  def __init__(self, place: hosts.Place, signals: Signals):
    self._place, self._signals = place, signals
    self._link: links.Link | None = None
    self._unsent: list[dict[str, Any]] = []
    self._selector = selectors.DefaultSelector()
    self._worker: subprocess.Popen | None = None
    self._wire: links.Link | None = None
    self._heard = time.monotonic()
    self._passed = 0
    # What ends the worker from without: exit code, reason, and when.
    self._stop: tuple[int, str, float] | None = None
    self._verdict = False
    self._failed: int | None = None
    self._ending: int | None = None
    self._end_by = 0.0
    self._held, self._held_since = b"", 0.0
    self._line = b""

  def __enter__(self) -> "Supervisor":
    return self

  def __exit__(self, *exception: Any) -> None:
    if self._worker is not None:
      self._kill()
      self._worker.stderr.close()
      self._wire.connection.close()
    if self._link is not None:
      self._link.connection.close()
    self._selector.close()

  def watch(self, command: Sequence[str], environ: Mapping[str, str]) -> int:
    """Runs the worker to its end; returns the exit code."""
    self._start(command, environ)
    begin = last = time.monotonic()
    while self._worker.poll() is None:
      self._read(0.1)
      if self._link is None:
        self._connect(begin)
      now = time.monotonic()
      if now - last > self._place.heartbeat / 6:
        last = now
        self._send(beat=1)
      self._look(now)
    while self._read(0):
      pass
    return self._judge(self._worker.returncode)

  def _start(self, command, environ) -> None:
    """Starts the worker, with a socket to it and a pipe from it."""
    ours, theirs = socket.socketpair()
    os.set_inheritable(theirs.fileno(), True)
    self._worker = subprocess.Popen(
      list(command),
      env={**environ, links.LINK: f"{theirs.fileno()}:{os.getpid()}"},
      stderr=subprocess.PIPE,
      pass_fds=[theirs.fileno()],
      # Ctrl-C comes here, and goes on as a request to save.
      start_new_session=True,
    )
    theirs.close()
    self._wire = links.Link(ours)
    for source in (self._wire, self._worker.stderr):
      self._selector.register(source, selectors.EVENT_READ)

  def _connect(self, begin: float) -> None:
    """Tries to reach the supervisor of process 0, while the worker starts.

    Raises:
      JoinError: It has been tried for long enough.
    """
    host, port = self._place.host, self._place.port
    try:
      connection = socket.create_connection(
        (host if self._place.process else "localhost", port), timeout=2
      )
    except OSError as e:
      waited = time.monotonic() - begin
      if waited > self._place.join_timeout:
        raise hosts.JoinError(
          f"{host}:{port}: process 0 of {self._place.processes} cannot be "
          f"reached: {e.strerror or e}; tried for {waited:.0f} s. See whether "
          f"it runs, and whether {hosts.COORDINATOR} is its address."
        ) from e
      return
    connection.settimeout(5)
    self._link, self._heard = links.Link(connection), time.monotonic()
    self._selector.register(self._link, selectors.EVENT_READ)
    self._link.send(
      hello=self._place.process,
      processes=self._place.processes,
      host=socket.gethostname(),
    )
    for message in self._unsent:
      self._link.send(**message)

  def _send(self, **message: Any) -> None:
    """Tells process 0, once it is reached."""
    if self._link is not None:
      self._link.send(**message)
    elif "beat" not in message:
      self._unsent.append(message)

  def _read(self, timeout: float) -> bool:
    """Takes what there is to read; says whether there was something."""
    ready = self._selector.select(timeout)
    for key, _ in ready:
      source = key.fileobj
      if source is self._worker.stderr:
        if not (data := os.read(source.fileno(), 1 << 16)):
          self._selector.unregister(source)
        self._say(data)
        continue
      messages = source.poll()
      if messages is None:
        self._selector.unregister(source)
        if source is self._link and not self._verdict:
          self._lose("is gone")
      hear = self._hear if source is self._link else self._pass_on
      for message in messages or ():
        hear(message)
    return bool(ready)

  def _hear(self, message: dict[str, Any]) -> None:
    """Does what process 0 says."""
    self._heard = time.monotonic()
    if "go" in message:
      place = dataclasses.asdict(self._place)
      # JAX's own says when a worker hangs whose supervisor does not; what it
      # says is then compared with what the supervisors know.
      place["jax_heartbeat"] = max(10, 0.8 * self._place.heartbeat)
      self._wire.send(go={**place, **message["go"]})
    elif "stop" in message and self._stop is None:
      until = self._heard + message["grace"]
      self._stop = (message["stop"], message["text"], until)
    elif "yours" in message:
      self._verdict = True
      if self._failed is not None:
        self._wire.send(yours=1)
        self._ending, self._end_by = self._failed, self._heard + _LAST

  def _pass_on(self, message: dict[str, Any]) -> None:
    """Tells process 0 what the worker says."""
    if "ending" in message:
      self._ending = message["ending"]
      self._send(ended=self._ending, text="", sure=True)
      # One that saved waits for the others to have done so.
      self._end_by = time.monotonic() + self._place.heartbeat
    else:
      self._failed = message.get("failed")
      self._send(**message)

  def _lose(self, how: str) -> None:
    """Notes that process 0 does not answer."""
    if self._stop is None:
      self._stop = (
        links.LostError.exit_code,
        f"process 0 on {self._place.host} {how}; run the same command to go "
        "on.",
        time.monotonic(),
      )

  def _look(self, now: float) -> None:
    """Passes signals on, and ends the worker where it is time."""
    noted = self._signals.noted
    if len(noted) > 1:
      self._kill()
    elif len(noted) > self._passed:
      self._passed = 1
      self._worker.send_signal(signal.SIGTERM)
    if self._link and now - self._heard > self._place.heartbeat:
      self._lose(f"has not answered for {self._place.heartbeat:g} s")
    late = self._ending is not None and now > self._end_by
    if late or (self._stop and now > self._stop[2]):
      self._kill()
    if self._held and now - self._held_since > 5:
      self._release()

  def _judge(self, status: int) -> int:
    """Returns the exit code, and says what the worker could not say."""
    noted = self._signals.noted
    if len(noted) > 1:
      self._release()
      return 128 + noted[1]
    code, text = status, f"ended with exit code {status}; see its error"
    if self._ending is not None and status < 0:
      code = self._ending
    elif status < 0:
      name = signal.Signals(-status).name
      code = links.LostError.exit_code
      text = f"was ended by {name}; run the same command to go on"
    if self._ending is None and self._stop is None:
      self._send(ended=code, text=text, **self._seen(status))
    self._wait_for_verdict()
    if self._stop and not (code == 0 or status in _TOLD):
      code, reason, _ = self._stop
      _tell(reason)
      return code
    self._release()
    if status < 0 and self._ending is None:
      _tell(f"process {self._place.process} {text}.")
    return code

  def _seen(self, status: int) -> dict[str, Any]:
    """Returns what is known of the reason of the worker's end.

    JAX ends a worker that has lost another, and may know which.
    """
    if status != -signal.SIGABRT or _FATAL not in self._held:
      return {"sure": True}
    silent = _SILENT.search(self._held)
    # Where it names none, its service does not answer: that of process 0.
    return {"sure": False, "lost": int(silent[1]) if silent else 0}

  def _wait_for_verdict(self) -> None:
    """Waits for what process 0 makes of the end of the worker."""
    begin = time.monotonic()
    until = begin + _ANSWER
    with contextlib.suppress(KeyError, ValueError):
      self._selector.unregister(self._wire)
    while self._link is None and time.monotonic() < until:
      # Process 0 may start later than this one ended, and would wait for it.
      if len(self._signals.noted) > 1:
        return
      self._connect(begin)
      self._read(0.1)
    if self._link is None:
      return
    while self._stop is None and not self._verdict:
      if time.monotonic() > until:
        break
      self._read(0.1)

  def _say(self, data: bytes) -> None:
    """Writes what the worker writes; holds JAX's news of a loss back."""
    *lines, self._line = (self._line + data).split(b"\n")
    for line in lines:
      if not self._held and _NOISE.match(line):
        self._held_since = time.monotonic()
        self._held = line + b"\n"
      elif self._held:
        self._held += line + b"\n"
      else:
        _write(line + b"\n")

  def _release(self) -> None:
    """Writes what was held back."""
    held, self._held = self._held + self._line, b""
    self._line = b""
    _write(held)

  def _kill(self) -> None:
    """Ends the worker and what it has started."""
    if self._worker.poll() is None:
      with contextlib.suppress(ProcessLookupError):
        os.killpg(self._worker.pid, signal.SIGKILL)
    self._worker.wait()


def _tell(text: str) -> None:
  _write(f"vidgen: error: {text}\n".encode())


def _write(data: bytes) -> None:
  with contextlib.suppress(OSError):
    sys.stderr.buffer.write(data)
    sys.stderr.buffer.flush()
