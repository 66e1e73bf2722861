"""Every layout gives what one device gives.

The table of them all: python -m tests.parallel.table
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vidgen
from tests.parallel import equality
from vidgen import samplers, sharding


def _is_slow(case: equality.Case) -> bool:
  """All but one job of each variant on each layout."""
  if case.layout == "height x width":
    # The autoencoder is the same for all of them.
    return case != equality.Case("5b", case.layout, "sample")
  # Gradients where heads divide over nothing; the others differ in positions.
  return (case.job == "train") != (case.variant == "2b")


@pytest.mark.parametrize(
  "case",
  [
    pytest.param(
      case,
      id=f"{case.variant}-{case.layout}-{case.job}",
      marks=[pytest.mark.slow] * _is_slow(case),
    )
    for case in equality.CASES
  ],
)
def test_equals_one_device(case):
  assert case.error() <= equality.TOLERANCE


def test_one_prompt_takes_fsdp_for_tokens():
  """The branches go to cfg, and no batch is left for fsdp to split."""
  run = lambda mesh: vidgen.load(
    str(equality.folder("5b")), dtype="float32", mesh=mesh
  ).sample("a kite", num_steps=2, output="latents", **equality.SIZE)
  error = equality.apart(run({"cfg": 2, "fsdp": 4}), run(None))
  assert error <= equality.TOLERANCE


@pytest.mark.parametrize("layout", ["data", "cfg x context x fsdp"])
def test_noise_is_equal_in_every_bit(layout):
  keys = samplers.keys(7, np.arange(4, dtype=np.uint32), samplers.STEP)

  @jax.jit
  def draw(keys):
    noise = samplers.step_noise(keys, jnp.int32(3), (3, 8, 12, 4))
    return sharding.constrain(noise, "batch", None, None, None, None)

  with sharding.use(sharding.make_mesh(equality.LAYOUTS[layout])):
    got = draw(keys)
  assert not got.sharding.is_fully_replicated
  np.testing.assert_array_equal(got, draw(keys))
