"""Writes what is made while the next is on its way."""

import collections
import time
from collections.abc import Callable
from concurrent import futures
from typing import Any

# How many results may wait to be written: memory stays bounded.
_DEPTH = 4


class Writer:
  """A thread that writes, in order; a context manager that waits for its end.

  Attributes:
    seconds: For how long it wrote.
  """

  def __init__(self, told: Callable[[Any], None]):
    """Makes one.

    Args:
      told: Is called with what each call of `put` gave, in the thread that
        calls `put`, `look` and `__exit__`.
    """
    self.seconds = 0.0
    self._told = told
    self._pool = futures.ThreadPoolExecutor(1, thread_name_prefix="write")
    self._pending: collections.deque[futures.Future] = collections.deque()

  def __enter__(self) -> "Writer":
    return self

  def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
    try:
      while self._pending:
        self._next()
    except Exception:
      # The error that ends the job is the one to show.
      if error is None:
        raise
    finally:
      self._pool.shutdown(cancel_futures=True)

  def put(self, write: Callable[..., Any], *args: Any) -> None:
    """Writes in the background; waits where too much is waiting.

    Raises:
      What an earlier call raised.
    """
    while len(self._pending) >= _DEPTH:
      self._next()
    self._pending.append(self._pool.submit(self._timed, write, *args))

  def look(self) -> None:
    """Tells of what has been written by now."""
    while self._pending and self._pending[0].done():
      self._next()

  def _next(self) -> None:
    self._told(self._pending.popleft().result())

  def _timed(self, write: Callable[..., Any], *args: Any) -> Any:
    start = time.perf_counter()
    try:
      return write(*args)
    finally:
      self.seconds += time.perf_counter() - start
