r"""Kills a job at random moments, again and again, and compares how it ends.

python -m tests.chaos.kill sample|train --folder=DIR [--kills=100] [--seed=0]
    [--clips=40] [--steps=60]

The job runs once undisturbed. Then it is started and killed by SIGKILL after a
random time, N times, and at last left to end. Of sampling, the names and the
hashes of all frames must be those of the undisturbed job, none missing and none
twice; of training, the final checkpoint must have the same bits. Prints what
happened, and ends with 1 if anything differs.
"""

import argparse
import hashlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).parents[2]

_TRAIN = """
import sys
sys.modules["torch"] = None  # What writes for TensorBoard would import it.
from tests import toy_training
from vidgen import errors, train
data, steps, workdir = sys.argv[1:]
config = toy_training.config(data, int(steps), pause=0.02, checkpoint_every=4)
try:
  train.run(config, workdir)
except errors.VidgenError as error:
  print(error, file=sys.stderr)
  sys.exit(error.exit_code)
"""


def start(argv: list[str], log: pathlib.Path) -> subprocess.Popen:
  """Starts Python with these arguments; what it says goes to a file."""
  environ = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
  with log.open("ab") as file:
    return subprocess.Popen(
      [sys.executable, *argv], cwd=ROOT, env=environ, stdout=file, stderr=file
    )


def sample_argv(prompts: pathlib.Path, out: pathlib.Path) -> list[str]:
  """A sampling job of the small model, as fast as can be."""
  return [
    *("-m", "vidgen.cli.main", "sample", f"--prompts={prompts}"),
    *(f"--out={out}", "--config.num_steps=1", "--config.num_frames=9"),
  ]


def train_argv(data: str, steps: int, workdir: pathlib.Path) -> list[str]:
  """A training run of a second, with steps that last."""
  return ["-c", _TRAIN, data, str(steps), str(workdir)]


def sampled(out: pathlib.Path) -> dict[str, str]:
  """What a sampling job made: the hash of each clip's frames by its name.

  Raises:
    AssertionError: A file is missing or twice there, or half of one is left.
  """
  lines = [
    json.loads(x) for x in (out / "clips.jsonl").read_text().splitlines()
  ]
  names = [line["name"] for line in lines]
  assert len(names) == len(set(names)), "a clip was made twice"
  files = {name for line in lines for name in line["files"]}
  held = {p.name for p in out.iterdir()}
  held -= {"clips.jsonl", "manifest.json", "report.html", "posters"}
  assert files == held, sorted(files ^ held)
  for line in lines:
    for name, digest in line["sha256"].items():
      data = (out / name).read_bytes()
      assert hashlib.sha256(data).hexdigest() == digest, name
  return {line["name"]: line["frames_sha256"] for line in lines}


def trained(workdir: pathlib.Path) -> dict[str, str]:
  """The hashes of a run's last checkpoint, and its losses."""
  steps = [p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
  newest = max(steps, key=lambda path: int(path.name))
  digest = hashlib.sha256((workdir / "published/line.json").read_bytes())
  found = {"step": newest.name, "published": digest.hexdigest()}
  for line in (workdir / "metrics.jsonl").read_text().splitlines():
    row = json.loads(line)
    assert row["step"] not in found, "a step was told twice"
    found[row["step"]] = json.dumps([row["loss"], row["grad_norm"]])
  return found


def disturb(
  argv: list[str],
  log: pathlib.Path,
  kills: int,
  rng: random.Random,
  most: float,
) -> list[float]:
  """Starts a job and kills it, `kills` times; it is started once more to end.

  Returns:
    The seconds after which each was killed.

  Raises:
    AssertionError: It ended with another code than 0, or too early to be killed
      in most of the tries.
  """
  moments = []
  while len(moments) < kills:
    child = start(argv, log)
    seconds = rng.uniform(0, most)
    try:
      code = child.wait(seconds)
    except subprocess.TimeoutExpired:
      child.send_signal(signal.SIGKILL)
      child.wait()
      moments.append(seconds)
      continue
    assert code == 0, f"ended with {code}: {log.read_text()[-2000:]}"
    break
  code = start(argv, log).wait()
  assert code == 0, f"ended with {code}: {log.read_text()[-2000:]}"
  return moments


def compare(
  argv: Callable[[pathlib.Path], list[str]],
  result: Callable[[pathlib.Path], dict[str, str]],
  folder: pathlib.Path,
  kills: int,
  seed: int,
) -> tuple[dict[str, str], dict[str, str], list[float]]:
  """Returns what an undisturbed job and a disturbed one made, and the moments.

  Moments come from the whole of the time that the job takes, its start with
  them; a job that ends before all kills are spent is begun anew elsewhere.
  """
  rng = random.Random(seed)
  began = time.perf_counter()
  code = start(argv(folder / "whole"), folder / "whole.log").wait()
  assert code == 0, (folder / "whole.log").read_text()[-2000:]
  most = time.perf_counter() - began
  want = result(folder / "whole")
  moments: list[float] = []
  number = 0
  while len(moments) < kills:
    target = folder / f"killed-{number}"
    left = kills - len(moments)
    spent = disturb(argv(target), folder / "killed.log", left, rng, most)
    moments += spent
    got = result(target)
    if got != want:
      return want, got, moments
    number += 1
  return want, want if number else {}, moments


def run(
  job: str, folder: pathlib.Path, kills: int, seed: int, clips: int, steps: int
) -> tuple[dict[str, str], dict[str, str], list[float]]:
  """Runs one of the two jobs; see `compare`."""
  folder.mkdir(parents=True, exist_ok=True)
  if job == "sample":
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"A red circle {i}.\n" for i in range(clips)))
    argv = lambda out: sample_argv(prompts, out)
    # The time that it takes is to be that of those that are killed: they find
    # its programs in the cache, and to compile them takes most of the job.
    code = start(argv(folder / "compiling"), folder / "compiling.log").wait()
    assert code == 0, (folder / "compiling.log").read_text()[-2000:]
    return compare(argv, sampled, folder, kills, seed)
  from tests import tiny_training

  data = tiny_training.shapes(folder)
  argv = lambda out: train_argv(data, steps, out)
  return compare(argv, trained, folder, kills, seed)


def main() -> int:
  """Runs a job as the command line has it."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("job", choices=["sample", "train"])
  parser.add_argument("--folder", type=pathlib.Path, required=True)
  for name, value in (
    ("kills", 100),
    ("seed", 0),
    ("clips", 40),
    ("steps", 60),
  ):
    parser.add_argument(f"--{name}", type=int, default=value)
  args = parser.parse_args()
  began = time.perf_counter()
  want, got, moments = run(
    args.job, args.folder, args.kills, args.seed, args.clips, args.steps
  )
  same = want == got
  print(
    f"{args.job}: {len(moments)} kills, {min(moments):.2f} to "
    f"{max(moments):.2f} "
    f"s after the start: {'the same' if same else 'DIFFERENT'} "
    f"({len(want)} results, {time.perf_counter() - began:.0f} s)"
  )
  return 0 if same else 1


if __name__ == "__main__":
  sys.exit(main())
