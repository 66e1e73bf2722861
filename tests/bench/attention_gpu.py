r"""Times attention on a Hopper GPU: cuDNN's, and a candidate of our own.

python tests/bench/attention_gpu.py [--tokens=17776] [--heads=48] [--batch=2]
    [--rounds=20] [--json=FILE]

In bfloat16 and at a head_dim of 64, as CogVideoX-5b attends with guidance. Each
row gives the milliseconds of a call, the median of rounds, its TFLOP/s, and by
how much it differs at most from the attention of one head in float32. cuDNN
comes with its backward pass, too, which counts 3.5 times the forward's FLOPs.
"""

import functools
import itertools
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from tests.bench import flash_hopper
from vidgen.nn import attention

_TOKENS = flags.DEFINE_integer("tokens", 17_776, "Queries and keys.")
_HEADS = flags.DEFINE_integer("heads", 48, "Heads.")
_BATCH = flags.DEFINE_integer("batch", 2, "Branches of guidance.")
_ROUNDS = flags.DEFINE_integer("rounds", 20, "Timed calls of each.")
_JSON = flags.DEFINE_string("json", None, "Where the figures go.")

BLOCKS = tuple(
  flash_hopper.Blocks(64, kv, groups, stages)
  for kv, groups, stages in ((128, 3, 2), (128, 3, 3), (128, 2, 2), (64, 3, 4))
)


class Row(NamedTuple):
  """A way to attend."""

  name: str
  call: Callable[..., Any]
  passes: float


def rows(scale: float) -> list[Row]:
  cudnn = functools.partial(
    attention.attention, scale=scale, implementation="cudnn"
  )

  def grads(q, k, v):
    out, back = jax.vjp(cudnn, q, k, v)
    return out, back(out)

  found = [Row("cudnn", cudnn, 1), Row("cudnn, both passes", grads, 3.5)]
  for blocks, bounded in itertools.product(BLOCKS, (True, False)):
    call = functools.partial(
      flash_hopper.flash_with_lse, scale=scale, bounded=bounded, blocks=blocks
    )
    kind = "bounded" if bounded else "running maximum"
    name = f"{blocks.groups} x {blocks.q} x {blocks.kv}, {blocks.stages} stages"
    found.append(Row(f"{name}, {kind}", call, 1))
  return found


def median(call: Callable[[], Any]) -> float:
  """Returns the milliseconds of a call."""
  jax.block_until_ready(call())
  seconds = []
  for _ in range(_ROUNDS.value):
    start = time.perf_counter()
    jax.block_until_ready(call())
    seconds.append(time.perf_counter() - start)
  return 1000 * statistics.median(seconds)


def main(argv: list[str]) -> None:
  del argv
  shape = (_BATCH.value, _TOKENS.value, _HEADS.value, 64)
  scale = shape[-1] ** -0.5
  q, k, v = (
    jax.random.normal(key, shape, jnp.bfloat16)
    for key in jax.random.split(jax.random.key(0), 3)
  )
  one = [x[:1, :, :1].astype(jnp.float32) for x in (q, k, v)]
  exact = jax.jit(
    functools.partial(attention.attention, implementation="blocked")
  )(*one)
  flops = 4 * _BATCH.value * _HEADS.value * _TOKENS.value**2 * shape[-1]
  table = {}
  for name, call, passes in rows(scale):
    compiled = jax.jit(call).lower(q, k, v).compile()
    out, *_ = jax.tree.leaves(compiled(q, k, v))
    error = float(jnp.abs(out[:1, :, :1].astype(jnp.float32) - exact).max())
    took = median(functools.partial(compiled, q, k, v))
    rate = passes * flops / took / 1e9
    table[name] = {"ms": took, "tflops": rate, "error": error}
    print(
      f"{name:40} {took:8.2f} ms {rate:6.0f} TFLOP/s {error:.1e}", flush=True
    )
  if _JSON.value is not None:
    report = {"device": jax.devices()[0].device_kind, "shape": shape, **table}
    pathlib.Path(_JSON.value).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
  app.run(main)
