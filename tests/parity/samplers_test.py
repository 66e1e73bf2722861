"""The samplers against diffusers' schedulers, on a toy network."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vidgen import diffusion, samplers

SHAPE = (2, 3, 4)
CONFIG = {
  "beta_start": 0.00085,
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "prediction_type": "v_prediction",
  "rescale_betas_zero_snr": True,
  "set_alpha_to_one": True,
  "timestep_spacing": "trailing",
  "clip_sample": False,
}


def network(lib, x, t):
  return lib.tanh(x * 0.7 + t / 1000)


def schedule(steps, shift=1.0):
  alpha2 = diffusion.zero_terminal_snr(snr_shift=shift)
  return diffusion.trailing(alpha2, steps)


def sample(name, plan, x, monkeypatch, noises=None):
  if noises is not None:
    draw = lambda keys, step, shape: jnp.asarray(noises)[step]
    monkeypatch.setattr(samplers, "step_noise", draw)
  table = samplers.table(
    plan, samplers.SAMPLERS[name](plan), np.ones(len(plan))
  )
  denoise = lambda x, level, scale: diffusion.x0_from_v(
    x, network(jnp, x, level.timestep), level
  )
  keys = samplers.keys(0, np.arange(SHAPE[0], dtype=np.uint32), samplers.STEP)
  state = samplers.run(
    denoise,
    samplers.init(jnp.asarray(x)),
    table,
    keys,
    0,
    len(plan),
    stochastic=noises is not None,
  )
  return np.asarray(state.x)


def test_alpha2_has_the_published_values():
  plain = diffusion.zero_terminal_snr(snr_shift=1.0)
  np.testing.assert_allclose(
    plain[[0, 19, 499, 979, 999]],
    [0.99915, 0.98101046, 0.24235917, 8.5787848e-05, 0],
    rtol=1e-7,
  )
  shifted = diffusion.zero_terminal_snr(snr_shift=3.0)
  np.testing.assert_allclose(
    shifted[[0, 19, 499, 979, 999]],
    [0.99745433, 0.94657298, 0.09596957, 2.7194360e-05, 0],
    rtol=1e-6,
  )


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_alpha2_is_diffusers(shift):
  scheduler = diffusers.CogVideoXDDIMScheduler(snr_shift_scale=shift, **CONFIG)
  ours = diffusion.zero_terminal_snr(snr_shift=shift)
  np.testing.assert_allclose(ours, scheduler.alphas_cumprod, rtol=1e-9)


@pytest.mark.parametrize("steps", [1, 7, 30, 50, 1000])
def test_timesteps_are_diffusers(steps):
  scheduler = diffusers.CogVideoXDDIMScheduler(**CONFIG)
  scheduler.set_timesteps(steps)
  np.testing.assert_array_equal(
    schedule(steps).now.timestep, scheduler.timesteps
  )


@pytest.mark.parametrize("steps", [7, 30, 50])
def test_euler_is_ddim(steps, monkeypatch):
  scheduler = diffusers.CogVideoXDDIMScheduler(snr_shift_scale=3.0, **CONFIG)
  scheduler.set_timesteps(steps)
  noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
  want = noise
  for t in scheduler.timesteps:
    want = scheduler.step(network(torch, want, t), t, want).prev_sample
  got = sample("ddim", schedule(steps, 3.0), noise.numpy(), monkeypatch)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strength", [1.0, 0.8])
@pytest.mark.parametrize("steps", [7, 30, 50])
def test_dpmpp_2m_sde_is_dpm(steps, strength, monkeypatch):
  scheduler = diffusers.CogVideoXDPMScheduler(snr_shift_scale=1.0, **CONFIG)
  scheduler.set_timesteps(steps)
  count = int(steps * strength)
  timesteps = scheduler.timesteps[steps - count :]
  generator = torch.Generator().manual_seed(0)
  noise = torch.randn(SHAPE, generator=generator)
  noises = torch.randn((count, *SHAPE), generator=generator)

  want, x0 = noise, None
  for i, t in enumerate(timesteps):
    # diffusers draws twice in inner steps and uses the second.
    monkeypatch.setattr(
      "diffusers.schedulers.scheduling_dpm_cogvideox.randn_tensor",
      lambda *args, i=i, **kwargs: noises[i],
    )
    want, x0 = scheduler.step(
      network(torch, want, t), x0, t, timesteps[i - 1] if i else None, want
    )
  plan = schedule(steps).tail(count)
  got = sample("dpmpp_2m_sde", plan, noise.numpy(), monkeypatch, noises.numpy())
  assert np.isfinite(got).all()
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_a_step_at_a_time_has_the_bits_of_a_whole_run(monkeypatch):
  plan = schedule(9)
  table = samplers.table(
    plan, samplers.dpmpp_2m_sde(plan), np.linspace(1, 6, len(plan))
  )
  cond, uncond = jnp.full((2, 1, 1), 0.3), jnp.full((2, 1, 1), -0.1)
  denoise = samplers.guided(
    lambda x, level, c: jnp.tanh(x + c + level.timestep / 1000), cond, uncond
  )
  keys = samplers.keys(3, np.arange(2, dtype=np.uint32), samplers.STEP)

  @jax.jit
  def loop(state, start, stop):
    return samplers.run(
      denoise, state, table, keys, start, stop, stochastic=True
    )

  state = start = samplers.init(
    samplers.normal(
      samplers.keys(3, np.arange(2, dtype=np.uint32), samplers.INITIAL), (3, 4)
    )
  )
  for i in range(len(plan)):
    state = loop(state, i, i + 1)
  whole = loop(start, 0, len(plan))
  assert loop._cache_size() == 1
  np.testing.assert_array_equal(state.x, whole.x)


def test_noise_of_a_clip_does_not_depend_on_its_batch():
  draw = lambda clips: samplers.normal(
    samplers.keys(5, np.asarray(clips, np.uint32), samplers.INITIAL), (4, 4)
  )
  np.testing.assert_array_equal(draw([3, 7, 9])[1], draw([7])[0])
  assert not np.array_equal(draw([3])[0], draw([7])[0])
