"""The doors of the convolutions: what stands behind them is equal."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from vidgen import sharding
from vidgen.nn import conv


def _normal(*shape):
  seed = sum(shape)
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal(shape, np.float32))


def _by_definition(x, kernel, history):
  """Sums the 27 taps in float64."""
  past = np.repeat(x[:, :1], 2, axis=1) if history is None else history
  pad = ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0))
  padded = np.pad(np.concatenate([past, x], 1).astype(np.float64), pad)
  f, h, w = x.shape[1:4]
  y = 0.0
  for t, i, j in np.ndindex(3, 3, 3):
    y = y + padded[:, t : t + f, i : i + h, j : j + w] @ kernel[t, i, j]
  return y


@pytest.mark.parametrize("frames", [1, 2, 3, 4])
@pytest.mark.parametrize("has_history", [False, True])
def test_causal_conv3d_by_either_way(frames, has_history):
  x, kernel = _normal(2, frames, 5, 4, 3), _normal(3, 3, 3, 3, 6)
  bias = _normal(6)
  history = _normal(2, 2, 5, 4, 3) if has_history else None
  want = _by_definition(x, kernel, history) + bias
  operands = (x,) if history is None else (history, x)
  plain = conv._causal_plain(jnp.asarray(kernel), operands) + bias
  np.testing.assert_allclose(plain, want, atol=2e-5)
  got = conv.causal_conv3d(x, kernel, bias, history)
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_upsample_conv2d_by_either_way():
  x, kernel, bias = _normal(2, 3, 3, 4, 5), _normal(3, 3, 5, 6), _normal(6)
  want = conv._upsample_plain(jnp.asarray(kernel), (x,)) + bias
  got = conv.upsample_conv2d(x, kernel, bias)
  np.testing.assert_allclose(got, want, atol=2e-5)


# Few positions, Winograd along the height, an odd height, and few channels.
FRAMES = {
  "few": ((2, 2, 4, 5), 6, 7, 0),
  "winograd": ((1, 2, 10, 12), 256, 257, 4),
  "odd": ((1, 2, 9, 12), 256, 257, 1),
  "thin": ((1, 2, 10, 12), 8, 257, 1),
}


@pytest.mark.parametrize(
  "size, i, o, convolutions", FRAMES.values(), ids=FRAMES
)
def test_frame_conv2d_by_either_way(size, i, o, convolutions):
  """And which way it was, by the convolutions in the program."""
  x, kernel = _normal(*size, i), _normal(3, 3, i, o) / (3 * i**0.5)
  loss = lambda way: lambda *args: jnp.sum(jnp.sin(way(*args)))
  plain = conv._per_frame
  got = conv.frame_conv2d(x, kernel)
  np.testing.assert_allclose(got, plain(x, kernel), atol=1e-5)
  got = jax.jit(jax.grad(loss(conv.frame_conv2d), (0, 1)))(x, kernel)
  want = jax.jit(jax.grad(loss(plain), (0, 1)))(x, kernel)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
  text = jax.jit(conv.frame_conv2d).lower(x, kernel).as_text()
  assert text.count("stablehlo.convolution") == convolutions


def test_rows_that_are_split_stay_as_they_are():
  x, kernel = _normal(1, 2, 12, 12, 256), _normal(3, 3, 256, 256) / 48

  def run(x, kernel):
    with sharding.frames(1, 12, 12):
      return sharding.settle(conv.frame_conv2d(conv.constrain(x), kernel))

  want = jax.jit(run)(x, kernel)
  with sharding.use(sharding.make_mesh({"context": 4})):
    text = jax.jit(run).lower(x, kernel).as_text()
    assert text.count("stablehlo.convolution") == 1
    np.testing.assert_allclose(jax.jit(run)(x, kernel), want, atol=1e-5)


@pytest.mark.parametrize("wrt", [0, 1, 2, (0, 1, 2)])
def test_gradients_by_either_way(wrt):
  args = _normal(1, 3, 4, 4, 2), _normal(3, 3, 3, 2, 3), _normal(1, 2, 4, 4, 2)
  door = lambda x, kernel, past: conv._causal(kernel, (past, x))
  plain = lambda x, kernel, past: conv._causal_plain(kernel, (past, x))
  loss = lambda way: lambda *args: jnp.sum(jnp.sin(way(*args)))
  got = jax.jit(jax.grad(loss(door), wrt))(*args)
  want = jax.grad(loss(plain), wrt)(*map(jnp.asarray, args))
  close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4)
  jax.tree.map(close, got, want)


def test_the_way_is_chosen_where_the_program_runs():
  args = jnp.ones((1, 4, 4, 4, 2)), jnp.ones((3, 3, 3, 2, 3)), jnp.ones(3)
  traced = jax.jit(conv.causal_conv3d).trace(*args)
  count = lambda platform: (
    traced.lower(lowering_platforms=(platform,))
    .as_text()
    .count("stablehlo.convolution")
  )
  assert count("tpu") == count("cuda") == 1
  assert count("cpu") == 4


def test_bfloat16_rounds_once():
  x, kernel = _normal(1, 4, 6, 6, 8), _normal(3, 3, 3, 8, 4)
  x, kernel = jnp.bfloat16(x), jnp.bfloat16(kernel)
  want = conv._causal_plain(kernel.astype(jnp.float32), (jnp.float32(x),))
  got = conv.causal_conv3d(x, kernel, jnp.zeros(4, jnp.bfloat16))
  assert got.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float32(got), want, rtol=2**-8, atol=1e-5)


def test_a_chunk_goes_on_where_the_last_one_ended():
  layer = conv.CausalConv3D(4)
  x = _normal(1, 7, 4, 4, 3)
  variables = layer.init(jax.random.key(0), x)
  assert set(variables) == {"params"}
  params = {"params": jax.tree.map(jnp.asarray, variables["params"])}
  whole = layer.apply(params, x)
  parts, cache = [], {}
  for chunk in (x[:, :1], x[:, 1:4], x[:, 4:5], x[:, 5:]):
    y, cache = layer.apply(params | cache, chunk, mutable=["cache"])
    parts.append(y)
  np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, atol=1e-5)


def test_downsample_pads_right_and_bottom():
  x, kernel, bias = _normal(1, 2, 4, 6, 3), _normal(3, 3, 3, 5), _normal(5)
  got = conv.DownsampleConv2D(5).apply(
    {"params": {"kernel": kernel, "bias": bias}}, x
  )
  padded = jnp.pad(x[0], ((0, 0), (0, 1), (0, 1), (0, 0)))
  axes = ("NHWC", "HWIO", "NHWC")
  want = lax.conv_general_dilated(
    padded, kernel, (2, 2), "VALID", dimension_numbers=axes
  )
  np.testing.assert_allclose(got[0], want + bias, atol=2e-5)


@pytest.mark.parametrize("size", [(2, 2), (4, 2), (2, 6)])
def test_frames_as_small_as_the_window_are_right_on_a_mesh(size):
  """The batch is split, and of the frames what may be; gradients, too."""
  x = _normal(4, 2, *size, 3)
  net = conv.CausalConv3D(5)
  params = nn.unbox(net.init(jax.random.key(0), x))

  def run(params, x):
    with sharding.frames(4, *size):
      return jnp.sum(jnp.sin(sharding.settle(net.apply(params, x))))

  run = jax.value_and_grad(run, argnums=(0, 1))
  want = jax.jit(run)(params, x)
  mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2})
  with sharding.use(mesh):
    placed = jax.device_put(x, sharding.training_batch(mesh, 4))
    got = jax.jit(run)(params, placed)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    got,
    want,
  )
