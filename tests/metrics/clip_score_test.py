"""CLIP score against transformers' own model, processor and tokenizer."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers

from tests import tiny_clip_tokenizer, tiny_svd
from vidgen import errors
from vidgen.metrics import clip_score

PROMPT = "red and red."


def _module(end):
  sizes = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
  }
  config = transformers.CLIPConfig(
    text_config={
      **sizes,
      "vocab_size": 100,
      "hidden_act": "quick_gelu",
      "eos_token_id": end,
      "bos_token_id": 0,
    },
    vision_config={**sizes, "patch_size": 8, "image_size": 32},
    projection_dim=24,
  )
  return _randomize(transformers.CLIPModel(config), 5).eval()


def _randomize(module, seed):
  # All but logit_scale, which has no axis.
  for child in module.children():
    tiny_svd.randomize(child, seed)
  return module


@pytest.fixture(scope="module", params=["old", "new"])
def saved(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp("clip")
  tiny_clip_tokenizer.write(folder)
  vocabulary = json.loads((folder / "vocab.json").read_text())
  ends = {"old": 2, "new": vocabulary["<|endoftext|>"]}
  module = _module(ends[request.param])
  module.save_pretrained(folder)
  return folder, module


def _video(seed=0, count=11, size=(40, 57)):
  rng = np.random.default_rng(seed)
  return rng.integers(0, 256, (count, *size, 3), dtype=np.uint8)


def _pixels(video):
  processor = transformers.CLIPImageProcessorPil(
    size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
  )
  images = list(video)
  return processor(images, return_tensors="pt").pixel_values


@pytest.mark.parametrize("size", [(40, 57), (57, 40), (32, 32), (20, 31)])
def test_frames_are_cut_and_resized_as_transformers_does(size):
  video = _video(size=size, count=1)
  want = _pixels(video)[0].permute(1, 2, 0)
  got = clip_score.preprocess(video[0], 32)
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_the_score_is_that_of_transformers(saved):
  folder, module = saved
  video = _video()
  tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
  ids = tokenizer(PROMPT, padding="max_length", max_length=77)["input_ids"]
  with torch.no_grad():
    out = module(input_ids=torch.tensor([ids]), pixel_values=_pixels(video))
  want = 100 * (out.image_embeds @ out.text_embeds.T).mean().item()
  found = clip_score.load(folder)
  np.testing.assert_allclose(found.score(PROMPT, video), want, rtol=1e-4)
  assert abs(want) > 0.5
  assert found.score("and", video) != found.score(PROMPT, video)


def test_a_frame_does_not_depend_on_its_neighbours(saved):
  folder, _ = saved
  found = clip_score.load(folder)
  video = _video()
  alone = [found.images(video[i : i + 1])[0] for i in range(len(video))]
  np.testing.assert_array_equal(found.images(video), np.stack(alone))


def test_the_identity_names_the_weights(saved, tmp_path):
  folder, module = saved
  name = clip_score.load(folder).identity
  assert name.startswith("clip-24d-p8-32-")
  other = tmp_path / "other"
  shutil.copytree(folder, other)
  _randomize(module, 6).save_pretrained(other)
  assert clip_score.load(other).identity != name


def test_folders_of_something_else_are_one_line(saved, tmp_path):
  folder, _ = saved
  with pytest.raises(errors.InputError, match=r"has no config\.json"):
    clip_score.load(tmp_path)
  (tmp_path / "config.json").write_text('{"hidden_size": 3}')
  with pytest.raises(errors.InputError, match="is of no CLIP"):
    clip_score.load(tmp_path)
  shutil.copy(folder / "config.json", tmp_path)
  with pytest.raises(errors.VidgenError, match="safetensors"):
    clip_score.load(tmp_path)
