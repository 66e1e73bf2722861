"""Eight CPU devices, and shapes checked in every function of vidgen."""

import atexit
import contextlib
import gc
import os
import shutil
import tempfile

# Before jax looks for devices: the TPU compiler would look for TPUs.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Tests compile the same programs many times, also in processes of their own.
# Each process of pytest has its own folder: what is half written is an error.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="vidgen-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import jaxtyping
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# Tracing makes millions of objects that stay: a fifth of it was the search for
# those that do not. What is left lying takes 80 MB.
gc.set_threshold(200_000, 50, 1000)
jaxtyping.install_import_hook("vidgen", "beartype.beartype")
atexit.register(
  shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True
)


@contextlib.contextmanager
def _fast():
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  try:
    yield
  finally:
    jax.config.update("jax_disable_most_optimizations", before)
    # What other tests compare bit by bit is compiled as for users.
    jax.clear_caches()


@pytest.fixture(scope="module")
def compiled_fast():
  """Leaves out optimisations for the rest of a module, not any partitioning.

  For results that hold to a tolerance: compiling takes half the time, and
  programs that run once take longer to compile than to run.
  """
  with _fast():
    yield


@pytest.fixture
def compiled_fast_once():
  """The same for one test."""
  with _fast():
    yield
