"""The pipeline's own promises: bits, residency, arguments."""


import jax
import numpy as np
import pytest

import vidgen
from tests import tiny_cogvideox
from vidgen import errors, pipeline

PROMPT = "a panda plays in the forest"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("5b")
  tiny_cogvideox.write(folder, "5b")
  return folder / "checkpoint"


@pytest.fixture(scope="module")
def loaded(folder):
  return vidgen.load(folder, dtype="float32")


class Recorder:
  """Progress that remembers what it was told."""

  def __init__(self, look=lambda: None):
    self.events, self._look = [], look

  def stage(self, name):
    self.events.append(name)
    recorder = self

    class Stage:
      def __enter__(self):
        return None

      def __exit__(self, *exc):
        recorder.events.append((name, recorder._look()))

    return Stage()

  def step(self, done, total):
    self.events.append((done, total, self._look()))


def test_outputs(loaded):
  kwargs = {"num_steps": 2, "seed": 3}
  uint8 = loaded.sample(PROMPT, **kwargs)
  assert uint8.shape == (1, 9, 64, 96, 3) and uint8.dtype == np.uint8
  floats = loaded.sample(PROMPT, output="float", **kwargs)
  assert floats.dtype == np.float32
  assert floats.min() >= 0 and floats.max() <= 1
  np.testing.assert_array_equal(uint8, np.round(floats * 255).astype(np.uint8))
  latents = loaded.sample(PROMPT, output="latents", **kwargs)
  assert latents.shape == (1, 3, 8, 12, 4)
  np.testing.assert_array_equal(loaded.decode(latents), uint8)


def test_a_seed_and_a_clip_decide_a_video(loaded):
  kwargs = {"num_steps": 2, "sampler": "dpmpp_2m_sde", "output": "latents"}
  first = loaded.sample(PROMPT, seed=3, clips=[5], **kwargs)
  np.testing.assert_array_equal(
    first, loaded.sample(PROMPT, seed=3, clips=[5], **kwargs)
  )
  batch = loaded.sample([PROMPT] * 2, seed=3, clips=[9, 5], **kwargs)
  np.testing.assert_allclose(batch[1], first[0], rtol=1e-4, atol=1e-5)
  assert np.abs(batch[0] - batch[1]).max() > 0.1
  other = loaded.sample(PROMPT, seed=4, clips=[5], **kwargs)
  assert np.abs(other - first).max() > 0.1


def test_progress_changes_no_bits_and_hears_every_step(loaded):
  recorder = Recorder()
  kwargs = {"num_steps": 3, "sampler": "dpmpp_2m_sde"}
  seen = loaded.sample(PROMPT, progress=recorder, **kwargs)
  np.testing.assert_array_equal(seen, loaded.sample(PROMPT, **kwargs))
  stages = [e for e in recorder.events if isinstance(e, str)]
  assert stages == ["text", "denoise", "decode"]
  steps = [e[:2] for e in recorder.events if len(e) == 3 and e[0] in (1, 2, 3)]
  assert steps == [(1, 3), (2, 3), (3, 3)]


def test_another_number_of_steps_compiles_nothing(loaded):
  loaded.sample(PROMPT, num_steps=2)
  before = loaded._run._cache_size()
  loaded.sample(PROMPT, num_steps=4, guidance_scale=3.0)
  assert loaded._run._cache_size() == before


def test_the_empty_prompt_is_encoded_once(loaded, monkeypatch):
  fresh = pipeline.Pipeline(loaded.model, loaded.params, loaded.mesh)
  calls = []
  ((stage, apply), *rest) = fresh._conditioners
  counted = lambda *args: calls.append(1) or apply(*args)
  fresh._conditioners = [(stage, counted), *rest]
  fresh.sample([PROMPT, "a red kite"], num_steps=1)
  assert len(calls) == 3
  fresh.sample(PROMPT, num_steps=1)
  assert len(calls) == 4


def test_stage_residency_has_one_component_on_the_device(folder, loaded):
  staged = vidgen.load(folder, dtype="float32", residency="stage")
  sizes = {
    name: {leaf.shape for leaf in jax.tree.leaves(tree) if leaf.ndim > 1}
    for name, tree in staged.params.items()
  }
  assert all(
    isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(staged.params)
  )
  device = loaded.mesh.devices.flat[0]
  own = {id(leaf) for leaf in jax.tree.leaves(loaded.params)}

  def resident():
    live = {
      array.shape
      for array in jax.live_arrays()
      if device in array.devices() and id(array) not in own
    }
    return {name for name, shapes in sizes.items() if shapes <= live}

  recorder = Recorder(resident)
  got = staged.sample(PROMPT, num_steps=2, progress=recorder)
  np.testing.assert_array_equal(got, loaded.sample(PROMPT, num_steps=2))
  seen = dict(
    e
    for e in recorder.events
    if isinstance(e, tuple) and e[0] in ("text", "denoise", "decode")
  )
  during = [
    e[2] for e in recorder.events if isinstance(e, tuple) and len(e) == 3
  ]
  assert during == [{"transformer"}] * 2
  assert all(names == set() for names in seen.values())


def test_weights_match_whatever_the_residency(folder, loaded):
  staged = vidgen.load(folder, dtype="float32", residency="stage")
  jax.tree.map(np.testing.assert_array_equal, staged.params, loaded.params)


BAD = {
  "height": {"height": 70},
  "width": {"width": 8},
  "num_frames": {"num_frames": 10},
  "num_frames: 17": {"num_frames": 17},
  "num_steps": {"num_steps": 0},
  "num_steps: 1001": {"num_steps": 1001},
  "sampler": {"sampler": "plms"},
  "strength": {"strength": 0.5},
  "image": {"image": np.zeros((8, 8, 3), np.uint8)},
  "output": {"output": "pil"},
  "seed": {"seed": -1},
  "clips": {"clips": [1, 2]},
  "latents": {"latents": np.zeros((1, 2, 3, 4, 4))},
  "guidance_scale": {"guidance_scale": float("nan")},
  "negative_prompt": {"negative_prompt": "x", "guidance_scale": 1.0},
  "negative_prompt: 2": {"negative_prompt": ["x", "y"]},
  "fps_id": {"fps_id": 7},
  "dynamic_guidance": {"dynamic_guidance": "yes"},
  "max_text_length": {"max_text_length": 4096},
}


@pytest.mark.parametrize("start", BAD)
def test_bad_arguments_are_one_line(loaded, start):
  with pytest.raises(errors.InputError) as raised:
    loaded.sample(PROMPT, **BAD[start])
  assert str(raised.value).startswith(start)
  assert "\n" not in str(raised.value)


def test_a_cut_prompt_is_named(loaded):
  with pytest.warns(UserWarning, match="does not read its end"):
    loaded.sample("the old train rolls slowly " * 20, num_steps=1)


def test_not_a_number_is_an_error(loaded):
  broken = jax.tree.map(
    lambda leaf: leaf * np.nan, loaded.params["transformer"]
  )
  params = dict(loaded.params, transformer=broken)
  bad = pipeline.Pipeline(loaded.model, params, loaded.mesh)
  with pytest.raises(errors.InputError, match="NaN"):
    bad.sample(PROMPT, num_steps=1)


def test_encode_is_the_scaled_mean(loaded):
  video = np.random.default_rng(0).uniform(-1, 1, (1, 9, 64, 96, 3))
  latents = loaded.encode(video)
  assert latents.shape == (1, 3, 8, 12, 4)
  again = loaded.encode(video, slicing=True)
  np.testing.assert_allclose(latents, again, rtol=1e-5, atol=1e-5)


def test_condition_is_public(loaded):
  condition = loaded.condition([PROMPT, ""])
  assert condition["text"].shape == (2, 32, 32)


def test_tiling_is_close(loaded):
  latents = np.random.default_rng(0).normal(size=(1, 3, 8, 12, 4))
  whole = loaded.decode(latents, output="float")
  tiled = loaded.decode(latents, output="float", tiling=True)
  assert whole.shape == tiled.shape
  assert 0 < np.abs(whole - tiled).mean() < 0.2


def test_video_longer_than_asked_is_cut(loaded):
  frames = np.random.default_rng(0).integers(0, 255, (12, 64, 96, 3), np.uint8)
  out = loaded.sample(PROMPT, video=frames, num_frames=9, num_steps=4)
  assert out.shape == (1, 9, 64, 96, 3)
  with pytest.raises(errors.InputError, match="1 to 9 frames"):
    loaded.sample(PROMPT, video=frames, num_steps=4)
