"""What processes of a run tell each other by: lines of JSON over a socket."""

import contextlib
import ctypes
import json
import os
import signal
import socket
from typing import Any

from vidgen import errors

# A worker's socket to its supervisor, and that one's process: DESCRIPTOR:PID.
LINK = "VIDGEN_LINK"


class LostError(errors.VidgenError):
  """Another process of the run is lost; run it again to go on: exit code 75."""

  exit_code = 75


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


def die_with(parent: int) -> None:
  """Asks the system to end this process when the one that started it ends."""
  pdeathsig = 1
  ctypes.CDLL(None).prctl(pdeathsig, signal.SIGKILL)
  if os.getppid() != parent:
    raise LostError("the supervisor of this process is gone.")
