"""Text and image to video in JAX: `vidgen.load(path).sample(prompt)`."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vidgen.version import VERSION as __version__

if TYPE_CHECKING:
  from vidgen.pipeline import Pipeline


def load(
  path_or_hub_id: Any,
  dtype: Any = "bfloat16",
  mesh: Mapping[str, int] | str | None = None,
  *,
  revision: str | None = None,
  residency: str = "all",
  lora: str | Mapping[str, float] | None = None,
  lora_scale: float = 1.0,
  check: Callable[[Any], Any] | None = None,
  batch_size: int = 1,
  executables: str | None = None,
) -> "Pipeline":
  """Loads a checkpoint, ready to sample.

  Args:
    path_or_hub_id: A folder in the published or the Orbax layout, or a hub id.
    dtype: What weights are held and computed in: "bfloat16", "float16" or
      "float32".
    mesh: Mesh axis to size, for example `{"cfg": 2, "tensor": 4}`; the name of
      a preset, or "auto", of all devices; None is one device.
    revision: A branch, tag or commit of the hub's repository.
    residency: "all" keeps every component on the devices, "stage" brings each
      from the host for its stage alone.
    lora: A LoRA file in the diffusers layout, merged into the weights; or
      several, each with its weight.
    lora_scale: Factor of the LoRA.
    check: Is called with the model and its folder before its weights are read;
      what it raises ends the loading. Plans that it returns are compiled
      meanwhile.
    batch_size: For how many clips at once they are.
    executables: A folder of `vidgen compile --save`, of which programs are
      taken that would be compiled otherwise.

  Raises:
    InputError: A checkpoint or an argument that cannot be used.
    CorruptError: A checkpoint that is damaged.
  """
  # Imported here so that `vidgen --help` need not wait for jax.
  from vidgen import loading

  return loading.load(
    str(path_or_hub_id),
    dtype,
    mesh,
    revision=revision,
    residency=residency,
    lora=lora,
    lora_scale=lora_scale,
    check=check,
    batch_size=batch_size,
    programs=executables,
  )


def __getattr__(name: str) -> Any:
  if name == "Pipeline":
    from vidgen.pipeline import Pipeline

    return Pipeline
  raise AttributeError(f"module 'vidgen' has no attribute {name!r}")


__all__ = ["Pipeline", "__version__", "load"]
