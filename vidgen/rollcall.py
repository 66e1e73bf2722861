"""What the supervisors of a run tell each other, by way of process 0's.

It waits until all are there, compares their configs, and then waits for the
first bad end, which ends the others.
"""

import contextlib
import dataclasses
import json
import selectors
import socket
import threading
import time
from typing import Any, NamedTuple

from vidgen import errors, hosts, links

# Seconds that a failure waits for the news of a loss that explains it.
_PATIENCE = 3.0

# Seconds that a worker has to end by itself when another did not end well.
_GRACE = 2.0


@dataclasses.dataclass
class Member:
  """A process of the run.

  Attributes:
    link: To its supervisor.
    host: Where it is.
    heard: When it last said something.
    ready: What it said its config and versions are; None before.
    code: Its exit code; None while it is at work.
  """

  link: links.Link
  host: str
  heard: float
  ready: dict[str, Any] | None = None
  code: int | None = None


class _Doubt(NamedTuple):
  """A failure that may be the effect of a loss.

  Attributes:
    process: Whose it is.
    code: Its exit code.
    text: What it says.
    until: When the news of a loss is waited for no more.
    lost: The process that JAX misses, where that is known.
  """

  process: int
  code: int
  text: str
  until: float
  lost: int | None


class RollCall:
  """The server, in a thread of its own."""

  def __init__(self, place: hosts.Place):
    """Begins to listen.

    Raises:
      JoinError: The port is taken.
    """
    self._place = place
    self._members: dict[int, Member] = {}
    self._strangers: dict[links.Link, float] = {}
    self._began = self._ended = False
    self._last_word: dict[str, Any] | None = None
    self._doubtful: _Doubt | None = None
    self._deadline = time.monotonic() + place.join_timeout
    self._selector = selectors.DefaultSelector()
    self._listener = _listen(place.port)
    self._selector.register(self._listener, selectors.EVENT_READ)
    self._thread = threading.Thread(
      target=self._serve, name="rollcall", daemon=True
    )
    self._thread.start()

  def join(self, timeout: float | None = None) -> None:
    """Waits until every process has ended and knows what to do."""
    self._thread.join(timeout)

  def _serve(self) -> None:
    pause, last = self._place.heartbeat / 6, time.monotonic()
    while not self._finished():
      for key, _ in self._selector.select(min(pause, 0.2)):
        if key.fileobj is self._listener:
          self._accept()
        else:
          self._read(key.fileobj)
      now = time.monotonic()
      if now - last > pause:
        last = now
        for member in self._members.values():
          member.link.send(beat=1)
      self._look(now)
    for member in self._members.values():
      self._close(member.link)
    self._hang_up()
    self._selector.close()

  def _finished(self) -> bool:
    """Whether nobody needs this any more."""
    if self._ended and time.monotonic() > self._deadline:
      return True
    open_ = any(m.link.fileno() >= 0 for m in self._members.values())
    if self._ended:
      return not open_ and 0 in self._members
    full = len(self._members) == self._place.processes
    return full and not open_

  def _accept(self) -> None:
    with contextlib.suppress(OSError):
      connection, _ = self._listener.accept()
      connection.settimeout(5)
      link = links.Link(connection)
      self._strangers[link] = time.monotonic()
      self._selector.register(link, selectors.EVENT_READ)

  def _read(self, link: links.Link) -> None:
    messages = link.poll()
    for message in messages or ():
      if link in self._strangers:
        self._greet(link, message)
        continue
      found = (p for p, m in self._members.items() if m.link is link)
      if (process := next(found, None)) is not None:
        self._members[process].heard = time.monotonic()
        self._hear(process, message)
    if messages is None:
      self._close(link)

  def _greet(self, link: links.Link, message: dict[str, Any]) -> None:
    """Takes in a supervisor that says who it is."""
    del self._strangers[link]
    process, host = message.get("hello"), str(message.get("host"))[:200]
    count, mine = message.get("processes"), self._place.processes
    if not isinstance(process, int):
      self._close(link)
    elif count != mine or not 0 <= process < mine:
      self._refuse(
        link,
        f"process {process} of {count} on {host} does not belong to this run, "
        f"which has {mine} processes; give all the same number.",
      )
    elif process in self._members and self._began:
      # Its host has started anew, before it was missed.
      self._close(link)
      self._lose(process, "has started anew")
    elif process in self._members:
      self._refuse(
        link,
        f"process {process} on {host} is there already, on "
        f"{self._members[process].host}; give each a number of its own.",
      )
    else:
      self._members[process] = Member(link, host, time.monotonic())
      if self._last_word is not None:
        link.send(**self._last_word)
        self._hang_up_if_heard()

  def _hang_up_if_heard(self) -> None:
    """Takes no more calls, once this host's own supervisor has come.

    Another may have come, and ended the run, before it.
    """
    if 0 in self._members:
      self._hang_up()

  def _hang_up(self) -> None:
    """Takes no more calls: those of the next start are not for this one."""
    if self._listener.fileno() >= 0:
      self._selector.unregister(self._listener)
      self._listener.close()
    for link in list(self._strangers):
      self._close(link)

  def _refuse(self, link: links.Link, text: str) -> None:
    link.send(stop=errors.InputError.exit_code, text=text, grace=0)
    self._close(link)

  def _hear(self, process: int, message: dict[str, Any]) -> None:
    """Does what a member's message asks for."""
    member = self._members[process]
    if "ready" in message:
      member.ready = message["ready"]
      ready = [m.ready is not None for m in self._members.values()]
      if sum(ready) == self._place.processes and not self._ended:
        self._begin()
    elif "failed" in message:
      wait = self._place.heartbeat if message["late"] else 0.0
      self._doubt(process, message["failed"], message["text"], wait)
    elif "ended" in message and member.code is None:
      member.code = message["ended"]
      if member.code == 0:
        member.link.send(yours=1)
      elif message["sure"]:
        self._blame(process, member.code, message["text"])
      else:
        lost = message["lost"]
        self._doubt(process, member.code, message["text"], lost=lost)

  def _begin(self) -> None:
    """Lets the workers join, if they agree."""
    first = self._members[0].ready
    for process, member in sorted(self._members.items()):
      if fields := differences(first, member.ready):
        return self._end(
          errors.InputError.exit_code,
          f"process {process} on {member.host} differs from process 0 on "
          f"{self._members[0].host}: {fields}; start all with the same "
          "command and installation.",
          grace=0,
        )
    self._began = True
    go = {"host": self._place.host, "port": _free_port()}
    for member in self._members.values():
      member.link.send(go=go)

  def _doubt(
    self,
    process: int,
    code: int,
    text: str,
    wait: float = 0.0,
    lost: int | None = None,
  ) -> None:
    """Keeps a failure for a while: it may be the effect of a loss."""
    if self._doubtful is None:
      until = time.monotonic() + _PATIENCE + wait
      self._doubtful = _Doubt(process, code, text, until, lost)

  def _settle(self, doubt: _Doubt) -> None:
    """Ends the run for a failure that no news has explained."""
    if doubt.lost in self._members and doubt.lost != doubt.process:
      host = self._members[doubt.lost].host
      self._end(
        links.LostError.exit_code,
        f"process {doubt.lost} on {host} hangs; run the same command to go on.",
      )
    else:
      self._blame(doubt.process, doubt.code, doubt.text)

  def _blame(self, process: int, code: int, text: str) -> None:
    """Ends the run for the end of one."""
    host = self._members[process].host
    self._members[process].link.send(yours=1)
    # One that was told to stop has agreed on that with the others.
    agreed = not text
    self._end(
      code,
      f"process {process} on {host} {text or 'has stopped and saved'}.",
      self._place.heartbeat if agreed else _GRACE,
      process,
    )

  def _end(
    self, code: int, text: str, grace: float = _GRACE, but: int | None = None
  ) -> None:
    """Tells all, but the one that knows, to end, and why; once."""
    if self._ended:
      return
    self._ended = True
    self._last_word = {"stop": code, "text": text, "grace": grace}
    self._deadline = time.monotonic() + grace + 30
    for process, member in self._members.items():
      if process != but:
        member.link.send(**self._last_word)
    self._hang_up_if_heard()

  def _close(self, link: links.Link) -> None:
    """Forgets a connection; that of a process at work is its loss."""
    self._strangers.pop(link, None)
    if link.fileno() < 0:
      return
    self._selector.unregister(link)
    link.connection.close()
    for process, member in self._members.items():
      if member.link is link and member.code is None and not self._ended:
        self._lose(process, "is gone")

  def _lose(self, process: int, how: str) -> None:
    """Ends the run for the loss of one."""
    member = self._members[process]
    member.code = links.LostError.exit_code
    self._end(
      member.code,
      f"process {process} on {member.host} {how}; run the same command to go "
      "on.",
    )
    self._close(member.link)

  def _look(self, now: float) -> None:
    """Ends the run where somebody has been waited for too long."""
    for link, since in list(self._strangers.items()):
      if now - since > 30:
        self._close(link)
    if self._ended:
      return
    if self._doubtful and now > self._doubtful.until:
      return self._settle(self._doubtful)
    for process, member in self._members.items():
      silent = member.link.fileno() >= 0 and member.code is None
      if silent and now - member.heard > self._place.heartbeat:
        how = f"has not answered for {self._place.heartbeat:g} s"
        return self._lose(process, how)
    missing = sorted(set(range(self._place.processes)) - set(self._members))
    if missing and now > self._deadline:
      self._end(
        hosts.JoinError.exit_code,
        f"process{'es' * (len(missing) > 1)} {listed(missing)} of "
        f"{self._place.processes} did not come to {self._place.host}:"
        f"{self._place.port} within {self._place.join_timeout:g} s; see "
        "whether they run and reach this host.",
        grace=0,
      )


def differences(one: dict[str, Any], other: dict[str, Any]) -> str:
  """Returns the fields in which two processes differ, at most four."""
  here, there = dict(_fields(one)), dict(_fields(other))
  names = sorted(
    name
    for name in here.keys() | there.keys()
    if here.get(name) != there.get(name)
  )
  shown = [
    f"{name} ({_short(there.get(name, 'absent'))} instead of "
    f"{_short(here.get(name, 'absent'))})"
    for name in names[:4]
  ]
  more = [f"{len(names) - 4} more"] if len(names) > 4 else []
  return ", ".join(shown + more)


def listed(numbers: list[int]) -> str:
  """Returns numbers as text, at most eight of them."""
  more = [f"{len(numbers) - 8} more"] if len(numbers) > 8 else []
  return ", ".join([str(n) for n in numbers[:8]] + more)


def _fields(value: Any, name: str = ""):
  """Yields the fields of nested dicts and lists, with their JSON."""
  if isinstance(value, dict | list) and value:
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in pairs:
      yield from _fields(item, f"{name}.{key}" if name else str(key))
  else:
    yield name, json.dumps(value, sort_keys=True)


def _short(text: str) -> str:
  """Returns text for a message; of long ones the end tells more."""
  return text if len(text) <= 60 else f"{text[:27]}...{text[-30:]}"


def _listen(port: int) -> socket.socket:
  """Listens on all addresses of this host."""
  try:
    if socket.has_dualstack_ipv6():
      return socket.create_server(
        ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
      )
    return socket.create_server(("", port), backlog=1024)
  except OSError as e:
    raise hosts.JoinError(
      f"port {port}: process 0 cannot listen on it: {e.strerror}; end what "
      f"has it, or choose another in {hosts.COORDINATOR}."
    ) from e


def _free_port() -> int:
  """Returns a port for JAX's own service that nobody has now."""
  with socket.socket() as probe:
    probe.bind(("", 0))
    return probe.getsockname()[1]
