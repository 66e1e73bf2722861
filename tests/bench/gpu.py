r"""Times CogVideoX of full size on this device, from random weights.

python tests/bench/gpu.py [--rounds=2] [--theirs]
    [--only=sample-2b,sample-5b,train-2b,train-2b-cached] [--steps=50]
    [--remat=attention] [--small] [--json=FILE] [--trace=DIR]

In bfloat16, on one device: a clip of 49 frames of 480x720 in 50 guided steps,
with its text encoder and its decoder; a training step of one such clip, its
encoder and AdamW along; and a step of latents that were encoded before, whose
MFU no encoder lowers. Of each, what the first call takes comes first, which
compiles; of a clip that is one step and the decoder. Times do not depend on
what weights hold. --theirs times diffusers' pipeline in the same process, with
torch.compile, where torch sees the device. MFU is the denoiser's FLOPs over its
seconds times the device's peak. --trace keeps a profile of the last call.
--small takes tiny sizes, to see on a CPU that it works.
"""

import contextlib
import functools
import json
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import linen as nn

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from vidgen import meters, optimizers, programs, progress, sharding, train
from vidgen.data import buckets, loader
from vidgen.models import base
from vidgen.pipeline import Pipeline
from vidgen.tasks import diffusion, sources

CASES = ("sample-2b", "sample-5b", "train-2b", "train-2b-cached")
PROMPT = "a video"

_ONLY = flags.DEFINE_list("only", list(CASES), "Which cases.")
_ROUNDS = flags.DEFINE_integer("rounds", 2, "Timed calls, after a cold one.")
_THEIRS = flags.DEFINE_bool("theirs", False, "Times diffusers, too.")
_STEPS = flags.DEFINE_integer("steps", 50, "Denoising steps.")
_REMAT = flags.DEFINE_string("remat", "attention", "What training keeps.")
_SMALL = flags.DEFINE_bool("small", False, "Tiny sizes.")
_JSON = flags.DEFINE_string("json", None, "Where the figures go.")
_TRACE = flags.DEFINE_string("trace", None, "Where a profile goes.")


def checkpoint(model: str, folder: pathlib.Path) -> pathlib.Path:
  """Returns a folder that has all of a checkpoint but its weights."""
  if _SMALL.value:
    # It takes torch and diffusers, which a device need not have.
    from tests import tiny_cogvideox

    tiny_cogvideox.write(folder / model, model)
    return folder / model / "checkpoint"
  return programs.skeleton(f"THUDM/CogVideoX-{model}", folder)


def draw(init: Callable[[Any], Any], key: jax.Array) -> Any:
  """Returns bfloat16 weights, without ever holding them in float32."""

  def make(key):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), nn.unbox(init(key)))

  return jax.jit(make)(key)


def timed(
  call: Callable[[], Any], first: Callable[[], Any]
) -> tuple[float, list[float]]:
  """Returns the seconds of a first call, and of those after it."""
  seconds = []
  for number in range(_ROUNDS.value + 1):
    trace = _TRACE.value is not None and number == _ROUNDS.value
    if trace:
      jax.profiler.start_trace(_TRACE.value)
    start = time.perf_counter()
    (call if number else first)()
    seconds.append(time.perf_counter() - start)
    print(f"  call {number}: {seconds[-1]:.2f} s", flush=True)
    if trace:
      jax.profiler.stop_trace()
  return seconds[0], seconds[1:]


def mfu(flops: float, seconds: float) -> float | None:
  peak = meters.peak_flops(jax.devices()[:1])
  return None if peak is None else flops / seconds / peak


class _Enough(Exception):
  """Ends a call after its first step."""


class _First(progress.Progress):
  """Lets a call take one step."""

  def step(self, done: int, total: int) -> None:
    raise _Enough


def sample(model: str, folder: pathlib.Path) -> dict[str, Any]:
  """Times whole clips."""
  home = checkpoint(model, folder)
  opened = base.find_family(home).open_model(home, jnp.dtype("bfloat16"))
  keys = jax.random.split(jax.random.key(0), len(opened.components))
  params = {
    part.name: draw(part.init, key)
    for part, key in zip(opened.components, keys, strict=True)
  }
  pipeline = Pipeline(opened, params, sharding.make_mesh(None))
  plan = opened.plan(base.Request(num_steps=_STEPS.value))
  told = progress.Progress()

  def call() -> None:
    told.seconds.clear()
    pipeline.sample(PROMPT, num_steps=_STEPS.value, progress=told)

  def first() -> None:
    with contextlib.suppress(_Enough):
      pipeline.sample(PROMPT, num_steps=_STEPS.value, progress=_First())
    frames, *rest = plan.latents
    pipeline.decode(np.zeros((1, frames - plan.padding, *rest), np.float32))

  with told:
    cold, warm = timed(call, first)
  branches = 2 * _STEPS.value
  flops = branches * opened.flops(plan.num_frames, plan.height, plan.width)
  peak, of = progress.peak_memory()
  return {
    "size": [plan.num_frames, plan.height, plan.width],
    "cold_seconds": cold,
    "seconds": statistics.median(warm),
    "stage_seconds": dict(told.seconds),
    "mfu": mfu(flops, told.seconds["denoise"]),
    "compile_seconds": told.compile_seconds,
    "peak_gib": peak / 2**30,
    "peak_of": of,
  }


@functools.partial(jax.jit, static_argnums=(1, 2))
def _drawn(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  # Second moments are not below 0.
  return jax.random.uniform(key, shape, jnp.float32, 0.0, 0.03).astype(dtype)


def fill(infos: Any) -> Any:
  """Returns arrays of these shapes, drawn where they are to be.

  One by one: as one program they would take minutes to compile.
  """
  keys = iter(jax.random.split(jax.random.key(0, impl="rbg"), 10_000))

  def make(info: Any) -> jax.Array:
    if jnp.issubdtype(info.dtype, jax.dtypes.prng_key):
      return jax.random.key(0)
    if jnp.issubdtype(info.dtype, jnp.floating):
      return _drawn(next(keys), info.shape, info.dtype)
    return jnp.zeros(info.shape, info.dtype)

  return jax.tree.map(make, infos, is_leaf=lambda x: hasattr(x, "shape"))


def step(model: str, folder: pathlib.Path, cached: bool) -> dict[str, Any]:
  """Times training steps of one clip, or of its latents and embedding."""
  size = (9, 32, 32) if _SMALL.value else (49, 480, 720)
  bucket = buckets.Bucket(*size, 1)
  data = loader.DataConfig(
    "video_folder", "data", buckets=(bucket,), cache="cache" if cached else None
  )
  config = train.TrainConfig(
    task=diffusion.DiffusionTaskConfig(
      source=sources.Source(checkpoint=str(checkpoint(model, folder))),
      remat=_REMAT.value,
    ),
    stages=(train.Stage(1, data, optimizers.Rate()),),
  )
  job = programs.TrainJob(config, folder)
  start = time.perf_counter()
  _, (program,) = job.programs(jax.devices()[:1])
  compiled = program.lower().compile()
  compiling = time.perf_counter() - start
  (state, *others), _ = compiled.args_info
  held, others = [fill(state)], fill(others)

  def call() -> None:
    held[0], _ = jax.block_until_ready(compiled(held[0], *others))

  cold, warm = timed(call, call)
  peak, of = progress.peak_memory()
  seconds = statistics.median(warm)
  return {
    "size": list(size),
    "remat": _REMAT.value,
    # Without any kept, the forward kernel stands there once more.
    "attention_kernels": compiled.as_text().count("__cudnn$fmha"),
    "cold_seconds": cold,
    "seconds": seconds,
    "mfu": mfu(program.model_flops, seconds),
    "compile_seconds": compiling,
    "peak_gib": peak / 2**30,
    "peak_of": of,
  }


def theirs(model: str, folder: pathlib.Path) -> dict[str, Any]:
  """Times diffusers' pipeline on embeddings, and its text encoder."""
  import diffusers
  import torch
  import transformers

  home = checkpoint(model, folder)
  device = "cuda" if torch.cuda.is_available() else "cpu"
  read = lambda name: json.loads((home / name / "config.json").read_text())

  def build(make: Callable[[], Any]) -> Any:
    with torch.device(device):
      return make().to(torch.bfloat16).eval()

  transformer = build(
    lambda: diffusers.CogVideoXTransformer3DModel.from_config(
      read("transformer")
    )
  )
  vae = build(lambda: diffusers.AutoencoderKLCogVideoX.from_config(read("vae")))
  text = build(
    lambda: transformers.T5EncoderModel(
      transformers.T5Config(**read("text_encoder"))
    )
  )
  kind = diffusers.CogVideoXDDIMScheduler
  pipeline = diffusers.CogVideoXPipeline(
    tokenizer=None,
    text_encoder=None,
    vae=vae,
    transformer=transformer,
    scheduler=kind.from_pretrained(home / "scheduler"),
  )
  pipeline.set_progress_bar_config(disable=True)
  if device == "cuda":
    transformer.compile(mode="max-autotune-no-cudagraphs", fullgraph=True)
  config = transformer.config
  length = config.max_text_seq_length
  tokens = torch.zeros((1, length), dtype=torch.int64, device=device)

  def call() -> None:
    with torch.no_grad():
      embedding = text(tokens).last_hidden_state
      pipeline(
        prompt_embeds=embedding,
        negative_prompt_embeds=embedding,
        num_inference_steps=_STEPS.value,
        num_frames=config.sample_frames,
        height=8 * config.sample_height,
        width=8 * config.sample_width,
        output_type="pt",
      )
      if device == "cuda":
        torch.cuda.synchronize()

  cold, warm = timed(call, call)
  return {"cold_seconds": cold, "seconds": statistics.median(warm)}


def main(argv: list[str]) -> None:
  del argv
  report: dict[str, Any] = {"device": jax.devices()[0].device_kind}
  print(report["device"])
  for case in _ONLY.value:
    kind, model, *form = case.split("-")
    with tempfile.TemporaryDirectory() as folder:
      here = pathlib.Path(folder)
      if kind == "sample":
        report[case] = sample(model, here)
      else:
        report[case] = step(model, here, form == ["cached"])
      if _THEIRS.value and kind == "sample":
        jax.clear_caches()
        report[f"{case}-diffusers"] = theirs(model, here / "theirs")
    for name in (case, f"{case}-diffusers"):
      if name in report:
        print(name, json.dumps(report[name]), flush=True)
  if _JSON.value is not None:
    pathlib.Path(_JSON.value).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
  app.run(main)
