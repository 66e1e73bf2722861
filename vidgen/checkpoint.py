"""Checkpoints: where they are, both layouts of them, and the way between.

The published layout is a folder with `model_index.json` and a folder for each
component, with `config.json` and safetensors. The Orbax layout is the same
folder with each component's weights in `orbax/`, and `MANIFEST.json` at the
top: the SHA-256 and the size of every file, as Orbax checks none of its data.
"""

import contextlib
import errno
import os
import pathlib
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import PyTree

from vidgen import (
  errors,
  manifest,
  tensorfile,
  tensorheader,
  weights,
)
from vidgen.models import base

LAYOUTS = ("published", "orbax")
ORBAX = "orbax"

# What of a repository is a model: no pickles, no weights outside a component,
# no second set of weights in another precision.
PATTERNS = (
  "*.json",
  "*/*.safetensors",
  "*/*.model",
  "*/*.txt",
  f"*/{ORBAX}/*",
)
IGNORED = ("*.fp16.*", "*.bf16.*", "*.non_ema.*")
# The small model's name, and where it is.
DEMO = "demo"
_DEMO = pathlib.Path(__file__).parent / "assets" / DEMO
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Seconds to wait for the hub's first answer; its own client waits for ever.
_TIMEOUT = 10.0

# What the system says of a disk that takes no more.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)

# The index of shards, of a variant such as fp16, too.
_INDEX = re.compile(r"\.index(\.\w+)?\.json$")
# The files next to the weights that a copy of a model takes along.
_SMALL = (".json", ".txt", ".model", ".md")
_SMALL_NAMES = ("LICENSE", "NOTICE")
_SMALL_LIMIT = 100 * 2**20


def resolve(
  path_or_hub_id: str | os.PathLike, revision: str | None = None
) -> pathlib.Path:
  """Returns the folder of a checkpoint, fetched if it is not here.

  Args:
    path_or_hub_id: A folder, the id of a repository, "owner/name", or "demo":
      the small model that the package carries. A folder of that name is
      "./demo".
    revision: A branch, a tag or a commit of the repository.

  Raises:
    InputError: It is neither, or cannot be fetched.
  """
  text = os.fspath(path_or_hub_id)
  own = text == DEMO
  folder = _DEMO if own else pathlib.Path(os.path.expanduser(text))
  if text and os.path.exists(folder):
    if not folder.is_dir():
      raise errors.InputError(
        f"{folder}: a file; give the folder that holds model_index.json."
      )
    if revision is not None:
      raise errors.InputError(
        f"{text}: a folder has no revision {revision}; drop one of them."
      )
    manifest.verify_small(folder)
    return folder
  if not _HUB_ID.fullmatch(text) or ".." in text:
    raise errors.InputError(
      f"{tensorheader.short(text)}: no such folder, and no hub id, which is "
      "OWNER/NAME."
    )
  folder = _fetch(text, revision)
  manifest.verify_small(folder)
  return folder


def _fetch(hub_id: str, revision: str | None) -> pathlib.Path:
  """Returns the folder of a repository, from the hub or from its cache."""
  # Takes a while to import, and most runs need it not.
  import huggingface_hub

  options = dict(
    revision=revision,
    allow_patterns=list(PATTERNS),
    ignore_patterns=list(IGNORED),
  )
  try:
    api = huggingface_hub.HfApi()
    api.repo_info(hub_id, revision=revision, timeout=_TIMEOUT)
  # The library lets the errors of its HTTP client through, which is another
  # one from version to version. Whatever it was, a local copy will do.
  except Exception as reason:
    try:
      folder = huggingface_hub.snapshot_download(
        hub_id, local_files_only=True, **options
      )
    except (OSError, ValueError):
      raise _unavailable(hub_id, revision, reason) from reason
    return pathlib.Path(folder)
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(hub_id, **options))
  except Exception as reason:
    raise _unavailable(hub_id, revision, reason) from reason


def _unavailable(
  hub_id: str, revision: str | None, reason: Exception
) -> errors.VidgenError:
  """Returns the error that says why, and how to get the files."""
  from huggingface_hub import errors as hub

  if isinstance(reason, OSError) and reason.errno in _DISK:
    return errors.StorageError(
      f"{hub_id}: cannot be kept in the hub's cache: {reason.strerror}; set "
      "HF_HOME to a folder with room for it."
    )
  at = "" if revision is None else f" --revision {revision}"
  name = hub_id.split("/")[-1]
  # Gated is a kind of not found, so it goes first.
  known = (
    (hub.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set"),
    (hub.GatedRepoError, "its licence has to be accepted on its page first"),
    (hub.RevisionNotFoundError, f"it has no revision {revision}"),
    (hub.RepositoryNotFoundError, "the hub has no such repository for you"),
    (hub.HFValidationError, "the hub allows no such id"),
  )
  lines = str(reason).strip().splitlines() or [""]
  why = next(
    (text for kind, text in known if isinstance(reason, kind)),
    f"{type(reason).__name__}: {lines[0]}",
  )
  return errors.InputError(
    f"{hub_id}: no such folder, no copy in the hub's cache, and it cannot be "
    f"fetched ({why}). On a machine with network run `hf download {hub_id}{at} "
    f"--local-dir {name}`, copy that folder here and give "
    f"--checkpoint={name}; or set HF_HOME to a cache that has it."
  )


def load_component(
  folder: pathlib.Path,
  component: base.Component,
  *,
  shardings: PyTree | None = None,
  dtype: DTypeLike | None = None,
) -> PyTree:
  """Returns the parameters of one component, from either layout.

  Args:
    folder: The checkpoint.
    component: Which, with its shapes and its table.
    shardings: The sharding of each parameter; None gives arrays of numpy.
    dtype: Of the floating-point parameters; None keeps that of the file.

  Raises:
    InputError: The component or its weights are missing.
    CorruptError: They do not fit, or are not what the manifest says.
  """
  folder = pathlib.Path(folder)
  home = folder / component.name
  shapes = _unboxed(component.shapes())
  if (home / ORBAX).is_dir():
    manifest.verify(folder, f"{component.name}/{ORBAX}")
    # Orbax takes time to import: only who reads or writes its layout pays.
    from vidgen import orbaxfile

    return orbaxfile.restore(home / ORBAX, shapes, shardings, dtype)
  return weights.load(
    tensorfile.open_folder(home),
    component.table,
    shapes,
    shardings=shardings,
    dtype=dtype,
  )


def convert(
  source: str | os.PathLike,
  target: str | os.PathLike,
  layout: str,
  dtype: DTypeLike | None = None,
) -> None:
  """Writes a checkpoint anew, in another layout or precision.

  Args:
    source: What `resolve` takes.
    target: A folder that is new or empty. It appears whole, at the end.
    layout: One of `LAYOUTS`.
    dtype: Of the floating-point weights; with None they keep their bits.

  Raises:
    InputError: The target holds something, or the source is no checkpoint.
    CorruptError: The source is corrupt.
    StorageError: The disk is full, or writing fails otherwise.
  """
  if layout not in LAYOUTS:
    raise errors.InputError(f"layout: {layout!r} is not one of {LAYOUTS}.")
  target = new_folder(target)
  folder = resolve(source)
  family = base.find_family(folder)
  components = family.components(family.read_config(folder))
  parts = _parts(folder, components)
  with drafted(target) as draft:
    for part in ["", *parts]:
      copy_small(folder, part, draft)
    for component in components:
      params = load_component(folder, component, dtype=dtype)
      home = draft / component.name
      if layout == "orbax":
        from vidgen import orbaxfile

        orbaxfile.save(home / ORBAX, params)
      else:
        config = tensorheader.read_json(folder / component.name / "config.json")
        tensorfile.write(
          home,
          stem(config),
          weights.published_shapes(params, component.table),
          weights.export(params, component.table),
        )
      del params
    if layout == "orbax":
      manifest.write(draft)


def new_folder(target: str | os.PathLike) -> pathlib.Path:
  """Returns the full path of a folder to be written.

  Raises:
    InputError: It holds something.
  """
  target = pathlib.Path(target).expanduser().absolute()
  if target.exists() and not (target.is_dir() and not any(target.iterdir())):
    raise errors.InputError(f"{target}: exists; name a new or empty folder.")
  return target


@contextlib.contextmanager
def drafted(target: pathlib.Path) -> Iterator[pathlib.Path]:
  """Gives a folder to fill; as `target` it appears whole, or not at all.

  Raises:
    StorageError: The disk is full, or writing fails otherwise.
  """
  draft = target.with_name(f".{target.name}.tmp-{secrets.token_hex(8)}")
  try:
    draft.mkdir(parents=True)
    yield draft
    for path in [draft, *draft.rglob("*")]:
      tensorfile.sync(path)
    draft.rename(target)
    tensorfile.sync(target.parent)
  except BaseException as e:
    shutil.rmtree(draft, ignore_errors=True)
    if isinstance(e, OSError) and not isinstance(e, errors.VidgenError):
      raise errors.StorageError(
        f"{target}: cannot be written: {e.strerror}."
      ) from e
    raise


def _parts(
  folder: pathlib.Path, components: tuple[base.Component, ...]
) -> list[str]:
  """Returns the folders that the index of a pipeline names and that exist."""
  path = folder / "model_index.json"
  known = {component.name for component in components}
  parts = []
  for name, value in tensorheader.read_json(path).items():
    if name.startswith("_") or not isinstance(value, list) or None in value:
      continue
    if not re.fullmatch(r"\w+", name):
      raise errors.CorruptError(
        f"{path}: {tensorheader.short(name)} is no component."
      )
    if name not in known and tensorfile.find_weights(folder / name):
      raise errors.InputError(
        f"{folder / name}: has weights that vidgen does not read, so they "
        "would be lost; remove them first if that is meant."
      )
    if (folder / name).is_dir():
      parts.append(name)
  return parts


def copy_small(folder: pathlib.Path, part: str, draft: pathlib.Path) -> None:
  """Copies the files of a folder that are no weights: configs, a tokenizer.

  What a link points to is copied if it belongs to the checkpoint: it is below
  its folder, or in the hub's cache, which holds nothing but links.
  """
  roots = [folder.resolve()]
  if folder.parent.name == "snapshots":
    roots.append(folder.parent.parent.resolve() / "blobs")
  (draft / part).mkdir(exist_ok=True)
  for path in sorted((folder / part).iterdir()):
    is_small = path.suffix in _SMALL or path.name in _SMALL_NAMES
    is_weights = path.name == manifest.NAME or _INDEX.search(path.name)
    if path.is_dir() or not is_small or is_weights:
      continue
    if not any(path.resolve().is_relative_to(root) for root in roots):
      raise errors.InputError(
        f"{path}: a link out of the checkpoint; put the file itself there."
      )
    if tensorheader.regular_size(path) > _SMALL_LIMIT:
      raise errors.InputError(f"{path}: over {_SMALL_LIMIT} bytes.")
    data = path.read_bytes()
    tensorheader.refuse_pickle(path, data[:9])
    (draft / part / path.name).write_bytes(data)


def stem(config: Mapping[str, Any]) -> str:
  """Returns what the library that reads a component calls its weights.

  Args:
    config: The component's config.json.
  """
  return tensorfile.STEMS[0 if "_class_name" in config else 1]


def _unboxed(shapes: PyTree) -> PyTree:
  """Returns the shapes in their boxes; a mesh in force constrains nothing."""
  is_box = lambda leaf: isinstance(leaf, nn.Partitioned)
  return jax.tree.map(
    lambda x: x.unbox(apply_constraint=False) if is_box(x) else x,
    shapes,
    is_leaf=is_box,
  )
