"""Orbits around simple solids: procedural, labelled, of any number.

A clip goes once around a convex solid, each face of which has a colour of its
own. The camera and the light are known exactly: a ray of each sample of a pixel
is cut with the planes of the faces, so that what is seen follows from the
labels alone. The light stands still beside the solid, and so each face looks
the same from everywhere.

The world has z up and the solid around its origin. At azimuth 0 the camera
stands on the side of x, and goes towards y.
"""

import dataclasses
import math
import zlib

import numpy as np
from jaxtyping import Float, UInt8

NUM_FRAMES, SIZE, FPS = 21, 64, 7

# Blattmann et al., https://arxiv.org/abs/2311.15127, appendix D.6; degrees.
ELEVATIONS = (-5.0, 30.0)
COLOURS = {
  "red": (230, 40, 40),
  "green": (40, 180, 60),
  "blue": (50, 80, 235),
  "yellow": (245, 220, 40),
  "purple": (150, 50, 200),
  "orange": (250, 140, 20),
  "cyan": (40, 210, 225),
  "pink": (255, 150, 190),
}
BACKGROUND = (255, 255, 255)

_DISTANCE = 4.0  # Of the camera, in radii of the largest solid.
_HALF_WIDTH = 1.15  # What is seen at the solid's distance, either way.
_LIGHT = (0.36, 0.48, 0.8)  # Where it comes from, of length 1.
_AMBIENT = 0.5
_SAMPLES = 4  # Of a pixel, along each side.
_HELD_OUT = 8  # One combination in so many.


def _regular(count: int, height: float) -> list[tuple[float, float, float]]:
  """Normals of `count` faces around the z axis, `height` their z, unscaled."""
  turns = [2 * math.pi * i / count for i in range(count)]
  return [(math.cos(t), math.sin(t), height) for t in turns]


# The normals of each solid's faces, and how far a face is from the centre, in
# units of the distance of the corners. Faces around come before top and bottom.
_ENDS = [(0.0, 0.0, 1.0), (0.0, 0.0, -1.0)]
_DIAGONAL = 1 / math.sqrt(2)
_SOLIDS: dict[str, tuple[list[tuple[float, float, float]], list[float]]] = {
  "cube": (_regular(4, 0.0) + _ENDS, [3**-0.5] * 6),
  "tetrahedron": (
    _regular(3, 8**-0.5) + _ENDS[1:],
    [1 / 3] * 4,
  ),
  "octahedron": (
    _regular(4, _DIAGONAL) + _regular(4, -_DIAGONAL),
    [3**-0.5] * 8,
  ),
  # Its corners: a triangle of radius 0.8, 0.6 above and below the centre.
  "prism": (_regular(3, 0.0) + _ENDS, [0.4] * 3 + [0.6] * 2),
}
SOLIDS = tuple(_SOLIDS)


@dataclasses.dataclass(frozen=True)
class Scene:
  """What a clip shows.

  Attributes:
    solid: One of `SOLIDS`.
    colours: Of its faces, names in `COLOURS`, no two alike.
    radius: Of its corners.
    turn: By which the solid is turned around z, in degrees.
    elevation: Of the camera above the horizon, in degrees.
  """

  solid: str
  colours: tuple[str, ...]
  radius: float
  turn: float
  elevation: float


def num_faces(solid: str) -> int:
  """Returns how many faces a solid has."""
  return len(_SOLIDS[solid][0])


def is_held_out(solid: str, colours: tuple[str, ...]) -> bool:
  """Says whether a combination is kept from the training split.

  The solid and the colours of two of its faces, neighbours, decide.
  """
  text = " ".join((solid, *colours[:2]))
  return zlib.crc32(text.encode()) % _HELD_OUT == 0


def azimuths(num_frames: int) -> Float[np.ndarray, " F"]:
  """Returns where the camera stands in each frame of an orbit, in degrees."""
  return 360.0 * np.arange(num_frames) / num_frames


def draw_scene(rng: np.random.Generator, *, held_out: bool = False) -> Scene:
  """Draws a scene.

  Args:
    rng: Of the clip alone.
    held_out: Whether solid and colours are a held-out combination.
  """
  while True:
    solid = str(rng.choice(SOLIDS))
    colours = rng.permutation(list(COLOURS))[: num_faces(solid)]
    colours = tuple(str(colour) for colour in colours)
    if is_held_out(solid, colours) == held_out:
      break
  return Scene(
    solid,
    colours,
    radius=float(rng.uniform(0.8, 1.0)),
    turn=float(rng.uniform(0, 360)),
    elevation=float(rng.uniform(*ELEVATIONS)),
  )


def render(
  scene: Scene, num_frames: int = NUM_FRAMES, size: int = SIZE
) -> UInt8[np.ndarray, "F H W 3"]:
  """Renders an orbit, whose frame 0 is seen from azimuth 0."""
  return render_at(scene, azimuths(num_frames), size)


def render_at(
  scene: Scene, azimuth: Float[np.ndarray, " F"], size: int = SIZE
) -> UInt8[np.ndarray, "F H W 3"]:
  """Renders a scene from some azimuths, in degrees, with smooth edges."""
  normals, offsets = _planes(scene)
  palette = _palette(scene, normals)
  frames = [_frame(scene, normals, offsets, palette, a, size) for a in azimuth]
  return np.stack(frames)


def _planes(
  scene: Scene,
) -> tuple[Float[np.ndarray, "k 3"], Float[np.ndarray, " k"]]:
  """The solid is where normal · point is at most the offset, for all faces."""
  normals, offsets = (np.array(x) for x in _SOLIDS[scene.solid])
  normals /= np.linalg.norm(normals, axis=1, keepdims=True)
  turn = np.radians(scene.turn)
  cos, sin = np.cos(turn), np.sin(turn)
  around_z = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
  return normals @ around_z.T, scene.radius * offsets


def _palette(
  scene: Scene, normals: Float[np.ndarray, "k 3"]
) -> Float[np.ndarray, "k+1 3"]:
  """What each face looks like: Lambert's law; the background comes last."""
  colours = np.array([COLOURS[name] for name in scene.colours], np.float32)
  lit = np.maximum(normals @ np.array(_LIGHT), 0)
  shade = _AMBIENT + (1 - _AMBIENT) * lit
  shaded = colours * shade[:, None].astype(np.float32)
  return np.concatenate([shaded, np.float32([BACKGROUND])])


def _frame(scene, normals, offsets, palette, azimuth, size):
  """One frame, `H W 3`."""
  a, e = np.radians(azimuth), np.radians(scene.elevation)
  outwards = np.array([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)])
  right = np.array([-np.sin(a), np.cos(a), 0.0])
  up = np.cross(outwards, right)
  count = size * _SAMPLES
  at = ((np.arange(count) + 0.5) / count * 2 - 1) * (_HALF_WIDTH / _DISTANCE)
  at = at.astype(np.float32)
  # A ray is camera + t (x right - y up - outwards). It enters the solid through
  # the last of the planes that it meets from outside, if it has left none yet.
  # A frame of all faces at once is slower: the axis of faces is short.
  first = np.full((count, count), -np.inf, np.float32)
  last, face = -first, np.full((count, count), len(normals), np.int8)
  for i, (normal, offset) in enumerate(zip(normals, offsets, strict=True)):
    along = lambda axis, n=normal: np.float32(n @ axis)
    speed = at[None, :] * along(right) - at[:, None] * along(up)
    speed -= along(outwards)
    with np.errstate(divide="ignore"):
      meets = np.float32(offset - _DISTANCE * along(outwards)) / speed
    enters = speed < 0
    later = enters & (meets > first)
    first[later], face[later] = meets[later], i
    np.minimum(last, meets, out=last, where=~enters)
  face[first >= last] = len(normals)
  pixels = palette[face]
  pixels = pixels.reshape(size, _SAMPLES, size, _SAMPLES, 3).mean(axis=(1, 3))
  return np.round(pixels).astype(np.uint8)


_TURNS = (
  "the camera goes around {}", "the camera orbits {}", "{} is seen all around",
  "{} turns around", "an orbit around {}", "a turntable video of {}",
)  # fmt: skip
_ABOVE = ((5.0, "from the side"), (18.0, "from a little above"))
_HIGHEST = "from above"


def caption(rng: np.random.Generator, scene: Scene) -> str:
  """Draws a caption: the solid, and mostly its height or its colours."""
  noun = scene.solid
  if rng.random() < 0.5:
    noun = f"{rng.choice(['colourful', 'many-coloured', 'small'])} {noun}"
  article = "an" if noun[0] in "aeiou" else "a"
  noun = f"{article} {noun}"
  if rng.random() < 0.5:
    *most, last = scene.colours[:3]
    noun = f"{noun} with {', '.join(most)} and {last} faces"
  text = str(rng.choice(_TURNS)).format(noun)
  if rng.random() < 0.5:
    heights = [name for most, name in _ABOVE if scene.elevation < most]
    text = f"{text}, {[*heights, _HIGHEST][0]}"
  if rng.random() < 0.7:
    text = text[0].upper() + text[1:]
  return text + str(rng.choice(["", "."]))


def words() -> list[str]:
  """Returns every word that a caption may hold, sorted."""
  texts = [
    *SOLIDS, *COLOURS, *_TURNS, *(name for _, name in _ABOVE), _HIGHEST,
    "a an the with and faces colourful many-coloured small",
  ]  # fmt: skip
  found = {word for text in texts for word in text.split()}
  return sorted(found - {"{}"})
