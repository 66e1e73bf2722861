"""The critic: any length, one look at time, and axes that the mesh knows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn

from vidgen import sharding
from vidgen.nn import discriminator

_NET = discriminator.Discriminator(features=8, num_layers=2, groups=4)
_jit = lambda f: jax.jit(
  f, compiler_options={"xla_backend_optimization_level": 0}
)
_apply = _jit(_NET.apply)


@pytest.fixture(scope="module")
def boxed():
  return _jit(_NET.init)(jax.random.key(0), jnp.zeros((1, 1, 8, 8, 3)))


def _normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(
  ("frames", "size", "want"),
  [
    (1, 16, (1, 4, 4)),
    (2, 18, (1, 4, 4)),
    (5, 8, (2, 2, 2)),
    (17, 16, (5, 4, 4)),
  ],
)
def test_any_length(boxed, frames, size, want):
  video = _normal(1, 2, frames, size, size, 3)
  logits = _apply(nn.unbox(boxed), video)
  assert logits.shape == (2, *want)
  assert np.isfinite(logits).all()


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize("size", [3, 4])
def test_convolution_is_torchs(stride, size):
  x, kernel = _normal(1, 2, 5, 8, 10, 4), _normal(2, 3, size, size, 4, 6)
  run = _jit(lambda x, kernel: discriminator._conv3d(x, kernel, stride))
  got = run(x, kernel)
  first = torch.from_numpy(np.array(x)).movedim(-1, 1)
  first = torch.nn.functional.pad(first, (0, 0, 0, 0, 1, 1), "replicate")
  want = torch.nn.functional.conv3d(
    first,
    torch.from_numpy(np.array(kernel)).permute(4, 3, 0, 1, 2),
    stride=(stride[0], stride[1], stride[1]),
    padding=(0, 1, 1),
  )
  want = want.movedim(1, -1).numpy()
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_a_picture_is_a_video_that_stands_still(boxed):
  params = nn.unbox(boxed)
  picture = _normal(1, 2, 1, 16, 16, 3)
  still = jnp.repeat(picture, 5, axis=1)
  one, five = _apply(params, picture), _apply(params, still)
  np.testing.assert_allclose(five, jnp.repeat(one, 2, axis=1), atol=1e-6)


def test_sees_time(boxed):
  params = nn.unbox(boxed)
  video = _normal(1, 1, 5, 16, 16, 3)
  swapped = video[:, jnp.array([0, 3, 2, 1, 4])]
  difference = _apply(params, video) - _apply(params, swapped)
  assert np.abs(difference).max() > 1e-6


def test_samples_do_not_see_each_other(boxed):
  params = nn.unbox(boxed)
  video = _normal(1, 2, 3, 16, 16, 3)
  both, alone = _apply(params, video), _apply(params, video[:1])
  np.testing.assert_allclose(both[:1], alone, atol=1e-6)


def test_every_axis_has_a_rule(boxed):
  mesh = sharding.make_mesh({"fsdp": 2})
  places = sharding.shardings(boxed["params"], mesh)
  spec = places["conv_1"]["kernel"].spec
  assert spec == jax.sharding.PartitionSpec(None, None, None, None, "fsdp")
