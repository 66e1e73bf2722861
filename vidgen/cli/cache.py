"""What the command line keeps from one run to the next, and no library does."""

import os
import pathlib
import tempfile

import jax

from vidgen import executables, shapefile


def enable() -> None:
  """Keeps compiled programs in $VIDGEN_CACHE, or ~/.cache/vidgen/xla.

  A second run of a command then starts without compiling. Without a folder
  that can be written, or if JAX_COMPILATION_CACHE_DIR names one already, there
  is nothing to do. Shapes of networks, and whole programs, which need not even
  be traced again, are kept beside.
  """
  if jax.config.jax_compilation_cache_dir is not None:
    return
  try:
    path = _home("~/.cache/vidgen/xla")
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path):
      pass
  except (OSError, RuntimeError):
    # RuntimeError: there is no home. The job runs as well, only later.
    return
  jax.config.update("jax_compilation_cache_dir", os.fspath(path))
  # The default, a second, leaves out small programs that add up.
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  home = _home("~/.cache/vidgen")
  shapefile.folder, executables.folder = home / "shapes", home / "programs"


def hashes() -> pathlib.Path | None:
  """Returns where the hashes of large files are remembered, if anywhere."""
  try:
    return _home("~/.cache/vidgen") / "hashes.json"
  except RuntimeError:
    return None


def _home(default: str) -> pathlib.Path:
  return pathlib.Path(
    os.environ.get("VIDGEN_CACHE", "") or default
  ).expanduser()
