"""Says whether two runs gave the same, makes one again, or tells of several.

usage: vidgen repro check A B [flags]
       vidgen repro rerun RUN --out=DIR [flags]
       vidgen repro report RUN RUN ... [--out=FILE.md]

  A, B, RUN           folders that vidgen sample, train or evaluate has written,
                      or the manifest.json in one; report takes the JSON files
                      of vidgen evaluate, too, and finds evaluate.json in a RUN
  --out=DIR           a new folder for the run made again; the table's file
  --tolerance=X       calls runs equal to rounding that differ by X at most: in
                      a pixel, of 0 to 255 (of latents alone, their largest
                      value is 255), or in a metric, relative to it
  --within_intervals  of check: compares two evaluations by their 95 %
                      intervals, as two kinds of device must be compared
  --json=FILE         writes what was found there too

check tells field by field what differs: what decides numbers, what should not,
and outputs. Exit code 0 says that they are identical (the hashes of all frames,
or of the final state), equal to rounding or equal within intervals; 1 that they
differ, or that files are gone or not as they were written. The last line says
why: the first recorded thing that they do not share. mp4 and gif show rounding
worse than it is: keep png or npz beside them for --tolerance.

rerun runs the recorded command again, with the recorded text of its config, in
the recorded directory; a line tells of each thing that has changed since, and
prompts, images and videos that are gone are an error. Then it checks. A config
is a program: rerun manifests of people whom you trust.

report prints a table in Markdown of the last metrics of runs of several seeds:
mean, 95 % interval by Student's t, and what the runs do not share besides.

example
  vidgen repro check videos videos_of_another_day
  vidgen repro check scores_of_gpu scores_of_tpu --within_intervals
  vidgen repro rerun videos --out=again
  vidgen repro report runs/seed0 runs/seed1 runs/seed2
"""

from absl import flags

from vidgen import errors
from vidgen.cli import cache, parse

_NEEDS = {"check": (2,), "rerun": (1,), "report": range(1, 10_000)}


def define(values: flags.FlagValues, argv: list[str]) -> None:
  """Defines the flags of this command; what it compares is no flag."""
  del argv
  for name in ("out", "json"):
    flags.DEFINE_string(name, None, "", flag_values=values)
  flags.DEFINE_float("tolerance", None, "", flag_values=values)
  flags.DEFINE_bool("within_intervals", False, "", flag_values=values)


def run(values: flags.FlagValues) -> int:
  """Compares, and prints the verdict."""
  from vidgen import likeness, repro, rerun, seedtable

  action, *names = parse.rest(values) or ("",)
  if action not in _NEEDS or len(names) not in _NEEDS[action]:
    raise errors.InputError(
      "give check A B, rerun RUN --out=DIR, or report RUN ...; see vidgen "
      "repro --help."
    )
  tolerance, out = values["tolerance"].value, values["out"].value
  if values["within_intervals"].value and action != "check":
    raise errors.InputError("--within_intervals: is for check.")
  if action == "report":
    table = seedtable.make(names)
    if out:
      seedtable.write(out, table)
    print(table, end="")
    return 0
  if action == "check":
    if out:
      raise errors.InputError("--out: is for rerun; check writes no folder.")
    report = repro.check(*names, tolerance, values["within_intervals"].value)
  else:
    if not out:
      raise errors.InputError("--out is missing; name a new folder.")
    report = rerun.run(
      names[0], out, tolerance=tolerance, memory=cache.hashes()
    )
  if values["json"].value is not None:
    repro.write_json(values["json"].value, report)
  print(report)
  return 1 if report.verdict == likeness.DIFFERENT else 0
