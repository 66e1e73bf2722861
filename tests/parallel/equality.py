"""One job on one device and on a mesh: how far the results lie apart."""

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jaxtyping import PyTree

import vidgen
from vidgen import pipeline, sharding, train_step
from vidgen.models.cogvideox import vae
from vidgen.tasks import diffusion, noising, sources

# Relative: the norm of the difference over the norm of one device's result.
TOLERANCE = 1e-5

# Heads of 2b divide over nothing, and tokens do not: texts have odd lengths.
_FIELDS = {"max_text_seq_length": 29, "sample_frames": 25}
VARIANTS = {
  "2b": {"num_attention_heads": 5, **_FIELDS},
  "5b": {"num_attention_heads": 4, **_FIELDS},
  "1.5-5b": {"num_attention_heads": 4, **_FIELDS},
}

LAYOUTS = {
  "data": {"data": 2},
  "cfg": {"cfg": 2},
  "fsdp": {"fsdp": 4},
  "tensor": {"tensor": 2},
  "ulysses": {"context": 4},
  "ring": {"ring": 4},
  "ulysses x ring": {"context": 2, "ring": 2},
  "cfg x context x fsdp": {"cfg": 2, "context": 2, "fsdp": 2},
  "height x width": {"context": 4, "ring": 2},
}

PROMPTS = ["a panda plays in the forest", "a red kite by the sea"]
SIZE = {"num_frames": 9, "height": 64, "width": 96}


@functools.cache
def folder(variant: str) -> pathlib.Path:
  """Writes a small checkpoint of a variant, once."""
  # Takes seconds to import, which those that are given a folder do not need.
  from tests import tiny_cogvideox

  home = tempfile.TemporaryDirectory()
  _homes.append(home)
  path = pathlib.Path(home.name)
  tiny_cogvideox.write(path, variant, fields={"transformer": VARIANTS[variant]})
  return path / "checkpoint"


_homes: list[tempfile.TemporaryDirectory] = []


@functools.lru_cache(maxsize=4)
def load(variant: str, layout: str | None) -> pipeline.Pipeline:
  """Loads it on one device or on a mesh."""
  mesh = None if layout is None else LAYOUTS[layout]
  return vidgen.load(str(folder(variant)), dtype="float32", mesh=mesh)


def sample(variant: str, layout: str | None) -> np.ndarray:
  """Latents of two prompts, with guidance and with noise in each step."""
  return load(variant, layout).sample(
    PROMPTS, num_steps=3, sampler="dpmpp_2m_sde", output="latents", **SIZE
  )


def train(variant: str, layout: str | None) -> PyTree:
  """The gradients of a training step on four samples."""
  pipe = load(variant, layout)
  source = sources.Source(checkpoint=str(folder(variant)))
  config = diffusion.DiffusionTaskConfig(
    source, noising.NoisingConfig(text_dropout=0.5), dtype="float32"
  )
  task = config.build(pipe.mesh)
  normal = np.random.default_rng(0).standard_normal
  length = VARIANTS[variant]["max_text_seq_length"]
  frames = 1 + SIZE["num_frames"] // 4
  latents = (4, frames, SIZE["height"] // 8, SIZE["width"] // 8, 4)
  batch = {
    "latents": normal(latents).astype(np.float32),
    "latents_std": np.abs(normal(latents)).astype(np.float32),
    "text": normal((4, length, 32)).astype(np.float32),
  }
  params = {"transformer": pipe.params["transformer"]}
  where = jax.tree.map(lambda x: x.sharding, params)
  frozen = {"empty_text": jnp.zeros((1, length, 32))}
  step = jax.jit(task.gradients, out_shardings=(where, None))
  with sharding.use(pipe.mesh):
    part, parts = sharding.host_part(pipe.mesh)
    rows = 4 // parts
    first = part * rows
    batch = {name: x[first : first + rows] for name, x in batch.items()}
    batch = train_step.place_batch(batch, pipe.mesh, first, 4)
    return step(params, frozen, batch, jax.random.key(0), jnp.int32(0))[0]


def code(variant: str, layout: str | None) -> dict[str, np.ndarray]:
  """The latents of a video, and the frames of latents."""
  pipe = load(variant, layout)
  return {
    "latents": pipe.encode(_video(9)),
    "frames": pipe.decode(_latents(7), "float"),
  }


def train_vae(variant: str, layout: str | None) -> PyTree:
  """The gradients of a reconstruction's error, with two levels of four.

  With four, a CPU's compiler takes minutes.
  """
  del variant  # The autoencoder is the same for all of them.
  mesh = sharding.make_mesh(None if layout is None else LAYOUTS[layout])
  config = vae.VaeConfig(
    block_out_channels=(8, 8),
    latent_channels=4,
    layers_per_block=1,
    norm_num_groups=2,
    temporal_compression_ratio=2,
  )
  where = sharding.shardings(vae.shapes(config), mesh)
  params = meta.unbox(vae.init(config, jax.random.key(0)))

  def loss(params, video):
    latents = vae.encode(params, config, video).mean
    again = vae.decode(params, config, latents)
    return jnp.mean(jnp.square(again - video))

  with sharding.use(mesh):
    video = _video(5)[:, :, :16, :24]
    step = jax.jit(jax.grad(loss), out_shardings=where)
    return step(jax.device_put(params, where), video)


def _video(frames: int) -> np.ndarray:
  size = (1, frames, SIZE["height"], SIZE["width"], 3)
  return np.random.default_rng(1).uniform(-1, 1, size).astype(np.float32)


def _latents(frames: int) -> np.ndarray:
  size = (1, frames, SIZE["height"] // 8, SIZE["width"] // 8, 4)
  return np.random.default_rng(2).standard_normal(size).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Case:
  """A cell of the table."""

  variant: str
  layout: str
  job: str

  @property
  def run(self) -> Callable[[str, str | None], PyTree]:
    """What is run, given the variant and the layout."""
    if self.layout == "height x width":
      return {"sample": code, "train": train_vae}[self.job]
    return {"sample": sample, "train": train}[self.job]

  def error(self) -> float:
    """Runs it on the mesh; the worst array counts."""
    got = self.run(self.variant, self.layout)
    return apart(got, reference(self.run, self.variant))


CASES = [
  Case(variant, layout, job)
  for job in ("sample", "train")
  for variant in VARIANTS
  for layout in LAYOUTS
]


@functools.cache
def reference(run: Callable[..., PyTree], variant: str) -> PyTree:
  """What one device gives, once."""
  return jax.tree.map(np.asarray, run(variant, None))


def apart(got: PyTree, want: PyTree) -> float:
  """The largest relative difference of any array.

  That of an array smaller than a thousandth of them all together is relative to
  that thousandth: some gradients are zero but for rounding, such as that of a
  bias that all keys share.
  """
  whole = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(want)))
  norm = lambda g, w: (
    np.linalg.norm(np.asarray(g) - w) / max(np.linalg.norm(w), 1e-3 * whole)
  )
  return max(float(x) for x in jax.tree.leaves(jax.tree.map(norm, got, want)))
