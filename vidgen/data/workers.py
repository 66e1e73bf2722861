"""Processes that share the making of a dataset's records."""

import concurrent.futures
import contextlib
import functools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from vidgen import errors, links

Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]

# Items that a process takes at once.
_CHUNK = 16


@contextlib.contextmanager
def mapping(count: int) -> Iterator[Map]:
  """Gives a `map` that works in so many processes, in order; 1 is this one.

  Raises:
    StorageError: A process was killed; the system does so for want of memory.
  """
  if count == 1:
    yield map
    return
  pool = concurrent.futures.ProcessPoolExecutor(
    count,
    # A fork would take the threads' locks along.
    multiprocessing.get_context("spawn"),
    initializer=links.die_with,
    initargs=(os.getpid(),),
  )
  try:
    yield functools.partial(pool.map, chunksize=_CHUNK)
  except concurrent.futures.process.BrokenProcessPool as error:
    raise errors.StorageError(
      f"one of {count} processes was killed, perhaps for want of memory; give "
      "--workers fewer."
    ) from error
  finally:
    pool.shutdown(cancel_futures=True)
