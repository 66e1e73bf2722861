"""LoRA files in the diffusers layout.

Hu et al., https://arxiv.org/abs/2106.09685: W + (alpha / r) B A, with A of
`[r, in]` in `*.lora_A.weight` and B of `[out, r]` in `*.lora_B.weight`. What
alpha is follows peft, which diffusers loads these files with.
"""

import math
import re
from typing import Any, NamedTuple

from vidgen import errors, tensorfile, tensorheader

DOWN, UP, ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"
METADATA = "lora_adapter_metadata"
# Starting points that leave the base weights as they were published.
_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


class Update(NamedTuple):
  """A low-rank update of one published weight.

  Attributes:
    name: The published name of the weight.
    down: The name of A in the file.
    up: The name of B in the file.
    factor: What B A is multiplied by.
  """

  name: str
  down: str
  up: str
  factor: float


def read(files: tensorfile.TensorFiles, prefix: str) -> list[Update]:
  """Returns the updates in a LoRA file whose names begin with `prefix`.

  Other prefixes are for other components.

  Raises:
    InputError: It has none, or is of another kind: DoRA, biases.
    CorruptError: Half of a pair is missing, or alpha or rank make no sense.
  """
  ends = (DOWN, UP, ALPHA)
  names = [name for name in files if name.startswith(prefix)]
  other = [name for name in names or files if not name.endswith(ends)]
  if other or not names:
    raise errors.InputError(
      f"{files.where}: a LoRA file has {prefix}*{DOWN}, *{UP} and *{ALPHA}"
      f", this one has: {tensorheader.listed(sorted(other or files))}."
    )
  modules = {end: set() for end in ends}
  for name in names:
    end = next(end for end in ends if name.endswith(end))
    modules[end].add(name.removesuffix(end))
  every = set().union(*modules.values())
  missing = [m + e for m in every for e in ends[:2] if m not in modules[e]]
  if missing:
    raise errors.CorruptError(
      f"{files.where}: missing: {tensorheader.listed(sorted(missing))}."
    )
  config = _config(files, prefix)
  if config and modules[ALPHA]:
    raise errors.InputError(
      f"{files.where}: alpha stands in its metadata and in its tensors; "
      "remove one."
    )
  updates = []
  for module in sorted(every):
    down, up, alpha = (module + end for end in ends)
    name = module.removeprefix(prefix)
    rank = files[down].shape[0] if files[down].shape else 0
    if rank < 1:
      raise errors.CorruptError(f"{files.where}: {down} has no rank.")
    if config:
      factor = _factor(files, config, name, rank)
    else:
      factor = _alpha(files, alpha) / rank if alpha in files else 1.0
    updates.append(Update(f"{name}.weight", down, up, factor))
  return updates


def _config(files: tensorfile.TensorFiles, prefix: str) -> dict[str, Any]:
  """Returns peft's config from the metadata of the file, or nothing."""
  if METADATA not in files.metadata:
    return {}
  where = f"{files.where}: {METADATA}"
  config = tensorheader.parse_json(files.metadata[METADATA].encode(), where)
  config = {
    key.removeprefix(prefix): value
    for key, value in config.items()
    if key.startswith(prefix)
  }
  if config and not {"r", "lora_alpha"} <= config.keys():
    raise errors.CorruptError(f"{where} lacks r or lora_alpha.")
  for key in ("use_dora", "lora_bias"):
    if config.get(key):
      raise errors.InputError(f"{where}: {key} is not supported.")
  if config.get("init_lora_weights") not in _INITS:
    raise errors.InputError(
      f"{where}: init_lora_weights {config['init_lora_weights']!r} changes "
      "the base weights too, which is not supported."
    )
  return config


def _factor(
  files: tensorfile.TensorFiles, config: dict[str, Any], name: str, rank: int
) -> float:
  """Returns alpha / r, or alpha / sqrt(r) where the rank is stabilised."""
  where = f"{files.where}: {METADATA}"
  wanted = _pick(config, "rank_pattern", name, config["r"], where)
  if wanted != rank:
    raise errors.CorruptError(
      f"{where}: the rank of {name} is {wanted:g}, its tensors have {rank}."
    )
  alpha = _pick(config, "alpha_pattern", name, config["lora_alpha"], where)
  return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pick(
  config: dict[str, Any], key: str, name: str, default: Any, where: str
) -> float:
  """Returns the value for the module `name`, as peft finds it.

  A pattern fits the end of a name, from a dot on, or all of it after a "^".
  Peft takes regular expressions; one from a file could run for ever.
  """
  patterns = config.get(key) or {}
  if not isinstance(patterns, dict):
    raise errors.CorruptError(f"{where}: {key} is no object.")
  value = default
  for pattern, item in patterns.items():
    if not re.fullmatch(r"\^?[\w.]+", pattern):
      raise errors.InputError(
        f"{where}: {key} has {pattern[:80]!r}; only names are read."
      )
    if name == pattern.removeprefix("^") or name.endswith(f".{pattern}"):
      value = item
      break
  if type(value) not in (int, float) or not math.isfinite(value):
    raise errors.CorruptError(f"{where}: {name} has no number for {key}.")
  return float(value)


def _alpha(files: tensorfile.TensorFiles, name: str) -> float:
  """Returns the number in a tensor of one element."""
  array = files.read(name)
  if array.size != 1 or not math.isfinite(float(array.reshape(-1)[0])):
    raise errors.CorruptError(f"{files.where}: {name} is not one number.")
  return float(array.reshape(-1)[0])
