r"""Counts the cycles of the TPU attention kernels, with no TPU.

python tests/bench/attention_cycles.py [--chip=v6e] [--tokens=17776]
    [--heads=48] [--running] [--dtype=bfloat16] [--blocks=Q,KV,CHUNK]
    [--json=FILE]

Compiles both kernels for heads of 64 ahead of time, which takes libtpu
(`pip install vidgen[tpu]`), and reads from what the compiler writes how many
instruction bundles it scheduled for one block of each, before it folds idle
ones away. A bundle is a cycle; waiting for memory is not in it. What runs once
a head (start and finish) is counted as if it ran in each block.

The table gives cycles, cycles per 1000 scores, the busiest units and their
share of the slots, and what all heads together hold in memory beside arguments
and results: the arrays laid out as the kernel takes and gives them. --running
subtracts the running maximum, as where the scores have no known bound.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

from vidgen.nn import flash_tpu

_CHIP = flags.DEFINE_enum("chip", "v6e", ["v5e", "v5p", "v6e"], "Which chip.")
_TOKENS = flags.DEFINE_integer("tokens", 17_776, "Queries and keys.")
_HEADS = flags.DEFINE_integer("heads", 48, "Heads; no matter for the cycles.")
_RUNNING = flags.DEFINE_bool("running", False, "No bound of the scores.")
_DTYPE = flags.DEFINE_enum(
  "dtype", "bfloat16", ["bfloat16", "float32"], "Of queries, keys and values."
)
_BLOCKS = flags.DEFINE_list(
  "blocks", None, "Block sizes instead of chosen ones."
)
_JSON = flags.DEFINE_string("json", None, "File for the table as JSON.")
_DUMP = flags.DEFINE_string("dump", None, "Compile and write there; no table.")

_TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
_FILES = "*pre-delay_hlo-static-per-bundle-utilization.txt"


class Row(NamedTuple):
  """What was counted of one kernel."""

  kernel: str
  block: str
  cycles: int
  per_1000_scores: float
  units: dict[str, float]
  temporary_bytes: int


def blocks(kernel: str, tokens: int) -> flash_tpu.Blocks:
  """Returns the block sizes of "forward" or "backward"."""
  if _BLOCKS.value:
    return flash_tpu.Blocks(*map(int, _BLOCKS.value))
  return flash_tpu.choose_blocks(
    tokens,
    tokens,
    backward=kernel == "backward",
    exact=_DTYPE.value == "float32",
  )


def compile_both(folder: pathlib.Path) -> None:
  """Compiles the kernels and writes their temporary bytes into `folder`."""
  name = _TOPOLOGIES[_CHIP.value]
  device = topologies.get_topology_desc(name, "tpu").devices[0]
  place = SingleDeviceSharding(device)
  struct = lambda shape, dtype: jax.ShapeDtypeStruct(
    shape, dtype, sharding=place
  )
  x = struct((1, _TOKENS.value, _HEADS.value, 64), jnp.dtype(_DTYPE.value))
  lse = struct((1, _TOKENS.value, _HEADS.value), jnp.float32)
  options = {"scale": 0.125}
  if _BLOCKS.value:
    options["blocks"] = flash_tpu.Blocks(*map(int, _BLOCKS.value))
  bound = None if _RUNNING.value else 10.0
  programs = {
    "forward": (
      lambda q, k, v: flash_tpu.flash(q, k, v, logit_bound=bound, **options),
      (x, x, x),
    ),
    "backward": (
      lambda *args: flash_tpu.flash_grads(*args, **options),
      (x, x, x, x, lse, x),
    ),
  }
  temporary = {}
  for kernel, (function, arguments) in programs.items():
    compiled = jax.jit(function).lower(*arguments).compile()
    memory = compiled.memory_analysis()
    temporary[kernel] = memory.temp_size_in_bytes
  (folder / "temporary.json").write_text(json.dumps(temporary))


def read(path: pathlib.Path) -> tuple[int, dict[str, float]]:
  """Returns the bundles of a schedule and the share of each unit's slots."""
  lines = path.read_text(errors="replace").splitlines()
  heads = next(line for line in lines if "MXU" in line)
  units = heads.replace(" ", "").split(",")
  table = [
    [int(number) for number in line.split()]
    for line in lines
    if re.fullmatch(r"\s*\d[\d\s]*", line)
  ]
  # The first line says how many slots a bundle has.
  slots, rows = table[0], table[1:]
  used = [sum(column) for column in zip(*rows, strict=True)]
  shares = [n / (s * len(rows)) for n, s in zip(used, slots, strict=True)]
  return len(rows), dict(zip(units, shares, strict=True))


def count(folder: pathlib.Path) -> list[Row]:
  """Compiles in a process of its own, which takes the flags, and counts."""
  flags_ = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
  environment = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "LIBTPU_INIT_ARGS": flags_,
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
  }
  command = [sys.executable, *sys.argv, f"--dump={folder}"]
  subprocess.run(command, env=environment, check=True)
  temporary = json.loads((folder / "temporary.json").read_text())
  rows = []
  for kernel, spare in temporary.items():
    (path,) = folder.glob(f"*flash_{kernel}{_FILES}")
    cycles, units = read(path)
    block = blocks(kernel, _TOKENS.value)
    busiest = sorted(units, key=units.get, reverse=True)[:3]
    rows.append(
      Row(
        kernel,
        "/".join(map(str, block)),
        cycles,
        1000 * cycles / (block.q * block.kv),
        {unit: units[unit] for unit in busiest},
        spare,
      )
    )
  return rows


def main(argv: list[str]) -> None:
  del argv
  if _DUMP.value:
    compile_both(pathlib.Path(_DUMP.value))
    return
  with tempfile.TemporaryDirectory() as folder:
    rows = count(pathlib.Path(folder))
  print(f"{_CHIP.value}, {_TOKENS.value} tokens, {_DTYPE.value}")
  for row in rows:
    units = ", ".join(f"{k} {v:.0%}" for k, v in row.units.items())
    print(
      f"{row.kernel:9} {row.block:14} {row.cycles:6} cycles "
      f"{row.per_1000_scores:5.2f}/1000 {units}; "
      f"{row.temporary_bytes / 1e6:.1f} MB"
    )
  if _JSON.value:
    table = [row._asdict() for row in rows]
    pathlib.Path(_JSON.value).write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
  app.run(main)
