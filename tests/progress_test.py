import contextlib
import io
import os
import re

import jax
import numpy as np
import pytest

from tests import sampling_jobs as jobs
from vidgen import (
  progress,
  sample,
)


@pytest.fixture
def pipeline(monkeypatch, tmp_path_factory):
  return jobs.fake_pipeline(monkeypatch, tmp_path_factory)


def test_plain_progress_lines(tmp_path, pipeline):
  stream = io.StringIO()
  path = tmp_path / "a.txt"
  path.write_text("a\nb\n")
  told = progress.create(stream)
  sample.run(jobs.config(tmp_path, prompts=os.fspath(path)), told)
  lines = stream.getvalue().splitlines()
  assert lines[0] == "load ..."
  assert lines[1].startswith("load took ")
  assert lines[2] == "clip 1/2 denoise ..."
  assert lines[3] == "clip 1/2 step 1/3"
  assert lines[4].startswith("clip 1/2 step 2/3, ")
  assert " s/step, " in lines[4]
  # A stage, three steps and its end; files are told as they are written.
  assert sum(line.startswith("clip 2/2") for line in lines) == 5
  assert sum(line.endswith(".mp4") for line in lines) == 2
  assert "\x1b" not in stream.getvalue()


def test_a_line_every_tenth_of_the_steps():
  stream = io.StringIO()
  told = progress.Lines(stream)
  with told, told.stage("denoise"):
    for done in range(1, 51):
      told.step(done, 50)
  steps = [x for x in stream.getvalue().splitlines() if x.startswith("step")]
  assert len(steps) == 11
  assert steps[-1].startswith("step 50/50, ")


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_a_bar_on_a_terminal(monkeypatch):
  monkeypatch.setenv("TERM", "xterm-256color")
  monkeypatch.setenv("COLUMNS", "100")
  stream = Terminal()
  told = progress.create(stream)
  with told:
    told.clip(2, 5)
    with told.stage("denoise"):
      told.step(1, 4)
      told.step(2, 4)
      told._bar.refresh()
    told.say("out/[a].mp4")
  assert "clip 2/5 denoise" in stream.getvalue()
  assert "2/4, 0.00 s/step, 0 s left" in stream.getvalue()
  assert "out/[a].mp4" in stream.getvalue()


def test_a_job_of_many_clips_has_few_lines(tmp_path, pipeline):
  said = io.StringIO()
  sample.run(jobs.many(tmp_path, 40), progress.create(said))
  lines = said.getvalue().splitlines()
  assert 10 < len(lines) < 60
  assert not any("clip 30/40" in line for line in lines)


def test_compiling_is_counted_apart():
  told = progress.Progress()
  with told, told.stage("denoise"):
    jax.jit(lambda x: x * 3 + 0.123)(np.ones(7, np.float32))
  seconds = told.compile_seconds
  assert seconds > 0
  with told:
    jax.monitoring.record_event_duration_secs("/another/event", 9.0)
  jax.jit(lambda x: x * 5 + 0.321)(np.ones(7, np.float32))
  assert told.compile_seconds == seconds


def test_a_stage_that_fails_is_not_counted():
  told = progress.Lines(io.StringIO())
  with told, contextlib.suppress(ValueError), told.stage("text"):
    raise ValueError
  assert told.seconds == {}


def test_the_summary_is_a_table():
  summary = progress.Summary(
    out="samples",
    files=[f"samples/{i}.mp4" for i in range(30)],
    clips=2,
    seconds={"load": 3.0, "denoise": 100.0, "decode": 10.5},
    compile_seconds=20.25,
    peak_bytes=3 * 2**29,
    peak_of="this process",
  )
  assert str(summary).splitlines()[:9] == [
    "load             3.0 s",
    "denoise        100.0 s",
    "decode          10.5 s",
    "compile (XLA)   20.2 s",
    "per clip        55.2 s",
    "peak memory     1.50 GiB (this process)",
    "2 clips in samples:",
    "  samples/0.mp4",
    "  samples/1.mp4",
  ]
  summary.clips, summary.busy = 3, 0.987
  summary.there, summary.failures = 4, ["a.txt:1: is bad."]
  assert re.search(r"devices at work +99 % of the time", str(summary))
  assert "3 clips in samples, beside 4 there before, 1 failed:" in str(summary)
  assert str(summary).endswith("... and 10 more")


def test_peak_memory_is_what_this_process_took():
  peak, what = progress.peak_memory()
  assert what == "this process"
  assert 2**26 < peak < 2**40


def test_durations():
  seconds = (0.4, 59.0, 60.0, 200.0, 3900.0)
  got = [progress.duration(s) for s in seconds]
  assert got == ["0 s", "59 s", "1 min 0 s", "3 min 20 s", "1 h 5 min"]
