"""Signals: the first asks, the second ends, and nothing else is disturbed."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

import vidgen
from vidgen import errors, preemption

ROOT = pathlib.Path(vidgen.__file__).parent.parent

CHILD = """
import multiprocessing, os, signal, sys, time
from vidgen import preemption
with preemption.Preemption() as stop:
  print("ready", flush=True)
  if sys.argv[1] == "steps":
    step = 0
    while not stop.requested(step):
      step += 1
      time.sleep(0.01)
    print("saved", flush=True)
    sys.exit(75)
  # As a compilation does, this keeps the main thread from running a handler.
  if sys.argv[1] == "busy":
    import ctypes
    sleep = ctypes.CDLL(None).sleep
    while True:
      left = 60
      while left:
        left = sleep(left)
"""


def start(kind):
  child = subprocess.Popen(
    [sys.executable, "-c", CHILD, kind],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert child.stdout.readline() == "ready\n"
  return child


def test_a_signal_asks_and_handlers_come_back():
  before = [signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)]
  with preemption.Preemption() as stop:
    assert not stop.requested(1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested(2)
    assert stop.requested(3)
  assert before == [
    signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)
  ]
  assert signal.set_wakeup_fd(-1) == -1
  with preemption.Preemption() as stop:
    assert not stop.requested(4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_lets_the_step_end(number):
  child = start("steps")
  child.send_signal(number)
  out, err = child.communicate(timeout=120)
  assert (child.returncode, out) == (75, "saved\n")
  assert err.count("\n") == 1
  assert err.startswith(f"{signal.Signals(number).name}: saving")


def test_the_second_signal_ends_a_busy_process():
  child = start("busy")
  child.send_signal(signal.SIGTERM)
  assert child.stderr.readline().startswith("SIGTERM: saving")
  begin = time.monotonic()
  child.send_signal(signal.SIGINT)
  assert child.wait(timeout=120) == 130
  assert time.monotonic() - begin < 2
  child.communicate()


def test_a_signal_that_comes_twice_at_once_is_one():
  child = start("steps")
  child.send_signal(signal.SIGTERM)
  child.send_signal(signal.SIGTERM)
  assert child.communicate(timeout=120)[0] == "saved\n"
  assert child.returncode == 75


def test_a_forked_worker_that_is_ended_asks_for_nothing():
  code = (
    "import os, signal, time\n"
    "from vidgen import preemption\n"
    "with preemption.Preemption() as stop:\n"
    "  for _ in range(20):\n"
    "    worker = os.fork()\n"
    "    if not worker:\n"
    "      time.sleep(20)\n"
    "      os._exit(0)\n"
    "    os.kill(worker, signal.SIGTERM)\n"
    "    status = os.waitpid(worker, 0)[1]\n"
    "    assert os.waitstatus_to_exitcode(status) == -15, status\n"
    "  assert not stop.requested(1)\n"
    "  os.kill(os.getpid(), signal.SIGTERM)\n"
    "  assert stop.requested(1)\n"
  )
  command = [sys.executable, "-W", "ignore", "-c", code]
  subprocess.run(command, check=True, cwd=ROOT, timeout=120)


def test_exit_codes():
  assert errors.PreemptedError("x").exit_code == 75
  assert errors.DivergedError("x").exit_code == 4
