"""Locks on files, which the system opens however a process ends."""

import errno
import fcntl
import os
import pathlib
import weakref
from typing import BinaryIO

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


def _lock(file: BinaryIO, kind: int) -> bool:
  """Locks an open file without waiting; says whether there are locks."""
  try:
    fcntl.flock(file, kind | fcntl.LOCK_NB)
  except OSError as error:
    if error.errno in _NO_LOCKS:
      return False
    raise
  return True
