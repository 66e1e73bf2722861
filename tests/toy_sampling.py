"""A sampling job without a model: clips of noise, a ledger, a manifest."""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import UInt8

from vidgen import clips, outputs, provenance, sharding


@dataclasses.dataclass
class ToyConfig:
  """What the job is asked for."""

  checkpoint: str = "toy"
  out: str = "samples"
  seed: int = 0
  num_steps: int = 2
  mesh: dict[str, int] = dataclasses.field(default_factory=dict)


def frames(index: int, seed: int = 0) -> UInt8[np.ndarray, "F H W 3"]:
  """The frames of a clip: a grey ramp of its own with noise."""
  draw = np.random.default_rng([seed, index])
  ramp = np.linspace(60, 180, 3 * 32 * 32 * 3).reshape(3, 32, 32, 3)
  return (ramp + draw.integers(0, 20, (3, 1, 1, 3))).astype(np.uint8)


def line(
  folder: pathlib.Path,
  index: int,
  made: UInt8[np.ndarray, "F H W 3"] | None,
  formats: tuple[str, ...] = ("mp4",),
  name: str = "clips.jsonl",
  seed: int = 0,
) -> None:
  """Writes a clip and its line in the ledger; None is one that failed."""
  stem = f"{index:06d}_{seed:012x}"
  record: dict[str, Any] = {"index": index, "name": stem, "prompt": "A star."}
  if made is None:
    record |= {"status": "failed", "error": "prompt: holds the number 13."}
  else:
    latents = made[..., :1].astype(np.float32) / 255
    files = clips.write(folder / stem, formats, latents, made, 8)
    names = [pathlib.Path(file).name for file in files]
    record |= {
      "status": "done",
      "files": names,
      "sha256": {name: _hash(folder / name) for name in names},
      "frames_sha256": hashlib.sha256(made.tobytes()).hexdigest(),
      "size": list(made.shape[1:3]),
      "frames": len(made),
    }
  with open(folder / name, "a") as file:
    file.write(json.dumps(record) + "\n")


def _hash(path: pathlib.Path) -> str:
  """The SHA-256 of a file; of a folder, of its files' hashes in order."""
  if path.is_dir():
    each = [_hash(file) for file in sorted(path.iterdir())]
    return hashlib.sha256("".join(each).encode()).hexdigest()
  return hashlib.sha256(path.read_bytes()).hexdigest()


def run(
  folder: pathlib.Path,
  count: int = 3,
  change: Any = lambda index, made: made,
  formats: tuple[str, ...] = ("mp4",),
  tell: Callable[[provenance.Record], None] = lambda record: None,
  **fields: Any,
) -> pathlib.Path:
  """Makes clips; `change` may alter the frames of one, `tell` adds a record."""
  folder.mkdir(parents=True, exist_ok=True)
  config = ToyConfig(out=str(folder), **fields)
  with provenance.recording(folder, "sample", config) as record:
    record.mesh(sharding.make_mesh(config.mesh or None))
    record.seeds(seed=config.seed)
    record.outputs(lambda: outputs.of_clips(folder))
    tell(record)
    for index in range(count):
      made = change(index, frames(index, config.seed))
      line(folder, index, made, formats, seed=config.seed)
  return folder
