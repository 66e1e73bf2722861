import dataclasses
import itertools

import numpy as np
import pytest

from vidgen import errors, prepare
from vidgen.data import builders, codec, orbiting_solids, records

SOLIDS = orbiting_solids.SOLIDS


def make(solid="cube", **fields):
  count = orbiting_solids.num_faces(solid)
  fields = {"radius": 1.0, "turn": 0.0, "elevation": 0.0, **fields}
  colours = tuple(orbiting_solids.COLOURS)[:count]
  return orbiting_solids.Scene(solid, colours, **fields)


def one(scene, azimuth=0.0, size=64):
  return orbiting_solids.render_at(scene, np.array([azimuth]), size)[0]


def is_solid(frame):
  return (frame != np.array(orbiting_solids.BACKGROUND)).any(-1)


def corners(solid):
  """Where three faces meet, from the planes of the faces."""
  normals, offsets = orbiting_solids._planes(make(solid))
  found = set()
  for three in itertools.combinations(range(len(normals)), 3):
    rows = normals[list(three)]
    if abs(np.linalg.det(rows)) > 1e-6:
      point = np.linalg.solve(rows, offsets[list(three)])
      if (normals @ point <= offsets + 1e-9).all():
        found.add(tuple(np.round(point, 6) + 0.0))
  return np.array(sorted(found))


@pytest.mark.parametrize(
  ("solid", "count"),
  [("cube", 8), ("tetrahedron", 4), ("octahedron", 6), ("prism", 6)],
)
def test_solids_are_what_they_are_called(solid, count):
  points = corners(solid)
  assert len(points) == count
  np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("solid", SOLIDS)
@pytest.mark.parametrize("azimuth", [0.0, 50.0])
def test_the_outline_is_that_of_the_corners(solid, azimuth):
  """A pinhole at distance 4, projected by hand."""
  scene = make(solid, elevation=20.0)
  a, e = np.radians(azimuth), np.radians(20.0)
  out = np.array([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)])
  right = np.array([-np.sin(a), np.cos(a), 0])
  up = np.array([-np.sin(e) * np.cos(a), -np.sin(e) * np.sin(a), np.cos(e)])
  points = corners(solid)
  depth = 4 - points @ out
  x = points @ right / depth * 4 / 1.15
  y = points @ up / depth * 4 / 1.15
  rows, columns = np.nonzero(is_solid(one(scene, azimuth, 128)))
  got = [columns.min(), columns.max() + 1, rows.min(), rows.max() + 1]
  want = [64 * (1 + x.min()), 64 * (1 + x.max())]
  want += [64 * (1 - y.max()), 64 * (1 - y.min())]
  np.testing.assert_allclose(got, want, atol=1.01)


def test_a_face_has_the_colour_that_its_light_gives():
  """From azimuth 0 the face towards x is seen: the first, red."""
  light = np.array([0.36, 0.48, 0.8])
  for azimuth, face, towards in ((0.0, 0, 0), (90.0, 1, 1), (180.0, 2, None)):
    frame = one(make(), azimuth)
    lit = 0.0 if towards is None else light[towards]
    colour = np.array(list(orbiting_solids.COLOURS.values())[face])
    want = np.round(colour * (0.5 + 0.5 * lit))
    np.testing.assert_allclose(frame[32, 32], want, atol=1)


def test_going_around_is_turning_the_other_way():
  """But for the light, which stays: the outline is the same."""
  here = is_solid(one(make(turn=30.0, elevation=10.0), 70.0))
  there = is_solid(one(make(turn=320.0, elevation=10.0), 0.0))
  np.testing.assert_array_equal(here, there)


def test_an_orbit_ends_where_it_began():
  azimuths = orbiting_solids.azimuths(7)
  assert azimuths[0] == 0 and azimuths[-1] + azimuths[1] == pytest.approx(360)
  scene = make("prism", elevation=25.0)
  np.testing.assert_array_equal(one(scene, 0.0), one(scene, 360.0))
  frames = orbiting_solids.render(scene, 7)
  assert frames.shape == (7, 64, 64, 3)
  np.testing.assert_array_equal(frames[2], one(scene, azimuths[2]))


def test_edges_are_smooth_and_sizes_agree():
  scene = make("octahedron", turn=10.0, elevation=15.0)
  small, large = one(scene, size=32), one(scene, size=64).astype(float)
  means = large.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
  assert np.abs(small - means).mean() < 0.7


def test_held_out_combinations_are_apart():
  rng = np.random.default_rng(0)
  for held_out in (False, True):
    for _ in range(20):
      scene = orbiting_solids.draw_scene(rng, held_out=held_out)
      assert len(set(scene.colours)) == orbiting_solids.num_faces(scene.solid)
      own = orbiting_solids.is_held_out(scene.solid, scene.colours)
      assert own == held_out
      assert -5 <= scene.elevation <= 30


def test_captions_are_of_known_words():
  rng = np.random.default_rng(0)
  words = set(orbiting_solids.words())
  for _ in range(50):
    scene = orbiting_solids.draw_scene(rng)
    text = orbiting_solids.caption(rng, scene)
    assert scene.solid in text
    found = text.lower().rstrip(".").replace(",", "").split()
    assert set(found) <= words


def test_is_prepared_and_read(tmp_path):
  config = prepare.PrepareConfig(
    "orbiting_solids", str(tmp_path), num_clips=3, num_frames=5
  )
  report = prepare.run(config)
  assert report.clips == {"train": 3, "validation": 1, "held_out": 1}
  assert prepare.run(config).was_there
  options = builders.OrbitingSolidsOptions(num_frames=5)
  for split in report.clips:
    data = records.Split("orbiting_solids", str(tmp_path), split)
    scene, captions = builders.orbiting_solids_scene(options, split, 0)
    clip, labels = data.read(0), data.index.labels[0]
    assert clip.captions == captions
    assert labels == dataclasses.asdict(scene) | {
      "colours": list(scene.colours)
    }
    frames = codec.read(clip.video, np.arange(5), clip.id)
    np.testing.assert_array_equal(frames, orbiting_solids.render(scene, 5))


def test_options_of_others_are_told(tmp_path):
  config = prepare.PrepareConfig(
    "orbiting_solids", str(tmp_path), two_share=0.5
  )
  with pytest.raises(errors.InputError, match="two_share: is for moving"):
    prepare.run(config)
