"""Gradients of convolutions whose frames a mesh splits well, badly or in part.

XLA adds up a part of a frame as often as there are devices that have it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tests.parallel import equality
from vidgen import sharding
from vidgen.models.svd import layers
from vidgen.nn import conv, discriminator

CHANNELS = 4

# Mesh, size at the coarsest level, batch, size.
CASES = {
  "one axis in part, beside a batch": (
    {"data": 2, "context": 4},
    (9, 6),
    2,
    (9, 6),
  ),
  "an axis not at all": ({"ring": 2, "context": 4}, (12, 9), 1, (12, 9)),
  "halving rounded up": ({"context": 4}, (8, 10), 1, (15, 20)),
}
MODULES = {
  "causal": conv.CausalConv3D(CHANNELS),
  "frame": layers.Conv2D(CHANNELS),
  "downsample": conv.DownsampleConv2D(CHANNELS),
  "halve": layers.Conv2D(CHANNELS, stride=2),
  "upsample": conv.UpsampleConv2D(CHANNELS),
  "time": layers.TemporalConv(CHANNELS),
}


def whole(tree):
  """What leaves a program lies as whole axes of a mesh can say."""
  return jax.lax.with_sharding_constraint(tree, PartitionSpec())


def gradients(mesh, coarsest, batch, size):
  """Of each module's sum of squares, by its parameters and by the frames."""
  key, *keys = jax.random.split(jax.random.key(0), 1 + len(MODULES))
  x = jax.random.normal(key, (batch, 3, *size, CHANNELS))
  modules = zip(MODULES.items(), keys, strict=True)
  params = {name: module.init(key, x) for (name, module), key in modules}

  def loss(name, params, x):
    return jnp.square(MODULES[name].apply(params, conv.constrain(x))).sum()

  def run(params, x):
    grad = jax.grad(loss, argnums=(1, 2))
    found = {name: grad(name, params[name], x) for name in MODULES}
    return found if mesh is None else whole(found)

  if mesh is None:
    return jax.jit(run)(params, x)
  with (
    sharding.use(sharding.make_mesh(mesh)),
    sharding.frames(batch, *coarsest),
  ):
    return jax.jit(run)(params, x)


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_one_device(case):
  mesh, *sizes = CASES[case]
  got, want = gradients(mesh, *sizes), gradients(None, *sizes)
  apart = {name: equality.apart(got[name], want[name]) for name in MODULES}
  assert max(apart.values()) <= equality.TOLERANCE, apart


@pytest.mark.parametrize("mesh", [{"data": 2}, {"data": 2, "context": 4}])
def test_a_critics_gradients_equal_one_device(mesh):
  """What a decoder has split comes to the critic as it is."""
  critic = discriminator.Discriminator(features=8, num_layers=2)
  key_x, key_params = jax.random.split(jax.random.key(0))
  video = jax.random.normal(key_x, (2, 3, 18, 24, 3))
  params = critic.init(key_params, video)

  def run(mesh):
    def loss(params, video):
      if mesh is not None:
        with sharding.frames(2, 9, 6):
          video = sharding.settle(conv.constrain(video))
      return jnp.square(critic.apply(params, video)).sum()

    if mesh is None:
      return jax.jit(jax.grad(loss))(params, video)
    with sharding.use(sharding.make_mesh(mesh)):
      return jax.jit(lambda *args: whole(jax.grad(loss)(*args)))(params, video)

  got, want = run(mesh), run(None)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.linalg.norm(b) > 0
    assert equality.apart(a, b) <= equality.TOLERANCE


def test_sampling_and_whole_grids_keep_the_gradient_of_xla():
  """Products of matrices take longer."""
  with sharding.use(sharding.make_mesh({"data": 2, "context": 4})):
    with sharding.frames(2, 12, 10):
      assert sharding.covered(12, 10) and sharding.covered(24, 20)
      assert not sharding.covered(11, 10)
    with sharding.frames(2, 9, 6):
      assert not sharding.covered(9, 6)
    with sharding.frames(2, 9, 5):
      assert sharding.grid() == (1, 1) and sharding.covered(9, 5)
    assert not sharding.covered(12, 10)
  with sharding.use(sharding.make_mesh({"data": 2, "fsdp": 4})):
    assert sharding.covered(12, 10)
  assert sharding.covered(12, 10)
