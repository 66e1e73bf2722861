"""Checkpoints to and from diffusers: convert, dtypes, LoRA."""

import json

import diffusers
import numpy as np
import peft
import pytest
import torch

import vidgen
from tests import tiny_cogvideox
from tests.parity import compare
from vidgen import checkpoint

PROMPT = "a panda plays in the forest"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("5b")
  tiny_cogvideox.write(folder, "5b")
  return folder / "checkpoint"


def run(pipeline, seed=0):
  pipeline.set_progress_bar_config(disable=True)
  return pipeline(
    PROMPT,
    num_frames=9,
    num_inference_steps=2,
    max_sequence_length=32,
    generator=torch.Generator().manual_seed(seed),
    output_type="np",
  ).frames


@pytest.mark.parametrize("variant", ["5b-i2v", "1.5-5b-i2v"])
def test_round_trip_keeps_every_bit(variant, tmp_path):
  """Published, Orbax, published: the same tensors under the same names."""
  tiny_cogvideox.write(tmp_path, variant)
  source = tmp_path / "checkpoint"
  checkpoint.convert(source, tmp_path / "orbax", "orbax")
  checkpoint.convert(tmp_path / "orbax", tmp_path / "back", "published")
  kind = diffusers.CogVideoXImageToVideoPipeline
  want, got = (kind.from_pretrained(p) for p in (source, tmp_path / "back"))
  for part in ("transformer", "vae", "text_encoder"):
    theirs = getattr(want, part).state_dict()
    ours = getattr(got, part).state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_diffusers_opens_what_convert_writes(folder, tmp_path):
  checkpoint.convert(folder, tmp_path / "orbax", "orbax")
  checkpoint.convert(tmp_path / "orbax", tmp_path / "back", "published")
  kind = diffusers.CogVideoXPipeline
  want = run(kind.from_pretrained(folder))
  np.testing.assert_array_equal(
    run(kind.from_pretrained(tmp_path / "back")), want
  )
  call = {"num_steps": 2, "output": "latents"}
  np.testing.assert_array_equal(
    vidgen.load(tmp_path / "orbax", dtype="float32").sample(PROMPT, **call),
    vidgen.load(folder, dtype="float32").sample(PROMPT, **call),
  )


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_stored_dtypes(stored, tmp_path):
  """16-bit files are read exactly, whatever the target."""
  pipeline = tiny_cogvideox.write(tmp_path, "2b", dtype=stored)
  loaded = vidgen.load(tmp_path / "checkpoint", dtype="float32")
  kernel = loaded.params["transformer"]["blocks"]["attention"]["query"][
    "kernel"
  ]
  want = pipeline.transformer.transformer_blocks[1].attn1.to_q.weight
  np.testing.assert_array_equal(kernel[1], want.detach().float().numpy().T)
  assert loaded.params["vae"]["decoder"]["conv_in"]["kernel"].dtype == "float32"


def test_old_configs_lack_newer_keys(tmp_path):
  """CogVideoX-2b's own config has none of the keys of later variants."""
  tiny_cogvideox.write(tmp_path, "2b")
  path = tmp_path / "checkpoint" / "transformer" / "config.json"
  config = json.loads(path.read_text())
  for key in (
    "use_rotary_positional_embeddings",
    "use_learned_positional_embeddings",
    "ofs_embed_dim",
    "patch_size_t",
    "patch_bias",
  ):
    del config[key]
  path.write_text(json.dumps(config))
  path = tmp_path / "checkpoint" / "vae" / "config.json"
  config = json.loads(path.read_text())
  for key in ("invert_scale_latents", "shift_factor", "use_quant_conv"):
    del config[key]
  path.write_text(json.dumps(config))
  loaded = vidgen.load(tmp_path / "checkpoint", dtype="float32")
  assert loaded.model.config.transformer.patch_size_t is None
  assert loaded.sample(PROMPT, num_steps=1).shape == (1, 9, 64, 96, 3)


@pytest.mark.parametrize("scale", [1.0, 0.6])
def test_lora_is_diffusers(scale, folder, tmp_path):
  """A LoRA that diffusers saved, merged with a scale."""
  theirs = diffusers.CogVideoXPipeline.from_pretrained(folder)
  config = peft.LoraConfig(
    r=4,
    lora_alpha=6,
    init_lora_weights=False,
    target_modules=["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj"],
  )
  torch.manual_seed(0)
  theirs.transformer.add_adapter(config)
  theirs.save_lora_weights(
    tmp_path,
    peft.get_peft_model_state_dict(theirs.transformer),
    transformer_lora_adapter_metadata=dict(config.to_dict()),
  )
  theirs.transformer.delete_adapters("default")
  theirs.load_lora_weights(tmp_path, adapter_name="tuned")
  theirs.fuse_lora(lora_scale=scale)
  noise = np.random.default_rng(0).standard_normal((1, 3, 8, 12, 4))
  noise = noise.astype(np.float32)
  theirs.set_progress_bar_config(disable=True)
  want = theirs(
    PROMPT,
    num_frames=9,
    num_inference_steps=4,
    max_sequence_length=32,
    latents=torch.from_numpy(noise).permute(0, 1, 4, 2, 3),
    output_type="np",
  ).frames
  call = {"num_steps": 4, "latents": noise, "output": "float"}
  ours = vidgen.load(
    folder,
    dtype="float32",
    lora=str(tmp_path / "pytorch_lora_weights.safetensors"),
    lora_scale=scale,
  )
  got = ours.sample(PROMPT, **call)
  compare.check("pipeline", f"LoRA, scale {scale}", got, want, 1e-4)
  plain = vidgen.load(folder, dtype="float32").sample(PROMPT, **call)
  assert compare.error(plain, want) > 1e-2
