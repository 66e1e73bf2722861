"""What can be asked of SVD, what it is told, and the job that samples it."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest
import torch

import vidgen
from tests import tiny_svd, tiny_svd_config
from vidgen import (
  arguments,
  checkpoint,
  clips,
  errors,
  layouts,
  loading,
  publish,
  sample,
  sample_model,
  video,
)
from vidgen.cli import main
from vidgen.models import base, svd
from vidgen.models.svd import flops, numbers, unet
from vidgen.models.svd import plan as plan_lib

SIZE = {"height": 16, "width": 16, "num_frames": 3, "num_steps": 2}
IMAGE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("svd")
  tiny_svd.write(folder)
  return folder / "checkpoint"


@pytest.fixture(scope="module")
def loaded(folder):
  return vidgen.load(folder, dtype="float32")


def plan(config=None, **fields):
  options = fields.pop("options", {})
  config = svd.config_svd_xt() if config is None else config
  request = base.Request(image=True, options=options, **fields)
  return plan_lib.plan(config, request)


def told(plan):
  """What the network is told of a clip."""
  names = svd.Conditioning().numbers
  of_clip = plan_lib.of_clip(plan.options)
  return numbers.told(names, of_clip, plan.num_frames, 0)[0].tolist()


def test_defaults_are_the_published_ones():
  got = plan()
  assert (got.num_frames, got.height, got.width) == (25, 576, 1024)
  assert got.latents == (25, 72, 128, 4)
  assert (len(got.schedule), got.sampler, got.fps) == (25, "euler", 7)
  assert got.decode_chunk is None
  np.testing.assert_allclose(got.guidance[3], np.linspace(1, 3, 25))
  assert told(got) == pytest.approx([6, 127, 0.02])
  assert plan(svd.config_svd()).num_frames == 14
  # ln(700) / 4 and ln(0.002) / 4.
  ends = got.schedule.now.timestep[[0, -1]]
  np.testing.assert_allclose(ends, [1.637770, -1.553652], atol=1e-6)


def test_fps_and_fps_id_are_apart():
  """The network is told fps - 1; files play at fps either way."""
  for options in ({"fps": 12}, {"fps_id": 11}):
    got = plan(options=options)
    assert got.fps == 12
    assert told(got)[0] == 11
  with pytest.raises(errors.InputError, match="fps_id: fps is given, too"):
    plan(options={"fps": 12, "fps_id": 11})


def test_guidance():
  assert plan(guidance_scale=1.0).guidance is None
  got = plan(guidance_scale=2.5, options={"min_guidance_scale": 1.5})
  np.testing.assert_allclose(got.guidance[0, [0, -1]], [1.5, 2.5])


@pytest.mark.parametrize(
  ("fields", "match"),
  [
    ({"num_frames": 26}, "num_frames: 26 are more than the 25"),
    ({"options": {"fps": 4}}, "fps: 4 is outside of 5 to 30"),
    ({"options": {"fps_id": 30}}, "fps: 31 is outside"),
    ({"options": {"motion_bucket_id": 256}}, "motion_bucket_id: 256 is above"),
  ],
)
def test_what_was_not_trained_is_warned_of(fields, match):
  with pytest.warns(UserWarning, match=match) as caught:
    plan(**fields)
  (one,) = caught
  assert "\n" not in str(one.message)


def test_the_rate_that_a_model_was_trained_for_is_not_warned_of():
  slow = dataclasses.replace(svd.config_svd_xt(), fps=4)
  assert plan(slow).fps == plan(slow, options={"fps": 4}).fps == 4
  with pytest.warns(UserWarning, match="fps: 3 is outside"):
    plan(slow, options={"fps": 3})


BAD = [
  ("image", {"image": None}),
  ("image", {"image": []}),
  ("image", {"image": np.zeros((1, 1, 3), np.uint8)}),
  ("image", {"image": np.zeros((9, 8, 2), np.uint8)}),
  ("image", {"image": np.zeros((9, 8), np.int64)}),
  ("prompt", {"prompt": "a panda"}),
  ("prompt", {"prompt": [""]}),
  ("negative_prompt", {"negative_prompt": "blurry"}),
  ("video", {"video": np.zeros((3, 16, 16, 3), np.uint8)}),
  ("height", {"height": 17}),
  ("width", {"width": 0}),
  ("num_frames", {"num_frames": 0}),
  ("num_steps", {"num_steps": 0}),
  ("sampler", {"sampler": "plms"}),
  ("guidance_scale", {"guidance_scale": float("nan")}),
  ("min_guidance", {"min_guidance_scale": 2.0, "guidance_scale": 1.0}),
  ("fps_id", {"fps": 7, "fps_id": 6}),
  ("fps", {"fps": -1}),
  ("fps", {"fps": "7"}),
  ("fps", {"fps": True}),
  ("motion_bucket_id", {"motion_bucket_id": -1}),
  ("noise_aug_strength", {"noise_aug_strength": float("inf")}),
  ("decode_chunk", {"decode_chunk": 0}),
  ("decode_chunk", {"decode_chunk": 1.5}),
  ("dynamic_guidance", {"dynamic_guidance": True}),
  ("tiling", {"tiling": True}),
]


@pytest.mark.parametrize(("start", "given"), BAD)
def test_bad_arguments_are_one_line(loaded, start, given):
  with pytest.raises(errors.InputError) as raised:
    loaded.sample(**{"image": IMAGE, **SIZE, **given})
  assert str(raised.value).startswith(start)
  assert "\n" not in str(raised.value)


def test_images_that_are_none(tmp_path, loaded):
  paths = {name: tmp_path / name for name in ("no.png", "a.mp4", "a.txt")}
  frames = np.zeros((2, 16, 16, 3), np.uint8)
  video.write_mp4(paths["a.mp4"], frames, 8)
  paths["a.txt"].write_text("a panda")
  for name, path in paths.items():
    with pytest.raises(errors.InputError) as raised:
      loaded.sample(image=path, **SIZE)
    assert str(raised.value).startswith(f"{path}: ")
    word = "no such image" if name == "no.png" else "is not an image"
    assert word in str(raised.value)
    assert "\n" not in str(raised.value)


def test_text_is_for_models_that_take_it():
  with pytest.raises(errors.InputError, match=r"^prompt: this checkpoint mak"):
    arguments.check_text(True, None)
  with pytest.raises(errors.InputError, match=r"^prompt: .* takes no text"):
    arguments.check_text(False, "a panda")


def inputs(model, image):
  given = plan(model.config, height=16, width=16)
  (one,) = model.inputs([""], arguments.images(image, 1, given), given)
  return one


def test_alpha_is_dropped_as_pillow_drops_it(loaded):
  rgba = np.concatenate([IMAGE, np.full((20, 30, 1), 9, np.uint8)], axis=-1)
  want = inputs(loaded.model, IMAGE)
  for image in (rgba, PIL.Image.fromarray(rgba)):
    got = inputs(loaded.model, image)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_very_wide_image(loaded):
  wide = np.zeros((30, 20_000, 3), np.uint8)
  got = inputs(loaded.model, wide)
  assert got["image"].shape == (1, 1, 16, 16, 3)
  assert got["pixels"].shape == (1, 1, 224, 224, 3)
  assert np.isfinite(got["pixels"]).all()


def test_the_image_is_noised_by_the_clips_own_key(loaded):
  """And its latents are those of an image, not scaled, without a key."""
  model, params = loaded.model, loaded.params["vae"]
  one = inputs(model, IMAGE)
  stage = next(s for s in model.conditioners if s.stage == "image")
  apply = jax.jit(lambda x, key: stage.apply(params, x, key, tiling=False))
  plain = apply(one, None)["image"]
  scaled = loaded.encode(one["image"])
  factor = model.config.vae.scaling_factor
  np.testing.assert_allclose(plain * factor, scaled, rtol=1e-4, atol=1e-5)
  keys = [jax.random.split(jax.random.key(seed), 1) for seed in (0, 0, 1)]
  first, again, other = (apply(one, key)["image"] for key in keys)
  np.testing.assert_array_equal(first, again)
  assert np.abs(first - plain).max() > 1e-4
  assert np.abs(first - other).max() > 1e-4


def test_the_unconditional_branch_has_no_image():
  model = svd.create(svd.config_svd(), jnp.float32)
  names = ("context", "image", "numbers")
  condition = {name: jnp.ones((1, 2)) for name in names}
  got = model.unconditional(condition, {})
  assert not got["context"].any() and not got["image"].any()
  assert got["numbers"].all()


@pytest.fixture
def between(tmp_path):
  """A checkpoint of random weights that makes what is between two frames."""
  conditioning = svd.Conditioning(given=(0, -1), mask_size=(16, 16))
  model = svd.create(tiny_svd_config.tiny(conditioning), jnp.float32)
  draw = np.random.default_rng(0).standard_normal
  params = {
    part.name: jax.tree.map(
      lambda x: np.asarray(draw(x.shape) / 8, np.float32), base.shapes(part)
    )
    for part in model.components
  }
  publish.publish(tmp_path / "between", model, params, tokenizer=None)
  return tmp_path / "between"


def test_the_size_of_a_learned_mask_is_the_only_one():
  conditioning = svd.Conditioning(given=(0, -1), mask_size=(4, 6))
  config = svd.config_small(3, conditioning)
  got = plan(config)
  ratio = config.vae.spatial_compression_ratio
  assert (got.height, got.width) == (4 * ratio, 6 * ratio)
  with pytest.raises(errors.InputError, match="makes 16x24 alone, not 16x16"):
    plan(config, height=16, width=16)


@pytest.mark.slow
def test_a_job_between_two_frames(between, folder, tmp_path, capsys):
  ends = [tmp_path / name for name in ("a.png", "b.png")]
  for path, image in zip(ends, (IMAGE, IMAGE[::-1]), strict=True):
    PIL.Image.fromarray(image).save(path)
  out = tmp_path / "out"
  argv = ["sample", f"--checkpoint={between}", f"--image={ends[0]}"]
  argv += [f"--config.{name}={value}" for name, value in SIZE.items()]
  argv += ["--config.dtype=float32", "--config.formats=png", f"--out={out}"]
  assert main.main(argv) == 2
  assert "last_image: this checkpoint makes what" in capsys.readouterr().err
  assert not out.exists()
  assert main.main([*argv, f"--last_image={ends[1]}"]) == 0
  (line,) = (out / "clips.jsonl").read_text().splitlines()
  record = json.loads(line)
  assert (record["image"], record["last_image"]) == ("a.png", "b.png")
  told = json.loads((out / "manifest.json").read_text())["inputs"]
  assert {"image", "last_image"} <= told.keys()
  (want,) = vidgen.load(between, dtype="float32").sample(
    image=[str(path) for path in ends], **SIZE
  )
  got = sorted((out / record["files"][0]).iterdir())
  got = np.stack([np.asarray(PIL.Image.open(path)) for path in got])
  np.testing.assert_array_equal(got, want)
  # Another last frame is another clip.
  assert main.main([*argv, f"--last_image={ends[0]}"]) == 0
  assert len((out / "clips.jsonl").read_text().splitlines()) == 2
  capsys.readouterr()
  argv[1] = f"--checkpoint={folder}"
  assert main.main([*argv, f"--last_image={ends[1]}"]) == 2
  assert "the first frame alone; drop it" in capsys.readouterr().err


@pytest.mark.slow
def test_a_job_of_a_folder_of_images(folder, tmp_path, capsys):
  """A clip each, by name; files play at the rate that was asked for."""
  images = tmp_path / "images"
  images.mkdir()
  for name in ("b.png", "a.jpg", "c.webp"):
    PIL.Image.fromarray(IMAGE).save(images / name)
  (images / "notes.txt").write_text("no image")
  argv = ["sample", f"--checkpoint={folder}", f"--out={tmp_path / 'out'}"]
  argv += [f"--config.{name}={value}" for name, value in SIZE.items()]
  argv += ["--config.dtype=float32", "--config.fps=12"]
  options = ["--config.options.decode_chunk=2", "--config.formats=mp4,npz"]
  assert main.main([*argv, *options, f"--image={images}"]) == 0
  lines = (tmp_path / "out" / "clips.jsonl").read_text().splitlines()
  records = [json.loads(line) for line in lines]
  assert [record["image"] for record in records] == ["a.jpg", "b.png", "c.webp"]
  assert {(r["fps"], r["frames"], r["prompt"]) for r in records} == {
    (12, 3, None)
  }
  assert [record["clip"] for record in records] == [0, 1, 2]
  capsys.readouterr()

  for more, message in (
    ([f"--image={images}", "--prompt=a panda"], "takes no text"),
    (["--prompt=a panda"], "takes no text"),
    ([], "--image=FILE alone"),
    ([f"--image={tmp_path / 'out'}"], "has no images"),
    ([f"--image={images / 'notes.txt'}"], "is not an image"),
    (
      [f"--image={images}", "--config.options.fps_id=3"],
      "fps_id: fps is given, too",
    ),
  ):
    assert main.main([*argv, *more]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
  missing = ["sample", f"--image={images / 'b.png'}", "--checkpoint=demo"]
  assert main.main([*missing, f"--out={tmp_path / 'no'}"]) == 2
  assert "makes a video from a text" in capsys.readouterr().err


@pytest.mark.slow
def test_programs_are_compiled_while_weights_load(folder):
  """What is compiled ahead is what sampling then calls, chunks of it too."""
  given = {**SIZE, "num_frames": 2}
  options = {"decode_chunk": 1}
  request = base.Request(image=True, options=options, **given)
  check = lambda model, _: [model.plan(request)]
  pipeline = vidgen.load(folder, dtype="float32", check=check)
  out = pipeline.sample(image=IMAGE, **given, **options)
  assert out.shape == (1, 2, 16, 16, 3) and out.dtype == np.uint8
  functions = [pipeline.denoise, pipeline.decoder]
  functions += [apply for _, apply in pipeline.conditioners]
  assert not any(function._cache_size() for function in functions)


def components(folder):
  config = svd.read_config(folder)
  return {
    part.name: checkpoint.load_component(folder, part)
    for part in svd.components(config)
  }


@pytest.mark.slow
def test_float16_files_and_the_way_back(folder, tmp_path):
  """Variants are read where nothing else is; what we write diffusers reads."""
  theirs = tiny_svd.write(tmp_path, dtype=torch.float16)
  half = tmp_path / "checkpoint"
  assert list((half / "unet").glob("*.fp16.safetensors"))
  want = components(half)
  assert {x.dtype for x in jax.tree.leaves(want)} == {np.dtype(np.float16)}

  checkpoint.convert(half, tmp_path / "orbax", "orbax")
  back = tmp_path / "published"
  checkpoint.convert(tmp_path / "orbax", back, "published")
  jax.tree.map(np.testing.assert_array_equal, components(back), want)
  again = type(theirs).from_pretrained(back, dtype=torch.float16)
  for name in ("unet", "vae", "image_encoder"):
    state = getattr(theirs, name).state_dict()
    for key, tensor in getattr(again, name).state_dict().items():
      assert torch.equal(tensor, state[key]), key

  # Both: the wider one is read.
  both = shutil.copytree(folder, tmp_path / "both")
  for part in ("unet", "vae", "image_encoder"):
    for file in (half / part).glob("*.fp16.safetensors"):
      shutil.copy(file, both / part)
  got = components(both)
  jax.tree.map(np.testing.assert_array_equal, got, components(folder))


def test_a_mesh_is_chosen_for_the_model(loaded):
  """Two heads on the finest level: a ring takes what is left."""
  given = plan(loaded.model.config, height=16, width=16)
  need = loading.need(loaded.model, [given], "bfloat16", "all", None)
  assert layouts.auto(8, need).sizes == {"cfg": 2, "ring": 2, "context": 2}


@pytest.mark.slow
def test_operations_are_those_that_xla_counts():
  config = unet.UnetConfig(
    block_out_channels=(64, 128, 128),
    down_block_types=(unet.CROSS_DOWN, unet.CROSS_DOWN, unet.DOWN),
    up_block_types=(unet.UP, unet.CROSS_UP, unet.CROSS_UP),
    num_attention_heads=(2, 4, 4),
    cross_attention_dim=16,
    addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=24,
  )
  params = jax.eval_shape(lambda: unet.init(config, jax.random.key(0)))
  struct = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)
  lowered = jax.jit(unet.Unet(config, attention="plain").apply).lower(
    {"params": base.unboxed(params)},
    struct(1, 4, 24, 24, 8),
    struct(1),
    struct(1, 1, 16),
    struct(1, 1, 24),
  )
  counted = lowered.cost_analysis()["flops"]
  assert flops.flops(config, 4, 24, 24) == pytest.approx(counted, rel=0.1)


def test_operations_that_are_left_out():
  """Of an image model those over time; by weights alone attention's."""
  config = unet.UnetConfig()
  count = functools.partial(flops.flops, config, 1, 64, 64)
  assert count(images=True) < 0.75 * count()
  c = np.array(config.block_out_channels)
  scores = count() - count(by_weights=True)
  # Per level: 2 transformers down, 3 up, and one in the middle at the last,
  # which has no others; each sees its n positions, and each of them its frame.
  n = np.array([64, 32, 16, 8]) ** 2
  layers = np.array([5, 5, 5, 1])
  assert scores == 2 * (layers * n * (n + 1) * 2 * c).sum()


def test_a_rate_of_its_own_is_published(tmp_path):
  configs = svd.published_configs(svd.config_small(3))
  for name, content in configs.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(json.dumps(content))
  assert svd.config_small(3).fps == 4 == svd.read_config(tmp_path).fps
  assert (
    "_fps" not in svd.published_configs(svd.config_svd())["model_index.json"]
  )
  index = tmp_path / "model_index.json"
  index.write_text(json.dumps(configs[index.name] | {"_fps": "fast"}))
  with pytest.raises(errors.InputError, match="_fps is 'fast'"):
    svd.read_config(tmp_path)


def test_a_negative_prompt_is_refused_before_loading(folder):
  model = base.find_family(folder).open_model(folder, "float32")
  values = dict.fromkeys(field.name for field in dataclasses.fields(clips.Clip))
  values |= {"where": "", "index": 0, "clip": 0, "seed": 0, "strength": 0.8}
  clip = clips.Clip(**values | {"negative_prompt": "ugly", "image": "a.png"})
  with pytest.raises(errors.InputError, match="negative_prompt: this checkpoi"):
    sample_model.check_clip(model, clip, sample.SampleConfig())
