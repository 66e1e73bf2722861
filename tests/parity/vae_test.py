"""The autoencoder against diffusers: same weights, same numbers."""

import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn

from tests.parity import compare
from vidgen import weights
from vidgen.models.cogvideox import chunks, vae, vae_weights
from vidgen.nn import posterior as posterior_lib

_TOLERANCE = 1e-5
_SMALL = dict(
  block_out_channels=(8, 16, 16, 32),
  norm_num_groups=2,
  layers_per_block=1,
  latent_channels=4,
  sample_height=192,
  sample_width=160,
)
_WIDE = dict(layers_per_block=1)
# Compiles in half the time; the arithmetic is the same.
_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


class _Pair:
  """A random model of diffusers', and ours with its weights."""

  def __init__(self, fields):
    torch.manual_seed(0)
    self.model = diffusers.AutoencoderKLCogVideoX(**fields).eval()
    with torch.no_grad():
      for name, p in self.model.named_parameters():
        # Fresh norms and biases are ones and nearly zeros, which hides traps.
        if p.ndim == 1:
          is_scale = "norm" in name and name.endswith("weight")
          p.copy_(0.3 * torch.randn_like(p) + is_scale)
      # Two of the log variances lie beyond what upstream allows.
      bias = self.model.encoder.conv_out.conv.bias
      bias[-2:] = torch.tensor([40.0, -60.0])
    self.config = config = vae.vae_config(dict(self.model.config))
    self.params = self._convert()
    self.encode = _jit(lambda p, x: vae.encode(p, config, x))
    self.decode = _jit(lambda p, z: vae.decode(p, config, z))

  def _convert(self):
    shapes = nn.unbox(vae.shapes(self.config))
    state = {k: v.numpy() for k, v in self.model.state_dict().items()}
    sizes = {k: v.shape for k, v in state.items()}
    targets = weights.match(sizes, vae_weights.VAE_TABLE, shapes)
    turn = lambda x, axes: np.transpose(x, axes) if axes else x
    leaves = {t.path: turn(state[k], t.axes) for k, t in targets.items()}
    return jax.tree.map(jnp.asarray, weights.unflatten(leaves, shapes))

  @torch.no_grad()
  def want_encode(self, video):
    posterior = self.model.encode(_first(video)).latent_dist
    return _last(posterior.mean), _last(posterior.logvar)

  @torch.no_grad()
  def want_decode(self, latents):
    return _last(self.model.decode(_first(latents)).sample)


def _first(x):
  return torch.from_numpy(np.array(np.moveaxis(x, -1, 1), order="C"))


def _last(x):
  return np.moveaxis(x.float().numpy(), 1, -1)


def _normal(*shape):
  seed = sum(shape)
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal(shape, np.float32))


def _check(case, got, want):
  compare.check("CogVideoX VAE", case, got, want, _TOLERANCE)


@pytest.fixture(scope="module")
def small():
  return _Pair(_SMALL)


@pytest.fixture
def tiled(small, monkeypatch):
  names = ("network", "chunk", "slicing", "post")
  run = _jit(chunks._run.__wrapped__, static_argnames=names)
  monkeypatch.setattr(chunks, "_run", run)
  small.model.enable_tiling()
  yield chunks.default_tiling(
    small.config.sample_height, small.config.sample_width
  )
  small.model.disable_tiling()


def _slow(*values):
  return [pytest.param(value, marks=pytest.mark.slow) for value in values]


# Even and odd first chunks, one and three chunks; two and four on demand.
@pytest.mark.parametrize("frames", [1, 2, 9, 13, 25, *_slow(17, 33)])
def test_encode(small, frames):
  video = _normal(2, frames, 16, 24, 3)
  got, want = small.encode(small.params, video), small.want_encode(video)
  mean, logvar = want
  _check(f"encode {frames} frames", got.mean, mean)
  _check(f"encode {frames} frames", got.logvar[..., :-2], logvar[..., :-2])
  np.testing.assert_array_equal(got.logvar[..., -2:], logvar[..., -2:])


@pytest.mark.parametrize("frames", [1, 2, 3, 5, *_slow(4, 7, 8)])
def test_decode(small, frames):
  latents = _normal(2, frames, 2, 3, 4)
  got, want = small.decode(small.params, latents), small.want_decode(latents)
  assert got.shape[1] == (4 * frames - 3 if frames % 2 else 4 * frames)
  _check(f"decode {frames} latents", got, want)


def test_published_width():
  pair = _Pair(_WIDE)
  video, latents = _normal(1, 5, 16, 16, 3), _normal(1, 3, 2, 2, 16)
  got, want = pair.encode(pair.params, video), pair.want_encode(video)
  for a, b in zip(got, want, strict=True):
    _check("published width: encode 5 frames", a, b)
  got, want = pair.decode(pair.params, latents), pair.want_decode(latents)
  _check("published width: decode 3 latents", got, want)


# Tiles of 96x80 pixels: two rows and two columns, the second ones smaller.
@pytest.mark.slow
def test_tiled_encode(small, tiled):
  video = _normal(1, 17, 112, 96, 3)
  got = vae.encode(small.params, small.config, video, tiling=tiled)
  want = small.want_encode(video)
  for a, b in zip(got, want, strict=True):
    _check("tiled encode", a, b)


def test_tiled_decode(small, tiled):
  latents = _normal(1, 5, 14, 12, 4)
  got = vae.decode(
    small.params, small.config, latents, tiling=tiled, post=jnp.negative
  )
  _check("tiled decode", got, -small.want_decode(latents))


def test_what_fits_a_tile_is_not_tiled(small, tiled):
  latents = _normal(2, 1, 2, 3, 4)
  got = vae.decode(small.params, small.config, latents, tiling=tiled)
  _check("one tile", got, small.want_decode(latents))


def test_slicing(small):
  latents, video = _normal(3, 1, 2, 3, 4), _normal(3, 1, 16, 16, 3)
  run = lambda p, z: vae.decode(p, small.config, z, slicing=True)
  got = _jit(run)(small.params, latents)
  _check("sliced decode", got, small.want_decode(latents))
  run = lambda p, x: vae.encode(p, small.config, x, slicing=True).mean
  got = _jit(run)(small.params, video)
  _check("sliced encode", got, small.want_encode(video)[0])


def test_posterior(small):
  moments = 30 * _normal(2, 3, 2, 3, 8)
  theirs = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution(
    _first(moments)
  )
  posterior = posterior_lib.of_moments(jnp.asarray(moments))
  noise = _normal(2, 3, 2, 3, 4)
  want = _last(theirs.mean) + _last(theirs.std) * noise
  _check("posterior sample", posterior_lib.sample(posterior, noise), want)
  # Upstream sums a video over all axes but the last one.
  want = theirs.kl().numpy().sum(axis=-1)
  np.testing.assert_allclose(posterior_lib.kl(posterior), want, rtol=1e-5)


def test_bfloat16_loses_no_more_than_upstream(small):
  latents, video = _normal(1, 3, 4, 4, 4), _normal(1, 1, 32, 32, 3)
  pictures, mean = small.want_decode(latents), small.want_encode(video)[0]
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), small.params)
  run = lambda p, z: vae.decode(p, small.config, z, dtype=jnp.bfloat16)
  got = np.float32(_jit(run)(half, jnp.bfloat16(latents)))
  run = lambda p, x: vae.encode(p, small.config, x, dtype=jnp.bfloat16).mean
  got_mean = _jit(run)(half, jnp.bfloat16(video))
  state = small.model.state_dict()
  with torch.no_grad():
    model = diffusers.AutoencoderKLCogVideoX(**_SMALL).eval()
    model.load_state_dict(state)
    model = model.to(torch.bfloat16)
    theirs = _last(model.decode(_first(latents).bfloat16()).sample)
    posterior = model.encode(_first(video).bfloat16()).latent_dist
  # PSNR grows as the error shrinks: the peak is the same.
  error = compare.error(got, pictures)
  assert error <= 1.05 * compare.error(theirs, pictures)
  error = compare.error(got_mean, mean)
  assert error <= 1.05 * compare.error(_last(posterior.mean), mean)
