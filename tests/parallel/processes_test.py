"""Two processes with four devices each are one process with eight."""

import pathlib
import socket
import subprocess
import sys

import pytest

from tests import tiny_training
from tests.parallel import equality
from vidgen import ledger

ROOT = pathlib.Path(__file__).parents[2]

_WORKER = """
import hashlib
import sys

import jax

port, rank, count, folder = sys.argv[1:]
count = int(count)
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_num_cpu_devices", 8 // count)
# The same sums in the same order, be they within a process or between two.
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", count, int(rank))

import pathlib
from tests.parallel import equality
from vidgen import placement

equality.folder = lambda variant: pathlib.Path(folder)
said = [jax.device_count()]
for job in ("sample", "train"):
  case = equality.Case("5b", "cfg x context x fsdp", job)
  result = case.run(case.variant, case.layout)
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(result):
    if isinstance(leaf, jax.Array):
      leaf = placement.to_host(leaf)
    digest.update(leaf.tobytes())
  said.append(digest.hexdigest())
print(*said)
"""


def _run(count: int, folder: pathlib.Path) -> set[str]:
  """What the processes of one run say: devices, and hashes of results."""
  with socket.socket() as server:
    server.bind(("localhost", 0))
    port = server.getsockname()[1]
  children = [
    subprocess.Popen(
      [sys.executable, "-c", _WORKER, *map(str, (port, rank, count, folder))],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      cwd=ROOT,
    )
    for rank in range(count)
  ]
  said = set()
  for child in children:
    out, error = child.communicate(timeout=600)
    assert child.returncode == 0, error[-3000:]
    said.add(out.strip().splitlines()[-1])
  return said


def test_two_processes_are_one():
  """Latents and gradients, bit for bit."""
  folder = equality.folder("5b")
  one, two = _run(1, folder), _run(2, folder)
  assert len(one) == 1
  assert one == two
  assert next(iter(one)).startswith("8 ")


_TRAINER = """
import pathlib
import sys

import jax

port, rank, count, data, folder, axis = sys.argv[1:]
count = int(count)
jax.config.update("jax_num_cpu_devices", 2 // count)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", count, int(rank))

from tests import toy_training
from vidgen import train

config = toy_training.config(data, 4, mesh={axis: 2})
train.run(config, pathlib.Path(folder))
"""


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "context"])
def test_processes_that_share_samples_read_the_same(axis, tmp_path):
  """A batch is dealt out by what of it a process has, not by its number."""
  data = tiny_training.shapes(tmp_path)
  results = []
  for count in (1, 2):
    folder = tmp_path / str(count)
    with socket.socket() as server:
      server.bind(("localhost", 0))
      port = server.getsockname()[1]
    children = [
      subprocess.Popen(
        [
          *(sys.executable, "-c", _TRAINER, str(port), str(rank), str(count)),
          *(data, str(folder), axis),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
      )
      for rank in range(count)
    ]
    for child in children:
      _, error = child.communicate(timeout=300)
      assert child.returncode == 0, error[-3000:]
    results.append((folder / "published" / "line.json").read_text())
  assert results[0] == results[1]


_JOB = """
import sys

import jax

port, rank, count, checkpoint, out = sys.argv[1:]
jax.config.update("jax_num_cpu_devices", 1)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", int(count), int(rank))

from vidgen import sample

config = sample.SampleConfig(
  checkpoint=checkpoint, prompts=f"{out}.txt", out=out, num_steps=1,
  num_frames=9, height=64, width=64, dtype="float32", mesh={"cfg": 2},
  guidance_scale=2.0)
for _ in range(2):
  summary = sample.run(config)
  print(summary.clips, summary.there, len(summary.files))
"""


@pytest.mark.slow
def test_processes_share_a_job_that_one_of_them_writes(tmp_path):
  checkpoint = tiny_training.checkpoint(tmp_path)
  (tmp_path / "out.txt").write_text("One.\nTwo.\nThree.\n")
  with socket.socket() as server:
    server.bind(("localhost", 0))
    port = server.getsockname()[1]
  arguments = lambda rank: (port, rank, 2, checkpoint, tmp_path / "out")
  children = [
    subprocess.Popen(
      [sys.executable, "-c", _JOB, *map(str, arguments(rank))],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      cwd=ROOT,
    )
    for rank in range(2)
  ]
  said = [child.communicate(timeout=300) for child in children]
  assert [child.returncode for child in children] == [0, 0], said
  assert said[0][0].splitlines()[-2:] == ["3 0 3", "0 3 0"]
  assert said[1][0].splitlines()[-2:] == ["3 0 0", "0 3 0"]
  records = ledger.read(tmp_path / "out")
  assert [r["status"] for r in records] == ["done"] * 3
  assert not any(ledger.damage(tmp_path / "out", r, True) for r in records)
