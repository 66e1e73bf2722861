r"""Compiles CogVideoX for slices of TPUs, and prints what fits where.

python tests/bench/fit_table.py [--only=TEXT] [--minutes=30] \
    [--out=tests/bench/fit.jsonl]

Each row is a `vidgen compile` of its own, with the mesh that "auto" chooses. Of
training it is the step on the longest clips of 480p, one a chip at a time. No
TPU is needed, but an hour or more of CPU is. Rows that are in --out already are
not compiled again: remove the file to start over.
"""

import json
import math
import pathlib
import re
import subprocess
import sys
import tempfile

from absl import app, flags

ROOT = pathlib.Path(__file__).parents[2]

SAMPLING = {"2b": "2b_sample", "5b": "5b_sample", "1.5-5b": "1_5_5b_sample"}
TRAINING = {"2b": "2b_train", "5b": "5b_train"}
SLICES = {
  "sample": {
    "2b": ("v5e:2x2", "v5e:2x4", "v6e:2x4", "v5p:2x2x1"),
    "5b": ("v5e:2x4", "v6e:2x4", "v5p:2x2x1"),
    "1.5-5b": ("v6e:2x4", "v5p:2x2x1", "v5p:2x2x2"),
  },
  "train": {
    "2b": ("v6e:8x8", "v5p:4x4x4", "v5e:16x16"),
    "5b": ("v5p:4x4x4", "v6e:16x16", "v5p:8x8x8"),
  },
}

# A run of the second stage alone, on its longest clips, of which each chip has
# one at a time.
_LONGEST = """import dataclasses
import runpy
from vidgen.data import loader

def get_config():
  config = runpy.run_path({path!r})["get_config"]()
  stage = config.stages[1]
  longest = max(stage.data.buckets, key=lambda b: b.num_frames)
  data = dataclasses.replace(stage.data, buckets=(longest,))
  config.stages = (dataclasses.replace(stage, data=data),)
  (bucket,) = loader.sized(data)
  config.accumulate = max(1, bucket.batch_size // {chips})
  return config
"""

_ONLY = flags.DEFINE_string("only", "", "Rows whose name holds it.")
_MINUTES = flags.DEFINE_float("minutes", 30.0, "The most a row may take.")
_OUT = flags.DEFINE_string(
  "out", str(ROOT / "tests/bench/fit.jsonl"), "Where results are kept."
)


def rows() -> list[tuple[str, str, str]]:
  """Returns the name, the config and the topology of each row."""
  found = []
  for kind, configs in (("sample", SAMPLING), ("train", TRAINING)):
    for model, slices in SLICES[kind].items():
      config = f"configs/cogvideox_{configs[model]}.py"
      found += [(f"{kind} {model} {one}", config, one) for one in slices]
  return found


def compile_row(config: str, topology: str) -> dict:
  """Returns what `vidgen compile --json` writes, or why there is nothing."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "report.json"
    if config.endswith("_train.py"):
      chips = math.prod(map(int, re.findall(r"\d+", topology.split(":")[1])))
      text = _LONGEST.format(path=str(ROOT / config), chips=chips)
      config = str(pathlib.Path(folder) / pathlib.Path(config).name)
      pathlib.Path(config).write_text(text, encoding="utf-8")
    command = [
      *(sys.executable, "-m", "vidgen.cli.main", "compile"),
      *(f"--config={config}", f"--topology={topology}"),
      *("--config.mesh=auto", f"--json={path}"),
    ]
    try:
      done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60 * _MINUTES.value,
      )
    except subprocess.TimeoutExpired:
      return {"error": f"not done after {_MINUTES.value:.0f} minutes"}
    if not path.exists():
      return {"error": done.stderr.strip().splitlines()[-1][:200]}
    return json.loads(path.read_text())


def line(name: str, report: dict) -> str:
  """Returns a row of the table."""
  if "error" in report:
    return f"| {name} | {report['error']} | | | | |"
  gib = report["hbm_bytes"] / 2**30, report["hbm_limit_bytes"] / 2**30
  bound = max(report["bound_seconds"].values())
  told = f"{bound:.1f}" if bound else "-"
  mesh = ", ".join(f"{k} {n}" for k, n in report["mesh"].items())
  return (
    f"| {name} | {mesh} | {'yes' if report['fits'] else 'no'} | "
    f"{gib[0]:.1f} of {gib[1]:.1f} | {told} | "
    f"{report['compile_seconds']:.0f} |"
  )


def main(argv: list[str]) -> None:
  del argv
  out = pathlib.Path(_OUT.value)
  known = {}
  if out.exists():
    known = dict(map(json.loads, out.read_text().splitlines()))
  print("| job, slice | mesh | fits | GiB of a chip | bound, s | compile, s |")
  print("| --- | --- | --- | --- | --- | --- |")
  for name, config, topology in rows():
    if _ONLY.value not in name:
      continue
    if name not in known:
      known[name] = compile_row(config, topology)
      with open(out, "a", encoding="utf-8") as file:
        file.write(json.dumps([name, known[name]]) + "\n")
    print(line(name, known[name]), flush=True)


if __name__ == "__main__":
  app.run(main)
