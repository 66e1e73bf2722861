"""The programs that a job would run, of a checkpoint that need not be here."""

import copy
import dataclasses
import functools
import importlib
import json
import math
import pathlib
import pkgutil
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from vidgen import (
  ahead,
  arguments,
  checkpoint,
  errors,
  layouts,
  loading,
  models,
  sharding,
  train,
  train_step,
)
from vidgen.compile import Program
from vidgen.data import loader
from vidgen.encoders import word_tokenizer
from vidgen.models import base
from vidgen.pipeline import Pipeline
from vidgen.sample import SampleConfig


def skeleton(name: str, folder: pathlib.Path) -> pathlib.Path:
  """Returns the folder of a checkpoint, of which the configs alone are needed.

  A folder that is here is taken as it is. Of a published checkpoint that is
  not, the configs are written from what the families know.

  Args:
    name: As `checkpoint.resolve` takes it.
    folder: Where configs may be written.

  Raises:
    InputError: It is neither here nor known.
  """
  if name == checkpoint.DEMO or pathlib.Path(name).expanduser().exists():
    return checkpoint.resolve(name)
  known: dict[str, Any] = {}
  for package in pkgutil.iter_modules(models.__path__):
    if package.ispkg:
      family = importlib.import_module(f"{models.__name__}.{package.name}")
      known |= {name: (family, make) for name, make in family.PUBLISHED.items()}
  if name not in known:
    raise errors.InputError(
      f"{name}: no such folder, and no published checkpoint that is known by "
      f"heart: {', '.join(sorted(known))}."
    )
  family, make = known[name]
  home = folder / name
  for path, content in family.published_configs(make()).items():
    (home / path).parent.mkdir(parents=True, exist_ok=True)
    (home / path).write_text(json.dumps(content), encoding="utf-8")
  if not (home / "tokenizer").is_dir():
    # Any will do: the length of texts is the model's.
    word_tokenizer.write(home / "tokenizer", ["a", "video"])
  return home


def bytes_of(tree: PyTree) -> int:
  """Returns the bytes that one device holds of arrays with shardings.

  Those without are whole on each device; numbers alone do not count.
  """

  def held(leaf):
    where = getattr(leaf, "sharding", None)
    shape = leaf.shape if where is None else where.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize

  return sum(held(leaf) for leaf in jax.tree.leaves(tree) if np.ndim(leaf))


@dataclasses.dataclass
class SampleJob:
  """The programs of `vidgen sample`, for a batch at a time.

  Attributes:
    config: Of the job.
    folder: Where configs of checkpoints may be written.
    why_mesh: Why the last mesh was this, if it was chosen.
    model: Of the last programs.
  """

  config: SampleConfig
  folder: pathlib.Path
  why_mesh: str = ""
  model: base.Model | None = None

  def programs(
    self, devices: Sequence[Any], device_bytes: int | None = None
  ) -> tuple[Mesh, list[Program]]:
    """Returns the mesh and, of a batch, text, image, denoising, decoding.

    Raises:
      InputError: The config asks for tiles, which compile as they come up.
    """
    config = self.config
    if config.tiling:
      raise errors.InputError(
        "config: tiling: tiles compile one by one, as they come up; leave it "
        "out to see what decoding takes without."
      )
    home = skeleton(config.checkpoint, self.folder)
    dtype = jnp.dtype(config.dtype)
    model = self.model = base.find_family(home).open_model(home, dtype)
    sizes = {
      name: getattr(config, name)
      for name in ("num_frames", "height", "width", "num_steps")
    }
    image = config.image or ("image" if model.takes_image else None)
    strength = None if config.video is None else config.strength
    plan = model.plan(
      arguments.request(
        sizes,
        config.guidance_scale,
        config.sampler,
        strength,
        image,
        config.options,
      )
    )
    mesh, self.why_mesh = layouts.make(
      config.mesh,
      lambda: loading.need(
        model, [plan], dtype, config.residency, device_bytes
      ),
      devices,
    )
    boxed = {part.name: part.shapes() for part in model.components}
    shapes = {part.name: base.shapes(part) for part in model.components}
    params = sharding.placed(shapes, sharding.shardings(boxed, mesh), dtype)
    weights = {name: bytes_of(tree) for name, tree in params.items()}
    pipeline = Pipeline(model, params, mesh)
    size = plan.num_frames, plan.height, plan.width
    branches = 1 if plan.guidance is None else 2
    count, starts = config.batch_size, config.video is not None
    # Conditions are made clip by clip, all else of the whole batch.
    runs = {stage.stage: count for stage, _ in pipeline.conditioners}
    runs["denoise"] = len(plan.schedule)
    flops = {"denoise": count * branches * model.flops(*size)}
    programs = []
    for one in ahead.programs(pipeline, plan, count, starts):
      others = sum(n for name, n in weights.items() if name != one.component)
      is_step = one.name == "denoise"
      programs.append(
        Program(
          name="denoise step" if is_step else one.name,
          lower=functools.partial(one.lower, mesh),
          key=one.key,
          resident_bytes=others if config.residency == "all" else 0,
          given_bytes=bytes_of(one.args),
          model_flops=flops.get(one.name, 0.0),
          runs=runs.get(one.name, 1),
        )
      )
    return mesh, programs

  def alternatives(self) -> Iterator[tuple[str, "SampleJob"]]:
    """Yields less resident weights, then more devices for them."""
    if self.config.residency == "all":
      yield "residency=stage", self._with(residency="stage")
    for change, mesh in _meshes(self.config.mesh):
      yield change, self._with(mesh=mesh)
      if self.config.residency == "all":
        both = self._with(mesh=mesh, residency="stage")
        yield f"{change} and residency=stage", both

  def _with(self, **fields: Any) -> "SampleJob":
    return SampleJob(dataclasses.replace(self.config, **fields), self.folder)


@dataclasses.dataclass
class TrainJob:
  """The programs of `vidgen train`: a step of each stage and bucket.

  Attributes:
    config: Of the run.
    folder: As of `SampleJob`.
    why_mesh: As of `SampleJob`.
  """

  config: train.TrainConfig
  folder: pathlib.Path
  why_mesh: str = ""

  def programs(
    self, devices: Sequence[Any], device_bytes: int | None = None
  ) -> tuple[Mesh, list[Program]]:
    """Returns the mesh and a program for each size of batch."""
    config = copy.deepcopy(self.config)
    source = getattr(config.task, "source", config.task)
    if source.checkpoint is not None:
      source.checkpoint = str(skeleton(source.checkpoint, self.folder))
    mesh, self.why_mesh = train.choose_mesh(config, devices, device_bytes)
    task = config.task.build(mesh)
    trainer = train.Trainer(config, task, mesh)
    frozen = task.frozen_shapes(mesh, **train.reading(config))
    state = sharding.placed(trainer.shapes, trainer.places)
    programs, seen = [], set()
    for stage in config.stages:
      for bucket in loader.sized(stage.data):
        name = f"{bucket.num_frames}x{bucket.height}x{bucket.width}"
        name = f"train step {name}, {bucket.batch_size} clips"
        cached = stage.data.cache is not None
        known = (name, repr((stage.options, stage.trainable, cached)))
        if known in seen:
          continue
        seen.add(known)
        lower = functools.partial(
          _lower_step, trainer, stage, bucket, state, frozen
        )
        programs.append(
          Program(
            name + (", cached" if cached else ""),
            lower,
            name,
            given_bytes=bytes_of((state, frozen)),
            model_flops=task.flops(bucket) or 0.0,
          )
        )
    return mesh, programs

  def alternatives(self) -> Iterator[tuple[str, "TrainJob"]]:
    """Yields recomputation, smaller parts of a batch, then another mesh."""
    remat = getattr(self.config.task, "remat", "full")
    again = {}
    if remat != "full":
      full = True if isinstance(remat, bool) else "full"
      if remat is not True:
        again = {"task": dataclasses.replace(self.config.task, remat=full)}
        yield f"task.remat={full}", self._with(**again)
    for parts in (2, 4, 8):
      more = self.config.accumulate * parts
      yield f"accumulate={more}", self._with(accumulate=more, **again)
    for change, mesh in _meshes(self.config.mesh):
      yield change, self._with(mesh=mesh, **again)

  def _with(self, **fields: Any) -> "TrainJob":
    return TrainJob(dataclasses.replace(self.config, **fields), self.folder)


def _meshes(
  mesh: dict[str, int] | str,
) -> Iterator[tuple[str, dict[str, int]]]:
  """Yields meshes that hold less on each device."""
  mesh = layouts.named(mesh) or {}
  fixed = {axis: n for axis, n in mesh.items() if axis not in ("data", "fsdp")}
  yield "mesh.fsdp=-1 in place of data", {**fixed, "fsdp": -1}
  for size in (2, 4, 8):
    more = {**fixed, "context": fixed.get("context", 1) * size, "fsdp": -1}
    yield f"mesh.context={more['context']} and mesh.fsdp=-1", more


def _lower_step(trainer, stage, bucket, state, frozen):
  """Lowers the step of a stage for one bucket."""
  task, step = trainer.stage_steps(stage)
  n = bucket.batch_size
  place = sharding.training_batch(trainer.mesh, n)
  number = np.zeros((1,), np.int32)
  if stage.data.cache is None:
    arrays = task.host_batch(loader.blank(bucket))
  else:
    arrays = task.cached_arrays(bucket, task.frozen_shapes(trainer.mesh))
  arrays |= {"index": number, "count": number}
  whole = lambda x: jax.ShapeDtypeStruct(
    (n, *x.shape[1:]), x.dtype, sharding=place
  )
  key = jax.eval_shape(lambda: train_step.key_of(0, train_step.STEP))
  with sharding.use(trainer.mesh):
    return step.lower(state, frozen, jax.tree.map(whole, arrays), key)
