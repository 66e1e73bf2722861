"""LoRAs on attention over time: exported, loaded, several by weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vidgen
from tests import tiny_svd
from vidgen import adapters, weights
from vidgen.models import svd

TARGETS = tuple(
  f"temporal_transformer_blocks.0.attn1.{name}"
  for name in ("to_q", "to_k", "to_v", "to_out.0")
)
CONFIG = adapters.LoraConfig(rank=2, alpha=4.0, targets=TARGETS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("svd")
  tiny_svd.write(folder)
  return folder


def export(folder, name, seed):
  config = svd.read_config(folder / "checkpoint")
  (part,) = (p for p in svd.components(config) if p.name == "unet")
  boxed = adapters.init(part, CONFIG, jax.random.key(seed))
  draw = lambda x: jax.random.normal(jax.random.key(seed), x.value.shape)
  tree = jax.tree.map(draw, boxed, is_leaf=lambda x: hasattr(x, "value"))
  file = adapters.export(folder / name, tree, CONFIG, part)
  return str(file), tree


@pytest.mark.slow
def test_two_at_once(folder):
  zoom, first = export(folder, "zoom", 1)
  pan, second = export(folder, "pan", 2)
  load = lambda **fields: weights.flatten(
    vidgen.load(folder / "checkpoint", "float32", **fields).params["unet"]
  )
  plain = load()
  both = load(lora={zoom: 0.5, pan: -1.0}, lora_scale=2.0)
  first, second = weights.flatten(first), weights.flatten(second)
  changed = 0
  for path, kernel in plain.items():
    stem = path.removesuffix("kernel")
    if f"{stem}down" not in first:
      np.testing.assert_array_equal(both[path], kernel)
      continue
    assert "/temporal_0/self_attention/" in path
    product = lambda tree, stem=stem: (
      jnp.asarray(tree[f"{stem}down"]) @ jnp.asarray(tree[f"{stem}up"])
    )
    # alpha / rank is 2, and so is the scale of all.
    want = kernel + 4 * (0.5 * product(first) - product(second))
    np.testing.assert_allclose(both[path], want, rtol=1e-4, atol=1e-4)
    changed += 1
  assert changed == len(first) // 2 and changed % 4 == 0
