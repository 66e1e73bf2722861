"""Inception: the 2048 numbers of an image that FID compares.

Szegedy et al., https://arxiv.org/abs/1512.00567, with the weights of 2015-12-05
that Heusel et al., https://arxiv.org/abs/1706.08500, took: a network that
pools a little otherwise than later ones, see fid_inception_v3 in
mseitzer/pytorch-fid, whose names the weights have. They are read from a local
folder, as safetensors.
"""

import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, UInt8

from vidgen import errors, tensorfile, tensorheader

SIZE = 299
WIDTH = 2048
_EPSILON = 1e-3

Params = Mapping[str, Float[Array, "..."]]


class Weights(NamedTuple):
  """Parameters, and the SHA-256 of the file that they are from."""

  params: Params
  sha256: str


# A branch is convolutions one after the other. All keep the size, but for
# those whose name ends with "/2", which halve it, and the stem's.
_A = (
  ("branch1x1",),
  ("branch5x5_1", "branch5x5_2"),
  ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
)
_B = (
  ("branch3x3/2",),
  ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3/2"),
)
_C = (
  ("branch1x1",),
  tuple(f"branch7x7_{i}" for i in (1, 2, 3)),
  tuple(f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)),
)
_D = (
  ("branch3x3_1", "branch3x3_2/2"),
  ("branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4/2"),
)
_E = (
  ("branch1x1",),
  ("branch3x3_1", "branch3x3_2a"),
  ("branch3x3_1", "branch3x3_2b"),
  ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3a"),
  ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3b"),
)
_STEM = (
  "Conv2d_1a_3x3/2",
  "Conv2d_2a_3x3/1",
  "Conv2d_2b_3x3",
  "pool",
  "Conv2d_3b_1x1",
  "Conv2d_4a_3x3/1",
  "pool",
)
# Of each module, its branches, and what the last branch pools with.
_MODULES = (
  *((f"Mixed_5{letter}", _A, "mean") for letter in "bcd"),
  ("Mixed_6a", _B, "halve"),
  *((f"Mixed_6{letter}", _C, "mean") for letter in "bcde"),
  ("Mixed_7a", _D, "halve"),
  ("Mixed_7b", _E, "mean"),
  ("Mixed_7c", _E, "max"),
)


def features(
  params: Params, images: Float[Array, "n h w 3"]
) -> Float[Array, "n 2048"]:
  """Returns the features of images in [-1, 1], of 299x299 pixels or others."""
  x = images
  for name in _STEM:
    x = _halving_pool(x) if name == "pool" else _unit(params, name, x)
  for module, branches, pooling in _MODULES:
    parts = []
    for names in branches:
      y = x
      for name in names:
        y = _unit(params, f"{module}.{name}", y)
      parts.append(y)
    pooled = _POOLS[pooling](x)
    if pooling != "halve":
      pooled = _unit(params, f"{module}.branch_pool", pooled)
    x = jnp.concatenate([*parts, pooled], axis=-1)
  return jnp.mean(x, axis=(1, 2))


def resize(frames: UInt8[Array, "F H W 3"]) -> Float[Array, "F 299 299 3"]:
  """Returns frames as Inception takes them: 299x299, in [-1, 1].

  Bilinear without antialiasing, as pytorch-fid does; clean-fid's bicubic with
  antialiasing gives other numbers.
  """
  shape = (frames.shape[0], SIZE, SIZE, 3)
  x = frames.astype(jnp.float32)
  return jax.image.resize(x, shape, "linear", antialias=False) / 127.5 - 1


def load(folder: str | os.PathLike) -> Weights:
  """Returns the weights of a folder that holds one safetensors file.

  Raises:
    InputError: There is none.
    CorruptError: It is broken, or of another network.
  """
  files = tensorfile.open_folder(pathlib.Path(folder))
  missing = [
    f"{name}.{part}"
    for name in names()
    for part in ("conv.weight", *(f"bn.{kind}" for kind in _NORM))
    if f"{name}.{part}" not in files
  ]
  if missing:
    raise errors.CorruptError(
      f"{files.where}: is not the Inception of FID; it lacks "
      f"{tensorheader.listed(missing, 5)}."
    )
  params = {}
  for name in names():
    kernel = files.read(f"{name}.conv.weight").astype(np.float32)
    scale, bias, mean, variance = (
      files.read(f"{name}.bn.{kind}").astype(np.float32) for kind in _NORM
    )
    # What training averaged is fixed, and so a part of the convolution.
    scale = scale / np.sqrt(variance + _EPSILON)
    params[f"{name}/kernel"] = jnp.asarray(
      (kernel * scale[:, None, None, None]).transpose(2, 3, 1, 0)
    )
    params[f"{name}/bias"] = jnp.asarray(bias - mean * scale)
  image = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
  try:
    width = jax.eval_shape(features, params, image).shape[-1]
  except (TypeError, ValueError) as error:
    raise errors.CorruptError(
      f"{files.where}: is not the Inception of FID; its shapes do not fit."
    ) from error
  if width != WIDTH:
    raise errors.CorruptError(
      f"{files.where}: gives {width} features instead of {WIDTH}."
    )
  digest = hashlib.sha256()
  for path in sorted({entry.file for entry in files.values()}):
    with open(path, "rb") as file:
      digest.update(hashlib.file_digest(file, "sha256").digest())
  return Weights(params, digest.hexdigest())


_NORM = ("weight", "bias", "running_mean", "running_var")


def names() -> list[str]:
  """Returns the names of all convolutions."""
  found = [name.split("/")[0] for name in _STEM if name != "pool"]
  for module, branches, pooling in _MODULES:
    units = [name.split("/")[0] for branch in branches for name in branch]
    units += [] if pooling == "halve" else ["branch_pool"]
    found += [f"{module}.{unit}" for unit in units]
  return list(dict.fromkeys(found))


def _unit(
  params: Params, name: str, x: Float[Array, "n h w c"]
) -> Float[Array, "n y x d"]:
  """A convolution with its norm, and a ReLU."""
  name, _, stride = name.partition("/")
  kernel = params[f"{name}/kernel"]
  x = lax.conv_general_dilated(
    x,
    kernel,
    (int(stride or 1),) * 2,
    "VALID" if stride else "SAME",
    precision=lax.Precision.HIGHEST,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  return nn.relu(x + params[f"{name}/bias"])


def _halving_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n y x c"]:
  return nn.max_pool(x, (3, 3), (2, 2), "VALID")


def _mean_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
  """The mean of the neighbours that are there: padding does not count."""
  return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _max_pool(x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
  return nn.max_pool(x, (3, 3), (1, 1), "SAME")


_POOLS: Mapping[str, Callable[[Array], Array]] = {
  "halve": _halving_pool,
  "mean": _mean_pool,
  "max": _max_pool,
}
