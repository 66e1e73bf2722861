"""Processes of a run: their places, their start, and the end of one."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest

import vidgen
from vidgen import errors, hosts, joining, links, rollcall
from vidgen.cli import cache, main

ROOT = pathlib.Path(vidgen.__file__).parent.parent


def no_metadata(name):
  raise AssertionError(f"asked for {name}")


# What each cluster tells its processes, and the place it makes.
PLACES = {
  "alone": ({}, None),
  "one of one": ({"VIDGEN_PROCESSES": "1", "SLURM_PROCID": "3"}, None),
  "addresses": (
    {
      "VIDGEN_COORDINATOR": "10.0.0.1:1234",
      "VIDGEN_PROCESSES": "4",
      "VIDGEN_PROCESS": "3",
      "SLURM_PROCID": "0",
    },
    ("10.0.0.1", 1234, 4, 3),
  ),
  "version 6": (
    {
      "VIDGEN_COORDINATOR": "[fd00::1]:1234",
      "VIDGEN_PROCESSES": "2",
      "VIDGEN_PROCESS": "0",
    },
    ("fd00::1", 1234, 2, 0),
  ),
  "kubernetes": (
    {
      "VIDGEN_COORDINATOR": "run-workers-0-0.run:8476",
      "VIDGEN_PROCESSES": "8",
      "JOB_COMPLETION_INDEX": "7",
    },
    ("run-workers-0-0.run", 8476, 8, 7),
  ),
  "gke": (
    {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2"},
    ("a", 8476, 4, 2),
  ),
  "gke, two slices": (
    {
      "TPU_WORKER_HOSTNAMES": "c,d",
      "TPU_WORKER_ID": "1",
      "MEGASCALE_NUM_SLICES": "2",
      "MEGASCALE_SLICE_ID": "1",
      "MEGASCALE_COORDINATOR_ADDRESS": "a:8080",
    },
    ("a", 8476, 4, 3),
  ),
  "gke, one host": (
    {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
    None,
  ),
  "gke, on the cpu": (
    {
      "TPU_WORKER_HOSTNAMES": "a,b",
      "TPU_WORKER_ID": "0",
      "JAX_PLATFORMS": "cpu",
    },
    None,
  ),
  "slurm": (
    {
      "SLURM_JOB_ID": "4097",
      "SLURM_STEP_NODELIST": "node[007-010,12],other",
      "SLURM_NTASKS": "5",
      "SLURM_PROCID": "4",
      "SLURM_LOCALID": "0",
      "SLURM_STEP_TASKS_PER_NODE": "1(x5)",
      "CUDA_VISIBLE_DEVICES": "0,1,2,3",
    },
    ("node007", 61441, 5, 4),
  ),
  "slurm, two nodes by name": (
    {
      "SLURM_JOB_ID": "1",
      "SLURM_STEP_NODELIST": "gpu-a,gpu-b",
      "SLURM_NTASKS": "2",
      "SLURM_PROCID": "1",
    },
    ("gpu-a", 61441, 2, 1),
  ),
  "slurm, not in a step": ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"}, None),
}


@pytest.mark.parametrize("name", PLACES)
def test_places(name):
  environ, want = PLACES[name]
  place = hosts.find(environ, lambda name: None)
  got = place and (place.host, place.port, place.processes, place.process)
  assert got == want


def test_tasks_that_share_a_nodes_devices():
  environ = {
    **PLACES["slurm"][0],
    "SLURM_STEP_TASKS_PER_NODE": "4",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "2",
  }
  assert hosts.find(environ).local_devices == (2,)
  # Where SLURM has split them, each sees its own alone.
  environ["CUDA_VISIBLE_DEVICES"] = "0"
  assert hosts.find(environ).local_devices is None


# Tasks a node, what each sees, what else is said, and the shares of the tasks.
SHARES = {
  "one each": ("4", "0,1,2,3", {}, [(0,), (1,), (2,), (3,)]),
  "several each": ("2(x3)", "4,5,6,7", {}, [(0, 1), (2, 3)]),
  "by their names": ("2", "GPU-a,GPU-b", {}, [(0,), (1,)]),
  "some left over": ("2", "0,1,2", {}, [(0,), (1,)]),
  "of this node": ("1,2(x2)", "0,1", {"SLURM_NODEID": "2"}, [(0,), (1,)]),
  "alone on its node": ("1,2", "0,1", {"SLURM_NODEID": "0"}, [None]),
  "all of the step": ("2", "0,1", {"SLURM_GPUS_ON_NODE": "2"}, [(0,), (1,)]),
  "bound": ("2", "0,1", {"SLURM_GPUS_ON_NODE": "4"}, [None, None]),
  "bound, one each": ("2", "0", {"SLURM_GPUS_ON_NODE": "2"}, [None, None]),
  "asked for": ("2", "0,1", {"SLURM_GPUS_PER_TASK": "2"}, [None, None]),
  "of a kind": ("2", "0,1", {"SLURM_GPUS_PER_TASK": "a100:2"}, [None, None]),
  "asked for, not bound": (
    "2",
    "0,1,2,3",
    {"SLURM_GPUS_PER_TASK": "2"},
    [(0, 1), (2, 3)],
  ),
  "none": ("2", "", {}, [None, None]),
  "not wanted": ("4", "0,1", {"JAX_PLATFORMS": "cpu"}, [None]),
}


@pytest.mark.parametrize("name", SHARES)
def test_shares_of_a_nodes_gpus(name):
  tasks, seen, more, want = SHARES[name]
  environ = {
    **PLACES["slurm"][0],
    "SLURM_STEP_TASKS_PER_NODE": tasks,
    "CUDA_VISIBLE_DEVICES": seen,
    **more,
  }
  got = [
    hosts.find({**environ, "SLURM_LOCALID": str(i)}).local_devices
    for i in range(len(want))
  ]
  assert got == want


@pytest.mark.parametrize(
  ("seen", "more"), [("0,1", {}), ("0", {"SLURM_GPUS_ON_NODE": "1"})]
)
def test_more_tasks_than_gpus_are_refused(seen, more):
  environ = {
    **PLACES["slurm"][0],
    "SLURM_STEP_TASKS_PER_NODE": "4",
    "CUDA_VISIBLE_DEVICES": seen,
    **more,
  }
  with pytest.raises(errors.InputError, match=r"4 tasks, .* [12] in all"):
    hosts.take_devices(environ)
  hosts.take_devices({**environ, hosts.PROCESSES: "1"})


def test_tasks_that_work_apart_take_their_share(monkeypatch, tmp_path):
  updates = []
  monkeypatch.setattr(jax.config, "update", lambda *pair: updates.append(pair))
  environ = {
    **PLACES["slurm"][0],
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_LOCALID": "1",
  }
  hosts.take_devices({})
  hosts.take_devices({**environ, "CUDA_VISIBLE_DEVICES": "0"})
  assert not updates
  hosts.take_devices(environ)
  assert updates == [("jax_cuda_visible_devices", "2,3")]
  # The command does so, whoever says which part it makes.
  for name, value in environ.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setenv("JAX_PLATFORMS", "")
  monkeypatch.setattr(cache, "enable", lambda: None)
  prompts = f"--prompts={tmp_path / 'no.txt'}"
  assert main.main(["sample", prompts, "--shard=0/2"]) == 2
  assert updates[1:] == updates[:1]


@pytest.mark.parametrize("form", ["10.0.0.{}", "w-{}:{}:10.0.0.{}"])
def test_tpu_vms(form):
  values = {
    "attributes/agent-worker-number": "1",
    "attributes/worker-network-endpoints": ",".join(
      form.format(i, i, i) for i in range(4)
    ),
    "attributes/tpu-env": "ACCELERATOR_TYPE: 'v6e-16'\nZONE: 'a'\n",
  }
  place = hosts.find({}, values.get)
  assert (place.host, place.processes, place.process) == ("10.0.0.0", 4, 1)
  values["attributes/tpu-env"] += (
    "MEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
    "MEGASCALE_COORDINATOR_ADDRESS: '10.9.0.1:8080'\n"
  )
  place = hosts.find({}, values.get)
  assert (place.host, place.processes, place.process) == ("10.9.0.1", 8, 5)


@pytest.mark.parametrize(
  "environ, word",
  [
    ({"VIDGEN_COORDINATOR": "a"}, "no HOST:PORT"),
    ({"VIDGEN_COORDINATOR": "a:b"}, "no HOST:PORT"),
    ({"VIDGEN_COORDINATOR": "a:70000"}, "no HOST:PORT"),
    ({"VIDGEN_COORDINATOR": "a:1"}, "VIDGEN_PROCESSES is not set"),
    ({"VIDGEN_PROCESSES": "2"}, "VIDGEN_COORDINATOR is not"),
    (
      {"VIDGEN_COORDINATOR": "a:1", "VIDGEN_PROCESSES": "0"},
      "VIDGEN_PROCESSES is '0'",
    ),
    (
      {"VIDGEN_COORDINATOR": "a:1", "VIDGEN_PROCESSES": "2"},
      "VIDGEN_PROCESS is not set",
    ),
    (
      {
        "VIDGEN_COORDINATOR": "a:1",
        "VIDGEN_PROCESSES": "2",
        "VIDGEN_PROCESS": "2",
      },
      "2 of 2",
    ),
    (
      {
        "VIDGEN_COORDINATOR": "a:1",
        "VIDGEN_PROCESSES": "2",
        "VIDGEN_PROCESS": "1",
        "VIDGEN_HEARTBEAT": "soon",
      },
      "VIDGEN_HEARTBEAT",
    ),
  ],
)
def test_places_that_make_no_sense(environ, word):
  with pytest.raises(errors.InputError, match=word):
    hosts.find(environ, no_metadata)


def test_alone_nothing_is_joined():
  with joining.joined({}, {"seed": 1}):
    pass


def test_long_values_differ_at_their_ends():
  path = "/mnt/" + "long/" * 20
  one, other = ({"data": path + name} for name in ("run_a", "run_b"))
  found = rollcall.differences(one, other)
  assert found.startswith("data (") and "run_a" in found and "run_b" in found
  assert len(found) < 150


def test_differences():
  one = {"config": {"seed": 0, "stages": [{"n": 1}]}, "versions": {"jax": "1"}}
  other = {"config": {"seed": 1, "stages": [{}]}, "versions": {"jax": "1"}}
  assert rollcall.differences(one, one) == ""
  assert rollcall.differences(one, other) == (
    "config.seed (1 instead of 0), config.stages.0 ({} instead of absent), "
    "config.stages.0.n (absent instead of 1)"
  )


SUPERVISOR = """
import os, sys, time
from vidgen import errors, hosts, supervisor
if os.environ["VIDGEN_PROCESS"] == "0":
  time.sleep(float(os.environ.get("late", 0)))
try:
  sys.exit(supervisor.run(hosts.find(os.environ), sys.argv[1:], os.environ))
except errors.VidgenError as error:
  print("vidgen: error:", error, file=sys.stderr)
  sys.exit(error.exit_code)
"""

# Without JAX a worker starts at once.
WORKER = """
import os, signal, sys, time, types
from vidgen import errors, joining
rank, what, seed = os.environ["VIDGEN_PROCESS"], sys.argv[1], int(sys.argv[2])
nothing = types.SimpleNamespace(initialize=lambda *args, **kwargs: None)
faults = types.SimpleNamespace(JaxRuntimeError=RuntimeError)
sys.modules["jax"] = types.SimpleNamespace(distributed=nothing, errors=faults)
if what == "early" and rank == "1":
  sys.exit(2)
if what == "saved":
  signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
try:
  with joining.joined(os.environ, {"config": {"seed": seed}}):
    print("joined", os.getpid(), flush=True)
    if what == "done":
      sys.exit(0)
    if what == "full" and rank == "1":
      raise errors.StorageError("no space.")
    if what == "bug":
      time.sleep(0.5 * int(rank))
      raise ArithmeticError("broken")
    if what == "device" and rank == "0":
      raise RuntimeError("INTERNAL: no answer")
    if what == "saved":
      signal.sigwait([signal.SIGTERM])
      raise errors.PreemptedError("saved")
    if what == "noise" and rank == "0":
      print("F0102 03:04:05.6  7 client.h:80] the JAX distributed service "
            "detected fatal errors", file=sys.stderr)
      if silent := os.environ.get("silent"):
        print(f"(stopped sending heartbeats):\\n{silent}", file=sys.stderr)
      sys.stderr.flush()
      os.abort()
    time.sleep(60)
except errors.VidgenError as error:
  print(error, file=sys.stderr)
  sys.exit(error.exit_code)
"""


class Run:
  """Supervisors on this machine, each with a worker."""

  def __init__(self, what, processes=2, seeds="000", **environ):
    self.port = free_port()
    python = [sys.executable, "-c"]
    self.children = [
      subprocess.Popen(
        [*python, SUPERVISOR, *python, WORKER, what, seeds[rank]],
        cwd=ROOT,
        env={
          **os.environ,
          "VIDGEN_COORDINATOR": f"localhost:{self.port}",
          "VIDGEN_PROCESSES": str(processes),
          "VIDGEN_PROCESS": str(rank),
          "VIDGEN_JOIN_TIMEOUT": "30",
          **environ,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
      for rank in range(processes)
    ]

  def joined(self):
    """Waits until the workers go; returns their processes."""
    return [int(c.stdout.readline().split()[1]) for c in self.children]

  def end(self):
    """Returns exit codes and what was written, of each."""
    done = [child.communicate(timeout=60) for child in self.children]
    codes = [child.returncode for child in self.children]
    return codes, [err.splitlines() for _, err in done]


@pytest.fixture
def start():
  with contextlib.ExitStack() as stack:

    def make(*args, **kwargs):
      run = Run(*args, **kwargs)
      for child in run.children:
        stack.callback(child.communicate)
        stack.callback(child.kill)
      return run

    yield make


def free_port():
  with socket.socket() as probe:
    probe.bind(("", 0))
    return probe.getsockname()[1]


def is_gone(process):
  for _ in range(100):
    try:
      os.kill(process, 0)
      stat = pathlib.Path(f"/proc/{process}/stat").read_text()
    except (ProcessLookupError, FileNotFoundError):
      return True
    if stat.rpartition(")")[2].split()[0] == "Z":
      return True
    time.sleep(0.1)
  return False


def test_all_done(start):
  assert start("done", 3).end() == ([0, 0, 0], [[], [], []])


@pytest.mark.parametrize("process", [0, 1])
def test_a_killed_worker_ends_the_others(start, process):
  run = start("work", 3)
  workers = run.joined()
  os.kill(workers[process], signal.SIGKILL)
  begin = time.monotonic()
  codes, lines = run.end()
  assert time.monotonic() - begin < 10
  assert codes == [75, 75, 75]
  assert [len(x) for x in lines] == [1, 1, 1], lines
  assert f"process {process} on " in lines[2][0]
  assert "was ended by SIGKILL; run the same" in lines[2][0]
  assert all(map(is_gone, workers))


@pytest.mark.parametrize("process", [0, 1])
def test_a_killed_supervisor_ends_the_others(start, process):
  run = start("work", 3)
  workers = run.joined()
  run.children[process].kill()
  codes, lines = run.end()
  want = [75, 75, 75]
  want[process] = -9
  assert codes == want
  assert [len(x) for x in lines] == [int(c == 75) for c in want], lines
  assert f"process {process} on " in lines[2][0]
  assert "is gone" in lines[2][0]
  # Nor does its worker go on.
  assert all(map(is_gone, workers))


@pytest.mark.parametrize("process", [0, 1])
def test_one_that_does_not_answer_is_lost_after_the_heartbeat(start, process):
  run = start("work", 3, VIDGEN_HEARTBEAT="3")
  workers = run.joined()
  child = run.children[process]
  child.send_signal(signal.SIGSTOP)
  begin = time.monotonic()
  try:
    other = run.children[2]
    _, err = other.communicate(timeout=60)
    assert 2 < time.monotonic() - begin < 12
    assert other.returncode == 75
    assert f"process {process} on " in err
    assert "has not answered for 3 s" in err
  finally:
    child.send_signal(signal.SIGCONT)
  codes, _ = run.end()
  assert codes == [75, 75, 75]
  assert all(map(is_gone, workers))


def test_an_error_of_one_is_that_of_all(start):
  codes, lines = start("full").end()
  assert codes == [74, 74]
  assert len(lines[0]) == 1
  assert "process 1 on " in lines[0][0]
  assert "ended: no space." in lines[0][0]
  assert lines[1] == ["no space."]


@pytest.mark.parametrize("late", ["0", "2"])
def test_one_that_ends_before_the_start(start, late):
  """Also where process 0 is not there yet: it must hear of it."""
  codes, lines = start("early", late=late).end()
  assert codes == [2, 2]
  assert "ended with exit code 2; see its error" in lines[0][0]


def test_a_bug_is_told_where_it_is(start):
  """Both fail; the first one's failure is the cause."""
  codes, lines = start("bug").end()
  assert codes == [1, 1]
  assert lines[0][0].startswith("Traceback")
  assert lines[0][-1] == "ArithmeticError: broken"
  assert len(lines[1]) == 1
  assert "process 0 on " in lines[1][0]
  assert "failed: ArithmeticError: broken; see there." in lines[1][0]


def test_what_devices_say_waits_for_the_news_of_a_loss(start):
  run = start("device", VIDGEN_HEARTBEAT="4")
  run.joined()
  run.children[1].send_signal(signal.SIGSTOP)
  try:
    _, err = run.children[0].communicate(timeout=60)
  finally:
    run.children[1].send_signal(signal.SIGCONT)
  assert run.children[0].returncode == 75
  assert "process 1 on " in err
  assert err.count("\n") == 1


def test_news_of_a_loss_comes_in_one_line(start):
  """JAX's own lines are dropped where ours says it, and only there."""
  run = start("noise", 3)
  workers = run.joined()
  os.kill(workers[1], signal.SIGKILL)
  codes, lines = run.end()
  assert codes == [75, 75, 75]
  assert len(lines[0]) == 1, lines
  run = start("noise", silent="1")
  codes, lines = run.end()
  assert codes == [75, 75]
  for line in lines:
    assert len(line) == 1, lines
    assert "process 1 on " in line[0]
    assert "hangs; run the same" in line[0]
  run = start("noise")
  codes, lines = run.end()
  assert codes == [75, 75]
  assert "fatal errors" in lines[0][0]
  assert "SIGABRT" in lines[1][0]


def test_told_to_stop_all_save(start):
  run = start("saved")
  run.joined()
  for child, number in zip(run.children, (15, 2), strict=True):
    child.send_signal(number)
  assert run.end() == ([75, 75], [["saved"], ["saved"]])


def test_a_second_signal_ends_at_once(start):
  run = start("work")
  workers = run.joined()
  # This worker takes no notice of being told.
  os.kill(workers[0], signal.SIGSTOP)
  run.children[0].send_signal(signal.SIGTERM)
  time.sleep(0.5)
  run.children[0].send_signal(signal.SIGINT)
  codes, _ = run.end()
  assert codes == [130, 75]
  assert all(map(is_gone, workers))


def test_other_configs(start):
  codes, lines = start("work", 3, seeds="001").end()
  assert codes == [2, 2, 2]
  for line in lines:
    assert "process 2 on " in line[0]
    assert "config.seed (1 instead of 0)" in line[0]


def test_process_0_that_is_not_there(start):
  run = start("work", VIDGEN_JOIN_TIMEOUT="2")
  run.children[0].kill()
  codes, lines = run.end()
  assert codes == [-9, 74]
  assert f"localhost:{run.port}: process 0 of 2 cannot be" in lines[1][0]
  assert "tried for 2 s" in lines[1][0]


def test_processes_that_do_not_come(start):
  run = start("work", 3, VIDGEN_JOIN_TIMEOUT="2")
  run.children[1].kill()
  codes, lines = run.end()
  assert codes == [74, -9, 74]
  assert "process 1 of 3 did not come" in lines[2][0]
  assert "within 2 s" in lines[2][0]


def test_a_port_that_is_taken():
  with socket.create_server(("", 0)) as server:
    port = server.getsockname()[1]
    with pytest.raises(hosts.JoinError, match=f"port {port}: .* in use"):
      rollcall.RollCall(hosts.Place("localhost", port, 2, 0))


def test_strangers():
  """Neither noise nor a second process 1 ends a run."""
  port = free_port()
  place = hosts.Place("localhost", port, 2, 0, heartbeat=1.0)
  calls = rollcall.RollCall(place)
  with contextlib.ExitStack() as stack:

    def call(data):
      connection = socket.create_connection(("localhost", port), timeout=10)
      connection.sendall(data)
      return stack.enter_context(links.Link(connection))

    hello = lambda **x: json.dumps({"host": "h", **x}).encode() + b"\n"
    first = call(hello(hello=1, processes=2))
    noise = call(b"GET / HTTP/1.1\n\n")
    assert noise.poll() is None
    assert call(b"[]\n").poll() is None
    assert (
      "is there already, on h"
      in call(hello(hello=1, processes=2)).receive()["text"]
    )
    assert "which has 2" in call(hello(hello=1, processes=4)).receive()["text"]
    zero = call(hello(hello=0, processes=2))
    for link in (first, zero):
      link.send(ready={})
    while "go" not in first.receive():
      pass
    for link in (first, zero):
      link.send(ended=0, sure=True, text="")
      while "yours" not in link.receive():
        pass
  calls.join(20.0)
  assert threading.active_count() == 1 or not any(
    thread.name == "rollcall" for thread in threading.enumerate()
  )


def test_a_part_of_work_that_is_done_apart(monkeypatch):
  by_hand = {
    hosts.COORDINATOR: "one:99",
    hosts.PROCESSES: "4",
    hosts.PROCESS: "2",
  }
  assert hosts.part(by_hand) == "2/4"
  assert hosts.part({}) is None
  assert hosts.part({**by_hand, hosts.PROCESSES: "1"}) is None
  monkeypatch.setattr(hosts, "_has_tpu", lambda environ: True)
  with pytest.raises(errors.InputError, match="one of 4 hosts of a TPU slice"):
    hosts.part(by_hand)
