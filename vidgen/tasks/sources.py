"""Where the model of a task comes from: its config, its weights, its words."""

import dataclasses
import importlib
import pathlib
import pkgutil
import shutil
import tempfile
import weakref
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Key, PyTree

from vidgen import checkpoint, errors, models, sharding
from vidgen.encoders import word_tokenizer
from vidgen.models import base
from vidgen.tasks import growth

DTYPES = ("bfloat16", "float32")


def check_dtype(name: str) -> None:
  """Raises InputError unless networks can be trained in this dtype."""
  if name not in DTYPES:
    raise errors.InputError(
      f"config: dtype {name!r} is not one of {', '.join(DTYPES)}."
    )


@dataclasses.dataclass
class Source:
  """Where a model comes from.

  Attributes:
    checkpoint: A folder in either layout, or a hub id.
    model: A family's config; None is that of the checkpoint.
    parts: Folders of single components, which take the checkpoint's place:
      `{"vae": "runs/vae/published"}`.
    scratch: Components that start from random weights, or parts of one, by
      the path of their parameters: `"text_encoder/blocks/attention"`.
    grow: Components that are made from smaller ones; see `growth.load`.
    tokenizer: The folder of a tokenizer; None is the checkpoint's.
    words: Makes a tokenizer of these words instead.
    revision: A branch, tag or commit of the hub's repository.
  """

  checkpoint: str | None = None
  model: Any = None
  parts: dict[str, str] = dataclasses.field(default_factory=dict)
  scratch: tuple[str, ...] = ()
  grow: tuple[str, ...] = ()
  tokenizer: str | None = None
  words: tuple[str, ...] = ()
  revision: str | None = None


def family_of(config: Any) -> ModuleType:
  """Returns the family whose config this is.

  Raises:
    InputError: It is no family's config.
  """
  for package in pkgutil.iter_modules(models.__path__):
    if package.ispkg:
      family = importlib.import_module(f"{models.__name__}.{package.name}")
      if isinstance(config, family.Config):
        return family
  raise errors.InputError(
    f"config: model is a {type(config).__name__}; give a family's Config."
  )


class Opened:
  """A source that has been looked into; its weights are not read yet.

  Attributes:
    family: The package of the model.
    config: The model's config.
    components: Its networks, by name.
  """

  def __init__(self, source: Source):
    self._source = source
    self._folder = None
    if source.checkpoint is not None:
      self._folder = checkpoint.resolve(source.checkpoint, source.revision)
    if source.model is not None:
      self.family, self.config = family_of(source.model), source.model
    elif self._folder is not None:
      self.family = base.find_family(self._folder)
      self.config = self.family.read_config(self._folder)
    else:
      raise errors.InputError(
        "config: set model, a family's config, or checkpoint, a folder."
      )
    self.components = {
      part.name: part for part in self.family.components(self.config)
    }
    self._renewed: dict[str, list[str]] = {}
    names = {*source.parts, *source.grow}
    for item in source.scratch:
      name, _, path = item.partition("/")
      names.add(name)
      if path:
        self._renewed.setdefault(name, []).append(path)
    if unknown := names - self.components.keys():
      raise errors.InputError(
        f"config: no component {', '.join(sorted(unknown))}; the model has "
        f"{', '.join(self.components)}."
      )
    for name in self.components:
      self.home(name)

  def home(self, name: str) -> pathlib.Path | None:
    """The folder that has a component's weights; None from scratch.

    A folder of its own takes the place of the checkpoint's.
    """
    if name in self._source.scratch:
      return None
    if name in self._source.parts:
      folder = pathlib.Path(self._source.parts[name]).expanduser()
      if not (folder / name).is_dir():
        raise errors.InputError(
          f"{folder}: has no {name}/; config: parts names the folder that "
          "holds it."
        )
      return folder
    if self._folder is None:
      raise errors.InputError(
        f"config: {name} comes from nowhere; set checkpoint, parts.{name} or "
        "add it to scratch."
      )
    return self._folder

  def is_scratch(self, name: str) -> bool:
    """Says whether a component starts from random weights."""
    return self.home(name) is None

  def is_as_saved(self, name: str) -> bool:
    """Says whether a component is what its files hold, and nothing else."""
    changed = {*self._source.grow, *self._renewed}
    return not self.is_scratch(name) and name not in changed

  def load(
    self,
    name: str,
    places: PyTree | None,
    dtype: DTypeLike,
    key: Key[Array, ""] | None = None,
  ) -> PyTree:
    """Returns the weights of a component.

    Args:
      name: Of the component.
      places: The sharding of each; None gives arrays of numpy, of a component
        that is as saved.
      dtype: Of the weights.
      key: Decides those that are learnt anew; None, of what is not trained, is
        the same for every run.
    """
    key = jax.random.key(0) if key is None else key
    home, component = self.home(name), self.components[name]
    if name in self._source.grow:
      params = growth.load(home, component, places, dtype, key)
    else:
      params = checkpoint.load_component(
        home, component, shardings=places, dtype=dtype
      )
    if name in self._renewed:
      params = growth.renew(
        component, params, places, self._renewed[name], dtype, key
      )
    return params

  def frozen(self, names: tuple[str, ...], mesh: Mesh, dtype: DTypeLike):
    """Returns the weights of components, by name, on a mesh."""
    return {
      name: self.load(
        name,
        sharding.shardings(self.components[name].shapes(), mesh),
        jnp.dtype(dtype),
      )
      for name in names
    }

  def frozen_shapes(
    self, names: tuple[str, ...], mesh: Mesh, dtype: DTypeLike
  ) -> dict[str, PyTree]:
    """Returns what `frozen` would, as shapes with shardings."""
    boxed = {name: self.components[name].shapes() for name in names}
    shapes = {name: base.shapes(self.components[name]) for name in names}
    return sharding.placed(shapes, sharding.shardings(boxed, mesh), dtype)

  def tokenizer_folder(self) -> pathlib.Path:
    """Returns the folder of the tokenizer; one of words is made here."""
    source = self._source
    if source.words:
      # A TemporaryDirectory warns when it goes with whoever holds it.
      made = tempfile.mkdtemp(prefix="vidgen-")
      weakref.finalize(self, shutil.rmtree, made, ignore_errors=True)
      folder = pathlib.Path(made) / "tokenizer"
      word_tokenizer.write(folder, list(source.words))
      return folder
    if source.tokenizer is not None:
      return pathlib.Path(source.tokenizer)
    if self._folder is not None:
      return self._folder / "tokenizer"
    raise errors.InputError(
      "config: a tokenizer comes from nowhere; set tokenizer, words or "
      "checkpoint."
    )

  def model(
    self,
    dtype: DTypeLike,
    folder: pathlib.Path | None,
    *,
    remat: str,
    unroll: int,
  ) -> Any:
    """Returns the model, with the tokenizer in `folder`."""
    return self.family.create(
      self.config, dtype, folder, remat=remat, unroll=unroll
    )
