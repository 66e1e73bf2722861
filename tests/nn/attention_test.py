"""Every implementation of attention, and every split, is the plain one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import ad_checkpoint
from jax.extend import core

from vidgen import sharding
from vidgen.nn import attention, blocked, context_parallel


def inputs(n, m, heads=3, batch=2):
  keys = jax.random.split(jax.random.key(0), 4)
  normal = jax.random.normal
  q = normal(keys[0], (batch, n, heads, 4))
  k, v = (normal(key, (batch, m, heads, 4)) for key in keys[1:3])
  return q, k, v, 3 * normal(keys[3], (heads, n, m))


def assert_close(got, want):
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g, w, rtol=2e-5, atol=2e-6),
    got,
    want,
  )


def both(attend, *args):
  """What comes out, and the gradients of all inputs by a mix of it."""
  out, back = jax.vjp(attend, *args)
  mix = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
  return out, back(mix)


def blocks_of(size):
  """Blocked attention with blocks of so many queries."""
  options = {"scale": 0.5, "block": size}
  return context_parallel.Kernel(
    lambda q, k, v, count, bound: blocked.forward(q, k, v, count, **options),
    functools.partial(blocked.backward, **options),
  )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n", [5, 8, 21])
def test_blocked_is_plain(n, bias):
  """One block, whole blocks, and a last block that is padded."""
  q, k, v, table = inputs(n, 7)
  args = (q, k, v, table) if bias else (q, k, v)

  def plain(q, k, v, bias=None):
    return attention.attention(q, k, v, bias=bias, implementation="plain")

  def block(q, k, v, bias=None):
    if bias is not None:
      return blocked.biased(q, k, v, bias, scale=0.5, block=8)
    return context_parallel.whole(q, k, v, blocks_of(8), k.shape[1])

  run = lambda attend: jax.jit(functools.partial(both, attend))(*args)
  assert_close(run(block), run(plain))


def largest(closed) -> int:
  """The most elements that any array of a program has."""
  sizes = [0]
  for equation in closed.eqns:
    sizes += [var.aval.size for var in equation.outvars]
    for inner in core.jaxprs_in_params(equation.params):
      sizes.append(largest(inner))
  return max(sizes)


def test_no_pass_holds_the_scores_of_a_head():
  q, k, v, _ = inputs(64, 64, heads=2, batch=1)
  attend = functools.partial(
    context_parallel.whole, kernel=blocks_of(8), num_keys=60
  )
  backward = jax.make_jaxpr(functools.partial(both, attend))(q, k, v)
  assert largest(backward.jaxpr) < 64 * 64


@pytest.mark.parametrize("implementation", ["plain", "blocked"])
def test_padding_is_not_attended_to(implementation):
  q, k, v, bias = inputs(6, 9)
  attend = functools.partial(attention.attention, implementation=implementation)
  for extra in ({}, {"bias": bias}):
    cut = {name: x[..., :7] for name, x in extra.items()}
    got = lambda *x, e=extra: attend(*x, num_keys=7, **e)
    want = lambda q, k, v, c=cut: attend(q, k[:, :7], v[:, :7], **c)
    run = lambda attend: jax.jit(functools.partial(both, attend))(q, k, v)
    assert_close(run(got), run(want))


MESHES = [
  {"data": 2},
  {"tensor": 3},
  {"context": 4},
  {"ring": 4},
  {"data": 2, "context": 2, "ring": 2},
  {"fsdp": 4, "tensor": 2},
]


@functools.cache
def plain(num_keys):
  args = inputs(24, 24)[:3]
  attend = functools.partial(
    attention.attention, num_keys=num_keys, implementation="plain"
  )
  return jax.jit(functools.partial(both, attend))(*args)


@pytest.mark.parametrize("num_keys", [24, 21])
@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_split_is_whole(mesh, num_keys):
  """Heads that do not divide, and padding in the last part."""
  args = inputs(24, 24)[:3]
  attend = functools.partial(attention.attention, num_keys=num_keys)
  with sharding.use(sharding.make_mesh(mesh)):
    got = jax.jit(functools.partial(both, attend))(*args)
  assert_close(got, plain(num_keys))


BOUNDS = {"small": 20.0, "large": 100.0}


@pytest.mark.parametrize("bound", BOUNDS)
def test_the_kernel_of_tpus_is_plain(bound):
  """Around a ring of two, of which the last part has padding."""
  args = inputs(24, 24)[:3]
  attend = functools.partial(
    attention.attention,
    num_keys=21,
    bound=jnp.asarray(BOUNDS[bound]),
    implementation="flash",
    interpret=True,
  )
  with sharding.use(sharding.make_mesh({"ring": 2, "context": 2})):
    got = jax.jit(functools.partial(both, attend))(*args)
  assert_close(got, plain(21))


def test_a_ring_needs_keys_everywhere():
  q, k, v, _ = inputs(8, 8)
  with (
    sharding.use(sharding.make_mesh({"ring": 4})),
    pytest.raises(ValueError, match="without any"),
  ):
    jax.jit(functools.partial(attention.attention, num_keys=6))(q, k, v)


def test_large_scores_do_not_overflow():
  q = jnp.full((1, 2, 1, 4), 100.0)
  out = attention.attention(q, q, jnp.ones((1, 2, 1, 4)))
  np.testing.assert_allclose(out, 1.0, rtol=1e-6)


@pytest.mark.parametrize(
  "name, reason",
  [
    ("fast", "unknown"),
    ("cudnn", "runs on a gpu"),
    ("flash", "runs on a tpu"),
  ],
)
def test_what_cannot_run_is_an_error(name, reason):
  q = jnp.zeros((1, 2, 1, 4))
  with pytest.raises(ValueError, match=reason):
    attention.attention(q, q, q, implementation=name)


@pytest.mark.parametrize(
  "platform, dtype, tokens, bias, chosen",
  [
    ("cpu", "float32", 64, False, "blocked"),
    ("gpu", "bfloat16", 64, False, "cudnn"),
    ("gpu", "bfloat16", 64, True, "plain"),
    ("gpu", "float32", 64, False, "plain"),
    ("gpu", "float32", 17776, False, "blocked"),
    ("gpu", "bfloat16", 17776, True, "blocked"),
    ("tpu", "bfloat16", 64, False, "flash"),
    ("tpu", "bfloat16", 64, True, "blocked"),
  ],
)
def test_what_each_platform_runs(platform, dtype, tokens, bias, chosen):
  found = []

  def choose(q):
    found.append(attention._choose(platform, q, q, q if bias else None))

  jax.eval_shape(choose, jax.ShapeDtypeStruct((2, tokens, 30, 64), dtype))
  assert found == [chosen]


def test_what_is_kept_for_the_backward_pass():
  """Also of cuDNN's kernel, by the name that JAX gives its primitive."""
  from jax._src.cudnn import fused_attention_stablehlo as cudnn

  assert attention.saved(cudnn._dot_product_attention_fwd_p_wrapper)
  assert not attention.saved(cudnn._dot_product_attention_bwd_p_wrapper)
  named = lambda name: jax.make_jaxpr(
    lambda x: ad_checkpoint.checkpoint_name(x, name)
  )(1.0).eqns[0]
  for name in ("attention", "dense"):
    eqn = named(name)
    assert attention.saved(eqn.primitive, 0, **eqn.params) == (
      name == "attention"
    )
