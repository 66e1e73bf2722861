"""How far the outputs of two runs are the same."""

import dataclasses
import math
import pathlib
from typing import Any

import numpy as np

from vidgen import errors, ledger, outputs, tensorheader, video
from vidgen.metrics import pixels

IDENTICAL = "identical"
ROUNDING = "equal to rounding"
INTERVALS = "equal within intervals"
DIFFERENT = "different"

# Which file of a clip is looked at: what loses least comes first.
_FORMATS = ("", ".npz", ".mp4", ".gif")
_LOSSY = (".mp4", ".gif")


@dataclasses.dataclass
class Likeness:
  """What comparing the outputs gave.

  Attributes:
    verdict: One of the four.
    why: In a line.
    lines: What is the same and what is not, for people.
    max_abs: The largest difference: of pixels in units of 0 to 255, of latents
      so, too, their largest value being 255; of metrics relative to the larger
      one; None: not looked at.
    psnr: The lowest of a clip, in dB; `pixels.MAX_PSNR` at most.
  """

  verdict: str
  why: str
  lines: list[str] = dataclasses.field(default_factory=list)
  max_abs: float | None = None
  psnr: float | None = None


def compare(
  first: dict[str, Any],
  second: dict[str, Any],
  folders: tuple[pathlib.Path, pathlib.Path],
  tolerance: float | None,
) -> Likeness:
  """Compares what two manifests have as "outputs".

  Args:
    first: Of one run.
    second: Of the other.
    folders: Where their files are.
    tolerance: The largest difference that counts as rounding, as `max_abs`;
      None looks at hashes alone.

  Raises:
    InputError: They are of jobs of two kinds, or a file is not there.
  """
  if first["kind"] != second["kind"]:
    raise errors.InputError(
      f"{folders[0]} has {first['kind']} as its outputs, {folders[1]} has "
      f"{second['kind']}: they cannot be compared."
    )
  if first["kind"] == "clips":
    return _clips(first, second, folders, tolerance)
  return _numbers(first, second, tolerance)


def _clips(first, second, folders, tolerance):
  """Compares clips by their index."""
  a, b = ({c["index"]: c for c in side["clips"]} for side in (first, second))
  both = sorted(a.keys() & b.keys())
  unequal = [index for index in both if not _equal(a[index], b[index])]
  lines = [f"clips in both: {len(both)}, of them equal {_less(both, unequal)}"]
  alone = [sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys())]
  for name, indices in zip("AB", alone, strict=True):
    if indices:
      lines.append(f"clips in {name} alone: {_listed(indices)}")
  for name, side in zip("AB", (first, second), strict=True):
    if side["failed"]:
      failed = [clip["index"] for clip in side["failed"]]
      lines.append(f"clips that failed in {name}: {_listed(failed)}")
  if unequal:
    lines.append(f"clips that differ: {_listed(unequal)}")
  if any(alone):
    missing = len(alone[0]) + len(alone[1])
    return Likeness(DIFFERENT, f"{missing} clips are in one of them", lines)
  if not both:
    return Likeness(DIFFERENT, "there is no clip in either", lines)
  for name, side, folder in zip("AB", (first, second), folders, strict=True):
    if damaged := _damaged(side, folder):
      why = f"the files of {len(damaged)} clips in {name} are not as written"
      lines.append(f"clips with damaged files in {name}: {_listed(damaged)}")
      return Likeness(DIFFERENT, why, lines)
  if not unequal:
    why = f"the frames of all {len(both)} clips are equal"
    return Likeness(IDENTICAL, why, lines)
  some = f"{len(unequal)} of {len(both)} clips differ"
  if tolerance is None:
    return Likeness(DIFFERENT, some, lines)
  worst, lowest, lossy = 0.0, pixels.MAX_PSNR, False
  for index in unequal:
    lossy |= _compared(a[index], b[index]) in _LOSSY
    found = _difference(a[index], b[index], folders)
    if found is None:
      return Likeness(DIFFERENT, f"clip {index} has another size", lines)
    worst, lowest = max(worst, found[0]), min(lowest, found[1])
  lines.append(f"largest difference {worst:.6g}, lowest PSNR {lowest:.2f} dB")
  if lossy:
    lines.append(
      "compared as the files show them: what mp4 and gif lose counts; "
      "--config.formats=mp4,png keeps the frames themselves"
    )
  met = worst <= tolerance
  why = f"{some}, by {worst:.6g} at most, tolerance {tolerance:.6g}"
  return Likeness(ROUNDING if met else DIFFERENT, why, lines, worst, lowest)


def _damaged(side: dict[str, Any], folder: pathlib.Path) -> list[int]:
  """Returns the clips of which a file is gone, or has other bytes.

  A manifest may have come without its folder: then nothing is known of files.
  """
  if not any(folder.glob(outputs.LEDGERS)):
    return []
  return [
    clip["index"]
    for clip in side["clips"]
    if any(
      not (folder / name).exists() or ledger.digest(folder / name) != digest
      for name, digest in clip["sha256"].items()
      if tensorheader.is_plain(name)
    )
  ]


def _less(both: list[int], unequal: list[int]) -> int:
  return len(both) - len(unequal)


def _equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
  """Says whether two clips have the same frames, as far as hashes tell it."""
  if a["frames_sha256"] and b["frames_sha256"]:
    # The hash is of the bytes alone.
    sizes = [one.get("shape") for one in (a, b)]
    is_one_size = None in sizes or sizes[0] == sizes[1]
    return is_one_size and a["frames_sha256"] == b["frames_sha256"]
  # Without frames there are files, whose names may differ.
  kind = lambda clip: {
    pathlib.Path(name).suffix: mark for name, mark in clip["sha256"].items()
  }
  files_a, files_b = kind(a), kind(b)
  common = files_a.keys() & files_b.keys()
  return bool(common) and all(files_a[s] == files_b[s] for s in common)


def _difference(
  a: dict[str, Any],
  b: dict[str, Any],
  folders: tuple[pathlib.Path, pathlib.Path],
) -> tuple[float, float] | None:
  """Returns the largest difference of two clips and their PSNR, in dB.

  None where their sizes differ.
  """
  suffixes = _suffixes(a, b)
  suffix = _compared(a, b)
  if suffix is None:
    raise errors.InputError(
      f"{folders[0]} and {folders[1]}: clip {a['index']} has no file of the "
      "same format in both; make both with the same formats."
    )
  x, y = (
    _read(folder, names[suffix])
    for folder, names in zip(folders, suffixes, strict=True)
  )
  if x.shape != y.shape:
    return None
  error = np.abs(x.astype(np.float64) - y.astype(np.float64))
  # Latents have no largest value: theirs is that of the first.
  peak = 255.0 if x.dtype == np.uint8 else float(np.abs(x).max())
  mse = float(np.square(error).mean())
  psnr = pixels.MAX_PSNR
  if not math.isfinite(mse):
    return math.inf, -math.inf
  if mse > 0:
    psnr = min(psnr, 10 * math.log10(max(peak, 1e-30) ** 2 / mse))
  return 255.0 * float(error.max()) / max(peak, 1e-30), psnr


def _suffixes(a: dict[str, Any], b: dict[str, Any]) -> list[dict[str, str]]:
  """The files of two clips by what their names end with."""
  return [
    {pathlib.Path(name).suffix: name for name in clip["sha256"]}
    for clip in (a, b)
  ]


def _compared(a: dict[str, Any], b: dict[str, Any]) -> str | None:
  """The suffix of the files by which two clips are compared, if any."""
  both = _suffixes(a, b)
  common = [s for s in _FORMATS if all(s in names for names in both)]
  return common[0] if common else None


def _read(folder: pathlib.Path, name: str) -> np.ndarray:
  """Returns a clip's frames, or its latents."""
  path = folder / name
  if "/" in name or not tensorheader.is_plain(name):
    raise errors.InputError(f"{folder}: {name!r} is no name of a clip.")
  if path.suffix == ".npz":
    try:
      with np.load(path, allow_pickle=False) as arrays:
        return np.asarray(arrays["latents"])
    except (OSError, ValueError, LookupError) as error:
      raise errors.InputError(f"{path}: holds no latents.") from error
  if path.suffix:
    return video.read_video(path)
  frames = sorted(path.glob("*.png"))
  if not frames:
    raise errors.InputError(f"{path}: holds no frames.")
  return np.stack([np.asarray(video.read_image(frame)) for frame in frames])


def _numbers(first, second, tolerance):
  """Compares states by their hash, and metrics by their numbers."""
  if tolerance is not None and tolerance >= 1:
    raise errors.InputError(
      f"--tolerance={tolerance:g}: metrics are compared relative to the larger "
      "one; give less than 1."
    )
  marks = [side.get("state_sha256") for side in (first, second)]
  a, b = first["metrics"], second["metrics"]
  if None not in marks:
    if marks[0] == marks[1]:
      line = f"state: equal, {marks[0][:16]}, at step {first.get('step')}"
      return Likeness(
        IDENTICAL, "the final states are equal to the bit", [line]
      )
    lines = [f"state: {marks[0][:16]} in A, {marks[1][:16]} in B"]
    what = "the final states differ"
  else:
    if a and a == b:
      return Likeness(IDENTICAL, f"all {len(a)} metrics are equal", [])
    lines, what = [], "the metrics differ"
  if a.keys() != b.keys() or not a:
    names = sorted(a.keys() ^ b.keys())
    lines.append(f"metrics of one of them: {tensorheader.listed(names) or '-'}")
    return Likeness(DIFFERENT, what, lines)
  shares = {name: relative(a[name], b[name]) for name in a}
  for name, size in shares.items():
    if size:
      lines.append(
        f"{name}: {float(a[name]):.8g} in A, {float(b[name]):.8g} in B "
        f"({size:.2g})"
      )
  worst = max(shares.values())
  if tolerance is None:
    return Likeness(DIFFERENT, what, lines, worst)
  met = math.isfinite(worst) and worst <= tolerance
  verdict = ROUNDING if met else DIFFERENT
  why = f"{what}; metrics by {worst:.2g} at most, tolerance {tolerance:.6g}"
  return Likeness(verdict, why, lines, worst)


def relative(a: int | float | str, b: int | float | str) -> float:
  """Returns the difference of two numbers, relative to the larger one.

  What is not finite is as far as can be from all but itself, and so are whole
  numbers: they count steps and clips.
  """
  if a == b:
    return 0.0
  if isinstance(a, int) and isinstance(b, int):
    return math.inf
  if isinstance(a, str) or isinstance(b, str):
    return math.inf
  return abs(a - b) / max(abs(a), abs(b))


def _listed(indices: list[int]) -> str:
  return tensorheader.listed(map(str, indices))


def outputs_of(
  manifest: dict[str, Any], folder: pathlib.Path, name: str
) -> dict[str, Any]:
  """Returns the outputs of a manifest; those of a killed job from its ledger.

  Raises:
    InputError: There are none.
    CorruptError: They are not as they were written.
  """
  found = manifest["outputs"]
  if found is None and any(folder.glob(outputs.LEDGERS)):
    found = outputs.of_clips(folder)
  if found is None:
    raise errors.InputError(
      f"{name}: no outputs are recorded, the run ended as "
      f"{manifest['exit']['reason']!r}; run it to its end first."
    )
  if not is_as_written(found):
    raise errors.CorruptError(f"{name}: outputs are not as they were written.")
  return found


def is_as_written(found: Any) -> bool:
  """Says whether this is what `vidgen.outputs` makes."""
  if not isinstance(found, dict):
    return False
  if found.get("kind") == "clips":
    lists = [found.get("clips"), found.get("failed")]
    return all(
      isinstance(items, list)
      and all(isinstance(i, dict) and _is_int(i.get("index")) for i in items)
      for items in lists
    ) and all(
      isinstance(clip.get("sha256"), dict)
      and isinstance(clip.get("frames_sha256"), str | None)
      for clip in lists[0]
    )
  metrics = found.get("metrics")
  return (
    found.get("kind") in ("state", "metrics")
    and isinstance(metrics, dict)
    and all(map(outputs.is_number, metrics.values()))
    and isinstance(found.get("state_sha256"), str | None)
  )


def _is_int(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)
