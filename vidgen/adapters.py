"""LoRA: small updates of a frozen network's dense layers, to be trained.

Hu et al., https://arxiv.org/abs/2106.09685: W + (alpha / rank) B A. What is
trained is a tree of `down` (A, transposed: `[layers, in, rank]`) and `up` (B,
transposed: `[layers, rank, out]`) at the paths of the layers. The factor is no
part of that tree, where an optimiser would find and train it, and it is not
multiplied into the values either, which would change the step that Adam takes:
`attach` applies it on the way into the network, and the exported file names it.
"""

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax.typing import DTypeLike
from jaxtyping import Array, Key, PyTree

from vidgen import errors, lora, tensorfile, tensorheader, weights
from vidgen.models import base

STEM = "pytorch_lora_weights"
_INITS = ("kaiming", "gaussian")
_ENDS = {"down": lora.DOWN, "up": lora.UP}


@dataclasses.dataclass
class LoraConfig:
  """A LoRA; the defaults are those of CogVideo's finetune/schemas/args.py.

  Attributes:
    rank: Rank of each update.
    alpha: The update is multiplied by alpha / rank.
    targets: Published names of linear layers, or their ends from a dot on, as
      peft has `target_modules`.
    init: How A starts, as in peft: "kaiming" is uniform in ±1/√in, "gaussian"
      has a standard deviation of 1/rank. B starts at zero.
  """

  rank: int = 128
  alpha: float = 64.0
  targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
  init: str = "kaiming"


def init(
  component: base.Component, config: LoraConfig, key: Key[Array, ""]
) -> PyTree:
  """Returns a new LoRA, float32, boxed with logical axes; it changes nothing.

  Raises:
    InputError: The config makes no sense, or not for this network.
  """
  boxes = _boxes(component.shapes())
  tree = {}
  for i, path in enumerate(sorted(_targets(component, config))):
    *stack, rows, columns = boxes[path].value.shape
    *names, row_axis, column_axis = boxes[path].names
    shape = (*stack, rows, config.rank)
    draw = jax.random.fold_in(key, i)
    if config.init == "gaussian":
      down = jax.random.normal(draw, shape) / config.rank
    else:
      bound = 1 / math.sqrt(rows)
      down = jax.random.uniform(draw, shape, minval=-bound, maxval=bound)
    up = jnp.zeros((*stack, config.rank, columns))
    at = tuple(path.split("/")[:-1])
    box = nn.LogicallyPartitioned
    tree[(*at, "down")] = box(down, (*names, row_axis, None))
    tree[(*at, "up")] = box(up, (*names, None, column_axis))
  return traverse_util.unflatten_dict(tree)


def attach(
  params: dict[str, PyTree],
  tree: PyTree,
  config: LoraConfig,
  component: base.Component,
) -> dict[str, PyTree]:
  """Returns a model's parameters with a LoRA next to the component's own.

  Gradients go through it to the LoRA, the factor alpha / rank among them.
  """
  scaled = jax.tree_util.tree_map_with_path(
    lambda path, leaf: (
      leaf * (config.alpha / config.rank) if path[-1].key == "up" else leaf
    ),
    tree,
  )
  return {**params, component.lora_name: scaled}


def export(
  folder: str | os.PathLike,
  tree: PyTree,
  config: LoraConfig,
  component: base.Component,
  *,
  dtype: DTypeLike | None = None,
) -> pathlib.Path:
  """Writes a LoRA as diffusers' `load_lora_weights` and `vidgen.load` take it.

  Args:
    folder: Is made; it holds no weights yet.
    tree: The LoRA, unboxed.
    config: What it was made with.
    component: What it was made for.
    dtype: Of the file; None keeps that of the tree.

  Returns:
    The file.

  Raises:
    InputError: The folder holds weights, a value is NaN or infinity, or the
      tree is another config's.
    StorageError: The disk is full, or writing fails otherwise.
  """
  folder = pathlib.Path(folder)
  leaves = weights.flatten(tree)
  modules = _targets(component, config)
  names = {p.removesuffix("kernel") + e for p in modules for e in _ENDS}
  if names != leaves.keys():
    odd = tensorheader.listed(sorted(names ^ leaves.keys()))
    raise errors.InputError(f"LoRA: not what its config says: {odd}.")
  tensors = {}
  for path, published in modules.items():
    for end, name in _ENDS.items():
      leaf = np.asarray(leaves[path.removesuffix("kernel") + end])
      leaf = leaf.astype(dtype or leaf.dtype)
      if not weights.is_finite(leaf):
        raise errors.InputError(f"LoRA: {path}: {end} holds NaN or infinity.")
      # Without layers there is one name, and no leading axis to go along.
      layers = leaf if leaf.ndim == 3 else leaf[None]
      for module, layer in zip(published, layers, strict=True):
        tensors[f"{component.name}.{module}{name}"] = np.ascontiguousarray(
          layer.T
        )
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise errors.StorageError(f"{folder}: {e.strerror}.") from e
  shapes = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tensors.items()
  }
  metadata = {lora.METADATA: json.dumps(_metadata(config, component.name))}
  [path] = tensorfile.write(
    folder, STEM, shapes, tensors.items(), metadata=metadata
  )
  return path


def _metadata(config: LoraConfig, prefix: str) -> dict[str, Any]:
  """Returns peft's config of a LoRA, as diffusers saves it."""
  fields = {
    "r": config.rank,
    "lora_alpha": config.alpha,
    "target_modules": list(config.targets),
    "init_lora_weights": config.init == "kaiming" or config.init,
    "lora_dropout": 0.0,
    "bias": "none",
  }
  return {f"{prefix}.{name}": value for name, value in fields.items()}


def _boxes(shapes: PyTree) -> dict[str, nn.Partitioned]:
  """Returns the boxed leaves of a tree by path."""
  is_box = lambda leaf: isinstance(leaf, nn.Partitioned)
  flat = jax.tree_util.tree_flatten_with_path(shapes, is_leaf=is_box)[0]
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  return {name(path): leaf for path, leaf in flat}


def _targets(
  component: base.Component, config: LoraConfig
) -> dict[str, list[str]]:
  """Returns the published modules of each kernel that the LoRA updates.

  Raises:
    InputError: As `init` says.
  """
  _check(component, config)
  found: dict[str, list[str]] = {}
  every: dict[str, list[str]] = {}
  table = weights.published_targets(base.shapes(component), component.table)
  used = set()
  for name, target in table.items():
    module = name.removesuffix(".weight")
    every.setdefault(target.path, []).append(module)
    ends = [t for t in config.targets if f".{module}".endswith(f".{t}")]
    if not ends or module == name:
      continue
    if target.axes != weights.LINEAR:
      raise errors.InputError(
        f"LoRA: targets: {ends[0]} is {module}, which is no linear layer."
      )
    used.update(ends)
    found.setdefault(target.path, []).append(module)
  if unused := [t for t in config.targets if t not in used]:
    linear = sorted(
      {
        name.removesuffix(".weight")
        for name, target in table.items()
        if target.axes == weights.LINEAR and not target.layer
      }
    )
    raise errors.InputError(
      f"LoRA: targets: {unused[0]} is no layer of the {component.name}; linear "
      f"layers are {tensorheader.listed(linear)}."
    )
  for path, modules in found.items():
    if modules != every[path]:
      raise errors.InputError(
        f"LoRA: targets: {modules[0]} is one of {len(every[path])} layers; "
        "name all of them, by the end of their names."
      )
  return found


def _check(component: base.Component, config: LoraConfig) -> None:
  if not component.takes_lora:
    raise errors.InputError(f"LoRA: the {component.name} takes none.")
  if type(config.rank) is not int or config.rank < 1:
    raise errors.InputError(f"LoRA: rank: {config.rank!r} is not 1 or more.")
  if not (math.isfinite(config.alpha) and config.alpha > 0):
    raise errors.InputError(f"LoRA: alpha: {config.alpha!r} is not positive.")
  if config.init not in _INITS:
    raise errors.InputError(
      f"LoRA: init: {config.init!r} is not one of {', '.join(_INITS)}."
    )
  if isinstance(config.targets, str) or not config.targets:
    raise errors.InputError("LoRA: targets: names layers, one or more.")
