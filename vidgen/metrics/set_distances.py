"""FVD, the kernel video distance and FID of two sets of videos."""

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from vidgen import errors, progress
from vidgen.metrics import (
  collect,
  distributions,
  i3d,
  inception,
  intervals,
  report,
)

# The network of each, by the names of `networks`.
METRICS = {"fvd": "i3d", "kvd": "i3d", "fid": "inception"}

# Its authors ask for so many images.
_ENOUGH_IMAGES = 10_000
# The singular values of 2048x2048 numbers take seconds.
_FID_RESAMPLES = 20


@dataclasses.dataclass
class Settings:
  """What is taken of each set, and how often it is drawn anew.

  Attributes:
    frames: The first so many of each clip.
    n: The first so many clips, None for all.
    batch_size: Clips that a network takes at once.
    resamples: Of the intervals.
    seed: Of their draws.
    version: Of the metrics' definitions.
  """

  frames: int
  n: int | None
  batch_size: int
  resamples: int
  seed: int
  version: str


def networks(
  names: Sequence[str],
  weights: str | os.PathLike | None,
  inception_folder: str | os.PathLike | None,
) -> dict[str, collect.Network]:
  """Loads the networks of metrics.

  Args:
    names: The metrics.
    weights: Where I3D's converted weights are kept; see `i3d.load`.
    inception_folder: Holds Inception's; see `inception.load`.

  Raises:
    InputError: Weights are missing.
    CorruptError: Weights are not the known ones.
  """
  found, wanted = {}, {METRICS[name] for name in names}
  if "i3d" in wanted:
    params, network = i3d.load(weights), i3d.I3D()
    apply = jax.jit(lambda p, x: network.apply({"params": p}, x))
    run = lambda x: apply(params, x)
    resize = jax.jit(i3d.resize)
    found["i3d"] = collect.Network("i3d400", i3d.SIZE, resize, run)
  if "inception" in wanted:
    if inception_folder is None:
      raise errors.InputError(
        "--metrics=fid: needs the weights of its Inception; name a folder that "
        "holds them as safetensors, --inception=DIR."
      )
    held = inception.load(inception_folder)
    found["inception"] = collect.Network(
      f"inception{inception.WIDTH}-{held.sha256[:8]}",
      inception.SIZE,
      jax.jit(inception.resize),
      lambda clips: _by_clip(held.params, clips),
    )
  return found


def _by_clip(params: inception.Params, clips: np.ndarray) -> np.ndarray:
  """Returns the features of each frame, one clip after the other."""
  return np.stack([np.asarray(_images(params, clip)) for clip in clips])


_images = jax.jit(inception.features)


def measure(
  names: Sequence[str],
  reference: collect.Source,
  generated: collect.Source,
  found: Mapping[str, collect.Network],
  settings: Settings,
  told: progress.Progress,
) -> dict[str, report.Result]:
  """Returns the distances of two sets.

  Args:
    names: The metrics.
    reference: A set.
    generated: The other.
    found: From `networks`.
    settings: See `Settings`.
    told: Is told how far it is.

  Raises:
    InputError: The sets have different n, or fewer clips than asked for.
  """
  counts = [
    sum(item.problem is None for item in side.items)
    for side in (reference, generated)
  ]
  if settings.n is None and counts[0] != counts[1]:
    # Told before a network has seen a clip.
    raise errors.InputError(
      f"{', '.join(names)}: the reference has {counts[0]} clips, the generated "
      f"set {counts[1]}; distances of sets of different n do not compare: give "
      f"--n={min(counts)} to take the first of both."
    )
  results = {}
  for key, network in found.items():
    own = [name for name in names if METRICS[name] == key]
    x, y, tallies = _features(
      own, reference, generated, network, settings, told
    )
    skipped = [skip for tally in tallies for skip in tally.skipped]
    formats = set.union(*(tally.formats for tally in tallies))
    of = (
      f"{network.name}-{'+'.join(sorted(formats))}-{settings.frames}f"
      f"-{network.size}-bilinear-n{len(x)}-{settings.version}"
    )
    for name in own:
      _warn(name, x)
      estimate = _estimate(name, x, y, settings)
      identity = f"{name}-{of}"
      if name == "kvd":
        identity = identity.replace(network.name, f"{network.name}-poly3")
      results[name] = report.Result(identity, estimate, len(x), skipped, {})
  return results


def _features(
  names: Sequence[str],
  reference: collect.Source,
  generated: collect.Source,
  network: collect.Network,
  settings: Settings,
  told: progress.Progress,
) -> tuple[np.ndarray, np.ndarray, list[collect.Tally]]:
  """Returns the features of both sets, clips first, and their tallies."""
  tallies = []
  for side, source in (("reference", reference), ("generated", generated)):
    total = len(source.items)
    with told.stage(f"{', '.join(names)}: the {side} set"):
      step = lambda done, total=total: told.step(done + 1, total)
      tally = collect.features(
        source,
        network,
        settings.frames,
        settings.n,
        settings.batch_size,
        step,
      )
    collect.enough(names[0], tally, settings.n, f"clips of the {side} set")
    tallies.append(tally)
  n, m = (len(tally.values) for tally in tallies)
  if n != m:
    raise errors.InputError(
      f"{names[0]}: {n} clips of the reference set and {m} of the generated "
      "set; distances between distributions depend on n: give "
      f"--n={min(n, m)} to take the first {min(n, m)} of both."
    )
  x, y = (np.stack(list(tally.values.values())) for tally in tallies)
  return x, y, tallies


def _estimate(
  name: str, x: np.ndarray, y: np.ndarray, settings: Settings
) -> intervals.Estimate:
  draws, seed = settings.resamples, settings.seed
  if name in ("kvd", "fvd"):
    draws = min(draws, distributions.RESAMPLES)
  if name == "kvd":
    return distributions.kernel(x, y, draws, seed)
  if name == "fvd":
    return distributions.frechet_estimate(x, y, draws, seed)
  # Clips are drawn, not frames, which are alike within a clip.
  flat = lambda features: features.reshape(-1, features.shape[-1])
  distance = lambda a, b: distributions.frechet(flat(a), flat(b))
  draws = min(draws, _FID_RESAMPLES)
  return intervals.halved(distance, x, y, draws, seed, least=0.0)


def _warn(name: str, x: np.ndarray) -> None:
  """Warns of too few clips."""
  if name == "fvd" and len(x) < distributions.ENOUGH:
    warnings.warn(
      f"fvd: of {len(x)} clips; below {distributions.ENOUGH} it is too large, "
      "and compares with FVDs of the same n only; kvd does not depend on n.",
      stacklevel=3,
    )
  if name == "fid" and (images := x.shape[0] * x.shape[1]) < _ENOUGH_IMAGES:
    warnings.warn(
      f"fid: of {images} frames; below {_ENOUGH_IMAGES} it is too large, and "
      "compares with FIDs of the same n only.",
      stacklevel=3,
    )
