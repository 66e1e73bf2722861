"""Says what a clip of moving shapes shows, from its pixels alone.

`judge` reads the clips of vidgen.data.moving_shapes, also blurred, noisy or a
little off in colour, as a network makes them. What it cannot read is "none":
there is no default that could be right by luck.
"""

import functools
import itertools
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage

from vidgen.data import moving_shapes

NONE = "none"
_OF_A_THING = ("colour", "shape", "size", "motion")
ATTRIBUTES = ("number", *_OF_A_THING, "background")

# Lengths are for frames of 64 pixels. Between colours: of 255, in RGB.
_BORDER = 3
_FOREGROUND = 54.0  # Half of the least contrast, purple on grey.
_SAME_COLOUR = 60.0
_KNOWN_COLOUR = 75.0
_LEAST_AREA = 20.0  # The smallest triangle has 32.

# Of the polar grid that shapes are compared on; the radius of a disc of the
# same area is 1, and 120 has whole thirds, quarters and fifths.
_RADII = (np.arange(17) + 0.5) * 0.1
_ANGLES = np.arange(120) * (2 * np.pi / 120)
_FOLDS = {"circle": 0, "square": 4, "triangle": 3, "star": 5}
_LEAST_OVERLAP, _LEAST_LEAD = 0.87, 0.025
_BLURS = (0.0, 0.18)  # Of the radius: 1.4 pixels of a small shape.

# A motion counts above the first and is absent below the second.
_SHIFT = (12.0, 6.0)
_GROWTH = (0.5, 0.25)  # Of the radius, a natural logarithm.
_TURN = (1.3, 0.6)  # Radians.
_RADIUS = (5.0, 19.0)  # What is neither small nor large is none of both.


class Seen(NamedTuple):
  """A thing as the judge sees it; an attribute that it cannot read is "none".

  Attributes:
    shape: One of `moving_shapes.SHAPES`.
    colour: One of `moving_shapes.COLOURS`.
    size: One of `moving_shapes.SIZES`.
    motion: One of `moving_shapes.MOTIONS`.
  """

  shape: str
  colour: str
  size: str
  motion: str


class Verdict(NamedTuple):
  """What a clip shows: a background, or "none", and things, largest first."""

  background: str
  things: tuple[Seen, ...]


def judge(frames: UInt8[np.ndarray, "F H W 3"]) -> Verdict:
  """Says what a clip shows."""
  pixels = frames.astype(np.float32)
  if len(pixels) < 3 or min(pixels.shape[1:3]) < 16:
    return Verdict(NONE, ())
  unit = min(pixels.shape[1:3]) / moving_shapes.SIZE
  border = _border(pixels, unit)
  ground = np.median(border, axis=1)
  difference = pixels - ground[:, None, None]
  masks = _separate(difference, unit)
  things = [
    _see(difference, ground, mask, _around(mask, masks), unit) for mask in masks
  ]
  return Verdict(_background(border, ground), tuple(things))


def match(verdict: Verdict, scene: moving_shapes.Scene) -> tuple[Seen, ...]:
  """Returns what is seen of each thing of a scene, in the scene's order.

  Things are told apart by their colours; by the rest only where those leave a
  choice. One that is not seen is all "none".
  """
  seen = list(verdict.things)
  seen += [Seen(NONE, NONE, NONE, NONE)] * (len(scene.things) - len(seen))

  def likeness(order: tuple[Seen, ...]) -> list[int]:
    right = [_right(*pair) for pair in zip(order, scene.things, strict=True)]
    return [sum(column) for column in zip(*right, strict=True)]

  return max(itertools.permutations(seen, len(scene.things)), key=likeness)


def agree(verdict: Verdict, scene: moving_shapes.Scene) -> dict[str, bool]:
  """Says which of `ATTRIBUTES` are as the scene has them, and if "all" are.

  Of two things, in any order, an attribute is right where both have it right.
  """
  pairs = zip(match(verdict, scene), scene.things, strict=True)
  right = zip(*(_right(*pair) for pair in pairs), strict=True)
  result = {"number": len(verdict.things) == len(scene.things)}
  result |= dict(zip(_OF_A_THING, map(all, right), strict=True))
  result["background"] = verdict.background == scene.background
  result["all"] = all(result.values())
  return result


def _right(seen: Seen, want: moving_shapes.Thing) -> list[bool]:
  return [getattr(seen, name) == getattr(want, name) for name in _OF_A_THING]


# --- Where things are -------------------------------------------------------


def _border(
  pixels: Float[np.ndarray, "F H W 3"], unit: float
) -> Float[np.ndarray, "F n 3"]:
  """The pixels along the edges of each frame."""
  height, width = pixels.shape[1:3]
  inside = np.zeros((height, width), bool)
  wide = max(1, round(_BORDER * unit))
  inside[wide:-wide, wide:-wide] = True
  return pixels[:, ~inside]


def _background(
  border: Float[np.ndarray, "F n 3"], ground: Float[np.ndarray, "F 3"]
) -> str:
  """The background's name, if it is flat and stays."""
  name = _nearest(np.median(ground, axis=0), moving_shapes.BACKGROUNDS)
  if name == NONE:
    return NONE
  colour = np.float32(moving_shapes.BACKGROUNDS[name])
  near = np.linalg.norm(border - colour, axis=-1) < _KNOWN_COLOUR
  flat = np.linalg.norm(border - ground[:, None], axis=-1) < _SAME_COLOUR
  return name if np.mean(near & flat) > 0.8 else NONE


def _nearest(colour: np.ndarray, palette: dict[str, tuple]) -> str:
  distances = {
    name: np.linalg.norm(colour - np.float32(value))
    for name, value in palette.items()
  }
  name = min(distances, key=distances.__getitem__)
  return name if distances[name] < _KNOWN_COLOUR else NONE


def _separate(
  difference: Float[np.ndarray, "F H W 3"], unit: float
) -> list[Bool[np.ndarray, "F H W"]]:
  """The pixels of each thing, the largest thing first."""
  # Without some smoothing, strong noise would join what is apart.
  smooth = ndimage.gaussian_filter(difference, (0, 0.7, 0.7, 0), truncate=2)
  found = np.linalg.norm(smooth, axis=-1) > _FOREGROUND
  labels, count = ndimage.label(found, np.ones((3, 3, 3)))
  sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
  things: list[tuple[np.ndarray, np.ndarray]] = []
  for label in np.argsort(-sizes)[:8]:
    if sizes[label] < _LEAST_AREA * unit**2:
      break
    for mask in _by_colour(difference, labels == label + 1, unit):
      _add(things, mask, _colour(difference, mask))
  least = _LEAST_AREA * unit**2
  kept = []
  for mask, _ in things:
    area = np.sum(mask, axis=(1, 2))
    # What shows for a moment is no thing.
    if np.mean(area > least / 2) > 0.25 and np.mean(area) > least:
      kept.append(mask)
  kept.sort(key=lambda mask: -np.sum(mask))
  return [m for m in kept if np.sum(m) > 0.1 * np.sum(kept[0])]


def _add(
  things: list[tuple[np.ndarray, np.ndarray]],
  mask: Bool[np.ndarray, "F H W"],
  colour: Float[np.ndarray, " 3"],
) -> None:
  """Adds a part: to a thing of its colour at other times, or as a new thing."""
  when = np.any(mask, axis=(1, 2))
  for i, (other, its_colour) in enumerate(things):
    together = np.sum(when & np.any(other, axis=(1, 2)))
    if together <= 1 and np.linalg.norm(colour - its_colour) < _SAME_COLOUR:
      things[i] = (other | mask, its_colour)
      return
  things.append((mask, colour))


def _by_colour(
  difference: Float[np.ndarray, "F H W 3"],
  mask: Bool[np.ndarray, "F H W"],
  unit: float,
) -> list[Bool[np.ndarray, "F H W"]]:
  """Parts a connected region where things of two colours touch."""
  # From the background, the way to a colour is that to its blurred edges too.
  inside = difference[mask]
  length = np.linalg.norm(inside, axis=-1, keepdims=True)
  ways = inside / np.maximum(length, 1)
  strong = length[:, 0] > 1.2 * _FOREGROUND
  first = _mean_way(ways[strong])
  far = strong & (ways @ first < 0.9)
  if np.mean(far) < 0.1:
    return [mask]
  second = _mean_way(ways[far])
  first = _mean_way(ways[strong & ~far]) if np.any(strong & ~far) else first
  if first @ second > 0.94:
    return [mask]
  parts = []
  nearer = ways @ first > ways @ second
  for chosen in (nearer, ~nearer):
    part = np.zeros_like(mask)
    part[mask] = chosen
    parts.append(part)
  # Seen at the same time, and more than a rim.
  cross = ndimage.generate_binary_structure(3, 1)
  cross[0] = cross[2] = False
  areas = [
    np.sum(ndimage.binary_opening(part, cross), axis=(1, 2)) for part in parts
  ]
  least = _LEAST_AREA * unit**2 / 2
  both = np.mean((areas[0] > least) & (areas[1] > least))
  return parts if both > 0.25 else [mask]


def _mean_way(ways: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, " 3"]:
  way = np.median(ways, axis=0) if len(ways) else np.zeros(3, np.float32)
  return (way / max(float(np.linalg.norm(way)), 1e-6)).astype(np.float32)


def _colour(
  difference: Float[np.ndarray, "F H W 3"], mask: Bool[np.ndarray, "F H W"]
) -> Float[np.ndarray, " 3"]:
  """A thing's colour less the background's, without its edges."""
  inside = difference[mask]
  length = np.linalg.norm(inside, axis=-1)
  return np.median(inside[length >= 0.8 * np.quantile(length, 0.8)], axis=0)


def _keeps_colour(
  difference: Float[np.ndarray, "F H W 3"],
  mask: Bool[np.ndarray, "F H W"],
  colour: Float[np.ndarray, " 3"],
) -> bool:
  """Says whether a thing has its colour in nearly all frames."""
  there = np.flatnonzero(np.any(mask, axis=(1, 2)))
  each = [_colour(difference[[i]], mask[[i]]) for i in there]
  near = np.linalg.norm(each - colour, axis=-1) < _SAME_COLOUR
  return bool(np.mean(near) > 0.8)


def _around(
  mask: Bool[np.ndarray, "F H W"], masks: list[Bool[np.ndarray, "F H W"]]
) -> Bool[np.ndarray, "F H W"]:
  """A thing's pixels and those just outside, without other things'."""
  others = [other for other in masks if other is not mask]
  wide = ndimage.binary_dilation(mask, np.ones((1, 5, 5)))
  return wide & ~np.any(others, axis=0) if others else wide


# --- What they are ----------------------------------------------------------


class _Track(NamedTuple):
  """A thing in each frame that shows it; lengths in 64ths of a frame."""

  time: Float[np.ndarray, " n"]
  x: Float[np.ndarray, " n"]
  y: Float[np.ndarray, " n"]
  radius: Float[np.ndarray, " n"]  # Of a disc of the same area.


def _see(
  difference: Float[np.ndarray, "F H W 3"],
  ground: Float[np.ndarray, "F 3"],
  mask: Bool[np.ndarray, "F H W"],
  near: Bool[np.ndarray, "F H W"],
  unit: float,
) -> Seen:
  """Reads a thing, whose edges are in `near`."""
  way = _colour(difference, mask)
  colour = _nearest(way + np.median(ground, axis=0), moving_shapes.COLOURS)
  if not _keeps_colour(difference, mask, way):
    colour = NONE
  # The share of each pixel that it covers.
  share = difference @ way / max(float(way @ way), 1.0)
  cover = np.where(near, _steepen(share), 0).astype(np.float32)
  area = np.sum(cover, axis=(1, 2))
  shown = area > _LEAST_AREA / 2 * unit**2
  if np.mean(shown) < 0.5:
    return Seen(NONE, colour, NONE, NONE)
  track, polar = _follow(cover, shown, unit)
  shape, turns = _shape(polar, track.radius)
  if np.mean(shown) < 0.8:
    return Seen(shape, colour, NONE, NONE)
  size = _size(shape, track)
  return Seen(shape, colour, size, _motion(shape, track, turns))


def _steepen(share: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
  """Makes edges steeper: less is left of blur, and none of weak noise."""
  return np.clip(2 * share - 0.5, 0, 1)


def _follow(
  cover: Float[np.ndarray, "F H W"], shown: Bool[np.ndarray, " F"], unit: float
) -> tuple[_Track, Float[np.ndarray, "n radii angles"]]:
  """Where a thing is, and its cover around its centre at each angle."""
  index = np.flatnonzero(shown)
  cover = cover[index]
  area = np.sum(cover, axis=(1, 2))
  y = np.sum(cover, axis=2) @ np.arange(cover.shape[1]) / area
  x = np.sum(cover, axis=1) @ np.arange(cover.shape[2]) / area
  radius = np.sqrt(area / np.pi)
  reach = radius[:, None, None] * _RADII[:, None]
  where = np.stack(
    np.broadcast_arrays(
      np.arange(len(index))[:, None, None],
      y[:, None, None] + reach * np.sin(_ANGLES),
      x[:, None, None] + reach * np.cos(_ANGLES),
    )
  )
  polar = ndimage.map_coordinates(cover, where, order=1)
  time = index / max(len(shown) - 1, 1)
  return _Track(time, x / unit, y / unit, radius / unit), polar


@functools.cache
def _templates() -> tuple[np.ndarray, dict[str, float]]:
  """Each shape in polar coordinates, sharp and blurred; and its size.

  Returns:
    Shape by blur by radius by angle; the radius of each shape by that of a
    disc of the same area.
  """
  size = 256
  unit = size / moving_shapes.SIZE
  templates, ratios = [], {}
  for shape in moving_shapes.SHAPES:
    radius = moving_shapes.SIZES["large"]
    thing = moving_shapes.Thing(
      shape, "red", "large", "still", (32.0, 32.0), 0.0
    )
    scene = moving_shapes.Scene("black", (thing,))
    red = moving_shapes.render(scene, 1, size)[..., 0].astype(np.float32)
    for blur in _BLURS:
      sigma = blur * radius * unit
      share = ndimage.gaussian_filter(red, (0, sigma, sigma))
      cover = _steepen(share / moving_shapes.COLOURS["red"][0])
      track, polar = _follow(cover, np.ones(1, bool), unit)
      templates.append(polar[0])
      ratios.setdefault(shape, radius / float(track.radius[0]))
  shape = (len(moving_shapes.SHAPES), len(_BLURS), *polar[0].shape)
  return np.reshape(templates, shape), ratios


def _shape(
  polar: Float[np.ndarray, "n radii angles"], radius: Float[np.ndarray, " n"]
) -> tuple[str, Float[np.ndarray, " n"]]:
  """A thing's shape, and how far it is turned in each frame, in radians."""
  templates, _ = _templates()
  weight = np.float32(_RADII)[:, None]
  spectrum = np.fft.rfft(polar * weight, axis=-1)
  theirs = np.fft.rfft(templates, axis=-1)
  # The product at each turn of each template.
  product = np.fft.irfft(
    np.einsum("nra,sbra->sbna", spectrum, theirs.conj()), len(_ANGLES), axis=-1
  )
  best = np.max(product, axis=-1)
  own = np.sum(polar**2 * weight, axis=(1, 2))
  full = own + np.sum(templates**2 * weight, axis=(2, 3))[..., None]
  # Intersection over union, softly; a large shape is clearer than a small one.
  overlap = np.average(best / (full - best), axis=-1, weights=radius**2)
  scores = np.max(overlap, axis=1)
  second, first = np.argsort(scores)[-2:]
  blur = np.argmax(overlap[first])
  turns = _ANGLES[np.argmax(product[first, blur], axis=-1)]
  clear = scores[first] - scores[second] > _LEAST_LEAD
  if scores[first] < _LEAST_OVERLAP or not clear:
    return NONE, turns
  return moving_shapes.SHAPES[first], turns


def _size(shape: str, track: _Track) -> str:
  """Small or large, by the radius halfway through the clip."""
  if shape == NONE:
    return NONE
  middle = _fit(track.time, track.radius)[0] * _templates()[1][shape]
  if not _RADIUS[0] < middle < _RADIUS[1]:
    return NONE
  return min(
    moving_shapes.SIZES,
    key=lambda name: abs(np.log(middle / moving_shapes.SIZES[name])),
  )


def _fit(
  time: Float[np.ndarray, " n"], value: Float[np.ndarray, " n"]
) -> tuple[float, float, float]:
  """A line's value halfway, its change in a clip, and what it leaves (RMS)."""
  slope, middle = np.polyfit(time - 0.5, value, 1)
  rest = value - middle - slope * (time - 0.5)
  return float(middle), float(slope), float(np.sqrt(np.mean(rest**2)))


def _motion(shape: str, track: _Track, turns: Float[np.ndarray, " n"]) -> str:
  """The one motion there is; "none" if it is unclear or there are two."""
  _, dx, rest_x = _fit(track.time, track.x)
  _, dy, rest_y = _fit(track.time, track.y)
  middle, growth, rest_radius = _fit(track.time, track.radius)
  # Of the last radius by the first; a line may end below nothing.
  ends = np.maximum([middle + growth / 2, middle - growth / 2], 0.1)
  growth = float(np.log(ends[0] / ends[1]))
  turn, rest_turn = 0.0, 0.0
  if shape != NONE and _FOLDS[shape]:
    period = 2 * np.pi / _FOLDS[shape]
    _, turn, rest_turn = _fit(track.time, np.unwrap(turns, period=period))
  shift, rest_shift = float(np.hypot(dx, dy)), float(np.hypot(rest_x, rest_y))
  moves, grows = shift > _SHIFT[0], abs(growth) > _GROWTH[0]
  turning = abs(turn) > _TURN[0]
  if moves + grows + turning > 1:
    return NONE
  if moves:
    return NONE if rest_shift > 0.12 * shift else _direction(dx, dy)
  if grows:
    if rest_radius > 0.12 * middle:
      return NONE
    return "grow" if growth > 0 else "shrink"
  if turning:
    return NONE if rest_turn > 0.3 else "spin"
  still = (
    shape != NONE
    and shift < _SHIFT[1]
    and abs(growth) < _GROWTH[1]
    and abs(turn) < _TURN[1]
    and rest_shift < _SHIFT[1] / 2
    and rest_radius < 0.12 * middle
    and rest_turn < 0.3
  )
  return "still" if still else NONE


def _direction(dx: float, dy: float) -> str:
  length = np.hypot(dx, dy)
  likeness = {
    name: (x * dx + y * dy) / (np.hypot(x, y) * length)
    for name, (x, y) in moving_shapes.DIRECTIONS.items()
  }
  return max(likeness, key=likeness.__getitem__)
