"""Programs here run once: compiling them well would take longer."""

import jax
import pytest


@pytest.fixture(scope="package", autouse=True)
def compiled_fast():
  """Leaves out optimisations, not the partitioning over devices."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)
  # What other tests compare bit by bit is compiled as for users.
  jax.clear_caches()
