"""FID's Inception against its layers in torch, of random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch

from vidgen import errors
from vidgen.metrics import inception

# Channels and sizes of each convolution, as torchvision's Inception3 has them.
_STEM = (
  ("Conv2d_1a_3x3", 3, 32, (3, 3)),
  ("Conv2d_2a_3x3", 32, 32, (3, 3)),
  ("Conv2d_2b_3x3", 32, 64, (3, 3)),
  ("Conv2d_3b_1x1", 64, 80, (1, 1)),
  ("Conv2d_4a_3x3", 80, 192, (3, 3)),
)


def _a(at, width, pooled):
  yield f"{at}.branch1x1", width, 64, (1, 1)
  yield f"{at}.branch5x5_1", width, 48, (1, 1)
  yield f"{at}.branch5x5_2", 48, 64, (5, 5)
  yield f"{at}.branch3x3dbl_1", width, 64, (1, 1)
  yield f"{at}.branch3x3dbl_2", 64, 96, (3, 3)
  yield f"{at}.branch3x3dbl_3", 96, 96, (3, 3)
  yield f"{at}.branch_pool", width, pooled, (1, 1)


def _b(at):
  yield f"{at}.branch3x3", 288, 384, (3, 3)
  yield f"{at}.branch3x3dbl_1", 288, 64, (1, 1)
  yield f"{at}.branch3x3dbl_2", 64, 96, (3, 3)
  yield f"{at}.branch3x3dbl_3", 96, 96, (3, 3)


def _c(at, c):
  yield f"{at}.branch1x1", 768, 192, (1, 1)
  yield f"{at}.branch7x7_1", 768, c, (1, 1)
  yield f"{at}.branch7x7_2", c, c, (1, 7)
  yield f"{at}.branch7x7_3", c, 192, (7, 1)
  yield f"{at}.branch7x7dbl_1", 768, c, (1, 1)
  yield f"{at}.branch7x7dbl_2", c, c, (7, 1)
  yield f"{at}.branch7x7dbl_3", c, c, (1, 7)
  yield f"{at}.branch7x7dbl_4", c, c, (7, 1)
  yield f"{at}.branch7x7dbl_5", c, 192, (1, 7)
  yield f"{at}.branch_pool", 768, 192, (1, 1)


def _d(at):
  yield f"{at}.branch3x3_1", 768, 192, (1, 1)
  yield f"{at}.branch3x3_2", 192, 320, (3, 3)
  yield f"{at}.branch7x7x3_1", 768, 192, (1, 1)
  yield f"{at}.branch7x7x3_2", 192, 192, (1, 7)
  yield f"{at}.branch7x7x3_3", 192, 192, (7, 1)
  yield f"{at}.branch7x7x3_4", 192, 192, (3, 3)


def _e(at, width):
  yield f"{at}.branch1x1", width, 320, (1, 1)
  yield f"{at}.branch3x3_1", width, 384, (1, 1)
  yield f"{at}.branch3x3_2a", 384, 384, (1, 3)
  yield f"{at}.branch3x3_2b", 384, 384, (3, 1)
  yield f"{at}.branch3x3dbl_1", width, 448, (1, 1)
  yield f"{at}.branch3x3dbl_2", 448, 384, (3, 3)
  yield f"{at}.branch3x3dbl_3a", 384, 384, (1, 3)
  yield f"{at}.branch3x3dbl_3b", 384, 384, (3, 1)
  yield f"{at}.branch_pool", width, 192, (1, 1)


def layers():
  yield from _STEM
  for letter, width, pooled in (("b", 192, 32), ("c", 256, 64), ("d", 288, 64)):
    yield from _a(f"Mixed_5{letter}", width, pooled)
  yield from _b("Mixed_6a")
  for letter, c in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
    yield from _c(f"Mixed_6{letter}", c)
  yield from _d("Mixed_7a")
  yield from _e("Mixed_7b", 1280)
  yield from _e("Mixed_7c", 2048)


def random_weights(seed=0):
  rng = np.random.default_rng(seed)
  tensors = {}
  for name, width, out, size in layers():
    shape = (out, width, *size)
    kernel = rng.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape)
    tensors[f"{name}.conv.weight"] = kernel
    tensors[f"{name}.bn.weight"] = 1 + rng.normal(0, 0.2, out)
    tensors[f"{name}.bn.bias"] = rng.normal(0, 0.2, out)
    tensors[f"{name}.bn.running_mean"] = rng.normal(0, 0.2, out)
    tensors[f"{name}.bn.running_var"] = rng.uniform(1, 1.3, out)
  # The classifier is there, too, and nobody asks it.
  tensors["fc.weight"] = np.zeros((1008, 2048))
  return {name: a.astype(np.float32) for name, a in tensors.items()}


@pytest.fixture(scope="module")
def tensors():
  return random_weights()


@pytest.fixture(scope="module")
def folder(tensors, tmp_path_factory):
  folder = tmp_path_factory.mktemp("inception")
  safetensors.numpy.save_file(tensors, folder / "inception.safetensors")
  return folder


def _torch_features(tensors, images):
  """Szegedy et al., table 1, pooling as the weights of 2015-12-05 want it."""
  functional = torch.nn.functional
  tensor = lambda name: torch.from_numpy(tensors[name])

  def unit(x, name, stride=1, pad=None):
    kernel = tensor(f"{name}.conv.weight")
    if pad is None:
      pad = [side // 2 for side in kernel.shape[2:]]
    x = functional.conv2d(x, kernel, stride=stride, padding=pad)
    kinds = ("running_mean", "running_var", "weight", "bias")
    norm = [tensor(f"{name}.bn.{kind}") for kind in kinds]
    return functional.batch_norm(x, *norm, eps=1e-3).relu()

  def chain(x, at, *names):
    for name in names:
      x = unit(x, f"{at}.{name}")
    return x

  halve = lambda x: functional.max_pool2d(x, 3, 2)
  mean = lambda x: functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
  x = torch.from_numpy(images).movedim(-1, 1)
  x = unit(unit(x, "Conv2d_1a_3x3", 2, 0), "Conv2d_2a_3x3", 1, 0)
  x = halve(unit(x, "Conv2d_2b_3x3"))
  x = halve(unit(unit(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3", 1, 0))
  for at in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
    one = chain(x, at, "branch1x1")
    two = chain(x, at, "branch5x5_1", "branch5x5_2")
    three = chain(x, at, *(f"branch3x3dbl_{i}" for i in (1, 2, 3)))
    x = torch.cat([one, two, three, chain(mean(x), at, "branch_pool")], 1)
  two = chain(x, "Mixed_6a", "branch3x3dbl_1", "branch3x3dbl_2")
  two = unit(two, "Mixed_6a.branch3x3dbl_3", 2, 0)
  one = unit(x, "Mixed_6a.branch3x3", 2, 0)
  x = torch.cat([one, two, halve(x)], 1)
  for at in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
    one = chain(x, at, "branch1x1")
    two = chain(x, at, *(f"branch7x7_{i}" for i in (1, 2, 3)))
    three = chain(x, at, *(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)))
    x = torch.cat([one, two, three, chain(mean(x), at, "branch_pool")], 1)
  one = unit(chain(x, "Mixed_7a", "branch3x3_1"), "Mixed_7a.branch3x3_2", 2, 0)
  two = chain(x, "Mixed_7a", *(f"branch7x7x3_{i}" for i in (1, 2, 3)))
  two = unit(two, "Mixed_7a.branch7x7x3_4", 2, 0)
  x = torch.cat([one, two, halve(x)], 1)
  for at in ("Mixed_7b", "Mixed_7c"):
    one = chain(x, at, "branch1x1")
    two = chain(x, at, "branch3x3_1")
    three = chain(x, at, "branch3x3dbl_1", "branch3x3dbl_2")
    pool = mean(x) if at == "Mixed_7b" else functional.max_pool2d(x, 3, 1, 1)
    last = chain(pool, at, "branch_pool")
    split = [
      unit(part, f"{at}.{name}{letter}")
      for part, name in ((two, "branch3x3_2"), (three, "branch3x3dbl_3"))
      for letter in "ab"
    ]
    x = torch.cat([one, *split, last], 1)
  return x.mean((2, 3)).numpy()


def test_is_fids_network_in_torch(tensors, folder):
  rng = np.random.default_rng(0)
  images = rng.uniform(-1, 1, (2, 123, 139, 3)).astype(np.float32)
  with torch.no_grad():
    want = _torch_features(tensors, images)
  got = jax.jit(inception.features)(inception.load(folder).params, images)
  assert want.std() > 0.1
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_resize_is_torchs_bilinear():
  frames = np.random.default_rng(0).integers(0, 256, (2, 64, 400, 3), np.uint8)
  first = torch.from_numpy(frames).movedim(-1, 1).float()
  want = torch.nn.functional.interpolate(
    first, (299, 299), mode="bilinear", align_corners=False
  )
  want = want.movedim(1, -1).numpy() / 127.5 - 1
  got = inception.resize(jnp.asarray(frames))
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_other_weights_are_refused(tensors, tmp_path):
  path = tmp_path / "inception.safetensors"
  with pytest.raises(errors.InputError, match="safetensors"):
    inception.load(tmp_path)
  fewer = {k: v for k, v in tensors.items() if not k.startswith("Mixed_7c.b")}
  safetensors.numpy.save_file(fewer, path)
  with pytest.raises(errors.CorruptError, match=r"it lacks .*Mixed_7c\.branch"):
    inception.load(tmp_path)
  name = "Mixed_5c.branch1x1.conv.weight"
  safetensors.numpy.save_file(tensors | {name: tensors[name][:, :9]}, path)
  with pytest.raises(errors.CorruptError, match="shapes do not fit"):
    inception.load(tmp_path)
