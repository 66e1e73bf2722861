r"""Times vidgen against diffusers and transformers on a CPU, in float32.

python tests/bench/compare.py [--rounds=5] [--compile] [--json=FILE]
    [--only=t5,dit,decode,encode,pipeline,unet,temporal,clip]

In one process, the same shapes, weights and threads; the calls alternate, so
that a busy machine slows all. Medians count. Compiling is told apart.
--compile adds torch.compile. `small` in the table is a whole pipeline: 9 frames
of 64x96, 10 steps with guidance, a DiT of 4 blocks of 8 heads. `unet` is whole
and takes 14 GB of memory.
"""

import dataclasses
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import vidgen
from tests import tiny_cogvideox
from vidgen import tensorfile, weights
from vidgen.encoders import clip, t5
from vidgen.models import base, cogvideox, svd
from vidgen.models.cogvideox import transformer, vae
from vidgen.models.svd import unet
from vidgen.models.svd import vae as temporal_vae

CASES = (
  *("t5", "dit", "decode", "encode", "pipeline"),
  *("unet", "temporal", "clip"),
)
_ONLY = flags.DEFINE_list("only", list(CASES), "Which cases.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Timed calls of each.")
_COMPILE = flags.DEFINE_bool("compile", False, "Also time torch.compile.")
_JSON = flags.DEFINE_string("json", None, "Where the figures go.")


class Case(NamedTuple):
  """What is timed: calls that return the same array."""

  name: str
  module: torch.nn.Module | None
  theirs: Callable[[], np.ndarray]
  ours: Callable[[], np.ndarray]


def load(module: torch.nn.Module, component: base.Component):
  """Returns our parameters of a module, by way of its own files."""
  with tempfile.TemporaryDirectory() as folder:
    module.save_pretrained(folder)
    files = tensorfile.open_folder(pathlib.Path(folder))
    return jax.device_put(
      weights.load(files, component.table, base.shapes(component))
    )


def component(name: str, config: cogvideox.Config | svd.Config):
  family = svd if isinstance(config, svd.Config) else cogvideox
  return {c.name: c for c in family.components(config)}[name]


def jitted(function: Callable, *args) -> Callable[[], np.ndarray]:
  run = jax.jit(function)
  return lambda: np.asarray(run(*args))


def text_case() -> Case:
  """T5 v1.1-XXL's width, 2 layers, 226 tokens."""
  config = cogvideox.config_2b()
  # The rows of the vocabulary are looked up, not multiplied: few will do.
  config.text_encoder = t5.T5Config(num_layers=2, vocab_size=1000)
  module = transformers.T5EncoderModel(
    transformers.T5Config(
      d_model=4096,
      d_kv=64,
      num_heads=64,
      d_ff=10240,
      num_layers=2,
      vocab_size=1000,
      feed_forward_proj="gated-gelu",
      tie_word_embeddings=False,
    )
  ).eval()
  params = load(module, component("text_encoder", config))
  ids = np.random.default_rng(0).integers(0, 1000, (1, 226)).astype(np.int32)
  apply = t5.T5Encoder(config.text_encoder).apply
  return Case(
    "T5, XXL width, 2 layers, 226 tokens",
    module,
    lambda: module(torch.from_numpy(ids).long())[0].numpy(),
    jitted(apply, {"params": params}, jnp.asarray(ids)),
  )


def dit_case() -> Case:
  """CogVideoX-2b's width, 4 blocks, 5x30x44 latents."""
  config = cogvideox.config_2b()
  config.transformer.num_layers = 4
  module = diffusers.CogVideoXTransformer3DModel(num_layers=4).eval()
  params = load(module, component("transformer", config))
  x = torch.randn(1, 5, 16, 30, 44)
  text, time_step = torch.randn(1, 226, 4096), torch.tensor([500])
  return Case(
    "DiT, 2b width, 4 blocks, 5x30x44 latents",
    module,
    lambda: module(x, text, time_step).sample.permute(0, 1, 3, 4, 2).numpy(),
    jitted(
      transformer.Transformer(config.transformer).apply,
      {"params": params},
      jnp.asarray(x.permute(0, 1, 3, 4, 2).numpy()),
      jnp.asarray(text.numpy()),
      jnp.asarray([500.0]),
    ),
  )


def vae_case(which: str) -> Case:
  """The published channels: 3x16x16 latents, or 9 frames of 128x128."""
  config = cogvideox.config_2b()
  module = diffusers.AutoencoderKLCogVideoX().eval()
  params = load(module, component("vae", config))
  last = lambda x: jnp.asarray(x.permute(0, 2, 3, 4, 1).numpy())
  if which == "decode":
    x = torch.randn(1, 16, 3, 16, 16)
    return Case(
      "VAE decode, 3x16x16 latents",
      module.decoder,
      lambda: module.decode(x).sample.permute(0, 2, 3, 4, 1).numpy(),
      jitted(lambda p, x: vae.decode(p, config.vae, x), params, last(x)),
    )
  x = torch.randn(1, 3, 9, 128, 128)
  return Case(
    "VAE encode, 9 frames of 128x128",
    module.encoder,
    lambda: module.encode(x).latent_dist.mean.permute(0, 2, 3, 4, 1).numpy(),
    jitted(lambda p, x: vae.encode(p, config.vae, x).mean, params, last(x)),
  )


def pipeline_case() -> Case:
  """A whole small pipeline, text to frames."""
  with tempfile.TemporaryDirectory() as folder:
    theirs = tiny_cogvideox.write(
      pathlib.Path(folder),
      "2b",
      fields={
        "transformer": {
          "num_attention_heads": 8,
          "attention_head_dim": 64,
          "num_layers": 4,
        },
        "vae": {
          "block_out_channels": (32, 64, 64, 128),
          "norm_num_groups": 8,
        },
      },
    )
    ours = vidgen.load(f"{folder}/checkpoint", dtype="float32")
  noise = np.random.default_rng(0).standard_normal((1, 3, 8, 12, 4))
  noise = noise.astype(np.float32)
  prompt = "a red kite by the sea"
  return Case(
    "small pipeline, 10 steps",
    None,
    lambda: (
      theirs(
        prompt,
        num_frames=9,
        num_inference_steps=10,
        max_sequence_length=32,
        latents=torch.from_numpy(noise).permute(0, 1, 4, 2, 3),
        output_type="np",
      ).frames
    ),
    lambda: ours.sample(prompt, num_steps=10, latents=noise, output="float"),
  )


def unet_case() -> Case:
  """The UNet of Stable Video Diffusion, of two frames of 32x32 latents."""
  config = svd.config_svd()
  kind = diffusers.UNetSpatioTemporalConditionModel
  module = kind(num_attention_heads=config.unet.num_attention_heads).eval()
  params = load(module, component("unet", config))
  x, context = torch.randn(1, 2, 8, 32, 32), torch.randn(1, 1, 1024)
  numbers, timestep = torch.tensor([[6.0, 127.0, 0.02]]), torch.tensor([0.5])

  def ours(params, x, timestep, context, numbers):
    vector = unet.embed_numbers(numbers, 256)[:, None]
    apply = unet.Unet(config.unet).apply
    return apply({"params": params}, x, timestep, context, vector)

  array = lambda x: jnp.asarray(x.numpy())
  return Case(
    "SVD UNet, 2 frames of 32x32 latents",
    module,
    lambda: (
      module(x, timestep, context, numbers)
      .sample.permute(0, 1, 3, 4, 2)
      .numpy()
    ),
    jitted(
      ours,
      params,
      array(x.permute(0, 1, 3, 4, 2)),
      *map(array, (timestep, context, numbers)),
    ),
  )


def temporal_case() -> Case:
  """SVD's decoder over time, of three frames of 16x16 latents."""
  config = svd.config_svd()
  module = diffusers.AutoencoderKLTemporalDecoder(
    block_out_channels=config.vae.block_out_channels,
    down_block_types=("DownEncoderBlock2D",) * 4,
    layers_per_block=2,
  ).eval()
  params = load(module, component("vae", config))
  x = torch.randn(3, 4, 16, 16)
  return Case(
    "SVD temporal decode, 3 frames of 16x16 latents",
    module.decoder,
    lambda: (
      module.decode(x, num_frames=3).sample.permute(0, 2, 3, 1)[None].numpy()
    ),
    jitted(
      lambda p, x: temporal_vae.decode(p, config.vae, x),
      params,
      jnp.asarray(x.permute(0, 2, 3, 1)[None].numpy()),
    ),
  )


def clip_case() -> Case:
  """CLIP's ViT-H/14, an image."""
  config = svd.config_svd()
  fields = dataclasses.asdict(config.image_encoder)
  module = transformers.CLIPVisionModelWithProjection(
    transformers.CLIPVisionConfig(**fields)
  ).eval()
  params = load(module, component("image_encoder", config))
  x = torch.randn(1, 3, 224, 224)
  return Case(
    "CLIP ViT-H/14, an image",
    module,
    lambda: module(x).image_embeds.numpy(),
    jitted(
      clip.VisionTower(config.image_encoder).apply,
      {"params": params},
      jnp.asarray(x.permute(0, 2, 3, 1).numpy()),
    ),
  )


def seconds(call: Callable[[], np.ndarray]) -> float:
  start = time.perf_counter()
  call()
  return time.perf_counter() - start


def compiled(case: Case) -> Callable[[], np.ndarray]:
  """Returns `case.theirs` with its module's forward compiled by inductor."""
  eager = case.module.forward
  fast = torch.compile(eager)

  def call() -> np.ndarray:
    case.module.forward = fast
    try:
      return case.theirs()
    finally:
      case.module.forward = eager

  return call


def measure(case: Case) -> dict[str, float]:
  """Returns medians, first-call seconds and the relative error."""
  row = {"first_call_s": seconds(case.ours)}
  got, want = case.ours(), case.theirs()
  row["error"] = float(np.linalg.norm(got - want) / np.linalg.norm(want))
  calls = {"vidgen": case.ours, "eager": case.theirs}
  if _COMPILE.value and case.module is not None:
    calls["compiled"] = compiled(case)
    row["torch_compile_first_s"] = seconds(calls["compiled"])
  times = {name: [] for name in calls}
  for _ in range(_ROUNDS.value):
    for name, call in calls.items():
      times[name].append(seconds(call))
  for name, values in times.items():
    row[f"{name}_s"] = statistics.median(values)
    row[f"{name}_all_s"] = [round(value, 3) for value in values]
  return row


def main(argv: list[str]) -> None:
  del argv
  threads = len(os.sched_getaffinity(0))
  torch.set_num_threads(threads)
  torch.manual_seed(0)
  make = {
    "t5": text_case,
    "dit": dit_case,
    "decode": lambda: vae_case("decode"),
    "encode": lambda: vae_case("encode"),
    "pipeline": pipeline_case,
    "unet": unet_case,
    "temporal": temporal_case,
    "clip": clip_case,
  }
  report = {}
  print(f"{threads} threads, float32, medians of {_ROUNDS.value}")
  print(
    "| what | vidgen | eager | eager / vidgen | compiled / vidgen | error |"
  )
  print("| --- | --- | --- | --- | --- | --- |")
  with torch.no_grad():
    for name in _ONLY.value:
      case = make[name]()
      row = measure(case)
      report[case.name] = row
      ratio = row["eager_s"] / row["vidgen_s"]
      other = "-"
      if "compiled_s" in row:
        other = f"{row['compiled_s'] / row['vidgen_s']:.2f}"
      print(
        f"| {case.name} | {row['vidgen_s']:.2f} s | {row['eager_s']:.2f} s | "
        f"{ratio:.2f} | {other} | {row['error']:.0e} |",
        flush=True,
      )
  if _JSON.value is not None:
    pathlib.Path(_JSON.value).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
  app.run(main)
