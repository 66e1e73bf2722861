"""MANIFEST.json: the SHA-256 and the size of every file of a checkpoint."""

import concurrent.futures
import hashlib
import json
import pathlib
from typing import Any

from vidgen import errors, tensorheader

NAME = "MANIFEST.json"


def write(folder: pathlib.Path) -> None:
  """Writes the manifest of all files in `folder` as they are now."""
  paths = [f for f in sorted(folder.rglob("*")) if f.is_file()]
  files = {
    path.relative_to(folder).as_posix(): {
      "size": path.stat().st_size,
      "sha256": _digest(path),
    }
    for path in paths
    if path != folder / NAME
  }
  text = json.dumps({"files": files}, indent=1) + "\n"
  (folder / NAME).write_text(text, encoding="utf-8")


def verify(folder: pathlib.Path, under: str) -> None:
  """Checks each file under a folder within a checkpoint.

  Raises:
    CorruptError: A file is missing, not listed, or not as it was written.
  """
  files = _read(folder)
  wanted = [name for name in files if name.startswith(f"{under}/")]
  held = {
    path.relative_to(folder).as_posix()
    for path in (folder / under).rglob("*")
    if not path.is_dir()
  }
  if unlisted := held - set(wanted):
    raise errors.CorruptError(
      f"{folder / NAME}: does not list {_listed(unlisted)}."
    )
  _check(folder, {name: files[name] for name in wanted})


def verify_small(folder: pathlib.Path, besides: str = "orbax") -> None:
  """Checks the listed files that are in no folder called `besides`.

  A checkpoint without a manifest passes.

  Raises:
    CorruptError: A file is missing, or not as it was written.
  """
  if (folder / NAME).exists():
    files = _read(folder)
    _check(
      folder, {n: f for n, f in files.items() if besides not in n.split("/")}
    )


def _read(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Returns what the manifest says of each file."""
  path = folder / NAME
  if not path.exists():
    raise errors.CorruptError(f"{path}: missing; copy the checkpoint again.")
  files = tensorheader.read_json(path).get("files")
  if not isinstance(files, dict):
    raise errors.CorruptError(f"{path}: lists no files.")
  for name, item in files.items():
    if not tensorheader.is_plain(name):
      raise errors.CorruptError(
        f"{path}: {tensorheader.short(name)} is no file of a checkpoint."
      )
    if not isinstance(item, dict) or item.keys() != {"size", "sha256"}:
      raise errors.CorruptError(f"{path}: {name} needs size and sha256.")
  return files


def _check(folder: pathlib.Path, files: dict[str, dict[str, Any]]) -> None:
  """Raises unless each file is as the manifest says; sizes go first."""
  missing = [name for name in files if not (folder / name).is_file()]
  if missing:
    raise errors.CorruptError(f"{folder}: missing: {_listed(missing)}.")
  wrong = [
    name
    for name, item in files.items()
    if (folder / name).stat().st_size != item["size"]
  ]
  if not wrong:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
      digests = pool.map(lambda name: _digest(folder / name), files)
      wrong = [
        name
        for name, digest in zip(files, digests, strict=True)
        if digest != files[name]["sha256"]
      ]
  if wrong:
    raise errors.CorruptError(
      f"{folder}: not as {NAME} has it: {_listed(wrong)}; copy the "
      "checkpoint again."
    )


def _digest(path: pathlib.Path) -> str:
  try:
    with path.open("rb") as f:
      return hashlib.file_digest(f, "sha256").hexdigest()
  except OSError as e:
    raise errors.StorageError(f"{path}: {e.strerror}.") from e


def _listed(names: Any) -> str:
  return tensorheader.listed(map(tensorheader.short, sorted(names)))
