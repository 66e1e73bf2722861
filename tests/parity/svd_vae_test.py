"""The autoencoder of SVD against diffusers: same weights, same numbers."""

import copy
import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn

from tests import tiny_svd
from tests.parity import compare
from vidgen import weights
from vidgen.models.svd import vae, vae_weights

TOLERANCE = 1e-5
# Compiles in half the time; the arithmetic is the same.
_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


class Pair:
  """A random model of diffusers', and ours with its weights."""

  def __init__(self, module):
    self.module = module
    with torch.no_grad():
      # Two of the log variances lie beyond what upstream allows.
      module.quant_conv.bias[-2:] = torch.tensor([60.0, -60.0])
    kind = {"_class_name": type(module).__name__}
    self.config = config = vae.vae_config(dict(module.config) | kind)
    init = lambda key: vae.init(config, key)
    shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0)))
    state = {k: v.numpy() for k, v in module.state_dict().items()}
    table = vae_weights.table(config.temporal)
    sizes = {k: v.shape for k, v in state.items()}
    targets = weights.match(sizes, table, shapes)
    assert targets.keys() == state.keys()
    turn = lambda x, axes: np.transpose(x, axes) if axes else x
    leaves = {t.path: turn(state[k], t.axes) for k, t in targets.items()}
    self.params = jax.tree.map(jnp.asarray, weights.unflatten(leaves, shapes))

  def encode(self, video, chunk=None):
    run = _jit(lambda p, x: vae.encode(p, self.config, x, chunk=chunk))
    return run(self.params, video)

  def decode(self, latents, **kwargs):
    run = _jit(lambda p, z: vae.decode(p, self.config, z, **kwargs))
    return run(self.params, latents)

  def _first(self, x):
    flat = np.asarray(x).reshape(-1, *x.shape[2:])
    flat = torch.from_numpy(np.array(np.moveaxis(flat, -1, 1), order="C"))
    return flat.to(self.module.dtype)

  @torch.no_grad()
  def want_encode(self, video):
    posterior = self.module.encode(self._first(video)).latent_dist
    shape = video.shape[:2]
    return last(posterior.mean, shape), last(posterior.logvar, shape)

  @torch.no_grad()
  def want_decode(self, latents, chunk):
    """As `StableVideoDiffusionPipeline.decode_latents` goes through a video."""
    parts = []
    for part in self._first(latents).split(chunk):
      kwargs = {"num_frames": len(part)} if self.config.temporal else {}
      parts.append(self.module.decode(part, **kwargs).sample)
    return last(torch.cat(parts), latents.shape[:2])


def last(x, shape):
  y = np.moveaxis(x.float().numpy(), 1, -1)
  return y.reshape(*shape, *y.shape[1:])


def normal(*shape):
  rng = np.random.default_rng(sum(shape))
  return jnp.asarray(rng.standard_normal(shape, np.float32))


def check(case, got, want):
  compare.check("SVD VAE", case, got, want, TOLERANCE)


@pytest.fixture(scope="module")
def pair():
  return Pair(tiny_svd.vae())


@pytest.fixture(scope="module")
def image_pair():
  return Pair(tiny_svd.image_vae())


@pytest.mark.parametrize("chunk", [None, 2])
def test_encode(pair, chunk):
  video = normal(2, 3, 12, 16, 3)
  got, want = pair.encode(video, chunk=chunk), pair.want_encode(video)
  case = f"encode, chunks of {chunk or 'all'}"
  check(case, got.mean, want[0])
  check(case, got.logvar[..., :-2], want[1][..., :-2])
  np.testing.assert_array_equal(got.logvar[..., -2:], want[1][..., -2:])


# A chunk alone, with a rest, of one frame each.
@pytest.mark.parametrize("chunk", [5, 3, 2, 1])
def test_decode(pair, chunk):
  latents = normal(1, 5, 5, 6, 4)
  want = pair.want_decode(latents, chunk)
  got = pair.decode(latents, chunk=chunk)
  check(f"decode, chunks of {chunk}", got, want)


def test_epsilons(pair):
  """Activations so small that 1e-6 and 1e-5 differ in each of the norms.

  In float64, as PyTorch's float32 norms lose digits of small differences.
  """
  small = Pair(tiny_svd.quiet(copy.deepcopy(pair.module)))
  small.module.double()
  latents = normal(1, 3, 4, 4, 4)
  got, want = small.decode(latents), small.want_decode(latents, 3)
  check("decode, small activations", got, want)
  video = normal(1, 2, 8, 8, 3)
  got, want = small.encode(video), small.want_encode(video)
  check("encode, small activations", got.mean, want[0])


def test_chunks_begin_anew_with_each_video(pair):
  latents = normal(2, 5, 4, 4, 4)
  wants = [pair.want_decode(one[None], 3) for one in latents]
  got = pair.decode(latents, chunk=3)
  check("decode 2 videos", got, np.concatenate(wants))


def test_post_sees_each_chunk(pair):
  latents = normal(1, 5, 4, 4, 4)
  got = pair.decode(latents, chunk=2, post=lambda x: x.mean(axis=(2, 3)))
  want = pair.want_decode(latents, 2).mean(axis=(2, 3))
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_decoder_of_images(image_pair):
  video, latents = normal(2, 2, 8, 12, 3), normal(2, 3, 4, 6, 4)
  got, want = image_pair.encode(video), image_pair.want_encode(video)
  check("image: encode", got.mean, want[0])
  want = image_pair.want_decode(latents, 3)
  check("image: decode", image_pair.decode(latents), want)
  check("image: decode, chunks", image_pair.decode(latents, chunk=2), want)


def test_full_size():
  """Counts, and every key of diffusers' state dicts."""
  config = vae.VaeConfig()
  levels = len(config.block_out_channels)
  fields = {
    "block_out_channels": config.block_out_channels,
    "layers_per_block": config.layers_per_block,
    "down_block_types": ("DownEncoderBlock2D",) * levels,
  }
  with torch.device("meta"):
    modules = {
      True: diffusers.AutoencoderKLTemporalDecoder(**fields),
      False: diffusers.AutoencoderKL(
        up_block_types=("UpDecoderBlock2D",) * levels, **fields
      ),
    }
  for (temporal, module), count in zip(
    modules.items(), (97_742_847, 83_653_863), strict=True
  ):
    config.temporal = temporal
    init = lambda key: vae.init(config, key)
    shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0)))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count
    sizes = {k: tuple(v.shape) for k, v in module.state_dict().items()}
    matched = weights.match(sizes, vae_weights.table(temporal), shapes)
    assert matched.keys() == sizes.keys()
