"""report.html: a run, or several side by side, on one page for a browser.

The page is one file that needs no network: style, code and data are in it, and
a policy (CSP) lets nothing else run. Videos stay where they are, by relative
address. Posters are files beside them: in the page, those of 10,000 clips would
weigh 100 MB, and a video without one is opened to be seen.
"""

import base64
import contextlib
import datetime
import hashlib
import html
import json
import os
import pathlib
import re
import urllib.parse
from collections.abc import Iterator, Sequence
from typing import Any

from vidgen import posters as posters_lib
from vidgen import runfiles, version, video

Path = str | os.PathLike

NAME = "report.html"
POSTERS = "posters"

_ASSETS = pathlib.Path(__file__).parent / "assets" / "report"
_SCRIPTS = (
  "page.js",
  "player.js",
  "cards.js",
  "clips.js",
  "charts.js",
  "main.js",
)


def write(
  *folders: Path, out: Path | None = None, posters: bool = True
) -> pathlib.Path:
  """Writes the page of one run, or of several compared, and returns its path.

  Args:
    *folders: Of sampling jobs or training runs.
    out: The page; report.html in the first folder without it.
    posters: Whether to make posters for videos that have none yet, in the
      folder `posters` of each run.

  Raises:
    InputError: A folder is not there, or holds no run.
    StorageError: It could not be written.
  """
  places = [pathlib.Path(os.path.abspath(folder)) for folder in folders]
  runs = [runfiles.load(place) for place in places]
  target = pathlib.Path(os.path.abspath(out or places[0] / NAME))
  data = describe(runs, target.parent, posters)
  _sweep(target, runs)
  with video.atomic(target) as temporary:
    temporary.write_text(page(data), encoding="utf-8")
  return target


def _sweep(target: pathlib.Path, runs: Sequence[runfiles.Run]) -> None:
  """Removes pages and posters that killed processes left half written."""
  # What may not be removed does no harm.
  with contextlib.suppress(OSError):
    for path in target.parent.glob(f".*.tmp{target.suffix}"):
      if video.target_of(path) == target.stem and video.is_old(path):
        path.unlink(missing_ok=True)
    for run in runs:
      for home in (run.folder / POSTERS, *run.folder.glob(f"{POSTERS}/*/")):
        posters_lib.sweep(home)


def page(data: dict[str, Any]) -> str:
  """Returns the page that shows `data`, which `describe` returns."""
  style = (_ASSETS / "style.css").read_text(encoding="utf-8")
  script = "\n".join(
    (_ASSETS / name).read_text(encoding="utf-8") for name in _SCRIPTS
  )
  script = f'"use strict";\n(() => {{\n{script}\n}})();'
  # Of a page from file:, Chromium takes file: for 'self', others may not.
  policy = "; ".join(
    (
      "default-src 'none'",
      f"script-src '{_hash(script)}'",
      f"style-src '{_hash(style)}'",
      "img-src 'self' file:",
      "media-src 'self' file:",
      "base-uri 'none'",
      "form-action 'none'",
    )
  )
  # In ASCII every text is valid, half of a surrogate pair too; without "<"
  # nothing in it ends the element.
  text = json.dumps(data, separators=(",", ":"), allow_nan=False)
  parts = {
    "policy": policy,
    "style": style,
    "script": script,
    "title": html.escape(
      ascii(", ".join(run["label"] for run in data["runs"]))[1:-1]
    ),
    "data": text.replace("<", "\\u003c").replace(">", "\\u003e"),
  }
  template = (_ASSETS / "page.html").read_text(encoding="utf-8")
  return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def describe(
  runs: Sequence[runfiles.Run], home: pathlib.Path, posters: bool
) -> dict[str, Any]:
  """Returns what the page shows, as JSON; addresses are relative to `home`.

  Clips are compared as rows: of several runs, those of the same prompt, seed
  and clip; of one training run, the samples of one name, step by step.
  """
  texts: dict[str, int] = {}
  labels = _labels([run.folder for run in runs])
  clips, keys, columns = [], [], []
  steps = sorted({c.step for r in runs for c in r.clips if c.step is not None})
  by_step = len(runs) == 1 and len(steps) > 1
  for number, run in enumerate(runs):
    held = _posters(run, posters)
    address = _address(run.folder, home)
    seen: dict[Any, int] = {}
    for clip in run.clips:
      key = (clip.prompt, clip.seed, clip.clip)
      if clip.step is not None:
        key = (clip.name,) if by_step else (clip.name, clip.step)
      # The same thing twice in a run is two rows.
      column = steps.index(clip.step) if by_step else number
      seen[key, column] = seen.get((key, column), 0) + 1
      keys.append((key, seen[key, column]))
      columns.append(column)
      clips.append(_clip(clip, address, held, texts))
      clips[-1]["run"] = number
  titles = [f"step {step:,}" for step in steps] if by_step else labels
  flat = [clip for run in runs for clip in run.clips]
  return {
    "version": version.VERSION,
    "made": _now(),
    "columns": titles,
    "by_step": by_step,
    "texts": list(texts),
    "clips": clips,
    "rows": list(_rows(flat, keys, columns, len(titles), by_step)),
    "runs": [
      _run(run, label, home) for run, label in zip(runs, labels, strict=True)
    ],
  }


def _run(run: runfiles.Run, label: str, home: pathlib.Path) -> dict[str, Any]:
  """Returns what is told of a run as a whole."""
  return {
    "label": label,
    "folder": os.fspath(run.folder),
    "href": _address(run.folder, home) + "/",
    "facts": list(run.facts.items()),
    "left": run.left,
    "took": run.took,
    "curves": {
      name: [[_short(x) for x in axis] for axis in points.tolist()]
      for name, points in run.curves.items()
    },
    "goodput": _goodput(run.goodput),
    "evaluations": {
      name: {
        str(metric): {
          field: value if isinstance(value, str) else _finite(value)
          for field, value in result.items()
          if field in ("value", "low", "high", "n", "skipped", "name")
        }
        for metric, result in metrics.items()
        if isinstance(result, dict)
      }
      for name, metrics in run.evaluations.items()
    },
  }


def _clip(
  clip: runfiles.Clip,
  folder: str,
  posters: set[str],
  texts: dict[str, int],
) -> dict[str, Any]:
  """Returns a clip for the page; what is not known is left out.

  Args:
    clip: The clip.
    folder: The address of the run.
    posters: Those that the run has.
    texts: Prompts by number; new ones are added.
  """
  told = {
    "name": clip.name,
    "status": clip.status,
    "error": clip.error,
    "where": clip.where,
    "index": clip.index,
    "seed": clip.seed,
    "clip": clip.clip,
    "step": clip.step,
    "height": clip.height,
    "width": clip.width,
    "frames": clip.frames,
    "fps": clip.fps,
    "seconds": clip.seconds,
    "settings": clip.settings,
    "metrics": clip.metrics,
    "hash": clip.hashes.get("raw", "")[:12],
    "kind": clip.kind,
  }
  # Prompts are long, and every run has the same ones.
  for name in ("prompt", "negative_prompt"):
    if text := getattr(clip, name):
      told[name] = texts.setdefault(text, len(texts))
  if clip.source is not None:
    told["src"] = f"{folder}/{_quote(clip.source)}"
    poster = _poster(clip)
    if poster in posters:
      told["poster"] = f"{folder}/{POSTERS}/{_quote(poster)}"
  return {k: v for k, v in told.items() if v not in (None, "", {})}


def _posters(run: runfiles.Run, make: bool) -> set[str]:
  """Returns the names of a run's posters, in its folder of them."""
  held = set()
  folder = run.folder / POSTERS
  homes: dict[pathlib.Path, list[pathlib.Path]] = {}
  for clip in run.clips:
    if clip.kind == "video":
      step = "" if clip.step is None else str(clip.step)
      homes.setdefault(folder / step, []).append(run.folder / clip.source)
  for home, videos in homes.items():
    there = posters_lib.make(videos, home) if make else _names(home)
    held |= {(home / name).relative_to(folder).as_posix() for name in there}
  return held


def _poster(clip: runfiles.Clip) -> str:
  """Returns where in the folder of posters a clip's is."""
  stem = os.path.splitext(os.path.basename(clip.source))[0]
  name = f"{stem}.jpg"
  return name if clip.step is None else f"{clip.step}/{name}"


def _names(folder: pathlib.Path) -> set[str]:
  return set(os.listdir(folder)) if folder.is_dir() else set()


def _rows(
  clips: Sequence[runfiles.Clip],
  keys: Sequence[Any],
  columns: Sequence[int],
  count: int,
  by_step: bool,
) -> Iterator[dict[str, Any]]:
  """Yields rows of clips that belong together, by number; null is none.

  `match` is "same" or "differs" where hashes tell, else it is left out.
  """
  rows: dict[Any, list[int | None]] = {}
  for number, (key, column) in enumerate(zip(keys, columns, strict=True)):
    rows.setdefault(key, [None] * count)[column] = number
  for cells in rows.values():
    done = [clips[i] for i in cells if i is not None]
    row: dict[str, Any] = {"cells": cells}
    done = [clip for clip in done if clip.status == "done"]
    if count > 1 and not by_step and len(done) > 1:
      match = _match([clip.hashes for clip in done])
      if match is not None:
        row["match"] = match
    yield row


def _match(hashes: Sequence[dict[str, str]]) -> str | None:
  """Compares clips by their raw frames; else by files of the same kind."""
  common = set.intersection(*(set(h) for h in hashes))
  if not common:
    return None
  kinds = ["raw"] if "raw" in common else sorted(common)
  same = all(len({h[kind] for h in hashes}) == 1 for kind in kinds)
  return "same" if same else "differs"


def _labels(folders: Sequence[pathlib.Path]) -> list[str]:
  """Returns as much of the end of each path as tells it from the others."""
  for count in range(1, max(len(f.parts) for f in folders) + 1):
    labels = ["/".join(f.parts[-count:]) for f in folders]
    if len(set(labels)) == len(labels):
      return labels
  return [f"{label} ({i})" for i, label in enumerate(labels, 1)]


def _address(path: pathlib.Path, home: pathlib.Path) -> str:
  """Returns a relative URL; what begins with "./" names no host or scheme."""
  relative = os.path.relpath(path, home)
  return "." if relative == "." else f"./{_quote(relative)}"


def _quote(path: str) -> str:
  return urllib.parse.quote(os.fsencode(path), safe="/")


def _goodput(value: dict[str, Any]) -> dict[str, Any] | None:
  """Returns the seconds of training by what they went to, if they are told."""
  seconds = value.get("seconds")
  if not isinstance(seconds, dict):
    return None
  numbers = {str(k): _finite(v) for k, v in seconds.items()}
  return {
    "seconds": {k: v for k, v in numbers.items() if v},
    "goodput": _finite(value.get("goodput")),
    "starts": _finite(value.get("starts")),
    "step": _finite(value.get("step")),
  }


def _finite(value: Any) -> float | int | None:
  """Returns a number that JSON can hold, else None."""
  return runfiles.number(value, lambda x: x)


def _short(value: float) -> float | int:
  """Returns a number with as many digits as a curve shows."""
  return int(value) if value == int(value) else float(f"{value:.5g}")


def _hash(text: str) -> str:
  """Returns the hash by which a policy (CSP) admits what is within the page."""
  digest = hashlib.sha256(text.encode()).digest()
  return f"sha256-{base64.b64encode(digest).decode()}"


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
