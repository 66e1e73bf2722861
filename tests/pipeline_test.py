"""The pipeline's own promises: bits, residency, arguments."""

import diffusers
import jax
import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from flax import linen as nn

import vidgen
from tests import tiny_cogvideox
from vidgen import errors, layouts, loading, pipeline
from vidgen.models import base, cogvideox
from vidgen.models.cogvideox import transformer

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


def test_outputs(loaded, caplog):
  kwargs = {"num_steps": 2, "seed": 3}
  uint8 = loaded.sample(PROMPT, **kwargs)
  assert uint8.shape == (1, 9, 64, 96, 3) and uint8.dtype == np.uint8
  floats = loaded.sample(PROMPT, output="float", **kwargs)
  assert floats.dtype == np.float32
  assert floats.min() >= 0 and floats.max() <= 1
  np.testing.assert_array_equal(uint8, np.round(floats * 255).astype(np.uint8))
  latents = loaded.sample(PROMPT, output="latents", **kwargs)
  assert latents.shape == (1, 3, 8, 12, 4)
  with jax.log_compiles():
    np.testing.assert_array_equal(loaded.decode(latents), uint8)
  # Where latents come from compiles nothing again.
  assert "Compiling jit(decode)" not in caplog.text


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
  # Of a batch's size bits may depend, and of nothing else: not on neighbours,
  # not on the place.
  moved = loaded.sample(["Else.", PROMPT], seed=[8, 3], clips=[7, 5], **kwargs)
  np.testing.assert_array_equal(moved[1], batch[1])
  moved = loaded.sample([PROMPT, "Else."], seed=[3, 8], clips=[5, 7], **kwargs)
  np.testing.assert_array_equal(moved[0], batch[1])


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
  before = loaded.denoise._cache_size()
  loaded.sample(PROMPT, num_steps=4, guidance_scale=3.0)
  assert loaded.denoise._cache_size() == before


def test_the_empty_prompt_is_encoded_once(loaded, monkeypatch):
  fresh = pipeline.Pipeline(loaded.model, loaded.params, loaded.mesh)
  calls = []
  ((stage, apply), *rest) = fresh.conditioners
  counted = lambda *args: calls.append(1) or apply(*args)
  fresh.conditioners = [(stage, counted), *rest]
  fresh.sample([PROMPT, "a red kite"], num_steps=1)
  assert len(calls) == 3
  fresh.sample(PROMPT, num_steps=1)
  assert len(calls) == 4


def test_stage_residency_has_one_component_on_the_device(folder, loaded):
  # Whatever other tests hold, kept so that no new array takes its place.
  before = jax.live_arrays()
  staged = vidgen.load(folder, dtype="float32", residency="stage")
  sizes = {
    name: {leaf.shape for leaf in jax.tree.leaves(tree) if leaf.ndim > 1}
    for name, tree in staged.params.items()
  }
  assert all(
    isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(staged.params)
  )
  device = loaded.mesh.devices.flat[0]
  own = {id(array) for array in before}

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


def test_a_mesh_is_chosen_for_the_model(folder):
  """Two heads split once, guidance once; the rest is a ring."""
  loaded = vidgen.load(folder, mesh="auto")
  model = loaded.model
  sizes = {axis: n for axis, n in loaded.mesh.shape.items() if n > 1}
  assert sizes == {"cfg": 2, "ring": 2, "context": 2}
  assert loaded.why_mesh.startswith("mesh: auto chose cfg=2, ring=2, context=2")
  plain = model.plan(base.Request(guidance_scale=1.0))
  need = loading.need(model, [plain], "bfloat16", "all", None)
  assert layouts.auto(8, need).sizes == {"ring": 4, "context": 2}
  largest = max(base.count(part) for part in model.components)
  staged = loading.need(model, [], "bfloat16", "stage", 100)
  assert (staged.guided, staged.stored_bytes) == (True, 2 * largest)


def test_weights_match_whatever_the_residency(folder, loaded):
  staged = vidgen.load(folder, dtype="float32", residency="stage")
  jax.tree.map(np.testing.assert_array_equal, staged.params, loaded.params)


FRAMES = np.zeros((9, 64, 96, 3), np.uint8)
BAD = [
  ("prompt", {"prompt": []}),
  ("height", {"height": 70}),
  ("height", {"height": 0}),
  ("width", {"width": 8}),
  ("num_frames", {"num_frames": 10}),
  ("num_frames", {"num_frames": 17}),
  ("num_frames", {"num_frames": 0}),
  ("num_steps", {"num_steps": 0}),
  ("num_steps", {"num_steps": 1001}),
  ("num_steps", {"num_steps": True}),
  ("sampler", {"sampler": "plms"}),
  ("sampler", {"sampler": ""}),
  ("strength", {"strength": 0.5}),
  ("strength", {"strength": 1.5, "video": FRAMES}),
  ("image", {"image": np.zeros((8, 8, 3), np.uint8)}),
  ("video", {"video": []}),
  ("video", {"video": FRAMES[0]}),
  ("video", {"video": FRAMES[:0]}),
  ("video", {"video": FRAMES[:5]}),
  ("video", {"video": FRAMES[:5], "num_frames": 9}),
  ("video", {"video": np.zeros((20, 64, 96, 3), np.uint8)}),
  ("video", {"video": 7}),
  ("num_frames", {"video": FRAMES, "num_frames": -4}),
  ("output", {"output": "pil"}),
  ("seed", {"seed": -1}),
  ("clips", {"clips": [1, 2]}),
  ("latents", {"latents": np.zeros((1, 2, 3, 4, 4))}),
  ("latents", {"latents": "x"}),
  ("guidance_scale", {"guidance_scale": float("nan")}),
  ("negative_prompt", {"negative_prompt": "x", "guidance_scale": 1.0}),
  ("negative_prompt", {"negative_prompt": ["x", "y"]}),
  ("fps_id", {"fps_id": 7}),
  ("dynamic_guidance", {"dynamic_guidance": "yes"}),
  ("dynamic_guidance", {"dynamic_guidance": True, "guidance_scale": 1.0}),
  ("max_text_length", {"max_text_length": 4096}),
  ("image_latent_scale", {"image_latent_scale": 1.0}),
]


@pytest.mark.parametrize(("start", "arguments"), BAD)
def test_bad_arguments_are_one_line(loaded, start, arguments):
  with pytest.raises(errors.InputError) as raised:
    loaded.sample(**{"prompt": PROMPT, "num_steps": 2, **arguments})
  assert str(raised.value).startswith(start)
  assert "\n" not in str(raised.value)


def test_bad_arrays_are_one_line(loaded):
  good = np.zeros((1, 9, 64, 96, 3), np.float32)
  for bad in (good[0], good[..., :1], good + 5, good.astype(np.uint8), "x.mp4"):
    with pytest.raises(errors.InputError, match=r"^video: "):
      loaded.encode(bad)
  for bad in (np.zeros((1, 3, 8, 12, 5)), np.zeros((3, 8, 12, 4)), [1]):
    with pytest.raises(errors.InputError, match=r"^latents: "):
      loaded.decode(bad)


@pytest.mark.parametrize(
  "arguments", [{"dtype": "float8"}, {"mesh": {"a": 2}}, {"residency": "some"}]
)
def test_bad_loads_are_one_line(folder, arguments):
  with pytest.raises(errors.InputError, match=next(iter(arguments))):
    vidgen.load(folder, **arguments)


def test_what_diffusers_takes_is_taken(loaded):
  """No negative prompt; frames of any mode in a list."""
  call = {"num_steps": 2, "seed": 3, "output": "latents"}
  want = loaded.sample(PROMPT, num_steps=2, seed=3, output="latents")
  got = loaded.sample(PROMPT, None, **call)
  np.testing.assert_array_equal(got, want)
  frames = [PIL.Image.fromarray(frame).convert("P") for frame in FRAMES]
  np.testing.assert_array_equal(
    loaded.sample(PROMPT, video=frames, **call),
    loaded.sample(PROMPT, video=FRAMES, **call),
  )


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


def test_frames_that_overflow_are_an_error(folder):
  """Bytes would be black, and nobody would know."""
  loaded = vidgen.load(folder, dtype="float16")
  broken = jax.tree.map(lambda leaf: leaf * np.inf, loaded.params["vae"])
  params = dict(loaded.params, vae=broken)
  bad = pipeline.Pipeline(loaded.model, params, loaded.mesh)
  latents = np.zeros((1, 1, 8, 12, loaded.model.latent_channels), np.float32)
  for tiling in (False, True):
    with pytest.raises(errors.InputError, match="NaN"):
      bad.decode(latents, tiling=tiling)
  frames = loaded.decode(latents)
  assert frames.dtype == np.uint8
  floats = loaded.decode(latents, output="float")
  np.testing.assert_array_equal(frames, np.round(255 * floats))


def test_encode_is_the_scaled_mean(loaded, folder):
  video = np.random.default_rng(0).uniform(-1, 1, (1, 9, 64, 96, 3))
  latents = loaded.encode(video)
  vae = diffusers.AutoencoderKLCogVideoX.from_pretrained(folder / "vae")
  with torch.no_grad():
    pixels = torch.from_numpy(video).float().permute(0, 4, 1, 2, 3)
    want = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
  want = want.permute(0, 2, 3, 4, 1)
  np.testing.assert_allclose(latents, want, rtol=1e-4, atol=1e-5)
  again = loaded.encode(video, slicing=True)
  np.testing.assert_allclose(latents, again, rtol=1e-5, atol=1e-5)


def test_condition_is_the_text_encoder(loaded, folder):
  condition = loaded.condition([PROMPT, ""])
  encoder = transformers.T5EncoderModel.from_pretrained(folder / "text_encoder")
  tokens = transformers.T5Tokenizer.from_pretrained(folder / "tokenizer")(
    [PROMPT, ""], padding="max_length", max_length=32, return_tensors="pt"
  )
  with torch.no_grad():
    want = encoder(tokens.input_ids)[0]
  np.testing.assert_allclose(condition["text"], want, rtol=1e-3, atol=1e-4)


def test_the_program_holds_no_table_of_positions(loaded):
  """Positions are made of small tables: a program is not its constants."""
  config = cogvideox.config_2b().transformer
  config.num_layers = 1
  module = transformer.Transformer(config)
  key = jax.random.key(0)
  params = jax.eval_shape(lambda: transformer.init(config, key))
  struct = jax.ShapeDtypeStruct
  lowered = jax.jit(module.apply).lower(
    {"params": nn.unbox(params)},
    struct((1, 13, 60, 90, 16), np.float32),
    struct((1, 226, 4096), np.float32),
    struct((1,), np.float32),
  )
  assert len(lowered.as_text()) < 2**20


def test_video_longer_than_asked_is_cut(loaded):
  frames = np.random.default_rng(0).integers(0, 255, (12, 64, 96, 3), np.uint8)
  out = loaded.sample(PROMPT, video=frames, num_frames=9, num_steps=4)
  assert out.shape == (1, 9, 64, 96, 3)
  with pytest.raises(errors.InputError, match="1 to 9; set num_frames"):
    loaded.sample(PROMPT, video=frames, num_steps=4)
