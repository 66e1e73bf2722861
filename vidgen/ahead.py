"""Programs of a pipeline, compiled before they are called."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from vidgen import executables, samplers, sharding
from vidgen.models import base


class Program(NamedTuple):
  """A compiled function and what it will be called with.

  Attributes:
    name: Of the stage.
    component: Whose weights it reads.
    function: What `jax.jit` gave.
    args: Arrays, or their shapes with shardings.
    static: Further arguments, by name, that decide the program itself.
  """

  name: str
  component: str
  function: Any
  args: tuple[Any, ...]
  static: dict[str, Any]

  @property
  def key(self) -> str:
    """What tells it from others: its name, and the shapes of its arguments."""
    return key(self.name, self.args, self.static)

  def lower(self, mesh: Mesh) -> jax.stages.Lowered:
    """Returns it lowered for a mesh."""
    with sharding.use(mesh):
      return self.function.lower(*self.args, **self.static)


class Ready:
  """Programs that are compiled already; others compile when they are called."""

  def __init__(self):
    self._programs: dict[str, jax.stages.Compiled] = {}

  def add(self, programs: dict[str, jax.stages.Compiled]) -> None:
    """Takes programs, by key."""
    self._programs |= programs

  def __len__(self) -> int:
    return len(self._programs)

  def __contains__(self, key: str) -> bool:
    return key in self._programs

  def call(self, name: str, function: Any, *args: Any, **static: Any) -> Any:
    """Calls a function, as it was compiled ahead if it was."""
    if self._programs:
      ready = self._programs.get(key(name, args, static))
      if ready is not None:
        return ready(*args)
    return function(*args, **static)


def key(name: str, args: Any, static: dict[str, Any]) -> str:
  """Returns the key of a call."""
  chosen = {n: getattr(x, "__name__", x) for n, x in static.items()}
  return f"{name} {executables.arguments((args, sorted(chosen.items())))[:16]}"


def programs(pipeline: Any, plan: base.Plan) -> Iterator[Program]:
  """Yields the programs that sampling one clip calls, in order.

  Nothing runs, so the pipeline's `params` may be shapes with shardings.

  Args:
    pipeline: A `vidgen.Pipeline`.
    plan: Of the clip.
  """
  model, mesh = pipeline.model, pipeline.mesh
  blank = np.zeros((plan.height, plan.width, 3), np.float32)
  image = base.Image(blank, np.zeros(blank.shape, np.uint8))
  frames = model.training.image_frames
  images = [image] * len(frames) if model.takes_image else None
  (inputs,) = model.inputs([""], images, plan)
  clip = np.zeros(1, np.uint32)
  keys = jax.eval_shape(lambda: samplers.keys(0, clip, samplers.POSTERIOR))
  condition: dict[str, Any] = {}
  for stage, apply in pipeline.conditioners:
    if not all(name in inputs for name in stage.needs):
      continue
    weights = pipeline.held(stage.component)[stage.component]
    args = weights, inputs, keys if stage.draws else None
    yield Program(stage.stage, stage.component, apply, args, {})
    with sharding.use(mesh):
      condition |= jax.eval_shape(apply, *args)
  where = sharding.batch_sharding(mesh, 1)
  placed = lambda tree: jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree
  )
  latents = jax.ShapeDtypeStruct((1, *plan.latents), np.float32)
  condition = placed(condition)
  table, static = pipeline.steps(plan)
  args = (
    pipeline.held(model.denoiser),
    placed(jax.eval_shape(samplers.init, latents)),
    condition,
    None if plan.guidance is None else condition,
    table,
    keys,
    0,
    len(plan.schedule),
  )
  yield Program("denoise", model.denoiser, pipeline.denoise, args, static)
  frames, *size = plan.latents
  latents = jax.ShapeDtypeStruct(
    (1, frames - plan.padding, *size), np.float32, sharding=where
  )
  args = pipeline.held("vae"), latents
  static = {"post": pipeline.post("uint8"), "slicing": False}
  static |= pipeline.chunks(plan.decode_chunk)
  yield Program("decode", "vae", pipeline.decoder, args, static)
