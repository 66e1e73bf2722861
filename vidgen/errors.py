"""The errors that end a command with one line and an exit code of their own."""


class VidgenError(Exception):
  """A mistake of the user or the world: one line, no traceback.

  The line says what is wrong, where, and how to mend it.
  """

  exit_code = 1


class InputError(VidgenError, ValueError):
  """Bad input or a bad config: exit code 2."""

  exit_code = 2


class CorruptError(VidgenError, ValueError):
  """Corrupt data or a corrupt checkpoint: exit code 3."""

  exit_code = 3


class DivergedError(VidgenError, ArithmeticError):
  """Training whose loss is no number any more: exit code 4."""

  exit_code = 4


class StorageError(VidgenError, OSError):
  """Input or output that failed, a full disk for one: exit code 74."""

  exit_code = 74


class PreemptedError(VidgenError):
  """Told to stop, and saved; run it again to go on: exit code 75."""

  exit_code = 75
