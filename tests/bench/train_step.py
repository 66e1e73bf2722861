r"""Times a training step against diffusers and torch on a CPU, in float32.

python tests/bench/train_step.py [--rounds=5] [--compile] [--small]
    [--json=FILE]

A step is forward, backward, clipping and AdamW of a DiT as wide as
CogVideoX-2b's, with 4 blocks, on one clip of 9 frames of 128x192 as latents. In
one process, from the same weights, on the same noise and threads; the calls
alternate, so that a busy machine slows all. Medians count. Ours also guards
against spikes, as it does in a run. The losses of the first steps are compared.
--compile adds torch.compile; --small takes a tiny DiT, to see that it works.
"""

import json
import os
import pathlib
import statistics
import sys
from collections.abc import Callable
from typing import NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from tests import tiny_cogvideox
from tests.bench import compare
from vidgen import optimizers, train_step
from vidgen.models import cogvideox
from vidgen.models.cogvideox import transformer
from vidgen.tasks import noising

# --rounds, --compile and --json are those of `compare`.
_SMALL = flags.DEFINE_bool("small", False, "A tiny DiT.")

_RATE = 1e-4
_ADAMW = optimizers.OptimizerConfig()
_STEPS = 3


class Sizes(NamedTuple):
  """Of the network, its latents and its text."""

  heads: int = 30
  layers: int = 4
  frames: int = 3
  height: int = 16
  width: int = 24
  text_length: int = 226
  text_dim: int = 4096


def network(sizes: Sizes) -> diffusers.CogVideoXTransformer3DModel:
  """Returns CogVideoX-2b's network at these sizes."""
  return diffusers.CogVideoXTransformer3DModel(
    num_attention_heads=sizes.heads,
    num_layers=sizes.layers,
    sample_frames=4 * (sizes.frames - 1) + 1,
    sample_height=sizes.height,
    sample_width=sizes.width,
    max_text_seq_length=sizes.text_length,
    text_embed_dim=sizes.text_dim,
  ).train()


def draw(sizes: Sizes) -> dict[str, np.ndarray]:
  """Returns a batch of one: latents, noise, text and timestep."""
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  latents = (1, sizes.frames, sizes.height, sizes.width, 16)
  return {
    "latents": normal(*latents),
    "noise": normal(*latents),
    "text": normal(1, sizes.text_length, sizes.text_dim),
    "timestep": np.array([500], np.int32),
  }


def their_step(
  module: torch.nn.Module, batch: dict[str, np.ndarray]
) -> Callable[[], np.ndarray]:
  """Returns a call that takes a step and returns the loss before it."""
  channels = lambda x: torch.from_numpy(x.transpose(0, 1, 4, 2, 3).copy())
  x0, noise = channels(batch["latents"]), channels(batch["noise"])
  text = torch.from_numpy(batch["text"])
  timestep = torch.from_numpy(batch["timestep"]).long()
  scheduler = tiny_cogvideox.scheduler("2b")
  options = _ADAMW.options
  adamw = torch.optim.AdamW(
    module.parameters(),
    lr=_RATE,
    betas=(options["b1"], options["b2"]),
    eps=options["eps"],
    weight_decay=options["weight_decay"],
  )

  def call() -> np.ndarray:
    x = scheduler.add_noise(x0, noise, timestep)
    v = scheduler.get_velocity(x0, noise, timestep)
    predicted = module(x, text, timestep).sample
    loss = torch.nn.functional.mse_loss(predicted, v)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), _ADAMW.clip_norm)
    adamw.step()
    adamw.zero_grad()
    return loss.detach().numpy()

  return call


def our_step(
  module: torch.nn.Module, sizes: Sizes, batch: dict[str, np.ndarray]
) -> Callable[[], np.ndarray]:
  """Returns the same of ours, from the weights that `module` has now."""
  config = cogvideox.config_2b()
  config.transformer = transformer.TransformerConfig(
    num_attention_heads=sizes.heads,
    num_layers=sizes.layers,
    max_text_seq_length=sizes.text_length,
    text_embed_dim=sizes.text_dim,
  )
  params = compare.load(module, compare.component("transformer", config))
  model = cogvideox.CogVideoX(config, jnp.float32, tokenizer=None)

  def gradients(params, frozen, batch, key, step):
    del frozen, key, step

    def loss(params):
      condition = {"text": batch["text"]}
      names = ("latents", "noise", "timestep")
      given = [batch[name] for name in names]
      return noising.loss(model, params, *given, condition).mean()

    value, grads = jax.value_and_grad(loss)(params)
    return grads, {"loss": value}

  constant = optimizers.Rate(_RATE, schedule="constant")
  rate = optimizers.schedule([(10**6, constant)])
  txs = {"transformer": optimizers.optimizer(_ADAMW, rate)}
  key = jax.random.key(0)
  # Under jit, so that no two of its arrays share memory: it is donated.
  start = lambda params: train_step.init(lambda _: params, (), txs, key)
  state = jax.jit(start)({"transformer": params})
  step = jax.jit(
    lambda state, batch: train_step.step(
      state,
      {},
      batch,
      key,
      gradients=gradients,
      txs=txs,
      rate=rate,
      parts=1,
      decay=0.0,
      sigmas=6.0,
    ),
    donate_argnums=0,
  )
  held, batch = [state], jax.device_put(batch)

  def call() -> np.ndarray:
    held[0], scalars = step(held[0], batch)
    jax.block_until_ready(held[0])
    return np.asarray(scalars["loss"])

  return call


def measure(sizes: Sizes) -> dict[str, float]:
  """Returns medians, first-call seconds and the losses' relative error."""
  module, batch = network(sizes), draw(sizes)
  ours = our_step(module, sizes, batch)
  theirs = their_step(module, batch)
  row, losses = {}, []
  row["first_call_s"] = compare.seconds(lambda: losses.append(ours()))
  losses += [ours() for _ in range(_STEPS - 1)]
  want = np.stack([theirs() for _ in range(_STEPS)])
  row["losses"] = [float(x) for x in losses]
  row["error"] = float(np.max(np.abs(np.stack(losses) / want - 1)))
  calls = {"vidgen": ours, "eager": theirs}
  if flags.FLAGS.compile:
    case = compare.Case("step", module, theirs, ours)
    calls["compiled"] = compare.compiled(case)
    row["torch_compile_first_s"] = compare.seconds(calls["compiled"])
  times = {name: [] for name in calls}
  for _ in range(flags.FLAGS.rounds):
    for name, call in calls.items():
      times[name].append(compare.seconds(call))
  for name, values in times.items():
    row[f"{name}_s"] = statistics.median(values)
    row[f"{name}_all_s"] = [round(value, 3) for value in values]
  return row


def main(argv: list[str]) -> None:
  del argv
  threads = len(os.sched_getaffinity(0))
  torch.set_num_threads(threads)
  torch.manual_seed(0)
  sizes = Sizes()
  if _SMALL.value:
    sizes = Sizes(2, 2, 3, 4, 6, text_length=8, text_dim=32)
  row = measure(sizes)
  print(f"{threads} threads, float32, {sizes}")
  print(
    f"losses of the first {_STEPS} steps: {row['losses']}, at most "
    f"{row['error']:.0e} off theirs; our first call took "
    f"{row['first_call_s']:.1f} s"
  )
  for name in ("vidgen", "eager", "compiled"):
    if f"{name}_s" in row:
      ratio = row[f"{name}_s"] / row["vidgen_s"]
      print(f"{name}: {row[f'{name}_s']:.3f} s a step, {ratio:.2f} of ours")
  if flags.FLAGS.json is not None:
    pathlib.Path(flags.FLAGS.json).write_text(json.dumps(row, indent=2) + "\n")


if __name__ == "__main__":
  app.run(main)
