"""From a folder or a hub id to a pipeline."""

import contextlib
import functools
import math
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from vidgen import (
  ahead,
  checkpoint,
  errors,
  executables,
  layouts,
  sharding,
  tensorfile,
  weights,
)
from vidgen.models import base
from vidgen.pipeline import Pipeline

DTYPES = ("bfloat16", "float16", "float32")
RESIDENCIES = ("all", "stage")


def load(
  path_or_hub_id: str,
  dtype: Any,
  mesh: Mapping[str, int] | str | None,
  *,
  revision: str | None,
  residency: str,
  lora: str | Mapping[str, float] | None,
  lora_scale: float,
  check: Callable[[base.Model, pathlib.Path], Iterable[base.Plan] | None]
  | None,
  batch_size: int,
  programs: str | None,
) -> Pipeline:
  """Loads a checkpoint; see `vidgen.load`."""
  try:
    name = jnp.dtype(dtype).name
  except TypeError:
    name = str(dtype)
  if name not in DTYPES:
    raise errors.InputError(f"dtype: {name} is not one of {', '.join(DTYPES)}.")
  dtype = jnp.dtype(name)
  if residency not in RESIDENCIES:
    raise errors.InputError(
      f"residency: {residency!r} is not one of {', '.join(RESIDENCIES)}."
    )
  loras = _loras(lora)
  sizes = layouts.named(mesh)
  if sizes is not None:
    # A mistake in it is told before a checkpoint is fetched.
    sharding.make_mesh(sizes or None)
  folder = checkpoint.resolve(path_or_hub_id, revision)
  model = base.find_family(folder).open_model(folder, dtype)
  plans = (check(model, folder) if check is not None else None) or ()
  memory = layouts.memory_of(jax.local_devices()[0])
  mesh, why = layouts.make(
    mesh, lambda: need(model, plans, dtype, residency, memory)
  )
  pipeline = Pipeline(
    model, _shapes(model, mesh, dtype), mesh, on_host=residency == "stage"
  )
  pipeline.why_mesh = why
  devices = list(mesh.devices.flat)
  identity = executables.identity(model, devices, mesh.shape)
  if programs is not None:
    pipeline.ready.add(executables.load(programs, identity, devices))
  with _compiling(pipeline, plans, batch_size, identity):
    params = {}
    for component in model.components:
      where = None
      if residency == "all":
        where = sharding.shardings(component.shapes(), mesh)
      params[component.name] = checkpoint.load_component(
        folder, component, shardings=where, dtype=dtype
      )
    for path, weight in loras.items():
      scale = lora_scale * weight
      params = _merge_lora(params, model.components, path, scale)
  pipeline.replace(params)
  return pipeline


def need(
  model: base.Model,
  plans: Iterable[base.Plan],
  dtype: DTypeLike,
  residency: str,
  device_bytes: int | None,
) -> layouts.Need:
  """Returns what a mesh for sampling clip by clip is chosen by."""
  plans = list(plans)
  sizes = [base.count(part) for part in model.components]
  stored = sum(sizes) if residency == "all" else max(sizes)
  return layouts.Need(
    heads=model.heads,
    guided=not plans or any(plan.guidance is not None for plan in plans),
    stored_bytes=stored * jnp.dtype(dtype).itemsize,
    device_bytes=device_bytes,
  )


def _shapes(model, mesh, dtype):
  """The shapes of all parameters, with their places."""
  boxed = {part.name: part.shapes() for part in model.components}
  return sharding.placed(
    {name: base.unboxed(tree) for name, tree in boxed.items()},
    sharding.shardings(boxed, mesh),
    dtype,
  )


@contextlib.contextmanager
def _compiling(
  pipeline: Pipeline,
  plans: Iterable[base.Plan],
  batch_size: int,
  identity: dict[str, Any],
) -> Iterator[None]:
  """Compiles what plans need while something else is done: files are read.

  What an earlier job kept is taken instead. A program that cannot be compiled
  says so when it is called.
  """
  plans, kept = list(plans), None
  if plans and not pipeline.ready:
    kept = executables.kept(identity, plans, batch_size)
  if kept is not None and kept.is_dir():
    todo = functools.partial(_take_kept, pipeline, kept, identity)
  else:
    found = {
      one.key: one
      for plan in plans
      for one in ahead.programs(pipeline, plan, batch_size)
    }
    todo = functools.partial(_compile, pipeline, found, kept, identity)
  thread = threading.Thread(target=todo, name="compile")
  thread.start()
  try:
    yield
  finally:
    thread.join()


def _take_kept(
  pipeline: Pipeline, kept: pathlib.Path, identity: dict[str, Any]
) -> None:
  """Reads programs; if they are damaged, those that are called compile."""
  devices = list(pipeline.mesh.devices.flat)
  forget = functools.partial(shutil.rmtree, kept, ignore_errors=True)
  try:
    pipeline.ready.add(executables.load(kept, identity, devices), forget)
  except Exception:
    forget()


def _compile(
  pipeline: Pipeline,
  programs: dict[str, ahead.Program],
  kept: pathlib.Path | None,
  identity: dict[str, Any],
) -> None:
  """Compiles programs that are not there, and keeps all for the next job."""
  compiled = {}
  with executables.cached() as cached:
    for key, one in programs.items():
      if key in pipeline.ready:
        continue
      try:
        compiled[key] = one.lower(pipeline.mesh).compile()
      except Exception:
        return
      pipeline.ready.add({key: compiled[key]})
  if kept is not None and len(compiled) == len(programs) and not cached:
    # Another job may have kept them meanwhile, or the disk may be full.
    with contextlib.suppress(errors.VidgenError, OSError):
      executables.save(kept, compiled, identity)


def _loras(lora: str | Mapping[str, float] | None) -> dict[str, float]:
  """The weight of each LoRA file: they are added to one another."""
  if lora is None:
    return {}
  loras = dict(lora) if isinstance(lora, Mapping) else {lora: 1.0}
  for path, weight in loras.items():
    if not isinstance(weight, int | float) or not math.isfinite(weight):
      raise errors.InputError(f"lora: {path} has the weight {weight!r}.")
  return loras


def _merge_lora(params, components, path, scale):
  """Adds a LoRA to every component that it names."""
  if not pathlib.Path(path).is_file():
    raise errors.InputError(f"{path}: there is no such LoRA file.")
  files = tensorfile.open_file(pathlib.Path(path))
  parts = {name.split(".", 1)[0] for name in files}
  named = [c for c in components if c.name in parts]
  if unknown := parts - {c.name for c in named}:
    raise errors.InputError(
      f"{path}: no LoRA of this model; it names {', '.join(sorted(unknown))}, "
      f"the model has {', '.join(c.name for c in components)}."
    )
  params = dict(params)
  for component in named:
    params[component.name] = weights.merge_lora(
      params[component.name],
      files,
      component.table,
      prefix=f"{component.name}.",
      scale=scale,
    )
  return params
