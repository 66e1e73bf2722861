"""The folder of a run: what it is, who works in it, its checkpoints.

`config.json` says which run it is, a lock keeps a second one out, and
`checkpoints/000000050/` is the state after step 50: the arrays in Orbax's
format, by their paths, and a manifest with the SHA-256 of every file, as Orbax
checks none of its data.
"""

import concurrent.futures
import contextlib
import errno
import functools
import logging
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from vidgen import (
  errors,
  manifest,
  orbaxfile,
  statefile,
  statetree,
  tensorfile,
)
from vidgen import workdir as workdir_lib

CHECKPOINTS = "checkpoints"

_STEP = re.compile(r"\d{9,}")
_LEFTOVER = re.compile(r"\.\d{9,}\.(tmp|drop)")

# Milliseconds that processes wait for each other's part of a checkpoint.
_BARRIER_MS = 600_000


class Run:
  """A run's folder, locked for as long as it is open.

  With several processes each calls every method, at the same point of the
  program; process 0 alone locks, writes the manifest and renames, so that all
  of them must see the same file system.
  """

  def __init__(
    self,
    path: pathlib.Path,
    keep: int,
    keep_every: int | None,
    warn: Callable[[str], None],
  ):
    self.path = path
    self._folder = path / CHECKPOINTS
    self._keep, self._keep_every, self._warn = keep, keep_every, warn
    self._pool = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
    self._pending: concurrent.futures.Future | None = None
    self._checkpointer: ocp.AsyncCheckpointer | None = None
    self._saved: list[int] = []
    self._count = 0
    self._damaged: list[int] = []
    self._lock: workdir_lib.Lock | None = None
    logging.getLogger("absl").addFilter(_is_not_told_twice)

  @classmethod
  def open(
    cls,
    workdir: str | os.PathLike,
    config: Mapping[str, Any],
    *,
    keep: int = 3,
    keep_every: int | None = None,
    free: Sequence[str] = (),
    warn: Callable[[str], None] | None = None,
  ) -> "Run":
    """Opens a run's folder, made if it is not there.

    Args:
      workdir: The folder.
      config: What the run is, as JSON has it.
      keep: How many of the newest checkpoints are kept.
      keep_every: Checkpoints whose step is a multiple are kept too, for ever.
      free: Patterns of the fields, "stages.*.num_steps", that may change from
        one start of the run to the next.
      warn: Is told what went wrong but does not end the run; None writes to
        standard error.

    Raises:
      InputError: The folder is that of another run, or is in use.
      StorageError: It cannot be made or written to.
    """
    if keep < 1 or (keep_every is not None and keep_every < 1):
      raise errors.InputError(
        f"keep: {keep} and keep_every: {keep_every}; give 1 or more."
      )
    path = pathlib.Path(workdir).expanduser().absolute()
    run = cls(path, keep, keep_every, _print if warn is None else warn)
    try:
      _on_first(functools.partial(run._prepare, config, tuple(free)))
    except BaseException:
      run._unlock()
      raise
    return run

  def __enter__(self) -> "Run":
    return self

  def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
    try:
      self.close()
    except errors.StorageError as failure:
      if error is None:
        raise
      # The error that ends the run is the one to show.
      self._warn(str(failure))

  def close(self) -> None:
    """Waits for the last checkpoint, then lets other runs in.

    Raises:
      StorageError: The last checkpoint could not be written.
    """
    try:
      self.wait()
    finally:
      self._pool.shutdown()
      if self._checkpointer is not None:
        self._checkpointer.close()
      self._unlock()

  def steps(self) -> list[int]:
    """Returns the steps of the finished checkpoints, in order."""
    return checkpoint_steps(self.path)

  def latest(self) -> pathlib.Path | None:
    """Returns the folder of the newest finished checkpoint."""
    steps = self.steps()
    return self._final(steps[-1]) if steps else None

  def save(self, step: int, state: PyTree) -> None:
    """Begins to write the checkpoint of `step`; the state may be donated then.

    Returns once the arrays are on the host. A step that this run has saved
    already is left alone.

    Args:
      step: How many steps are done.
      state: A tree of arrays; a number becomes JAX's array of it.

    Raises:
      StorageError: The checkpoint begun before could not be written, and this
        one is not begun: call again to try it.
    """
    self.wait()
    if step in self._saved:
      return
    leaves, draft = statetree.named(state), self._draft(step)
    try:
      if jax.process_index() == 0:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
      if jax.process_count() == 1:
        host = statetree.on_host(leaves)
        put = functools.partial(orbaxfile.save, draft / statefile.NAME, host)
      else:
        put = self._put_with_others(draft / statefile.NAME, leaves)
    except (OSError, ValueError, RuntimeError) as e:
      shutil.rmtree(draft, ignore_errors=True)
      raise self._failure(step, e) from e
    self._pending = self._pool.submit(self._write, step, put)

  def wait(self) -> None:
    """Waits until no checkpoint is being written.

    Raises:
      StorageError: The last one could not be written. Nothing of it is left.
    """
    pending, self._pending = self._pending, None
    if pending is not None:
      pending.result()

  def restore(
    self, shapes: PyTree, shardings: PyTree | None = None
  ) -> tuple[int, PyTree] | None:
    """Returns step and state of the newest sound checkpoint, None without any.

    One that is damaged is passed over with a warning, and removed once there is
    a newer sound one.

    Args:
      shapes: The shape and dtype of each array.
      shardings: Their shardings, not those they were saved with of necessity;
        None takes what the leaves of `shapes` have. A leaf of numpy comes back
        as one, one without a sharding goes to one device.

    Raises:
      InputError: The checkpoint is of a state with other names, shapes or
        dtypes.
      CorruptError: There are checkpoints, and all are damaged.
    """
    self.wait()
    self._saved.clear()
    step = _on_first(self._newest)
    if step < 0:
      return None
    if shardings is not None:
      shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        shardings,
      )
    return step, statefile.read(self._final(step), shapes)

  def _prepare(self, config: Mapping[str, Any], free: tuple[str, ...]) -> int:
    """Makes the folder, takes the lock, checks the config and tidies up."""
    try:
      self._folder.mkdir(parents=True, exist_ok=True)
      self._lock = workdir_lib.Lock(self.path, self._warn)
      workdir_lib.identify(self.path / workdir_lib.CONFIG, config, free)
      for path in self._folder.iterdir():
        if _LEFTOVER.fullmatch(path.name):
          shutil.rmtree(path)
    except (FileExistsError, NotADirectoryError) as e:
      raise errors.InputError(
        f"{self.path}: holds a file where a folder has to be; choose "
        "another --workdir."
      ) from e
    except errors.VidgenError:
      raise
    except OSError as e:
      raise errors.StorageError(
        f"{self.path}: cannot be used as a workdir: {e.strerror}; choose "
        "another, or free some space."
      ) from e
    return 0

  def _unlock(self) -> None:
    if self._lock is not None:
      self._lock.release()

  def _put_with_others(
    self, path: pathlib.Path, leaves: dict[str, Any]
  ) -> Callable[[], None]:
    """Begins every process's part; what is returned waits for all of them."""
    if self._checkpointer is None:
      self._checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
    self._checkpointer.save(path, args=ocp.args.PyTreeSave(leaves))
    return self._checkpointer.wait_until_finished

  def _write(self, step: int, put: Callable[[], None]) -> None:
    """Finishes a checkpoint and drops old ones; runs in the background."""
    self._count += 1
    try:
      self._commit(step, put)
      if jax.process_index() == 0:
        self._drop(step)
    finally:
      # Through the coordinator: on the devices it would mix with the steps.
      ocp.multihost.get_barrier_sync_fn()(
        key=f"vidgen_checkpoint_{step}_{self._count}", timeout_ms=_BARRIER_MS
      )
    if not self._final(step).is_dir():
      raise errors.StorageError(
        f"{self._final(step)}: process 0 wrote no checkpoint there; see its "
        "error, and choose a --workdir that all processes share."
      )
    self._saved.append(step)

  def _commit(self, step: int, put: Callable[[], None]) -> None:
    """Turns the draft of a checkpoint into it."""
    draft = self._draft(step)
    try:
      put()
      if jax.process_index() == 0:
        manifest.write(draft)
        for path in [*draft.rglob("*"), draft]:
          tensorfile.sync(path)
        old = self._hide(step)
        draft.rename(self._final(step))
        tensorfile.sync(self._folder)
        shutil.rmtree(old, ignore_errors=True)
    # A full disk comes out of Orbax as one of several kinds.
    except (OSError, ValueError, RuntimeError) as e:
      raise self._failure(step, e) from e
    finally:
      if jax.process_index() == 0:
        shutil.rmtree(draft, ignore_errors=True)

  def _drop(self, step: int) -> None:
    """Removes what the policy does not keep, now that `step` is there."""
    damaged = {s for s in self._damaged if s != step}
    self._damaged.clear()
    old = [s for s in self.steps() if s <= step and s not in damaged]
    kept = {s for s in old if self._keep_every and s % self._keep_every == 0}
    kept.update(old[-self._keep :])
    for s in sorted({*old, *damaged} - kept):
      try:
        shutil.rmtree(self._hide(s))
      except OSError as e:
        raise errors.StorageError(
          f"{self._final(s)}: an old checkpoint that cannot be removed: "
          f"{e.strerror}; remove it by hand."
        ) from e

  def _hide(self, step: int) -> pathlib.Path:
    """Renames a checkpoint, if it is there: half removed it would be found."""
    hidden = self._folder / f".{step:09d}.drop"
    with contextlib.suppress(FileNotFoundError):
      self._final(step).rename(hidden)
    return hidden

  def _newest(self) -> int:
    """Returns the step of the newest sound checkpoint, -1 without any."""
    self._damaged.clear()
    steps, fault = self.steps(), None
    for step in reversed(steps):
      try:
        statefile.verify(self._final(step))
        return step
      except errors.VidgenError as e:
        self._warn(f"WARNING: the checkpoint of step {step} is not used: {e}")
        fault = e
        # What cannot be read now may be sound, and stays.
        if isinstance(e, errors.CorruptError):
          self._damaged.append(step)
    if fault is None:
      return -1
    raise errors.CorruptError(
      f"{self._folder}: none of its {len(steps)} checkpoints is sound; put a "
      f"copy there, or start anew in another --workdir. {fault}"
    )

  def _failure(self, step: int, error: Exception) -> errors.StorageError:
    text = f"{error} {error.__cause__}"
    full = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT)]
    # Orbax's own lines are long, and say this at their end.
    reason = next((line for line in full if line in text), None)
    if reason is None:
      # The name of the draft helps nobody.
      reason = getattr(error, "strerror", None) or str(error)
      reason = reason.removeprefix(f"{self._draft(step) / statefile.NAME}: ")
    return errors.StorageError(
      f"{self._final(step)}: not saved: {reason.rstrip('.')}; free some space, "
      "or keep fewer checkpoints."
    )

  def _final(self, step: int) -> pathlib.Path:
    return self._folder / f"{step:09d}"

  def _draft(self, step: int) -> pathlib.Path:
    return self._folder / f".{step:09d}.tmp"


def checkpoint_steps(workdir: str | os.PathLike) -> list[int]:
  """Returns the steps of the finished checkpoints of a run, in order."""
  folder = pathlib.Path(workdir) / CHECKPOINTS
  if not folder.is_dir():
    return []
  names = (path.name for path in folder.iterdir())
  return sorted(int(name) for name in names if _STEP.fullmatch(name))


def _on_first(work: Callable[[], int]) -> int:
  """Returns what `work` gives on process 0 (-1 or more), or raises its error.

  Were it raised on process 0 alone, the others would wait for it.
  """
  if jax.process_count() == 1:
    return work()
  value, failure = 0, None
  if jax.process_index() == 0:
    try:
      value = work()
    except errors.VidgenError as e:
      value, failure = -2 - e.exit_code, e
  value = int(multihost_utils.broadcast_one_to_all(np.int32(value)))
  if failure is not None:
    raise failure
  if value < -1:
    kinds = (errors.InputError, errors.CorruptError, errors.StorageError)
    kind = next(k for k in kinds if k.exit_code == -2 - value)
    raise kind("process 0 cannot use the workdir; see its error.")
  return value


def _is_not_told_twice(record: logging.LogRecord) -> bool:
  """Whether it is none of Orbax's tracebacks, which come as errors too."""
  return record.levelno < logging.ERROR or "orbax" not in record.pathname


def _print(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
