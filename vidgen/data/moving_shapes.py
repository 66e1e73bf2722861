"""Clips of moving shapes with captions: procedural, labelled, of any number.

A clip shows one or two flat shapes on a flat background, each with a colour, a
size and a motion; its captions say so in many phrasings. What a caption leaves
out has a default (a black background, a large shape, the middle of the frame),
so that a caption decides the clip up to a pixel or so. Some combinations of
shape, colour and motion are held out: the training split never shows them.
"""

import dataclasses
import zlib

import numpy as np
from jaxtyping import Float, UInt8

NUM_FRAMES, SIZE, FPS = 17, 64, 8

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {
  "red": (230, 40, 40),
  "green": (40, 180, 60),
  "blue": (50, 80, 235),
  "yellow": (245, 220, 40),
  "purple": (150, 50, 200),
  "orange": (250, 140, 20),
  "cyan": (40, 210, 225),
}
BACKGROUNDS = {
  "black": (0, 0, 0),
  "white": (255, 255, 255),
  "grey": (128, 128, 128),
}
SIZES = {"small": 8.0, "large": 13.0}
# Where a motion leads, in units of its reach along x and y (down is positive).
DIRECTIONS = {
  "right": (1, 0),
  "left": (-1, 0),
  "up": (0, -1),
  "down": (0, 1),
  "up right": (1, -1),
  "up left": (-1, -1),
  "down right": (1, 1),
  "down left": (-1, 1),
}
MOTIONS = (*DIRECTIONS, "still", "grow", "shrink", "spin")
# Two objects keep to lanes of their own.
_LANE_MOTIONS = {
  "horizontal": ("right", "left", "still", "grow", "shrink", "spin"),
  "vertical": ("up", "down", "still", "grow", "shrink", "spin"),
}

_SCALES = {"grow": (0.5, 1.5), "shrink": (1.5, 0.5)}
_TURN = np.pi  # Radians that a spinning shape turns in a clip, clockwise.
_HELD_OUT = 8  # One combination in so many.


@dataclasses.dataclass(frozen=True)
class Thing:
  """A shape in a clip.

  Attributes:
    shape: One of `SHAPES`.
    colour: One of `COLOURS`.
    size: One of `SIZES`.
    motion: One of `MOTIONS`.
    centre: Where it is halfway through the clip, x and y in pixels.
    reach: How far it moves from there, either way, in pixels.
  """

  shape: str
  colour: str
  size: str
  motion: str
  centre: tuple[float, float]
  reach: float


@dataclasses.dataclass(frozen=True)
class Scene:
  """What a clip shows: a background and one or two things."""

  background: str
  things: tuple[Thing, ...]


def is_held_out(shape: str, colour: str, motion: str) -> bool:
  """Says whether a combination is kept from the training split."""
  text = f"{shape} {colour} {motion}"
  return zlib.crc32(text.encode()) % _HELD_OUT == 0


def is_legal(shape: str, motion: str) -> bool:
  """Says whether the motion of the shape can be seen: a circle's spin can't."""
  return not (shape == "circle" and motion == "spin")


def draw_scene(
  rng: np.random.Generator,
  *,
  held_out: bool = False,
  two: bool = False,
  backgrounds: tuple[str, ...] = tuple(BACKGROUNDS),
  motions: tuple[str, ...] = MOTIONS,
) -> Scene:
  """Draws a scene.

  Args:
    rng: Of the clip alone.
    held_out: Whether the first thing is a held-out combination; all others are
      not.
    two: Two things rather than one.
    backgrounds: What to choose from.
    motions: What to choose from.
  """
  background = str(rng.choice(backgrounds))
  if not two:
    return Scene(background, (_draw_one(rng, motions, held_out),))
  way = str(rng.choice(list(_LANE_MOTIONS)))
  lanes = [18.0, 46.0]
  things: list[Thing] = []
  for lane in lanes:
    allowed = tuple(m for m in _LANE_MOTIONS[way] if m in motions)
    while True:
      thing = _draw_one(rng, allowed, held_out and not things)
      if all(thing.colour != other.colour for other in things):
        break
    along = 32.0 + rng.uniform(-1, 1)
    centre = (along, lane) if way == "horizontal" else (lane, along)
    things.append(
      dataclasses.replace(thing, size="small", centre=centre, reach=16.0)
    )
  return Scene(background, tuple(things))


def _draw_one(
  rng: np.random.Generator, motions: tuple[str, ...], held_out: bool
) -> Thing:
  while True:
    shape, motion = str(rng.choice(SHAPES)), str(rng.choice(motions))
    colour, size = str(rng.choice(list(COLOURS))), str(rng.choice(list(SIZES)))
    if not is_legal(shape, motion):
      continue
    if is_held_out(shape, colour, motion) == held_out:
      break
  centre = (32.0 + rng.uniform(-1, 1), 32.0 + rng.uniform(-1, 1))
  reach = 18.0 if size == "small" else 14.0
  return Thing(shape, colour, size, motion, centre, reach)


def render(
  scene: Scene, num_frames: int = NUM_FRAMES, size: int = SIZE
) -> UInt8[np.ndarray, "F H W 3"]:
  """Renders a scene, with smooth edges.

  Args:
    scene: What to show; its lengths are for 64 pixels.
    num_frames: Frames of the same two seconds.
    size: Height and width in pixels.
  """
  time = np.linspace(0, 1, num_frames) if num_frames > 1 else np.array([0.5])
  return render_at(scene, time, size)


def render_at(
  scene: Scene, time: Float[np.ndarray, " F"], size: int = SIZE
) -> UInt8[np.ndarray, "F H W 3"]:
  """Renders the frames at `time`, in [0, 1] from the start to the end."""
  shape = (len(time), size, size, 3)
  frames = np.empty(shape, np.float32)
  frames[:] = BACKGROUNDS[scene.background]
  grid = (np.arange(size, dtype=np.float32) + 0.5) * (SIZE / size)
  for thing in scene.things:
    cover = _cover(thing, time.astype(np.float32), grid)[..., None]
    frames += cover * (np.float32(COLOURS[thing.colour]) - frames)
  return np.round(frames).astype(np.uint8)


def _cover(
  thing: Thing, time: np.ndarray, grid: np.ndarray
) -> Float[np.ndarray, "F H W"]:
  """The share of each pixel that a thing covers."""
  dx, dy = DIRECTIONS.get(thing.motion, (0, 0))
  # A diagonal takes the same way as the others.
  reach = thing.reach * (0.8 if dx and dy else 1.0)
  way = (2 * time - 1) * reach
  x = grid[None, None, :] - (thing.centre[0] + dx * way)[:, None, None]
  y = grid[None, :, None] - (thing.centre[1] + dy * way)[:, None, None]
  first, last = _SCALES.get(thing.motion, (1.0, 1.0))
  radius = SIZES[thing.size] * (first + (last - first) * time)
  radius = radius[:, None, None].astype(np.float32)
  if thing.motion == "spin":
    cos, sin = np.cos(_TURN * time), np.sin(_TURN * time)
    cos, sin = cos[:, None, None], sin[:, None, None]
    x, y = cos * x + sin * y, cos * y - sin * x
  pixel = grid[1] - grid[0]
  return np.clip(0.5 - _DISTANCES[thing.shape](x, y, radius) / pixel, 0, 1)


def _circle(x, y, r):
  return np.hypot(x, y) - r


def _square(x, y, r):
  return np.maximum(np.abs(x), np.abs(y)) - 0.88 * r


def _triangle(x, y, r):
  """Equilateral, a corner up; the distance from the nearest of its lines."""
  inner = 0.62 * r
  slope = np.abs(x) * np.float32(3**0.5 / 2) - y * np.float32(0.5)
  return np.maximum(slope, y) - inner


def _star(x, y, r):
  """Five points, one up; the distance from the line of the nearest edge."""
  outer, inner = 1.3 * r, 0.55 * r
  # Folded into the half of a point: an edge from (0, -outer) to the notch.
  fifth = 2 * np.pi / 5
  angle = np.arctan2(x, -y)
  angle = np.abs((angle + fifth / 2) % fifth - fifth / 2)
  length = np.hypot(x, y)
  u, v = length * np.sin(angle), length * np.cos(angle)
  notch = np.sin(np.pi / 5) * inner, np.cos(np.pi / 5) * inner
  ex, ey = notch[0], notch[1] - outer
  norm = np.hypot(ex, ey)
  return (u * -ey + (v - outer) * ex) / norm


_DISTANCES = {
  "circle": _circle,
  "square": _square,
  "triangle": _triangle,
  "star": _star,
}


# --- Captions ---------------------------------------------------------------

_MOVE = (
  "moves moving", "slides sliding", "drifts drifting", "glides gliding",
  "travels travelling", "goes going", "floats floating", "flies flying",
  "shifts shifting", "heads heading", "moves moving", "moves moving",
)  # fmt: skip
_WAYS = {
  "right": (
    "right", "to the right", "rightwards", "towards the right",
    "to the right side", "from left to right", "from the left to the right",
  ),
  "left": (
    "left", "to the left", "leftwards", "towards the left",
    "to the left side", "from right to left", "from the right to the left",
  ),
  "up": (
    "up", "upwards", "to the top", "upward", "towards the top",
    "from bottom to top", "from the bottom to the top",
  ),
  "down": (
    "down", "downwards", "to the bottom", "downward", "towards the bottom",
    "from top to bottom", "from the top to the bottom",
  ),
  "up right": (
    "diagonally up and to the right", "up and to the right",
    "diagonally up right", "to the upper right", "diagonally to the top right",
  ),
  "up left": (
    "diagonally up and to the left", "up and to the left",
    "diagonally up left", "to the upper left", "diagonally to the top left",
  ),
  "down right": (
    "diagonally down and to the right", "down and to the right",
    "diagonally down right", "to the lower right",
    "diagonally to the bottom right",
  ),
  "down left": (
    "diagonally down and to the left", "down and to the left",
    "diagonally down left", "to the lower left",
    "diagonally to the bottom left",
  ),
}  # fmt: skip
_VERBS = {
  "still": (
    "stays still|staying still", "does not move|not moving",
    "stands still|standing still", "remains still|remaining still",
    "is still|being still", "stays in place|staying in place",
    "is motionless|motionless", "is stationary|stationary",
    "is not moving|not moving", "stays where it is|staying where it is",
  ),
  "grow": (
    "grows|growing", "gets bigger|getting bigger",
    "becomes larger|becoming larger", "expands|expanding",
    "grows larger|growing larger", "gets larger|getting larger",
    "becomes bigger|becoming bigger",
  ),
  "shrink": (
    "shrinks|shrinking", "gets smaller|getting smaller",
    "becomes smaller|becoming smaller", "contracts|contracting",
    "shrinks away|shrinking away",
  ),
  "spin": (
    "spins|spinning", "rotates|rotating", "turns around|turning around",
    "spins in place|spinning in place", "spins around|spinning around",
    "turns in place|turning in place",
  ),
}  # fmt: skip
# Before a clause, and before a phrase without a finite verb.
_LEADS = (
  ("a video in which", "a clip in which"),
  ("a video of", "a clip of", "video of", "a video showing"),
)
_SIZE_WORDS = {
  "small": ("small", "little", "tiny"),
  "large": ("large", "big", "huge"),
}
_COLOUR_WORDS = {"purple": ("purple", "violet"), "grey": ("grey", "gray")}


def caption(
  rng: np.random.Generator, scene: Scene, *, vague: bool = False
) -> str:
  """Draws a caption that says all of a scene that is not the default.

  With `vague` it may call a diagonal way just "diagonally", whichever it is.
  """
  parts = [
    _noun_phrase(rng, thing, alone=len(scene.things) == 1)
    for thing in scene.things
  ]
  vague = vague and rng.random() < 0.2
  form = int(rng.integers(3))
  if form == 2 and len(scene.things) == 1:
    text = _participle(rng, scene.things[0].motion, parts[0], vague)
  else:
    clauses = [
      f"{part} {_predicate(rng, thing.motion, form, vague)}"
      for part, thing in zip(parts, scene.things, strict=True)
    ]
    join = str(rng.choice([" and ", ", and ", " while "]))
    text = join.join(clauses)
  text = _with_background(rng, text, scene.background)
  if rng.random() < 0.1:
    lead = rng.choice(_LEADS[int(form == 2)])
    text = f"{lead} {text}"
  if rng.random() < 0.7:
    text = text[0].upper() + text[1:]
  return text + str(rng.choice(["", "", "."]))


def _noun_phrase(rng, thing: Thing, alone: bool) -> str:
  colour = str(rng.choice(_COLOUR_WORDS.get(thing.colour, (thing.colour,))))
  words = [colour, thing.shape]
  # Two things are always small; one is large unless its caption says small.
  if alone and (thing.size == "small" or rng.random() < 0.5):
    words.insert(0, str(rng.choice(_SIZE_WORDS[thing.size])))
  article = str(rng.choice(["a", "a", "the", "one", ""]))
  if article == "a" and words[0][0] in "aeiou":
    article = "an"
  return " ".join([article, *words]).strip()


def _predicate(rng, motion: str, form: int, vague: bool) -> str:
  """A finite clause, or "is moving ..." where `form` is 1."""
  if motion in _WAYS:
    finite, participle = str(rng.choice(_MOVE)).split()
    way = _way(rng, motion, vague)
    return f"is {participle} {way}" if form == 1 else f"{finite} {way}"
  finite, participle = str(rng.choice(_VERBS[motion])).split("|")
  if form == 1 and not finite.startswith(("is ", "does ")):
    return f"is {participle}"
  return finite


def _participle(rng, motion: str, noun: str, vague: bool) -> str:
  """A phrase without a finite verb: "a red circle moving right"."""
  if motion in _WAYS:
    word = str(rng.choice(_MOVE)).split()[1]
    return f"{noun} {word} {_way(rng, motion, vague)}"
  phrase = str(rng.choice(_VERBS[motion])).split("|")[1]
  if rng.random() < 0.5 and " " not in phrase:
    return f"a {phrase} {noun.removeprefix('a ').removeprefix('an ')}".replace(
      "the ", ""
    ).replace("one ", "")
  return f"{noun} {phrase}"


def _way(rng, motion: str, vague: bool) -> str:
  if vague and " " in motion:
    return "diagonally"
  return str(rng.choice(_WAYS[motion]))


def _with_background(rng, text: str, background: str) -> str:
  if background == "black" and rng.random() < 0.5:
    return text
  colour = str(rng.choice(_COLOUR_WORDS.get(background, (background,))))
  forms = [
    f"{text} on a {colour} background",
    f"{text} against a {colour} background",
    f"{text} on {colour}",
    f"{text}, {colour} background",
    f"on a {colour} background, {text}",
    f"{text} in front of a {colour} background",
    f"{text} with a {colour} background",
    f"{text} over a {colour} background",
    f"{text} on a {colour} backdrop",
  ]
  return str(rng.choice(forms))


def words() -> list[str]:
  """Returns every word that a caption may hold, sorted."""
  texts: list[str] = [
    *SHAPES, *COLOURS, *BACKGROUNDS, *SIZES, *_MOVE,
    *(way for ways in _WAYS.values() for way in ways),
    *(verb.replace("|", " ") for verbs in _VERBS.values() for verb in verbs),
    *(word for group in _SIZE_WORDS.values() for word in group),
    *(word for group in _COLOUR_WORDS.values() for word in group),
    "a an the one is and while on against background backdrop in front of",
    "with over video clip showing which",
  ]  # fmt: skip
  return sorted({word for text in texts for word in text.split()})
