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
from jaxtyping import Array, Float, Key, PyTree, UInt8

from vidgen import (
  diffusion,
  errors,
  models,
  samplers,
  shapefile,
  tensorheader,
  weights,
)


class Component(NamedTuple):
  """A network of a family.

  Attributes:
    name: Its folder in the published layout, for example "transformer".
    init: Makes its parameters from a key, boxed with logical axes.
    table: How the published tensors become its parameters.
    takes_lora: Whether the model reads a LoRA for it, under `lora_name`.
    grows_from: How the published tensors of a smaller network, of which this
      one is made, become some of its parameters; empty where there is none.
  """

  name: str
  init: Callable[[Key[Array, ""]], PyTree]
  table: weights.Table
  takes_lora: bool = False
  grows_from: weights.Table = ()

  @property
  def lora_name(self) -> str:
    """Where a LoRA of this network stands in the tree of parameters."""
    return f"{self.name}_lora"

  def shapes(self) -> PyTree:
    """Returns the boxed shapes of its parameters, without making them."""
    return shapefile.of(self.init)


class Image(NamedTuple):
  """An image that a caller gives.

  Attributes:
    pixels: In the size of the video, in [-1, 1].
    original: As it was given.
  """

  pixels: Float[np.ndarray, "H W 3"]
  original: UInt8[np.ndarray, "h w 3"]


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
    tiling: Whether frames are to be encoded and decoded in tiles.
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
  tiling: bool = False
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
    guidance: The guidance scale of each step, or of each frame in it, or None
      without guidance.
    options: The family's options, each with its value.
    fps: Frames a second that the video is meant for.
    decode_chunk: Frames that are decoded at a time; None leaves it to the
      model.
  """

  num_frames: int
  height: int
  width: int
  latents: tuple[int, int, int, int]
  padding: int
  schedule: diffusion.Schedule
  sampler: str
  guidance: Float[np.ndarray, " steps *_frames"] | None
  options: dict[str, Any]
  fps: int | float
  decode_chunk: int | None = None


class Conditioner(NamedTuple):
  """A stage of conditioning: one component turns inputs into embeddings.

  Attributes:
    stage: What the stage is called.
    component: The component whose parameters it needs.
    needs: The inputs it reads; without them it does not run.
    draws: Whether it draws noise, and so needs a key.
    tiles: Whether it can work in tiles; then it must not run under jit.
    apply: `(params, inputs, key, *, tiling) -> {name: array}`, of one clip.
    purpose: What the key is for; see `samplers`.
  """

  stage: str
  component: str
  needs: tuple[str, ...]
  draws: bool
  tiles: bool
  apply: Callable[..., dict[str, Array]]
  purpose: int = samplers.POSTERIOR


class Training(NamedTuple):
  """What a model says of its training, beside what it predicts.

  Attributes:
    continuous: Whether noise levels are any, told as EDM's sigma, and not rows
      of `Model.levels`.
    image_frames: The frames of a clip that are given as images; negative ones
      are counted from the end.
    image_embedding: The condition that embeds them, beside their latents; None
      has none.
    noises_image: Whether the model adds noise to them by itself, and is told
      how much: the input `image_noise`.
    image_switch: Whether it can take single frames as images, which no layer
      over time sees: the condition `image_only`.
    numbers: What it is told of each clip, by name.
  """

  continuous: bool = False
  image_frames: tuple[int, ...] = (0,)
  image_embedding: str | None = None
  noises_image: bool = False
  image_switch: bool = False
  numbers: tuple[str, ...] = ()


@runtime_checkable
class Model(Protocol):
  """A family's model: pure functions of one tree of parameters.

  The tree is `{component name: parameters}`, where a component's `lora_name`
  may hold a LoRA for it (see `vidgen.adapters`).

  Attributes:
    components: The networks.
    denoiser: The name of the one that denoises.
    fps: Frames a second.
    latent_channels: Channels of the latents.
    heads: Heads of the denoiser's attention, which a mesh may split.
    conditioners: The stages of conditioning, in order.
    takes_image: Whether a video is made from its first frame.
    takes_text: Whether it is made from a text.
    takes_fps: Whether the model is told the rate of frames, as an option `fps`.
    training: What its training has to know.
  """

  components: tuple[Component, ...]
  denoiser: str
  fps: int
  latent_channels: int
  heads: int
  conditioners: tuple[Conditioner, ...]
  takes_image: bool
  takes_text: bool
  takes_fps: bool
  training: Training

  def plan(self, request: Request) -> Plan:
    """Returns what the request comes to. Raises InputError if it can't be."""

  def inputs(
    self, prompts: list[str], images: list[Image] | None, plan: Plan
  ) -> list[dict[str, np.ndarray]]:
    """Returns the conditioners' inputs of each clip, b = 1.

    Warns of text that the model does not read. Where it takes none, prompts are
    empty, and say no more than how many clips there are.
    """

  def clip_inputs(
    self,
    images: UInt8[np.ndarray, "b n H W 3"],
    told: dict[str, Float[np.ndarray, " b"]],
    num_frames: int,
  ) -> dict[str, np.ndarray]:
    """Returns the conditioners' inputs of clips, but for text and `image`.

    Args:
      images: The frames that are given.
      told: The `numbers` of `training`, one of each clip.
      num_frames: Frames of the clips.
    """

  def unconditional(
    self, condition: dict[str, Array], negative: dict[str, Array]
  ) -> dict[str, Array]:
    """Returns the condition of guidance's other branch.

    Args:
      condition: What the conditioners gave.
      negative: What they gave for the negative prompts alone; empty where the
        model takes no text.
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
    decode_chunk: int | None = None,
  ) -> Array:
    """Returns `post` of the video, in [-1, 1], of scaled latents.

    `post` works frame by frame; it is applied as frames are made, so that only
    its result is held for the whole video. `decode_chunk` is as of `Plan`.
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

  def flops(
    self, num_frames: int, height: int, width: int, by_weights: bool = False
  ) -> float:
    """Returns the operations of one prediction for a video of this size.

    Those by weights leave out the products of attention.
    """

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
      "the folders of its networks."
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
