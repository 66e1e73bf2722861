"""Programs of a pipeline, compiled before they are called."""

from collections.abc import Callable, Iterator
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
    # What to do about those that were never called yet, if they can't be.
    self._untried: dict[str, Callable[[], None]] = {}

  def add(
    self,
    programs: dict[str, jax.stages.Compiled],
    forget: Callable[[], None] | None = None,
  ) -> None:
    """Takes programs, by key.

    Args:
      programs: What to call.
      forget: Is called if one of them cannot run, which then compiles; with
        None that is an error.
    """
    self._programs |= programs
    if forget is not None:
      self._untried |= dict.fromkeys(programs, forget)

  def __len__(self) -> int:
    return len(self._programs)

  def __contains__(self, key: str) -> bool:
    return key in self._programs

  def call(self, name: str, function: Any, *args: Any, **static: Any) -> Any:
    """Calls a function, as it was compiled ahead if it was."""
    wanted = key(name, args, static) if self._programs else ""
    ready = self._programs.get(wanted, function)
    if ready is function:
      return function(*args, **static)
    if wanted not in self._untried:
      return ready(*args)
    forget = self._untried.pop(wanted)
    try:
      # Whether it runs is told when it has run.
      return jax.block_until_ready(ready(*args))
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" in str(error):
        raise
      del self._programs[wanted]
      forget()
      arrays = [x for x in jax.tree.leaves(args) if isinstance(x, jax.Array)]
      if any(x.is_deleted() for x in arrays):
        # What was given away is lost; the next job compiles.
        raise
      return function(*args, **static)


def key(name: str, args: Any, static: dict[str, Any]) -> str:
  """Returns the key of a call."""
  chosen = {n: getattr(x, "__name__", x) for n, x in static.items()}
  return f"{name} {executables.arguments((args, sorted(chosen.items())))[:16]}"


def programs(
  pipeline: Any, plan: base.Plan, count: int = 1, starts: bool = False
) -> Iterator[Program]:
  """Yields the programs that sampling a batch calls, in order.

  Nothing runs, so the pipeline's `params` may be shapes with shardings. Without
  tiles, which compile one by one.

  Args:
    pipeline: A `vidgen.Pipeline`.
    plan: Of each of the clips.
    count: How many are made at once.
    starts: Whether they start from videos.
  """
  model, mesh = pipeline.model, pipeline.mesh
  blank = np.zeros((plan.height, plan.width, 3), np.float32)
  image = base.Image(blank, np.zeros(blank.shape, np.uint8))
  frames = model.training.image_frames
  images = [image] * len(frames) if model.takes_image else None
  (inputs,) = model.inputs([""], images, plan)

  def drawn(number: int) -> Any:
    clips = np.zeros(number, np.uint32)
    return jax.eval_shape(lambda: samplers.keys(0, clips, samplers.POSTERIOR))

  condition: dict[str, Any] = {}
  for stage, apply in pipeline.conditioners:
    if not all(name in inputs for name in stage.needs):
      continue
    weights = pipeline.held(stage.component)[stage.component]
    args = weights, inputs, drawn(1) if stage.draws else None
    yield Program(stage.stage, stage.component, apply, args, {})
    with sharding.use(mesh):
      condition |= jax.eval_shape(apply, *args)
  where = sharding.batch_sharding(mesh, count)
  # Conditions are made clip by clip, all else of the whole batch.
  placed = lambda tree: jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      (count, *x.shape[1:]), x.dtype, sharding=where
    ),
    tree,
  )
  latents = jax.ShapeDtypeStruct((count, *plan.latents), np.float32)
  condition = placed(condition)
  if starts:
    size = plan.num_frames, plan.height, plan.width
    video = jax.ShapeDtypeStruct((count, *size, 3), np.float32)
    args = pipeline.held("vae"), video, drawn(count)
    yield Program("encode", "vae", pipeline.encoder, args, {"slicing": False})
  table, static = pipeline.steps(plan)
  args = (
    pipeline.held(model.denoiser),
    placed(jax.eval_shape(samplers.init, latents)),
    condition,
    None if plan.guidance is None else condition,
    table,
    drawn(count),
    0,
    len(plan.schedule),
  )
  yield Program("denoise", model.denoiser, pipeline.denoise, args, static)
  frames, *size = plan.latents
  latents = jax.ShapeDtypeStruct(
    (count, frames - plan.padding, *size), np.float32, sharding=where
  )
  args = pipeline.held("vae"), latents
  static = {"post": pipeline.post("uint8"), "slicing": False}
  static |= pipeline.chunks(plan.decode_chunk)
  yield Program("decode", "vae", pipeline.decoder, args, static)
