"""Locks on files and folders, which the system opens however a process ends."""

import contextlib
import errno
import fcntl
import os
import pathlib
import weakref
from collections.abc import Iterator
from typing import BinaryIO

from vidgen import errors

# What file systems say that have no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Lock:
  """An open file that nobody else can lock, until it is released.

  Attributes:
    file: It, to be read and appended to, without a buffer.
    is_real: False where the file system has no locks.
    release: Closes the file.
  """

  def __init__(self, path: pathlib.Path):
    """Opens a file, which is made if it is not there, and locks it.

    Raises:
      BlockingIOError: Another has locked it.
      OSError: It cannot be opened.
    """
    self.file = path.open("ab+", buffering=0)
    self.release = weakref.finalize(self, self.file.close)
    try:
      self.is_real = _lock(self.file, fcntl.LOCK_EX)
    except OSError:
      self.release()
      raise
    # A child that is forked would hold the lock after its parent's death.
    release = self.release
    os.register_at_fork(after_in_child=lambda: release())


def is_locked(path: pathlib.Path) -> bool:
  """Says whether a file is there that somebody has locked."""
  try:
    with path.open("rb") as file:
      _lock(file, fcntl.LOCK_SH)
  except BlockingIOError:
    return True
  except OSError:
    pass
  return False


@contextlib.contextmanager
def folder(path: pathlib.Path, busy: str) -> Iterator[None]:
  """Keeps a folder, which is made if it is not there, from others meanwhile.

  Args:
    path: Of the folder.
    busy: What another does that holds it, "another run is encoding there".

  Raises:
    InputError: Another holds it.
  """
  path.mkdir(parents=True, exist_ok=True)
  descriptor = os.open(path, os.O_RDONLY)
  try:
    try:
      _lock(descriptor, fcntl.LOCK_EX)
    except BlockingIOError as error:
      raise errors.InputError(f"{path}: {busy}; wait for its end.") from error
    yield
  finally:
    os.close(descriptor)


def _lock(file: BinaryIO | int, kind: int) -> bool:
  """Locks an open file without waiting; says whether there are locks."""
  try:
    fcntl.flock(file, kind | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno in _NO_LOCKS:
      return False
    raise
  return True
