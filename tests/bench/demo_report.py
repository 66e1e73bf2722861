r"""Measures how well a model of moving shapes does what its prompts say.

python tests/bench/demo_report.py [--checkpoint=demo] [--prompts=200] \
    [--sets=seen,unseen,two] [--batch_size=16] [--num_steps=N] \
    [--guidance_scale=X] [--sampler=NAME] [--seed=0] [--out=DIR] \
    [--reconstructions]

Samples a clip for each prompt of three sets and has the judge of
vidgen.metrics.moving_shapes read it: one object of combinations that training
shows (in clips that it does not), one object of combinations that it never
shows, and two objects. Prints a table with 95 % intervals (Wilson), and writes
report.json and contact sheets: the first 24 prompts, whatever came of them.
The judge also reads the true clips of the same prompts: what it misreads there
is its own error. --reconstructions has it read those clips after the
autoencoder instead, and prints their mean PSNR.
"""

import collections
import json
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont
from absl import app, flags

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))

import vidgen
from vidgen.data import moving_shapes
from vidgen.metrics import moving_shapes as judge

SETS = {
  "seen": dict(held_out=False, two=False),
  "unseen": dict(held_out=True, two=False),
  "two": dict(held_out=False, two=True),
}
NAMES = {
  "seen": "one object",
  "unseen": "one object, combination never shown",
  "two": "two objects",
}
COLUMNS = (*judge.ATTRIBUTES, "all")
_TRAIN_OFFSET = 2**31  # Keeps the draws of these sets apart from small seeds.

_CHECKPOINT = flags.DEFINE_string("checkpoint", "demo", "Folder or hub id.")
_PROMPTS = flags.DEFINE_integer("prompts", 200, "Prompts of each set.")
_SETS = flags.DEFINE_list("sets", list(SETS), "Which sets.")
_BATCH = flags.DEFINE_integer("batch_size", 16, "Clips sampled at a time.")
_STEPS = flags.DEFINE_integer("num_steps", None, "The model's own if None.")
_SCALE = flags.DEFINE_float("guidance_scale", None, "As num_steps.")
_SAMPLER = flags.DEFINE_string("sampler", None, "As num_steps.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the prompts and the noise.")
_OUT = flags.DEFINE_string("out", None, "Where report and sheets go.")
_RECONSTRUCTIONS = flags.DEFINE_bool(
  "reconstructions", False, "Judge the autoencoder instead."
)


# --- Prompts ----------------------------------------------------------------


@flags.validator("sets", f"Give some of {', '.join(SETS)}.")
def _known(names: list[str]) -> bool:
  return set(names) <= SETS.keys()


def prompts(
  n: int, seed: int, held_out: bool = False, two: bool = False
) -> list[tuple[str, moving_shapes.Scene]]:
  """Returns `n` different captions, each with a scene that it tells of.

  Each value of an attribute comes up about as often as the others: of several
  draws the one whose values were the rarest so far is taken.

  Args:
    n: How many; the first of a longer list are the shorter list.
    seed: The same seed gives the same list.
    held_out: Combinations that the training split never shows; of two objects,
      the first one's.
    two: Two objects in each.
  """
  rng = np.random.default_rng([_TRAIN_OFFSET, seed, held_out, two])
  counts: collections.Counter[tuple[str, str]] = collections.Counter()
  result: dict[str, moving_shapes.Scene] = {}
  while len(result) < n:
    draws = [
      moving_shapes.draw_scene(rng, held_out=held_out, two=two)
      for _ in range(8)
    ]
    scene = min(draws, key=lambda s: sum(_load(counts, v) for v in _values(s)))
    caption = moving_shapes.caption(rng, scene)
    if caption not in result:
      result[caption] = scene
      counts.update(_values(scene))
  return list(result.items())


_CLASSES = {
  "background": len(moving_shapes.BACKGROUNDS),
  "shape": len(moving_shapes.SHAPES),
  "colour": len(moving_shapes.COLOURS),
  "size": len(moving_shapes.SIZES),
  "motion": len(moving_shapes.MOTIONS),
}


def _values(scene: moving_shapes.Scene) -> list[tuple[str, str]]:
  """The attributes of a scene, by name and value."""
  names = ("shape", "colour", "size", "motion")
  things = [(k, getattr(thing, k)) for thing in scene.things for k in names]
  return [("background", scene.background), *things]


def _load(counts: collections.Counter, value: tuple[str, str]) -> float:
  return counts[value] * _CLASSES[value[0]]


# --- Sampling and scoring ---------------------------------------------------


def sample(
  pipeline: Any,
  captions: Sequence[str],
  batch_size: int = 16,
  seed: int = 0,
  **options: Any,
) -> Iterator[np.ndarray]:
  """Yields the clip of each caption, uint8 `F H W 3`.

  A caption's number is its clip's id, so that the batch size changes no noise.
  The last batch is filled up, to be compiled no second time, and cut.

  Args:
    pipeline: Has the `sample` of vidgen.Pipeline.
    captions: What to show.
    batch_size: How many at a time.
    seed: Of the noise.
    **options: Of `sample`; None is left to the model.
  """
  options = {k: v for k, v in options.items() if v is not None}
  batch_size = min(batch_size, len(captions))
  for start in range(0, len(captions), batch_size):
    chosen = list(captions[start : start + batch_size])
    filled = chosen + chosen[-1:] * (batch_size - len(chosen))
    clips = range(start, start + batch_size)
    frames = pipeline.sample(filled, seed=seed, clips=clips, **options)
    yield from frames[: len(chosen)]


def score(
  frames: Sequence[np.ndarray], scenes: Sequence[moving_shapes.Scene]
) -> dict[str, Any]:
  """Judges clips, uint8 `F H W 3`, by the scenes that they should show.

  Returns:
    "accuracy": {attribute or "all": rate}, "n", "motions" and "shapes": the
    rate of each class by thing; "confusion": {attribute: {want: {got: number}}}
    of the wrong; "clips": for each its "verdict" and "agree".
  """
  right: dict[str, list[bool]] = {name: [] for name in COLUMNS}
  classes: dict = {"motion": {}, "shape": {}}
  confusion: dict[str, dict[str, collections.Counter]] = {}
  clips = []

  def note(attribute: str, want: str, got: str) -> None:
    if attribute in classes:
      classes[attribute].setdefault(want, []).append(want == got)
    if want != got:
      of_attribute = confusion.setdefault(attribute, {})
      of_attribute.setdefault(want, collections.Counter())[got] += 1

  for clip, scene in zip(frames, scenes, strict=True):
    verdict = judge.judge(np.asarray(clip))
    agree = judge.agree(verdict, scene)
    clips.append({"verdict": verdict, "agree": agree})
    for name in COLUMNS:
      right[name].append(agree[name])
    note("background", scene.background, verdict.background)
    note("number", str(len(scene.things)), str(len(verdict.things)))
    matched = judge.match(verdict, scene)
    for thing, seen in zip(scene.things, matched, strict=True):
      for name in seen._fields:
        note(name, getattr(thing, name), getattr(seen, name))
  order = {"motion": moving_shapes.MOTIONS, "shape": moving_shapes.SHAPES}
  rates = {
    name: {k: rate(found[k]) for k in order[name] if k in found}
    for name, found in classes.items()
  }
  return {
    "n": len(clips),
    "accuracy": {name: rate(values) for name, values in right.items()},
    "motions": rates["motion"],
    "shapes": rates["shape"],
    "confusion": confusion,
    "clips": clips,
  }


def rate(right: Sequence[bool]) -> dict[str, float]:
  """Returns a rate and its 95 % interval, after Wilson (1927)."""
  n, k, z = len(right), int(np.sum(right)), 1.959964
  if not n:
    return {"n": 0, "right": 0, "rate": 0.0, "low": 0.0, "high": 1.0}
  p = k / n
  middle = (p + z * z / (2 * n)) / (1 + z * z / n)
  half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
  low, high = max(0.0, float(middle - half)), min(1.0, float(middle + half))
  return {"n": n, "right": k, "rate": p, "low": low, "high": high}


# --- Reporting --------------------------------------------------------------


def table(results: dict[str, dict[str, Any]]) -> str:
  """Returns the figures of each set as Markdown."""
  lines = [
    "| | n | " + " | ".join(COLUMNS) + " |",
    "|---|--:|" + "--:|" * len(COLUMNS),
  ]
  for name, result in results.items():
    cells = [_percent(result["accuracy"][column]) for column in COLUMNS]
    lines.append(f"| {name} | {result['n']} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


def details(result: dict[str, Any]) -> str:
  """Returns the rates of each motion and shape, and what was mistaken."""
  lines = []
  for title in ("motions", "shapes"):
    lines += ["", f"| {title} | n | right |", "|---|--:|--:|"]
    for name, value in result[title].items():
      lines.append(f"| {name} | {value['n']} | {_percent(value)} |")
  lines.append("")
  for attribute, wants in result["confusion"].items():
    for want, gots in wants.items():
      text = ", ".join(f"{got} {n}" for got, n in gots.most_common())
      lines.append(f"{attribute}: {want} taken for: {text}")
  return "\n".join(lines)


def _percent(value: dict[str, float]) -> str:
  low, high = 100 * value["low"], 100 * value["high"]
  return f"{100 * value['rate']:.1f} ({low:.1f}-{high:.1f})"


def contact_sheet(
  frames: Sequence[np.ndarray],
  captions: Sequence[str],
  clips: Sequence[dict[str, Any]],
  columns: int = 2,
  side: int = 96,
  shown: int = 5,
) -> PIL.Image.Image:
  """Draws clips in their order: caption, what the judge says, some frames.

  Args:
    frames: Each clip, uint8 `F H W 3`.
    captions: Of each clip.
    clips: Of each clip, its part of `score`'s "clips".
    columns: Clips in a row.
    side: Width of a drawn frame in pixels.
    shown: Frames of each clip, from the first to the last.
  """
  line, gap = 14, 12
  width, height = shown * (side + 2), 4 * line + side + gap
  rows = -(-len(frames) // columns)
  size = (columns * (width + gap) + gap, rows * height + gap)
  sheet = PIL.Image.new("RGB", size, (238, 238, 232))
  draw = PIL.ImageDraw.Draw(sheet)
  font = PIL.ImageFont.load_default(size=11)
  for i, (clip, caption, found) in enumerate(
    zip(frames, captions, clips, strict=True)
  ):
    left = gap + i % columns * (width + gap)
    top = gap + i // columns * height
    wrong = [k for k in judge.ATTRIBUTES if not found["agree"][k]]
    colour = (170, 30, 30) if wrong else (20, 110, 40)
    said = say(found["verdict"])
    said += f" - wrong: {', '.join(wrong)}" if wrong else " - right"
    text = [
      *_wrap(draw, f"{i + 1}. {caption}", font, width)[:2],
      *_wrap(draw, said, font, width)[:2],
    ]
    split = len(_wrap(draw, f"{i + 1}. {caption}", font, width)[:2])
    for row, words in enumerate(text):
      ink = (30, 30, 30) if row < split else colour
      draw.text((left, top + row * line), words, fill=ink, font=font)
    chosen = np.linspace(0, len(clip) - 1, shown).round().astype(int)
    for column, frame in enumerate(clip[chosen]):
      picture = PIL.Image.fromarray(frame).resize((side, side))
      sheet.paste(picture, (left + column * (side + 2), top + 4 * line))
  return sheet


def _wrap(draw, text: str, font, width: int) -> list[str]:
  lines = [""]
  for word in text.split():
    longer = f"{lines[-1]} {word}".strip()
    if draw.textlength(longer, font=font) > width and lines[-1]:
      lines.append(word)
    else:
      lines[-1] = longer
  return lines


def say(verdict: judge.Verdict) -> str:
  """Returns a verdict in words."""
  things = [
    f"{thing.size} {thing.colour} {thing.shape}, {thing.motion}"
    for thing in verdict.things
  ]
  return f"{' + '.join(things) or 'nothing'}; on {verdict.background}"


def psnr(want: np.ndarray, got: np.ndarray) -> float:
  """Returns the peak signal-to-noise ratio of two uint8 clips in dB."""
  error = np.mean((want.astype(np.float64) - got.astype(np.float64)) ** 2)
  return float(10 * np.log10(255**2 / max(error, 1e-10)))


def reconstruct(
  pipeline: Any, frames: Sequence[np.ndarray], batch_size: int = 16
) -> Iterator[np.ndarray]:
  """Yields each clip, uint8 `F H W 3`, after encoding and decoding."""
  for start in range(0, len(frames), batch_size):
    batch = np.stack(frames[start : start + batch_size])
    latents = pipeline.encode(batch.astype(np.float32) / 127.5 - 1)
    yield from pipeline.decode(latents)


def main(_) -> None:
  pipeline = vidgen.load(_CHECKPOINT.value, dtype="float32")
  out = pathlib.Path(_OUT.value) if _OUT.value else None
  if out:
    out.mkdir(parents=True, exist_ok=True)
  results: dict[str, dict[str, Any]] = {}
  figures: dict[str, Any] = {"seed": _SEED.value}
  for name in _SETS.value:
    pairs = prompts(_PROMPTS.value, _SEED.value, **SETS[name])
    captions, scenes = zip(*pairs, strict=True)
    true = [moving_shapes.render(scene) for scene in scenes]
    results[f"{NAMES[name]}: the true clips"] = score(true, scenes)
    start = time.perf_counter()
    if _RECONSTRUCTIONS.value:
      frames = list(reconstruct(pipeline, true, _BATCH.value))
      mean = float(np.mean([psnr(*p) for p in zip(true, frames, strict=True)]))
      figures[f"{name}_psnr"] = mean
      print(f"{NAMES[name]}: reconstructions have {mean:.2f} dB")
    else:
      options = dict(
        num_steps=_STEPS.value,
        guidance_scale=_SCALE.value,
        sampler=_SAMPLER.value,
      )
      frames = list(
        sample(pipeline, captions, _BATCH.value, _SEED.value, **options)
      )
    figures[f"{name}_seconds"] = time.perf_counter() - start
    results[NAMES[name]] = score(frames, scenes)
    print(f"\n## {NAMES[name]}\n{details(results[NAMES[name]])}", flush=True)
    if out:
      clips = results[NAMES[name]]["clips"][:24]
      sheet = contact_sheet(frames[:24], captions[:24], clips)
      suffix = "" if name == "seen" else f"_{name}"
      sheet.save(out / f"contact_sheet{suffix}.png")
      figures[f"{name}_captions"] = captions
  print(f"\n{table(results)}")
  if out:
    text = json.dumps(figures | {"results": results}, indent=1)
    (out / "report.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
  app.run(main)
