"""A hash of this package: a clone changes without its version."""

import functools
import hashlib
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent


@functools.cache
def of_package() -> str:
  """Returns the hash of the package that runs."""
  return of_folder(ROOT)


def of_folder(root: pathlib.Path) -> str:
  """Returns a SHA-256 of the names and contents of a package's Python."""
  digest = hashlib.sha256()
  for path in sorted(root.rglob("*.py")):
    name = path.relative_to(root).as_posix().encode()
    digest.update(b"%d %s" % (len(name), name))
    digest.update(hashlib.sha256(path.read_bytes()).digest())
  return digest.hexdigest()
