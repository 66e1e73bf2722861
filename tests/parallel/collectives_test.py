"""What layouts move, read from the compiled programs of one clip."""

import collections
import functools
import math

import jax
import pytest

import vidgen
from tests.parallel import equality
from vidgen import ahead, arguments, hlo

LAYERS = 2
ITEM = 4  # Bytes of float32.


@functools.cache
def moved(stage: str, num_frames: int, **mesh: int):
  """Counts (kind, how often it runs, bytes of its result on one device)."""
  folder = str(equality.folder("5b"))
  pipe = vidgen.load(folder, dtype="float32", mesh=mesh)
  sizes = {**equality.SIZE, "num_frames": num_frames, "num_steps": 3}
  request = arguments.request(sizes, None, "ddim", None, None, {})
  plan = pipe.model.plan(request)
  programs = {one.name: one for one in ahead.programs(pipe, plan)}
  text = programs[stage].lower(pipe.mesh).compile().as_text()
  found = collections.Counter(
    (one.kind, one.count, one.result_bytes) for one in hlo.collectives(text)
  )
  return pipe, plan, found


def in_layers(found):
  """Those in the loop over blocks; the others run once a step."""
  return {
    (kind, size): number
    for (kind, count, size), number in found.items()
    if count == LAYERS
  }


def activation(pipe, plan, parts: int) -> int:
  """Bytes of one device's part of all tokens of both branches."""
  config = pipe.model.config.transformer
  f, h, w, _ = plan.latents
  tokens = config.max_text_seq_length + f * h * w // config.patch_size**2
  tokens = math.ceil(tokens / parts) * parts
  return 2 * tokens * config.dim * ITEM // parts


def test_ulysses_trades_four_times_a_layer():
  pipe, plan, found = moved("denoise", 9, context=4)
  size = activation(pipe, plan, 4)
  assert in_layers(found) == {("all-to-all", size): 4}
  gathered = sum(
    bytes * n for (kind, _, bytes), n in found.items() if kind == "all-gather"
  )
  # The prediction alone, of 16 channels and not 64, is whole again in the end.
  assert pipe.model.config.transformer.dim == 64
  assert gathered == 4 * size * 16 // 64
  once = sum(b * n for (_, count, b), n in found.items() if count == 1)
  assert once < 4 * size


def test_a_ring_passes_keys_and_values_on():
  pipe, plan, found = moved("denoise", 9, cfg=2, ring=2, context=2)
  size = activation(pipe, plan, 8)
  assert in_layers(found) == {
    ("all-to-all", size): 4,
    ("collective-permute", size): 2,
  }


def test_tensor_sums_twice_a_layer():
  pipe, plan, found = moved("denoise", 9, tensor=2)
  layers = in_layers(found)
  assert layers.pop(("all-reduce", activation(pipe, plan, 1))) == 2
  # Modulation: two vectors of a branch and layer.
  dim = pipe.model.config.transformer.dim
  assert layers == {("all-gather", 2 * 6 * dim * ITEM): 2}


def test_fsdp_gathers_the_weights_of_a_layer():
  pipe, _, found = moved("denoise", 9, cfg=2, fsdp=4)
  gathered = {
    size: number
    for (kind, size), number in in_layers(found).items()
    if kind == "all-gather"
  }
  blocks = pipe.params["transformer"]["blocks"]
  stored = [
    leaf.nbytes // LAYERS
    for leaf in jax.tree.leaves(blocks)
    if not leaf.sharding.is_fully_replicated
  ]
  assert gathered == collections.Counter(stored)


@pytest.mark.parametrize(
  "mesh",
  [
    pytest.param({"cfg": 2, "context": 4}, marks=pytest.mark.slow),
    {"fsdp": 8},
  ],
  ids=str,
)
def test_the_autoencoder_exchanges_edges(mesh):
  """Of 4 x 2 parts: edges, and sums for norms; no frame is ever gathered."""
  pipe, plan, found = moved("decode", 25, **mesh)
  _, h, w, _ = plan.latents
  width = max(pipe.model.config.vae.block_out_channels)
  edge = 2 * 8 * max(h * 8 // 4, w * 8 // 2) * width * ITEM
  weights = {
    leaf.nbytes for leaf in jax.tree.leaves(pipe.params["vae"]["decoder"])
  }
  for kind, _, size in found:
    if kind == "collective-permute":
      assert size <= edge
    elif kind == "all-reduce":
      assert size <= 8 * width * ITEM
    elif kind == "all-to-all":
      # Of 3 channels: how eight rows of devices have the frames in the end.
      assert size <= 12 * (h * 8) * (w * 8) * 3 * ITEM // 8
    else:
      assert (kind, size in weights) == ("all-gather", True)
