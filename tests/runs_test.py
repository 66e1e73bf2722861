"""Runs: what is saved comes back, whatever happens in between."""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import vidgen
from vidgen import errors, manifest, runs, sharding, statefile

ROOT = pathlib.Path(vidgen.__file__).parent.parent
CONFIG = {"model": {"width": 8}, "seed": 0, "num_steps": 10, "stages": [1, 2]}


def make_state(seed=0):
  """A state with all kinds of leaves that training has."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  params = {
    "blocks": [{"kernel": draw(16, 8)}, {"kernel": draw(16, 8)}],
    "norm": {"scale": draw(8).astype(jnp.bfloat16)},
  }
  optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adamw(1e-3), optax.identity()
  )
  return {
    "step": jnp.int32(seed),
    "key": jax.random.key_data(jax.random.key(seed)),
    "params": {"net": params},
    "opt": {"net": optimizer.init(params)},
    "guard": (jnp.zeros((4,), bool), None, {}),
    "count": seed,
  }


def assert_equal(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    y = jnp.asarray(y)
    assert isinstance(x, jax.Array)
    assert (x.dtype, x.shape) == (y.dtype, y.shape)
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def fill(workdir, *steps, **options):
  with runs.Run.open(workdir, CONFIG, **options) as run:
    for step in steps:
      run.save(step, make_state(step))


def open_run(workdir, **options):
  return runs.Run.open(workdir, CONFIG, **options)


def blobs(workdir, step):
  """The files with the arrays of a checkpoint, the largest first."""
  folder = workdir / "checkpoints" / f"{step:09d}" / "state"
  files = [p for p in folder.rglob("*") if p.is_file() and p.parent.name == "d"]
  return sorted(files, key=lambda p: -p.stat().st_size)


def test_what_is_saved_comes_back(tmp_path):
  with open_run(tmp_path / "new" / "run") as run:
    assert run.restore(make_state()) is None
    assert run.latest() is None
    run.save(5, make_state(5))
  with open_run(tmp_path / "new" / "run") as run:
    step, state = run.restore(make_state())
    assert run.latest() == run.path / "checkpoints" / "000000005"
  assert step == 5
  assert_equal(state, make_state(5))


def test_a_state_may_be_donated_once_save_is_back(tmp_path):
  state = make_state(1)
  spoil = jax.jit(lambda s: jax.tree.map(jnp.ones_like, s), donate_argnums=0)
  with open_run(tmp_path) as run:
    run.save(1, state)
    jax.block_until_ready(spoil(state))
    _, got = run.restore(make_state())
  assert_equal(got, make_state(1))


def test_a_checkpoint_goes_to_another_mesh(tmp_path):
  meshes = [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"tensor": 2}]
  specs = [("fsdp", None), ("fsdp", "tensor"), (None, "tensor")]
  state = make_state(3)

  def place(state, mesh, spec):
    mesh = sharding.make_mesh(mesh)

    def one(x):
      split = np.shape(x) == (16, 8)
      return NamedSharding(mesh, PartitionSpec(*(spec if split else ())))

    return jax.device_put(state, jax.tree.map(one, state))

  for i, (mesh, spec) in enumerate(zip(meshes, specs, strict=True)):
    with open_run(tmp_path) as run:
      placed = place(make_state(), mesh, spec)
      if i:
        places = jax.tree.map(lambda x: x.sharding, placed)
        _, got = run.restore(jax.eval_shape(make_state), places)
        for x, y in zip(
          jax.tree.leaves(got), jax.tree.leaves(placed), strict=True
        ):
          assert x.sharding == y.sharding
        assert_equal(got, state)
      else:
        got = place(state, mesh, spec)
      run.save(i, got)


def test_a_part_of_a_state_can_be_read(tmp_path):
  fill(tmp_path, 2)
  folder = tmp_path / "checkpoints" / "000000002"
  want = make_state(2)["params"]["net"]
  assert_equal(statefile.read_part(folder, "params/net", want), want)
  host = jax.tree.map(np.zeros_like, want)
  got = statefile.read_part(folder, "params/net", host)
  assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(got))
  assert got["norm"]["scale"].dtype == jnp.bfloat16
  with pytest.raises(errors.InputError, match="not in the checkpoint: ema/"):
    statefile.read_part(folder, "ema", want)


def test_old_checkpoints_are_dropped(tmp_path):
  fill(tmp_path, *range(1, 8), keep=2, keep_every=3)
  assert runs.checkpoint_steps(tmp_path) == [3, 6, 7]
  names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
  assert names == ["000000003", "000000006", "000000007"]


def test_a_step_is_saved_once_until_the_run_goes_back(tmp_path):
  with open_run(tmp_path) as run:
    run.save(1, make_state(1))
    run.save(1, make_state(2))
    assert_equal(run.restore(make_state())[1], make_state(1))
    run.save(1, make_state(2))
    assert_equal(run.restore(make_state())[1], make_state(2))


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def truncate(path):
  os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("damage", [flip, truncate, pathlib.Path.unlink])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage):
  fill(tmp_path, 1, 2)
  blob = blobs(tmp_path, 2)[0]
  damage(blob)
  told = []
  with open_run(tmp_path, warn=told.append, keep=1) as run:
    step, state = run.restore(make_state())
    assert step == 1
    assert_equal(state, make_state(1))
    assert len(told) == 1
    assert "\n" not in told[0]
    assert told[0].startswith("WARNING: the checkpoint of step 2")
    assert f"/d/{blob.name}" in told[0]
    # It stays until something newer than what was restored is safe.
    assert run.steps() == [1, 2]
  with open_run(tmp_path, warn=told.append, keep=2) as run:
    run.restore(make_state())
    run.save(3, make_state(3))
    run.wait()
    assert run.steps() == [1, 3]


def test_a_damaged_checkpoint_is_written_anew(tmp_path):
  fill(tmp_path, 1, 2)
  flip(blobs(tmp_path, 2)[0])
  with open_run(tmp_path, warn=lambda _: None, keep=1) as run:
    assert run.restore(make_state())[0] == 1
    run.save(2, make_state(2))
  with open_run(tmp_path) as run:
    assert run.steps() == [2]
    assert_equal(run.restore(make_state())[1], make_state(2))


@pytest.mark.parametrize(
  "name", ["MANIFEST.json", "state/manifest.ocdbt", "state/_METADATA"]
)
def test_a_checkpoint_that_lacks_a_file_is_passed_over(tmp_path, name):
  fill(tmp_path, 1, 2)
  (tmp_path / "checkpoints" / "000000002" / name).unlink()
  told = []
  with open_run(tmp_path, warn=told.append) as run:
    assert run.restore(make_state())[0] == 1
  assert len(told) == 1
  assert name in told[0]


def test_no_sound_checkpoint_is_an_error(tmp_path):
  fill(tmp_path, 1, 2)
  for step in (1, 2):
    flip(blobs(tmp_path, step)[0])
  with open_run(tmp_path, warn=lambda _: None) as run:
    with pytest.raises(errors.CorruptError, match="none of its 2") as failure:
      run.restore(make_state())
    assert blobs(tmp_path, 1)[0].name in str(failure.value)
    assert run.steps() == [1, 2]


def test_another_state_is_refused(tmp_path):
  fill(tmp_path, 1)
  state = make_state()
  net = state["params"]["net"]
  net["norm"]["scale"] = net["norm"]["scale"].astype(jnp.float32)
  net["blocks"][0]["kernel"] = jnp.zeros((16, 9))
  net["blocks"][1] = {"weight": net["blocks"][1]["kernel"]}
  with open_run(tmp_path) as run:
    with pytest.raises(errors.InputError) as failure:
      run.restore(state)
    text = str(failure.value)
    assert "\n" not in text
    assert "norm/scale bfloat16 instead of float32" in text
    assert "blocks/0/kernel [16, 8] instead of [16, 9]" in text
    assert "not in the checkpoint: params/net/blocks/1/weight" in text
    assert "in the checkpoint only: params/net/blocks/1/kernel" in text


def test_leaves_that_cannot_be_kept(tmp_path):
  with open_run(tmp_path) as run:
    with pytest.raises(TypeError, match="key_data"):
      run.save(1, {"key": jax.random.key(0)})
    with pytest.raises(TypeError, match="a: int64 does not fit int32"):
      run.save(1, {"a": 2**40})
    with pytest.raises(ValueError, match="same path"):
      run.save(1, {"a": {"b": 1}, "a/b": 2})
    with pytest.raises(ValueError, match="without an element"):
      run.save(1, {"a": jnp.zeros((0, 2))})


def test_another_config_is_refused(tmp_path):
  fill(tmp_path, 1)
  path = tmp_path / "config.json"
  assert json.loads(path.read_text()) == CONFIG
  other = {**CONFIG, "model": {"width": 9, "heads": 2}, "stages": (1, 3)}
  with pytest.raises(errors.InputError) as failure:
    runs.Run.open(tmp_path, other)
  text = str(failure.value)
  assert "\n" not in text
  assert "model.width (8 there, 9 here)" in text
  assert "model.heads (absent there, 2 here)" in text
  assert "stages.1 (2 there, 3 here)" in text
  assert "seed" not in text
  free = ("model.*", "stages.*")
  with runs.Run.open(tmp_path, other, free=free):
    assert json.loads(path.read_text())["model"]["width"] == 9
  with pytest.raises(errors.InputError, match="finite"):
    runs.Run.open(tmp_path, {"rate": float("nan")})
  with pytest.raises(errors.InputError, match="a file where a folder"):
    runs.Run.open(path, CONFIG)


def test_one_run_at_a_time(tmp_path):
  with open_run(tmp_path):
    with pytest.raises(errors.InputError, match=f"process {os.getpid()} on"):
      open_run(tmp_path)
    code = (
      f"from vidgen import runs\nruns.Run.open({str(tmp_path)!r}, {CONFIG!r})\n"
    )
    other = subprocess.run(
      [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT
    )
    assert "another run is at work" in other.stderr
  open_run(tmp_path).close()


def test_a_lock_ends_with_its_process(tmp_path):
  code = (
    "import os, signal, time\n"
    "from vidgen import runs\n"
    f"run = runs.Run.open({str(tmp_path)!r}, {CONFIG!r})\n"
    # A worker outlives it.
    "worker = os.fork()\n"
    "if not worker: time.sleep(60)\n"
    "print(worker, flush=True)\n"
    "time.sleep(0.2)\n"
    "os.kill(os.getpid(), signal.SIGKILL)\n"
  )
  command = [sys.executable, "-W", "ignore", "-c", code]
  child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
  worker = int(child.stdout.readline())
  try:
    assert child.wait() == -signal.SIGKILL
    open_run(tmp_path).close()
  finally:
    os.kill(worker, signal.SIGKILL)
    child.stdout.close()


KILLED = """
import sys
import jax.numpy as jnp
from vidgen import runs
with runs.Run.open(sys.argv[1], {}) as run:
  shapes = {"w": jnp.zeros((64, 4096)), "step": 0}
  found = run.restore(shapes)
  step = 0 if found is None else found[0]
  if found is not None:
    assert found[1]["step"] == step
    assert (found[1]["w"] == jnp.sin(step + jnp.arange(4096.0))).all()
  print("at", step, flush=True)
  while True:
    step += 1
    row = jnp.sin(step + jnp.arange(4096.0))
    run.save(step, {"w": jnp.tile(row, (64, 1)), "step": step})
"""


def test_killed_while_it_saves(tmp_path):
  rng = np.random.default_rng(0)
  steps, drafts = [], 0
  for _ in range(5):
    child = subprocess.Popen(
      [sys.executable, "-c", KILLED, str(tmp_path)],
      stdout=subprocess.PIPE,
      text=True,
      cwd=ROOT,
    )
    try:
      line = child.stdout.readline()
      assert line.startswith("at ")
      steps.append(int(line.split()[1]))
      deadline = time.monotonic() + 120
      while max(runs.checkpoint_steps(tmp_path), default=0) <= steps[-1]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
      time.sleep(rng.uniform(0, 0.1))
    finally:
      child.kill()
      child.communicate()
    drafts += len(list((tmp_path / "checkpoints").glob(".*.tmp")))
  assert steps == sorted(set(steps))
  assert drafts, "no kill hit a save"
  with runs.Run.open(tmp_path, {}) as run:
    assert not list((tmp_path / "checkpoints").glob(".*"))
    step, state = run.restore({"w": jnp.zeros((64, 4096)), "step": 0})
    assert step > steps[-1]
    row = jnp.sin(step + jnp.arange(4096.0))
    assert_equal(state, {"w": jnp.tile(row, (64, 1)), "step": step})


def test_leftovers_are_removed(tmp_path):
  fill(tmp_path, 1)
  for name in (".000000002.tmp", ".000000000.drop"):
    (tmp_path / "checkpoints" / name / "state").mkdir(parents=True)
  (tmp_path / "checkpoints" / "notes").mkdir()
  open_run(tmp_path).close()
  names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
  assert names == {"000000001", "notes"}


@pytest.fixture
def small_disk(tmp_path):
  disk = tmp_path / "disk"
  disk.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("may not mount a small file system")
  yield disk
  subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk(small_disk):
  rng = np.random.default_rng(0)
  # What is random cannot be compressed.
  state = {"w": jnp.asarray(rng.normal(size=150_000), jnp.float32)}
  big = {"w": jnp.asarray(rng.normal(size=400_000), jnp.float32)}
  with runs.Run.open(small_disk / "run", {}) as run:
    run.save(1, state)
    run.wait()
    run.save(2, big)
    with pytest.raises(errors.StorageError) as failure:
      run.save(3, state)
    text = str(failure.value)
    assert "\n" not in text
    assert "000000002: not saved" in text
    assert "No space left on device" in text
    folder = small_disk / "run" / "checkpoints"
    assert [p.name for p in folder.iterdir()] == ["000000001"]
    assert_equal(run.restore(state)[1], state)
    # There is room for this one.
    run.save(3, state)
    run.wait()
    assert run.steps() == [1, 3]
    ballast = small_disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb") as file:
      file.write(bytes(2**21))
    run.save(4, state)
    with pytest.raises(errors.StorageError, match="000000004"):
      run.wait()
    ballast.unlink()
    run.save(4, {"w": state["w"][:1000]})
    run.wait()
    assert run.steps() == [1, 3, 4]


def test_an_error_of_the_run_is_not_hidden_by_a_full_disk(small_disk):
  told = []
  big = {"w": jnp.asarray(np.random.default_rng(0).normal(size=800_000))}
  with (
    pytest.raises(ZeroDivisionError),
    runs.Run.open(small_disk, {}, warn=told.append) as run,
  ):
    run.save(1, big)
    raise ZeroDivisionError
  assert len(told) == 1
  assert "not saved" in told[0]


def test_a_full_disk_keeps_the_config(small_disk):
  path = small_disk / "run"
  runs.Run.open(path, {"a": 1}).close()
  with contextlib.suppress(OSError), (small_disk / "x").open("wb") as file:
    file.write(bytes(2**21))
  with pytest.raises(errors.StorageError, match=r"config.json: cannot"):
    runs.Run.open(path, {"a": "b" * 10_000}, free=("*",))
  assert json.loads((path / "config.json").read_text()) == {"a": 1}
  assert manifest.NAME not in os.listdir(path)


TWO = """
import os, sys, time
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
rank, port, workdir = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, rank)
import jax.numpy as jnp, numpy as np, signal
from jax.sharding import NamedSharding, PartitionSpec as P
from vidgen import errors, preemption, runs
mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
rows, whole = NamedSharding(mesh, P("x")), NamedSharding(mesh, P())
make = jax.jit(
  lambda n: {"w": n + jnp.arange(32.0).reshape(8, 4), "step": n.astype(int)},
  out_shardings={"w": rows, "step": whole},
)
def check(state, n, place):
  want = n + np.arange(32.0).reshape(8, 4)
  assert state["w"].sharding == place
  for shard in state["w"].addressable_shards:
    np.testing.assert_array_equal(shard.data, want[shard.index])
spoil = jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0)
total = jax.jit(jnp.sum, out_shardings=whole)
with runs.Run.open(workdir, {}, keep=2) as run, preemption.Preemption() as stop:
  assert run.restore(make(0.0)) is None
  for n in range(1, 4):
    state = make(float(n))
    run.save(n, state)
    spoil(state)
  run.wait()
  assert run.steps() == [2, 3], run.steps()
  step, state = run.restore(make(0.0))
  assert step == 3
  check(state, 3, rows)
  if rank == 0:
    blob = max((run.path / "checkpoints/000000003/state").rglob("d/*"))
    blob.write_bytes(blob.read_bytes()[:-1])
  columns = NamedSharding(mesh, P(None, "x"))
  shapes = {
    "w": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=columns),
    "step": jax.ShapeDtypeStruct((), jnp.int32, sharding=whole),
  }
  step, state = run.restore(shapes)
  assert step == 2
  check(state, 2, columns)
  step = 0
  while not stop.requested(step):
    if step == 3 and rank == 1:
      os.kill(os.getpid(), signal.SIGTERM)
    step += 1
    # As in training, no process gets ahead of the others.
    jax.block_until_ready(total(make(float(step))["w"]))
    time.sleep(0.01)
  run.save(step, make(float(step)))
print("stopped at", step, flush=True)
try:
  runs.Run.open(workdir, {"other": 1})
except errors.InputError as e:
  print("refused" if rank else e, flush=True)
"""


def test_two_processes(tmp_path, unused_port):
  children = [
    subprocess.Popen(
      [sys.executable, "-c", TWO, str(rank), unused_port, str(tmp_path)],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
      cwd=ROOT,
    )
    for rank in range(2)
  ]
  try:
    done = [child.communicate(timeout=300) for child in children]
  finally:
    for child in children:
      child.kill()
      child.communicate()
  assert [child.returncode for child in children] == [0, 0], done
  out, err = zip(*done, strict=True)
  stops = [
    [line for line in text.splitlines() if line.startswith("stopped at ")]
    for text in out
  ]
  assert stops[0] == stops[1]
  assert len(stops[0]) == 1
  assert "other (absent there, 1 here)" in out[0]
  assert out[1].endswith("refused\n")
  assert "step 3 is not used" in err[0]
  assert "not used" not in err[1]


@pytest.fixture
def unused_port():
  import socket

  with socket.socket() as s:
    s.bind(("localhost", 0))
    return str(s.getsockname()[1])
