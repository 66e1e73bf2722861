"""What the rest of the code knows of a family of models."""

import dataclasses
import importlib
import pathlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Key, PyTree

from vidgen import diffusion, errors, models, tensorheader, weights


class Component(NamedTuple):
  """A network of a family.

  Attributes:
    name: Its folder in the published layout, for example "transformer".
    init: Makes its parameters from a key, boxed with logical axes.
    table: How the published tensors become its parameters.
    takes_lora: Whether the model reads a LoRA for it, under `lora_name`.
  """

  name: str
  init: Callable[[Key[Array, ""]], PyTree]
  table: weights.Table
  takes_lora: bool = False

  @property
  def lora_name(self) -> str:
    """Where a LoRA of this network stands in the tree of parameters."""
    return f"{self.name}_lora"

  def shapes(self) -> PyTree:
    """Returns the boxed shapes of its parameters, without making them."""
    return jax.eval_shape(self.init, jax.random.key(0))


@dataclasses.dataclass
class Request:
  """What a caller asks of one video; None is the model's own default.

  Attributes:
    num_frames: Frames.
    height: Pixels.
    width: Pixels.
    num_steps: Denoising steps.
    guidance_scale: Scale of classifier-free guidance; at most 1 is none.
    sampler: Name of the sampler.
    strength: How much of a given video is made anew; None without a video.
    image: Whether an image is given.
    options: What this family alone has.
  """

  num_frames: int | None = None
  height: int | None = None
  width: int | None = None
  num_steps: int | None = None
  guidance_scale: float | None = None
  sampler: str | None = None
  strength: float | None = None
  image: bool = False
  options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Plan:
  """A request that the model can serve, with nothing left open.

  Attributes:
    num_frames: Frames of the video that is given or made.
    height: Pixels.
    width: Pixels.
    latents: The shape `f h w c` that is denoised.
    padding: Leading latents that are dropped before decoding.
    schedule: The noise levels.
    sampler: Name of the sampler.
    guidance: The guidance scale of each step, or None without guidance.
    options: The family's options, each with its value.
  """

  num_frames: int
  height: int
  width: int
  latents: tuple[int, int, int, int]
  padding: int
  schedule: diffusion.Schedule
  sampler: str
  guidance: Float[np.ndarray, " steps"] | None
  options: dict[str, Any]


class Conditioner(NamedTuple):
  """A stage of conditioning: one component turns inputs into embeddings.

  Attributes:
    stage: What the stage is called.
    component: The component whose parameters it needs.
    needs: The inputs it reads; without them it does not run.
    draws: Whether it draws noise, and so needs a key.
    tiles: Whether it can work in tiles; then it must not run under jit.
    apply: `(params, inputs, key, *, tiling) -> {name: array}`, of one clip.
  """

  stage: str
  component: str
  needs: tuple[str, ...]
  draws: bool
  tiles: bool
  apply: Callable[..., dict[str, Array]]


@runtime_checkable
class Model(Protocol):
  """A family's model: pure functions of one tree of parameters.

  The tree is `{component name: parameters}`, where a component's `lora_name`
  may hold a LoRA for it (see `vidgen.adapters`).

  Attributes:
    components: The networks.
    fps: Frames a second.
    latent_channels: Channels of the latents.
    heads: Heads of the denoiser's attention, which a mesh may split.
    conditioners: The stages of conditioning, in order.
    takes_image: Whether a video is made from its first frame.
  """

  components: tuple[Component, ...]
  fps: int
  latent_channels: int
  heads: int
  conditioners: tuple[Conditioner, ...]
  takes_image: bool

  def plan(self, request: Request) -> Plan:
    """Returns what the request comes to. Raises InputError if it can't be."""

  def inputs(
    self, prompts: list[str], images: list[np.ndarray] | None, plan: Plan
  ) -> list[dict[str, np.ndarray]]:
    """Returns the conditioners' inputs of each clip, b = 1.

    Warns of text that the model does not read. Images are `H W 3` in [-1, 1].
    """

  def encode(
    self,
    params: PyTree,
    video: Array,
    key: Key[Array, " b"] | None,
    *,
    tiling: bool,
    slicing: bool,
  ) -> Array:
    """Returns scaled latents of a video in [-1, 1]; the mean without a key.

    `tiling` goes tile by tile, compiles what it needs by itself and must not
    run under jit; `slicing` goes clip by clip.
    """

  def decode(
    self,
    params: PyTree,
    latents: Array,
    post: Callable[[Array], Array],
    *,
    tiling: bool,
    slicing: bool,
  ) -> Array:
    """Returns `post` of the video, in [-1, 1], of scaled latents.

    `post` works frame by frame; it is applied as frames are made, so that only
    its result is held for the whole video.
    """

  def denoise(
    self,
    params: PyTree,
    x: Array,
    level: diffusion.NoiseLevel,
    condition: dict[str, Array],
  ) -> Array:
    """Returns the predicted x0 in float32."""

  def levels(self) -> diffusion.NoiseLevel:
    """Returns the levels that a network of the family is trained at.

    Float64 arrays of numpy, the clean end first.
    """

  def predict(
    self,
    params: PyTree,
    x: Array,
    level: diffusion.NoiseLevel,
    condition: dict[str, Array],
  ) -> Array:
    """Returns what the network gives, in float32; training compares it.

    The level may be one of each sample: arrays along the batch.
    """

  def target(
    self, x0: Array, noise: Array, level: diffusion.NoiseLevel
  ) -> Array:
    """Returns what `predict` ought to give at alpha · x0 + sigma · noise."""

  def pad_latents(self, latents: Array) -> Array:
    """Returns latents of as many frames as the network can take."""

  def image_condition(
    self,
    params: PyTree,
    image: Array,
    key: Key[Array, " b"] | None,
    *,
    scale: Any = None,
    tiling: bool = False,
  ) -> Array:
    """Returns an image's latents as `condition["image"]` has them.

    Args:
      params: The tree.
      image: `b 1 H W 3` in [-1, 1].
      key: One of each sample: the posterior is sampled; None takes its mean.
      scale: Factor of the latents; None is that of the published pipeline.
      tiling: As of `encode`.
    """

  def flops(self, num_frames: int, height: int, width: int) -> float:
    """Returns the operations of one prediction for a video of this size."""

  def published_configs(self) -> dict[str, dict[str, Any]]:
    """Returns the JSON files of the published layout, by path."""


def shapes(component: Component) -> PyTree:
  """Returns the plain shapes of a component's parameters."""
  return unboxed(component.shapes())


def unboxed(shapes: PyTree) -> PyTree:
  """Returns shapes without their logical axes."""
  return nn.unbox(shapes)


def count(component: Component) -> int:
  """Returns how many parameters a component has."""
  return sum(x.size for x in jax.tree.leaves(shapes(component)))


def find_family(folder: pathlib.Path) -> ModuleType:
  """Returns the family that reads the pipeline in `folder`.

  Each package under `vidgen.models` is asked; a new family registers nowhere.

  Raises:
    InputError: `folder` holds no pipeline, or one that no family reads.
  """
  path = folder / "model_index.json"
  if not path.is_file():
    raise errors.InputError(
      f"{folder}: no model_index.json; give the folder that holds it, with "
      "its transformer/, vae/, text_encoder/, tokenizer/ and scheduler/."
    )
  name = tensorheader.read_json(path).get("_class_name")
  known = []
  for package in pkgutil.iter_modules(models.__path__):
    if not package.ispkg:
      continue
    family = importlib.import_module(f"{models.__name__}.{package.name}")
    if name in family.PIPELINES:
      return family
    known += family.PIPELINES
  raise errors.InputError(
    f"{path}: no family reads a {name}; known are {', '.join(known)}."
  )
