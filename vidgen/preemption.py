"""Being told to stop: by SIGTERM, as clusters do it, or by Ctrl-C."""

import contextlib
import os
import signal
import threading
import time
import weakref
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

# Seconds in which a signal that comes again is the same one: whoever ends a
# process and its group, as `timeout` does, sends it twice.
_TWICE = 0.5


class Preemption:
  """Turns a signal into a request to save and stop, while it is entered.

  One process: the first SIGTERM or SIGINT is the request, the second ends the
  process at once with 128 plus its number; this works while XLA compiles too.

  Several: JAX passes a SIGTERM that any of them gets on to all, and they agree
  on the step after which they stop. It has a handler of its own, which one of
  Python would put out of action, so SIGINT is left alone.
  """

  def __init__(self):
    self._asked = False
    self._alone = jax.process_count() == 1
    self._old: dict[int, Any] = {}
    self._pipe: tuple[int, int] | None = None
    self._old_descriptor = -1
    self._thread: threading.Thread | None = None

  def __enter__(self) -> "Preemption":
    if not self._alone:
      return self
    # The interpreter runs handlers between two instructions of the main thread,
    # and one of them may be a compilation of minutes. It writes the signal's
    # number into this pipe at once.
    self._pipe = os.pipe()
    os.set_blocking(self._pipe[1], False)
    self._old_descriptor = signal.set_wakeup_fd(
      self._pipe[1], warn_on_full_buffer=False
    )
    self._old = {s: signal.signal(s, self._note) for s in _SIGNALS}
    self._thread = threading.Thread(
      target=self._watch, args=(self._pipe[0],), name="signals", daemon=True
    )
    self._thread.start()
    self._leave_out_forks()
    return self

  def __exit__(self, *exception: Any) -> None:
    if self._thread is None:
      return
    self._forget()
    os.write(self._pipe[1], b"\0")
    self._thread.join()
    for descriptor in self._pipe:
      os.close(descriptor)

  def requested(self, step: int) -> bool:
    """Whether to save and stop after `step`; to be asked after every step.

    With several processes the answer is the same on all of them, and True for
    one step only.
    """
    if self._alone:
      return self._asked
    return multihost_utils.reached_preemption_sync_point(step)

  def _leave_out_forks(self) -> None:
    """Gives a forked worker its signals back: it shares the pipe.

    Else a worker that is ended would end the run.
    """
    alive = weakref.ref(self)

    def hold() -> None:
      if (p := alive()) and p._old:
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)

    def go_on() -> None:
      if (p := alive()) and p._old:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def begin() -> None:
      if (p := alive()) and p._old:
        p._forget()
        p._thread = None
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    os.register_at_fork(
      before=hold, after_in_parent=go_on, after_in_child=begin
    )

  def _forget(self) -> None:
    """Puts back what signals did before."""
    for number, handler in self._old.items():
      signal.signal(number, handler)
    if self._old:
      signal.set_wakeup_fd(self._old_descriptor)
    self._old = {}

  def _watch(self, descriptor: int) -> None:
    """Reads the numbers of signals until a zero."""
    first, last, since = True, 0, 0.0
    while (number := os.read(descriptor, 1)[0]) != 0:
      if number not in _SIGNALS:
        continue
      if number == last and time.monotonic() - since < _TWICE:
        continue
      last, since = number, time.monotonic()
      name = signal.Signals(number).name
      if not first:
        _tell(f"{name} again: stopping at once.")
        os._exit(128 + number)
      first, self._asked = False, True
      _tell(f"{name}: saving, then stopping; once more stops at once.")

  def _note(self, number: int, frame: FrameType | None) -> None:
    self._asked = True


def _tell(text: str) -> None:
  """Writes a line to standard error, past what another thread may hold."""
  with contextlib.suppress(OSError):
    # A live line hides the cursor.
    shown = "\x1b[?25h" if os.isatty(2) else ""
    os.write(2, f"{shown}{text}\n".encode())
