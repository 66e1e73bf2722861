"""Meters: every step once, the time in its place, nothing half written."""

import io
import json
import math
import os
import pathlib
import re
import struct
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vidgen
from vidgen import board, errors, goodput, meters

ROOT = pathlib.Path(vidgen.__file__).parent.parent


def train(folder, start, stop, total=20, stream=None, **options):
  """Takes steps `start` + 1 to `stop`, and returns what was told of them."""
  stream = io.StringIO() if stream is None else stream
  told = []
  with meters.Meters(folder, total, stream=stream, **options) as meter:
    meter.resume(start)
    for step in range(start + 1, stop + 1):
      scalars = {"loss": jnp.float32(1 / step), "grad_norm": jnp.float32(step)}
      told.append(meter.step(step, scalars, videos=2, flops=1e9))
  return told, stream.getvalue()


def records(folder):
  text = (folder / "metrics.jsonl").read_text()
  return [json.loads(line) for line in text.splitlines()]


def test_a_step_is_told_of_when_the_next_is_taken(tmp_path):
  told, text = train(tmp_path, 0, 20, log_every=5)
  assert told[0] is None
  losses = [values["loss"] for values in told[1:]]
  np.testing.assert_allclose(losses, [1 / n for n in range(1, 20)], rtol=1e-6)
  found = records(tmp_path)
  assert [record["step"] for record in found] == [5, 10, 15, 20]
  assert found[-1]["loss"] == pytest.approx(1 / 20)
  assert found[-1]["grad_norm"] == 20
  pace = found[-1]["seconds_per_step"]
  assert found[-1]["videos_per_second"] == pytest.approx(2 / pace)
  # This machine's peak is not known.
  assert found[-1]["mfu"] is None
  lines = text.splitlines()
  assert len(lines) == 4
  number = r"[\d.e+-]+"
  pattern = (
    rf"step 20/20, loss 0.05, grad norm 20, {number} s/step, "
    rf"{number} videos/s, MFU -, 0 s left"
  )
  assert re.fullmatch(pattern, lines[-1]), lines[-1]


def test_the_mean_of_what_only_some_parts_have(tmp_path):
  """Nothing is told of a mean over nothing."""
  told = []
  with meters.Meters(tmp_path, 2, log_every=1, stream=io.StringIO()) as meter:
    meter.resume(0)
    for step, count in ((1, 3), (2, 0)):
      part = jnp.float32(6.0), jnp.float32(count)
      scalars = {"loss": jnp.float32(1), "grad_norm": jnp.float32(1)}
      told.append(meter.step(step, scalars | {"some": part}))
  first, second = records(tmp_path)
  assert first["some"] == told[1]["some"] == 2
  assert "some" not in second


@pytest.mark.parametrize("name", ["checkpoint", "sample"])
def test_waiting_for_the_last_step_is_part_of_the_steps(tmp_path, name):
  class Slow:
    def __array__(self, *args, **kwargs):
      time.sleep(0.02)
      return np.asarray(1.0)

  told = []
  with meters.Meters(tmp_path, 10, stream=io.StringIO()) as meter:
    meter.resume(0)
    for step in range(1, 11):
      scalars = {"loss": Slow(), "grad_norm": jnp.float32(step)}
      told.append(meter.step(step, scalars, videos=2, flops=1e9))
      with meter.timing(name):
        pass
  # Divergence is noticed though each step is caught up with.
  assert [one and one["grad_norm"] for one in told] == [None, *range(1, 10)]
  seconds = json.loads((tmp_path / "goodput.json").read_text())["seconds"]
  assert seconds["step"] >= 0.2 > 0.1 > seconds[name]


def test_the_fetch_of_a_step_waits_for_no_later_one(tmp_path):
  # The second step's value would never come.
  class Never:
    def __array__(self, *args, **kwargs):
      raise AssertionError("fetched too early")

  with meters.Meters(tmp_path, 9, stream=io.StringIO()) as meter:
    meter.resume(0)
    meter.step(1, {"loss": jnp.float32(3)})
    assert meter.step(2, {"loss": Never()}) == {"loss": 3}
    meter._pending = None


def test_no_step_is_told_of_twice(tmp_path):
  train(tmp_path, 0, 13, log_every=2)
  path = tmp_path / "metrics.jsonl"
  with path.open("a") as file:
    file.write('{"step": 14, "lo')
  assert len(path.read_text().splitlines()) == 7
  train(tmp_path, 7, 20, log_every=2)
  steps = [record["step"] for record in records(tmp_path)]
  assert steps == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
  train(tmp_path, 0, 4, log_every=2)
  assert [record["step"] for record in records(tmp_path)] == [2, 4]


def test_a_checkpoint_finds_its_record_written(tmp_path):
  with meters.Meters(tmp_path, 9, log_every=1, stream=io.StringIO()) as meter:
    meter.resume(0)
    meter.step(1, {"loss": jnp.float32(1)})
    assert not (tmp_path / "metrics.jsonl").exists()
    with meter.timing("checkpoint"):
      assert [record["step"] for record in records(tmp_path)] == [1]
    assert (tmp_path / "goodput.json").exists()
    # It is told of once, by the next step.
    assert meter.step(2, {"loss": jnp.float32(2)}) == {"loss": 1.0}


def test_the_last_step_is_told_of_when_a_run_is_stopped(tmp_path):
  with (
    pytest.raises(errors.PreemptedError),
    meters.Meters(tmp_path, 9, log_every=1, stream=io.StringIO()) as meter,
  ):
    meter.resume(0)
    meter.step(1, {"loss": jnp.float32(1)})
    raise errors.PreemptedError("stopped")
  assert [record["step"] for record in records(tmp_path)] == [1]


def test_what_is_not_finite_stays_json(tmp_path):
  with meters.Meters(tmp_path, 1, stream=io.StringIO()) as meter:
    meter.resume(0)
    meter.step(1, {"loss": jnp.float32(math.nan), "x": jnp.float32(-math.inf)})
  (record,) = records(tmp_path)
  assert (record["loss"], record["x"]) == ("nan", "-inf")
  assert math.isnan(float(record["loss"]))


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_a_live_line_on_a_terminal(tmp_path, monkeypatch):
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", "120")
  stream = Terminal()
  with meters.Meters(tmp_path, 20, log_every=5, stream=stream) as meter:
    meter.resume(3)
    for step in range(4, 9):
      meter.step(step, {"loss": jnp.float32(0.5)}, videos=1)
      time.sleep(0.15)
    meter.say("[a] line")
  text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", stream.getvalue())
  # The last step is told of by the next, or at the end.
  assert "step 7/20" in text or "step 8/20" in text
  assert "loss 0.5" in text
  assert "[a] line" in text
  assert stream.getvalue().rstrip().count("\x1b[?25h") >= 1
  assert [record["step"] for record in records(tmp_path)] == [5]


def device(kind):
  return types.SimpleNamespace(device_kind=kind)


@pytest.mark.parametrize(
  ("kind", "tera"),
  [
    ("TPU v4", 275),
    ("TPU v5 lite", 197),
    ("TPU v5", 459),
    ("TPU v5p", 459),
    ("TPU v6 lite", 918),
    ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA A100 80GB PCIe", 312),
    ("NVIDIA H100 80GB HBM3", 989),
    ("NVIDIA H200", 989),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ("cpu", None),
  ],
)
def test_peaks(kind, tera):
  peak = meters.peak_flops.__wrapped__([device(kind)] * 2)
  assert peak == (None if tera is None else 2 * tera * 1e12)


def test_the_peak_is_that_of_the_devices_at_work(tmp_path, monkeypatch):
  monkeypatch.setattr(meters, "peak_flops", len)
  whole = meters.Meters(tmp_path, 1, stream=io.StringIO())
  assert whole._peak == len(jax.devices()) == 8
  devices = jax.devices()[:2]
  part = meters.Meters(tmp_path, 1, devices=devices, stream=io.StringIO())
  assert part._peak == 2


def test_utilisation(tmp_path):
  stream = io.StringIO()
  with meters.Meters(tmp_path, 30, log_every=30, stream=stream) as meter:
    meter._peak = 1e12
    meter.resume(0)
    for step in range(1, 31):
      time.sleep(0.005)
      meter.step(step, {"loss": 0.0}, videos=3, flops=2e9)
  (record,) = records(tmp_path)
  pace = record["seconds_per_step"]
  assert pace > 0.005
  assert record["mfu"] == pytest.approx(2e9 / (pace * 1e12))
  assert f"MFU {100 * record['mfu']:.1f}%" in stream.getvalue()


def events(folder):
  """The events of all files: TFRecords of protocol buffers."""
  from tensorboardX.proto import event_pb2

  for path in sorted((folder / "tensorboard").iterdir()):
    data = path.read_bytes()
    while data:
      (size,) = struct.unpack("<Q", data[:8])
      yield event_pb2.Event.FromString(data[12 : 12 + size])
      data = data[16 + size :]


def test_tensorboard(tmp_path):
  frames = np.random.default_rng(0).integers(0, 256, (3, 8, 16, 3), np.uint8)
  with meters.Meters(tmp_path, 9, log_every=1, stream=io.StringIO()) as meter:
    meter.resume(4)
    meter.step(5, {"loss": jnp.float32(2)})
    meter.video("samples/a", frames, 8, 5)
    meter.video("samples/b", frames[:1], 8, 5)
  found = list(events(tmp_path))
  assert found[0].file_version == "brain.Event:2"
  # TensorBoard drops what older files have from this step on.
  assert found[1].step == 5
  assert found[1].session_log.status == found[1].session_log.START
  values = {v.tag: (e.step, v) for e in found for v in e.summary.value}
  assert values["loss"][0] == 5
  assert values["loss"][1].simple_value == 2
  image = values["samples/a"][1].image
  assert (image.height, image.width) == (8, 16)
  assert image.encoded_image_string.startswith(b"GIF89a")
  assert values["samples/b"][1].image.encoded_image_string[1:4] == b"PNG"


def test_two_event_files_of_one_second(tmp_path):
  for _ in range(2):
    board.Board(tmp_path, 0).close()
  assert len(list(tmp_path.iterdir())) == 2


def seconds(folder):
  return json.loads((folder / "goodput.json").read_text())


def test_each_second_is_counted_once():
  clock = goodput.Clock()
  begin = time.perf_counter()
  with clock.timing("step"):
    time.sleep(0.02)
    with clock.timing("checkpoint"):
      time.sleep(0.05)
  whole = clock.read()
  assert sum(whole.values()) == pytest.approx(
    time.perf_counter() - begin, abs=0.01
  )
  assert whole["checkpoint"] >= 0.05
  assert 0.02 <= whole["step"] < 0.05 + 0.02
  assert clock.moving() == pytest.approx(
    sum(clock.read().values()) - whole["checkpoint"], abs=0.01
  )


def test_compiling_is_apart():
  with goodput.Clock() as clock, clock.timing("step"):
    jax.jit(lambda x: jnp.sin(x) @ jnp.cos(x) + 3.25)(jnp.ones((7, 7)))
    found = clock.read()
  assert found["compile"] > 0
  assert found["step"] >= 0


def test_goodput_over_all_starts(tmp_path):
  def start(at, stop):
    stream = io.StringIO()
    with meters.Meters(tmp_path, 99, log_every=1, stream=stream) as meter:
      meter.resume(at)
      items = meter.waiting(range(at + 1, stop + 1))
      for step in items:
        with meter.timing("step"):
          time.sleep(0.02)
        meter.step(step, {"loss": 0.0})
      with meter.timing("sample"):
        time.sleep(0.03)

  start(0, 4)
  first = seconds(tmp_path)
  assert (first["step"], first["starts"]) == (4, 1)
  assert first["seconds"]["step"] >= 0.08
  assert first["seconds"]["sample"] >= 0.03
  assert "lost" not in first["seconds"]
  total = sum(first["seconds"].values())
  assert first["total_seconds"] == pytest.approx(total, abs=0.01)
  part = first["seconds"]["step"] / total
  assert first["goodput"] == pytest.approx(part, abs=0.01)
  # Two of the four steps are done again.
  start(2, 4)
  second = seconds(tmp_path)
  assert (second["step"], second["starts"]) == (4, 2)
  lost = second["seconds"]["lost"]
  # An estimate by the logged pace, whose last record has no step after it.
  assert 0.02 <= lost <= first["seconds"]["step"]
  assert second["seconds"]["step"] >= first["seconds"]["step"] - lost + 0.04
  assert second["total_seconds"] >= first["total_seconds"] + 0.07
  assert second["seconds"]["sample"] >= 0.06


def test_lost_work_of_a_killed_run(tmp_path):
  pace = lambda step, x: {"step": step, "seconds_per_step": x}
  lines = [pace(10, None), pace(20, 2.0), pace(30, 3.0), pace(40, 5.0)]
  path = tmp_path / "metrics.jsonl"
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  # The file was written at step 25; then came a kill. The run goes on from 18:
  # 2 steps of 2 s and 5 of 3 s move, 5 of 3 s and 10 of 5 s were never seen.
  old = {"step": 25, "starts": 1, "seconds": {"step": 60.0, "data": 1.0}}
  (tmp_path / "goodput.json").write_text(json.dumps(old))
  with meters.Meters(tmp_path, 99, stream=io.StringIO()) as meter:
    meter.resume(18)
  found = seconds(tmp_path)["seconds"]
  assert found["lost"] == pytest.approx(2 * 2 + 5 * 3 + 5 * 3 + 10 * 5)
  assert found["step"] == pytest.approx(60 - 19)
  assert [record["step"] for record in records(tmp_path)] == [10]


def test_a_foreign_goodput_file_ends_no_run(tmp_path):
  for text in ("", "[]", '{"seconds": 3}', '{"seconds": {"a": "b"}}'):
    (tmp_path / "goodput.json").write_text(text)
    train(tmp_path, 0, 1)
    assert seconds(tmp_path)["starts"] == 1


@pytest.fixture
def full_disk(tmp_path):
  disk = tmp_path / "disk"
  disk.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
  if subprocess.run(mount, capture_output=True).returncode:
    pytest.skip("may not mount a small file system")
  yield disk
  subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk(full_disk):
  with (
    pytest.raises(errors.StorageError, match="No space left") as failure,
    meters.Meters(full_disk, 10**6, log_every=1, stream=io.StringIO()) as meter,
  ):
    meter.resume(0)
    for step in range(1, 10_000):
      meter.step(step, {"loss": 0.0})
  assert "\n" not in str(failure.value)
  # What is there is whole.
  steps = [record["step"] for record in records(full_disk)]
  assert steps == list(range(1, len(steps) + 1))
  assert not list(full_disk.glob(".*"))


def test_without_torch(tmp_path):
  code = (
    "import io, sys\n"
    "for name in ('torch', 'tensorflow', 'moviepy', 'matplotlib'):\n"
    "  sys.modules[name] = None\n"
    "from vidgen import meters\n"
    f"folder = {str(tmp_path)!r}\n"
    "with meters.Meters(folder, 1, stream=io.StringIO()) as meter:\n"
    "  meter.resume(0)\n"
    "  meter.step(1, {'loss': 1.0})\n"
  )
  command = [sys.executable, "-W", "error", "-c", code]
  subprocess.run(command, check=True, cwd=ROOT)
  assert os.listdir(tmp_path / "tensorboard")
