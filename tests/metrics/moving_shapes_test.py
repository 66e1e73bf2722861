"""The judge reads what the clips show, and says none where it cannot."""

import collections
import dataclasses
import json

import numpy as np
import pytest
from scipy import ndimage

from tests.bench import demo_report
from vidgen.data import moving_shapes
from vidgen.metrics import moving_shapes as judge

BLUR, NOISE, SHIFT, FLICKER = 1.0, 8.0, 0.1, 0.02


def scene_of(shape="square", motion="right", colour="red", size="large"):
  reach = 18.0 if size == "small" else 14.0
  thing = moving_shapes.Thing(shape, colour, size, motion, (32.0, 32.0), reach)
  return moving_shapes.Scene("black", (thing,))


def spoil(frames, rng):
  """Blur, a colour cast, flicker and noise, as of a network's clips."""
  x = ndimage.gaussian_filter(frames.astype(np.float32), (0, BLUR, BLUR, 0))
  x = x * (1 + rng.uniform(-SHIFT, SHIFT, 3))
  x = x + 255 * rng.uniform(-SHIFT, SHIFT, 3) / 2
  x = x * (1 + rng.normal(0, FLICKER, (len(x), 1, 1, 1)))
  x = x + rng.normal(0, NOISE, x.shape)
  return np.clip(np.round(x), 0, 255).astype(np.uint8)


def accuracy(count, two, spoiled):
  rng = np.random.default_rng(11)
  scenes = [
    moving_shapes.draw_scene(rng, two=two, held_out=i % 4 == 0)
    for i in range(count)
  ]
  clips = map(moving_shapes.render, scenes)
  clips = [spoil(clip, rng) for clip in clips] if spoiled else list(clips)
  return demo_report.score(clips, scenes)["accuracy"]


@pytest.mark.parametrize("spoiled", [False, True])
@pytest.mark.parametrize("count, two", [(200, False), (100, True)])
def test_reads_each_attribute(count, two, spoiled):
  for name, value in accuracy(count, two, spoiled).items():
    assert value["rate"] >= 0.99, (name, value)


@pytest.mark.parametrize("size, num_frames", [(64, 9), (128, 17), (64, 33)])
def test_reads_other_sizes(size, num_frames):
  rng = np.random.default_rng(3)
  for two in (False, True):
    scene = moving_shapes.draw_scene(rng, two=two)
    clip = moving_shapes.render(scene, num_frames, size)
    assert judge.agree(judge.judge(clip), scene)["all"], scene


def flat(value=0):
  return np.full((17, 64, 64, 3), value, np.uint8)


def noise():
  shape = (17, 64, 64, 3)
  return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def stripes():
  clip = flat()
  clip[:, :, ::8] = clip[:, :, 1::8] = clip[:, :, 2::8] = (230, 40, 40)
  return clip


def clouds():
  x = np.random.default_rng(1).normal(size=(17, 64, 64, 3))
  x = ndimage.gaussian_filter(x, (2, 6, 6, 0))
  return np.clip(128 + x / x.std() * 60, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
  "clip", [noise, stripes, clouds], ids=lambda f: f.__name__
)
def test_garbage_is_read_as_none(clip):
  verdict = judge.judge(clip())
  assert verdict.background == "none"
  for thing in verdict.things:
    assert thing.shape == thing.size == "none"
    assert thing.motion in ("none", *moving_shapes.DIRECTIONS, "grow", "shrink")
  for scene in (scene_of(motion="still"), scene_of("circle"), scene_of("star")):
    assert not judge.agree(verdict, scene)["all"]


@pytest.mark.parametrize("name", moving_shapes.BACKGROUNDS)
def test_an_empty_clip_shows_nothing(name):
  clip = np.broadcast_to(
    np.uint8(moving_shapes.BACKGROUNDS[name]), (17, 64, 64, 3)
  )
  assert judge.judge(clip.copy()) == (name, ())


def test_a_background_of_no_name_is_none_when_empty():
  assert judge.judge(flat(35)) == ("black", ())
  assert judge.judge(flat(64)) == ("none", ())
  assert judge.judge(flat(192)) == ("none", ())


def test_a_background_of_no_name_is_none():
  clip = moving_shapes.render(scene_of())
  clip[:, :, :, 2] = np.maximum(clip[:, :, :, 2], 200)
  assert judge.judge(clip).background == "none"


def test_a_thing_that_is_missing_has_no_motion():
  scene = scene_of(motion="right")
  clip = moving_shapes.render(scene)
  clip[5:10] = 0
  (seen,) = judge.judge(clip).things
  assert seen == ("square", "red", "none", "none")
  clip = moving_shapes.render(scene)
  clip[2:] = 0
  assert judge.judge(clip).things == ()


@pytest.mark.parametrize("motion", ["right", "grow", "spin"])
def test_the_order_of_frames_counts(motion):
  clip = moving_shapes.render(scene_of(motion=motion))
  shuffled = np.random.default_rng(0).permutation(17)
  (seen,) = judge.judge(clip[shuffled]).things
  assert seen.motion == "none"
  (seen,) = judge.judge(clip[::-1]).things
  want = {"right": "left", "grow": "shrink", "spin": "spin"}[motion]
  assert seen == ("square", "red", "large", want)


def test_half_a_motion_and_none_of_one():
  """A jump is no steady way; a drift of a few pixels neither way nor rest."""
  clip = moving_shapes.render(scene_of(motion="right", size="small"))
  jump = np.concatenate([np.repeat(clip[:1], 8, 0), np.repeat(clip[-1:], 9, 0)])
  assert judge.judge(jump).things[0].motion == "none"
  scene = scene_of(motion="right")
  thing = dataclasses.replace(scene.things[0], reach=4.5)
  drift = moving_shapes.render(dataclasses.replace(scene, things=(thing,)))
  assert judge.judge(drift).things[0].motion == "none"


def test_two_motions_at_once_are_none():
  grow = moving_shapes.render(scene_of(motion="grow", size="small"))
  moved = [np.roll(frame, 2 * t - 16, axis=1) for t, frame in enumerate(grow)]
  assert judge.judge(np.stack(moved)).things[0].motion == "none"


def test_a_shape_or_colour_that_changes_is_none():
  square = moving_shapes.render(scene_of("square", "still"))
  circle = moving_shapes.render(scene_of("circle", "still"))
  (seen,) = judge.judge(np.concatenate([square[:9], circle[:8]])).things
  assert seen.shape == "none"
  blue = moving_shapes.render(scene_of("square", "still", "blue"))
  (seen,) = judge.judge(np.concatenate([square[:9], blue[:8]])).things
  assert seen.colour == "none"


@pytest.mark.parametrize("outline", ["bar", "ring", "plus", "half"])
def test_other_shapes_are_none(outline):
  y, x = np.mgrid[:64, :64] - 31.5
  masks = {
    "bar": (abs(x) < 16) & (abs(y) < 4),
    "ring": (np.hypot(x, y) < 13) & (np.hypot(x, y) > 8),
    "plus": (np.minimum(abs(x), abs(y)) < 4)
    & (np.maximum(abs(x), abs(y)) < 13),
    "half": (np.hypot(x, y) < 14) & (y > 0),
  }
  clip = flat()
  clip[:, masks[outline]] = moving_shapes.COLOURS["cyan"]
  (seen,) = judge.judge(clip).things
  assert seen == ("none", "cyan", "none", "none")


def test_a_colour_of_no_name_is_none():
  clip = moving_shapes.render(scene_of("circle", "still"))
  clip[:] = clip.max(axis=-1, keepdims=True)
  (seen,) = judge.judge(clip).things
  assert seen == ("circle", "none", "large", "still")


def test_a_second_object_is_counted():
  small = scene_of("circle", "still", size="small")
  things = [
    dataclasses.replace(small.things[0], centre=centre)
    for centre in ((18.0, 32.0), (46.0, 32.0))
  ]
  clip = moving_shapes.render(moving_shapes.Scene("black", tuple(things)))
  verdict = judge.judge(clip)
  assert len(verdict.things) == 2
  agree = judge.agree(verdict, moving_shapes.Scene("black", (things[0],)))
  assert not agree["number"] and not agree["all"]
  assert agree["colour"] and agree["shape"]


def test_agree_takes_two_things_in_any_order():
  rng = np.random.default_rng(2)
  scene = moving_shapes.draw_scene(rng, two=True)
  seen = [judge.Seen(t.shape, t.colour, t.size, t.motion) for t in scene.things]
  for order in (seen, seen[::-1]):
    verdict = judge.Verdict(scene.background, tuple(order))
    assert all(judge.agree(verdict, scene).values())
    assert list(judge.match(verdict, scene)) == seen
  swapped = [
    seen[0]._replace(colour=seen[1].colour),
    seen[1]._replace(colour=seen[0].colour),
  ]
  agree = judge.agree(judge.Verdict("none", tuple(swapped)), scene)
  assert agree["colour"] and not agree["all"] and not agree["background"]
  for name in ("shape", "motion"):
    same = getattr(seen[0], name) == getattr(seen[1], name)
    assert agree[name] == same
  one = judge.agree(judge.Verdict(scene.background, (seen[0],)), scene)
  assert not one["number"] and not one["colour"] and not one["shape"]


# --- The report -------------------------------------------------------------


class Renderer:
  """A pipeline that shows the true scene of each caption, or always one."""

  def __init__(self, pairs, only=None):
    self._scenes, self._only, self.calls = dict(pairs), only, []

  def sample(self, captions, *, seed, clips, **options):
    self.calls.append((len(captions), list(clips), seed, options))
    scenes = [self._only or self._scenes[caption] for caption in captions]
    return np.stack([moving_shapes.render(scene) for scene in scenes])

  def encode(self, video):
    assert video.min() >= -1 and video.max() <= 1
    return video

  def decode(self, latents):
    return np.round((latents + 1) * 127.5).astype(np.uint8)


@pytest.mark.parametrize("name", demo_report.SETS)
def test_prompts_differ_and_are_balanced(name):
  kinds = demo_report.SETS[name]
  pairs = demo_report.prompts(120, seed=0, **kinds)
  assert len({caption for caption, _ in pairs}) == 120
  assert pairs[:7] == demo_report.prompts(7, seed=0, **kinds)
  assert pairs[:7] != demo_report.prompts(7, seed=1, **kinds)
  counts = collections.defaultdict(collections.Counter)
  for _, scene in pairs:
    assert len(scene.things) == 1 + kinds["two"]
    counts["background"][scene.background] += 1
    for i, thing in enumerate(scene.things):
      held_out = moving_shapes.is_held_out(
        thing.shape, thing.colour, thing.motion
      )
      assert held_out == (kinds["held_out"] and i == 0)
      for attribute in ("shape", "colour", "motion"):
        counts[attribute][getattr(thing, attribute)] += 1
  for attribute, classes in (
    ("background", moving_shapes.BACKGROUNDS),
    ("shape", moving_shapes.SHAPES),
    ("colour", moving_shapes.COLOURS),
  ):
    even = sum(counts[attribute].values()) / len(classes)
    for value in classes:
      assert 0.6 * even < counts[attribute][value] < 1.5 * even, counts


def test_samples_in_batches_of_one_size():
  pairs = demo_report.prompts(10, seed=0)
  captions = [caption for caption, _ in pairs]
  pipeline = Renderer(pairs)
  frames = list(
    demo_report.sample(
      pipeline, captions, 4, seed=3, num_steps=2, guidance_scale=None
    )
  )
  assert [call[0] for call in pipeline.calls] == [4, 4, 4]
  assert [call[1][0] for call in pipeline.calls] == [0, 4, 8]
  assert {call[2] for call in pipeline.calls} == {3}
  assert pipeline.calls[0][3] == {"num_steps": 2}
  want = [moving_shapes.render(scene) for _, scene in pairs]
  np.testing.assert_array_equal(frames, want)


def test_a_true_renderer_scores_all_and_one_clip_little():
  pairs = demo_report.prompts(36, seed=4)
  captions, scenes = zip(*pairs, strict=True)
  result = demo_report.score(
    list(demo_report.sample(Renderer(pairs), captions)), scenes
  )
  assert {v["rate"] for v in result["accuracy"].values()} == {1.0}
  assert not result["confusion"]
  assert sum(v["n"] for v in result["motions"].values()) == 36

  pipeline = Renderer(pairs, only=scenes[0])
  result = demo_report.score(
    list(demo_report.sample(pipeline, captions)), scenes
  )
  assert result["accuracy"]["number"]["rate"] == 1
  assert result["accuracy"]["colour"]["rate"] < 0.5
  assert result["accuracy"]["all"]["right"] < 3
  colour = scenes[0].things[0].colour
  for gots in result["confusion"]["colour"].values():
    assert set(gots) == {colour}


def test_the_interval_is_wilsons():
  # Of R's prop.test without correction.
  got = demo_report.rate([True] * 81 + [False] * 182)
  assert (got["n"], got["right"]) == (263, 81)
  assert abs(got["low"] - 0.2553) < 1e-4 and abs(got["high"] - 0.3662) < 1e-4
  assert demo_report.rate([])["high"] == 1
  assert demo_report.rate([True] * 20)["high"] == 1


def test_the_report_can_be_written(tmp_path):
  pairs = demo_report.prompts(5, seed=4, two=True)
  captions, scenes = zip(*pairs, strict=True)
  pipeline = Renderer(pairs, only=scenes[0])
  frames = list(demo_report.sample(pipeline, captions))
  result = demo_report.score(frames, scenes)
  table = demo_report.table({"two objects": result})
  assert "| two objects | 5 | 100.0 (56.6-100.0) |" in table
  assert "colour: " in demo_report.details(result)
  assert json.loads(json.dumps(result))["n"] == 5
  sheet = demo_report.contact_sheet(frames, captions, result["clips"])
  pixels = np.asarray(sheet)
  # The first frame of the first clip stands under its four lines of text.
  first = np.asarray(sheet.crop((12, 68, 108, 164)).resize((64, 64)))
  assert np.mean(np.abs(first.astype(float) - frames[0][0])) < 6
  assert pixels.shape[1] == 2 * (5 * 98 + 12) + 12


def test_reconstructions_of_a_perfect_autoencoder():
  pairs = demo_report.prompts(5, seed=0)
  clips = [moving_shapes.render(scene) for _, scene in pairs]
  got = list(demo_report.reconstruct(Renderer(pairs), clips, 2))
  np.testing.assert_array_equal(got, clips)
  assert demo_report.psnr(clips[0], clips[0]) > 90
  off = np.where(clips[0] > 100, clips[0] - 10, clips[0] + 10).astype(np.uint8)
  assert abs(demo_report.psnr(clips[0], off) - 28.13) < 0.01
