"""Compiled programs in files, for machines that should not compile them again.

A file holds machine code, as XLA serialises it: whoever can write one can run
anything. The index beside the files has the SHA-256 of each, which is checked
before a file is opened, and what they were compiled for, which must be what is
here. Load those alone that you made.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import pickle
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
from jax.experimental import serialize_executable

from vidgen import (
  checkpoint,
  codehash,
  environment,
  errors,
  tensorheader,
  version,
)
from vidgen.models import base

INDEX = "executables.json"

# What says who wrote a config; all else may be a constant of a program.
_WRITERS = ("_class_name", "_diffusers_version", "_name_or_path")

# What JAX says when it finds a program in its persistent cache.
_HIT = "/jax/compilation_cache/cache_hits"

# Where a job's programs are kept for the next one; None: nowhere. The command
# line says so, no library.
folder: pathlib.Path | None = None


def identity(
  model: Any, devices: Sequence[Any], mesh: Mapping[str, int]
) -> dict[str, Any]:
  """Returns all that executables depend on, beside the shapes of a call.

  Args:
    model: A `base.Model`. Of two with parameters of the same shapes, the scale
      of latents for one may differ, and is a constant of the program.
    devices: That the mesh is laid over.
    mesh: Axis to size.
  """
  configs = {
    path: {k: v for k, v in config.items() if k not in _WRITERS}
    for path, config in model.published_configs().items()
  }
  text = json.dumps([configs, jnp.dtype(model.dtype).name], sort_keys=True)
  first = devices[0]
  return {
    "model": hashlib.sha256(text.encode()).hexdigest()[:16],
    "vidgen": version.VERSION,
    "code": codehash.of_package()[:16],
    "jax": jax.__version__,
    "jaxlib": jaxlib.__version__,
    "runtime": first.client.platform_version.splitlines()[0],
    "device_kind": first.device_kind,
    "devices": len(devices),
    "mesh": {axis: size for axis, size in mesh.items() if size > 1},
    "settings": {n: getattr(jax.config, n) for n in environment.SETTINGS},
  }


def arguments(tree: Any) -> str:
  """Returns a hash of the shapes and dtypes of a call, and of what else is."""
  leaves, structure = jax.tree.flatten(tree)
  kinds = [
    f"{x.dtype}{list(x.shape)}"
    if hasattr(x, "shape")
    else type(x).__name__
    if isinstance(x, int | float) and not isinstance(x, bool)
    else repr(x)
    for x in leaves
  ]
  text = f"{structure} {kinds}"
  return hashlib.sha256(text.encode()).hexdigest()


def kept(
  identity: Mapping[str, Any], plans: Sequence[base.Plan], batch_size: int
) -> pathlib.Path | None:
  """Returns the folder that keeps the programs of these plans, if one does.

  It is named by all that they depend on, the settings of JAX and XLA and the
  instructions of the processor among it.
  """
  if folder is None or jax.process_count() > 1:
    return None
  facts = [
    identity,
    {name: getattr(jax.config, name) for name in environment.SETTINGS},
    {name: os.environ.get(name) for name in environment.VARIABLES},
    environment.instructions(),
    [_facts(plan) for plan in plans],
    batch_size,
  ]
  text = json.dumps(facts, sort_keys=True, default=repr)
  return folder / hashlib.sha256(text.encode()).hexdigest()[:32]


def _facts(plan: base.Plan) -> list[Any]:
  """What of a plan decides its programs."""
  guided = None if plan.guidance is None else plan.guidance.shape
  return [
    *(plan.num_frames, plan.height, plan.width, plan.latents, plan.padding),
    *(plan.sampler, guided, len(plan.schedule), plan.decode_chunk),
    sorted(plan.options.items()),
  ]


@contextlib.contextmanager
def cached() -> Iterator[list[str]]:
  """Yields a list of what this thread takes from JAX's persistent cache.

  What comes from there cannot be saved again: it would be read, and then fail
  when it is called.
  """
  found: list[str] = []
  thread = threading.get_ident()

  def listen(event: str, **told: Any) -> None:
    if event == _HIT and threading.get_ident() == thread:
      found.append(event)

  jax.monitoring.register_event_listener(listen)
  try:
    yield found
  finally:
    jax.monitoring.unregister_event_listener(listen)


def save(
  folder: str | os.PathLike,
  programs: Mapping[str, jax.stages.Compiled],
  identity: dict[str, Any],
) -> None:
  """Writes programs, by name, to a folder that is new or empty.

  Raises:
    InputError: The folder holds something.
    StorageError: The disk is full, or writing fails otherwise.
  """
  index: dict[str, Any] = {"identity": identity, "programs": {}}
  with checkpoint.drafted(checkpoint.new_folder(folder)) as draft:
    for number, (name, compiled) in enumerate(programs.items()):
      payload = pickle.dumps(serialize_executable.serialize(compiled))
      file = f"{number:02d}_{re.sub(r'[^a-z0-9]+', '_', name.lower())}.xla"
      (draft / file).write_bytes(payload)
      digest = hashlib.sha256(payload).hexdigest()
      index["programs"][name] = {"file": file, "sha256": digest}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (draft / INDEX).write_text(text, encoding="utf-8")


def load(
  folder: str | os.PathLike, identity: dict[str, Any], devices: Sequence[Any]
) -> dict[str, jax.stages.Compiled]:
  """Returns the programs of a folder, by name.

  Args:
    folder: As `save` wrote it.
    identity: Of what is here.
    devices: To run on.

  Raises:
    InputError: They were compiled for something else.
    CorruptError: A file is not what it was.
  """
  folder = pathlib.Path(folder).expanduser()
  path = folder / INDEX
  if not path.is_file():
    raise errors.InputError(
      f"{folder}: no {INDEX}; vidgen compile --save={folder} makes it."
    )
  index = tensorheader.read_json(path)
  held = index.get("identity")
  listed = index.get("programs")
  if not isinstance(held, dict) or not isinstance(listed, dict):
    raise errors.CorruptError(f"{path}: is no index of executables.")
  differing = [
    f"{name} {held.get(name)!r}, here {identity.get(name)!r}"
    for name in sorted(held.keys() | identity.keys())
    if held.get(name) != identity.get(name)
  ]
  if differing:
    raise errors.InputError(
      f"{folder}: compiled for something else: {'; '.join(differing)}; compile "
      "it again."
    )
  return {
    name: _read(folder, name, item, devices) for name, item in listed.items()
  }


def _read(
  folder: pathlib.Path, name: str, item: Any, devices: Sequence[Any]
) -> jax.stages.Compiled:
  """Reads one program, once its bytes are known to be those written."""
  file = item.get("file") if isinstance(item, dict) else None
  if not isinstance(file, str) or not tensorheader.is_plain(file):
    raise errors.CorruptError(f"{folder / INDEX}: names no file of {name!r}.")
  try:
    payload = (folder / file).read_bytes()
  except OSError as error:
    raise errors.CorruptError(
      f"{folder / file}: cannot be read: {error.strerror}; compile it again."
    ) from error
  if hashlib.sha256(payload).hexdigest() != item.get("sha256"):
    raise errors.CorruptError(
      f"{folder / file}: is not what was written; compile it again."
    )
  return serialize_executable.deserialize_and_load(
    *pickle.loads(payload), execution_devices=list(devices)
  )
