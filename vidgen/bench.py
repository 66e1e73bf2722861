"""Times a sampling config on this machine: a cold clip, then warm ones."""

import dataclasses
import json
import pathlib
import platform
import statistics
import time
from typing import Any

import jax

import vidgen
from vidgen import errors, sample, sample_model, video
from vidgen import progress as progress_lib

PROMPT = "A panda plays the guitar by a quiet stream."


@dataclasses.dataclass
class Report:
  """What a run took; seconds are the medians of the warm runs.

  Attributes:
    device: Kind and number of the devices.
    size: Frames, height and width of a clip.
    load_seconds: Reading the checkpoint.
    compile_seconds: What XLA compiled for the first clip; little where the
      persistent cache has it.
    first_seconds: The first clip, compiling left out.
    stage_seconds: Each stage of a warm clip.
    clip_seconds: A warm clip.
    runs: How many warm clips.
    peak_bytes: Peak memory, and `peak_of` says of what.
  """

  device: str
  size: tuple[int, int, int]
  load_seconds: float
  compile_seconds: float
  first_seconds: float
  stage_seconds: dict[str, float]
  clip_seconds: float
  runs: int
  peak_bytes: int
  peak_of: str

  def __str__(self) -> str:
    frames, height, width = self.size
    rows = [
      ("load", self.load_seconds),
      ("compile (XLA)", self.compile_seconds),
      ("first clip", self.first_seconds),
      *((f"warm {name}", s) for name, s in self.stage_seconds.items()),
      ("warm clip", self.clip_seconds),
    ]
    lines = [f"{frames} frames of {height}x{width} on {self.device}"]
    lines += [f"{name:16} {seconds:9.2f} s" for name, seconds in rows]
    peak = self.peak_bytes / 2**30
    lines.append(f"{'peak memory':16} {peak:9.2f} GiB ({self.peak_of})")
    return "\n".join(lines)


def run(
  config: sample.SampleConfig,
  *,
  runs: int = 3,
  progress: progress_lib.Progress | None = None,
) -> Report:
  """Makes the config's first clip once cold and `runs` times warm.

  Raises:
    InputError: A config that `vidgen sample` would not take either.
  """
  if runs < 1:
    raise errors.InputError(f"runs: {runs}; give 1 or more.")
  given = config.prompt, config.prompts, config.image
  if given == (None, None, None):
    config = dataclasses.replace(config, prompt=PROMPT)
  # Frames are what is timed, whatever the job would write.
  config = dataclasses.replace(config, formats=("mp4",))
  clip = sample.plan(config)[0]
  progress = progress_lib.Progress() if progress is None else progress
  with progress:
    with progress.stage("load"):
      pipeline = sample_model.load(config, [clip], default_prompt=PROMPT)
      clip = sample_model.prompted(pipeline.model, clip, PROMPT)
    load = progress.seconds.pop("load")
    ahead = progress.compile_seconds
    times, stages = [], []
    for number in range(runs + 1):
      progress.seconds.clear()
      progress.clip(number + 1, runs + 1)
      start = time.perf_counter()
      ((_, frames),) = sample_model.make(pipeline, [clip], config, progress)
      times.append(time.perf_counter() - start)
      stages.append(dict(progress.seconds))
      if number == 0:
        compiled = progress.compile_seconds
  median = statistics.median
  peak_bytes, peak_of = progress_lib.peak_memory()
  devices = pipeline.mesh.devices.flat
  return Report(
    device=f"{len(devices)} x {devices[0].device_kind or platform.machine()}",
    size=frames.shape[:3],
    load_seconds=load,
    compile_seconds=compiled,
    first_seconds=times[0] - (compiled - ahead),
    stage_seconds={
      name: median(stage[name] for stage in stages[1:]) for name in stages[1]
    },
    clip_seconds=median(times[1:]),
    runs=runs,
    peak_bytes=peak_bytes,
    peak_of=peak_of,
  )


def write_json(path: str | pathlib.Path, report: Report) -> None:
  """Writes the report, with the versions that made it."""
  values: dict[str, Any] = dataclasses.asdict(report)
  values |= {"jax": jax.__version__, "vidgen": vidgen.__version__}
  with video.atomic(path) as temporary:
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
