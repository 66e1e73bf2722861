"""The autoencoder task as a run has it: config, samples, what is published."""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, PyTree

from vidgen import checkpoint, errors, publish, sharding
from vidgen.data import buckets, loader
from vidgen.tasks import autoencoder, noising, sources
from vidgen.tasks.base import Sample

VAE = "vae"
_FPS = 8.0
_STATISTICS = 256  # Clips that tell the statistics of latents.


@dataclasses.dataclass
class AutoencoderTaskConfig:
  """What an autoencoder run trains.

  Attributes:
    model: A family's config.
    checkpoint: A folder in either layout, or a hub id, to start from; None
      starts from random weights.
    init_past_taps: "zeros" starts the causal kernels with weights for the
      present frame only, so that single frames train a sound video model.
    normalise: Clips, of which 256 decide the mean and the deviation of each
      channel of the latents; the checkpoint is then changed so that they are 0
      and 1, and what that does to the border of frames is for the decoder to
      learn. One scaling factor cannot do it. None leaves it as it is.
    whiten: With `normalise`, how far channels are decorrelated first, from 0,
      not at all, to 1, wholly: eigenvalues of their covariance are taken to the
      power of 1 - whiten. Latents of small variance that the decoder reads as
      well as large ones are lost in a denoiser's error.
    loss: What the loss consists of.
    dtype: What the networks compute in; weights in training are float32.
    remat: Whether the backward pass computes each residual block again: it
      takes a third longer, in a small part of the memory.
    samples: Clips that are reconstructed now and then: the first batch of a
      config; None makes no samples.
    lpips_folder: Where the weights of LPIPS are kept; None is the cache.
  """

  model: Any
  checkpoint: str | None = None
  init_past_taps: str = "random"
  normalise: loader.DataConfig | None = None
  whiten: float = 0.0
  loss: autoencoder.AutoencoderLossConfig = dataclasses.field(
    default_factory=autoencoder.AutoencoderLossConfig
  )
  dtype: str = "float32"
  remat: bool = False
  samples: loader.DataConfig | None = None
  lpips_folder: str | None = None

  def build(self, mesh: Mesh) -> "AutoencoderRun":
    """Returns the task, everything checked that needs no weights."""
    sources.check_dtype(self.dtype)
    if self.checkpoint is not None and self.init_past_taps != "random":
      raise errors.InputError(
        "config: init_past_taps has no effect on a checkpoint; drop one."
      )
    if self.checkpoint is None and self.normalise is not None:
      raise errors.InputError(
        "config: normalise is for a checkpoint; random weights need none."
      )
    if not 0 <= self.whiten <= 1 or (self.whiten and self.normalise is None):
      raise errors.InputError(
        f"config: whiten is {self.whiten}; it goes from 0 to 1, with normalise."
      )
    autoencoder.check(self.loss)
    return AutoencoderRun(self, mesh)


class AutoencoderRun(autoencoder.AutoencoderTask):
  """See `tasks.base.Task`."""

  def __init__(self, config: AutoencoderTaskConfig, mesh: Mesh):
    family = sources.family_of(config.model)
    dtype = jnp.dtype(config.dtype)
    model = family.create_autoencoder(
      config.model, dtype, config.init_past_taps, remat=config.remat
    )
    super().__init__(model, config.loss, config.lpips_folder)
    self._run, self._mesh = config, mesh
    self._configs = family.published_configs(config.model)
    (self._component,) = (
      part for part in family.components(config.model) if part.name == VAE
    )
    self._fixed: loader.Batch | None = None
    self._reconstruct = jax.jit(self.reconstruct)

  def with_options(self, options: dict[str, Any]) -> "AutoencoderRun":
    """Returns the task with other fields of the loss."""
    if not options:
      return self
    # These decide what is loaded and made at the start.
    fixed = {"adversarial", "discriminator_features", "discriminator_layers"}
    fixed |= {"lpips_net"} if self.config.lpips else {"lpips_net", "lpips"}
    fields = {f.name for f in dataclasses.fields(self.config)} - fixed
    if unknown := options.keys() - fields:
      raise errors.InputError(
        f"config: a stage's options {', '.join(sorted(unknown))} are none that "
        f"may change from stage to stage: {', '.join(sorted(fields))}."
      )
    other = AutoencoderRun.__new__(AutoencoderRun)
    other.__dict__ |= self.__dict__
    other.config = dataclasses.replace(self.config, **options)
    autoencoder.check(other.config)
    return other

  def reads(self) -> dict[str, pathlib.Path]:
    """Returns the folder of the autoencoder that the run starts from."""
    if self._run.checkpoint is None:
      return {}
    return {VAE: checkpoint.resolve(self._run.checkpoint) / VAE}

  def start(
    self, places: dict[str, PyTree], key: Key[Array, ""]
  ) -> dict[str, PyTree]:
    """Returns the autoencoder of the checkpoint that the run starts from."""
    del key
    if self._run.checkpoint is None:
      return {}
    folder = checkpoint.resolve(self._run.checkpoint)
    params = checkpoint.load_component(
      folder, self._component, shardings=places[VAE], dtype=jnp.float32
    )
    if self._run.normalise is not None:
      mean, basis = normal_basis(self._latents(params), self._run.whiten)
      normal = self.model.normalise(params, mean, basis)
      params = jax.device_put(normal, places[VAE])
    return {VAE: params}

  def _latents(self, params: PyTree) -> Float[np.ndarray, "n c"]:
    """The latents of the clips that tell their statistics."""
    data = self._run.normalise
    size = min(bucket.batch_size for bucket in loader.sized(data))
    encode = jax.jit(
      lambda video: self.model.encode(params, noising.to_signed(video)).mean
    )
    with sharding.use(self._mesh):
      latents = [
        np.asarray(encode(batch.video))
        for batch in loader.batches(
          data, seed=0, start=0, stop=-(-_STATISTICS // size)
        )
      ]
    return np.concatenate([x.reshape(-1, x.shape[-1]) for x in latents])

  def flops(self, bucket: buckets.Bucket) -> float | None:
    """Returns nothing: convolutions are not counted."""
    del bucket

  def samples(
    self, params: dict[str, PyTree], frozen: dict[str, PyTree]
  ) -> list[Sample]:
    """Reconstructs the fixed clips, beside what went in."""
    if self._run.samples is None:
      return []
    if self._fixed is None:
      batches = loader.batches(self._run.samples, seed=0, start=0, stop=1)
      (self._fixed,) = batches
    batch = self._fixed
    with sharding.use(self._mesh):
      out, metrics = self._reconstruct(params, frozen, batch.video)
    pairs = autoencoder.side_by_side(batch.video, np.asarray(out))
    rate = self._run.samples.fps or _FPS
    return [
      Sample(
        name=f"{i:03d}",
        text=f"{batch.ids[i]}: original | reconstruction",
        frames=pair,
        fps=float(rate),
        metrics={name: float(value[i]) for name, value in metrics.items()},
      )
      for i, pair in enumerate(pairs)
    ]

  def publish(
    self,
    folder: pathlib.Path,
    params: dict[str, PyTree],
    frozen: dict[str, PyTree],
  ) -> None:
    """Writes the autoencoder as diffusers reads it, in float32."""
    del frozen
    publish.publish_component(
      folder, self._component, self._configs, params[VAE]
    )


def normal_basis(
  latents: Float[np.ndarray, "n c"], whiten: float = 0.0
) -> tuple[Float[np.ndarray, " c"], Float[np.ndarray, "c c"]]:
  """Returns `mean` and `basis`: `(latents - mean) @ inv(basis)` is normal.

  Each of its channels has mean 0 and deviation 1. Of the changes that take the
  eigenvalues of the covariance to the power of 1 - whiten, it is the symmetric
  one, which keeps channels nearest to what they were (Kessy et al., 2018).
  """
  mean = latents.mean(axis=0)
  covariance = np.cov(latents, rowvar=False, dtype=np.float64)
  values, vectors = np.linalg.eigh(covariance)
  values = np.maximum(values, 1e-8 * values.max())
  change = vectors * values ** (-whiten / 2) @ vectors.T
  change /= np.sqrt(np.diag(change.T @ covariance @ change))
  return mean, np.linalg.inv(change).astype(latents.dtype)
