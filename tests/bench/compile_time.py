r"""Compiles CogVideoX-5b's denoising step with 2 and with all of its 42 layers.

python tests/bench/compile_time.py [--topology=v5e:2x4] [--layers=2,42]

Layers run in a loop, so that the time should hardly differ. No TPU is needed:
49 frames of 480x720 are compiled by libtpu (the `tpu` extra), on the mesh that
"auto" chooses.
"""

import json
import pathlib
import tempfile
import time

from absl import app, flags

from vidgen import programs, sample, topology
from vidgen.encoders import word_tokenizer
from vidgen.models import cogvideox

_TOPOLOGY = flags.DEFINE_string("topology", "v5e:2x4", "Compiled for.")
_LAYERS = flags.DEFINE_list("layers", ["2", "42"], "Depths, each in turn.")


def write(folder: pathlib.Path, layers: int) -> None:
  """Writes the configs of a checkpoint of so many layers."""
  config = cogvideox.config_5b()
  config.transformer.num_layers = layers
  for path, content in cogvideox.published_configs(config).items():
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text(json.dumps(content), encoding="utf-8")
  word_tokenizer.write(folder / "tokenizer", ["a", "video"])


def seconds(layers: int, where: topology.Topology) -> tuple[float, float]:
  """Returns what tracing and compiling took."""
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    write(folder, layers)
    config = sample.SampleConfig(checkpoint=name, mesh="auto")
    job = programs.SampleJob(config, folder)
    _, every = job.programs(where.devices, where.chip.hbm_bytes)
    step = next(one for one in every if one.name == "denoise step")
    start = time.perf_counter()
    lowered = step.lower()
    traced = time.perf_counter()
    lowered.compile()
    return traced - start, time.perf_counter() - traced


def main(argv: list[str]) -> None:
  del argv
  where = topology.find(_TOPOLOGY.value)
  took = []
  for layers in map(int, _LAYERS.value):
    trace, compiling = seconds(layers, where)
    took.append(trace + compiling)
    print(
      f"{layers} layers: traced in {trace:.1f} s, compiled in "
      f"{compiling:.1f} s",
      flush=True,
    )
  print(f"{took[-1] / took[0]:.2f} times as long")


if __name__ == "__main__":
  app.run(main)
