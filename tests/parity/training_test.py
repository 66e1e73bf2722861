"""Loss and gradients against diffusers and torch: same weights, same noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests import tiny_cogvideox
from tests.parity import compare
from tests.parity.transformer_test import rotary
from vidgen import checkpoint, weights
from vidgen.models import cogvideox
from vidgen.tasks import noising

TOLERANCE = 1e-4
TIMESTEPS = [37, 711]
CASES = {"2b": 3, "5b": 3, "5b-i2v": 3, "1.5-5b": 4, "1.5-5b-i2v": 4}


def inputs(module, frames):
  """Latents, noise, text and, for image models, the image's latents."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  config = module.config
  h, w, c = config.sample_height, config.sample_width, config.out_channels
  shape = (len(TIMESTEPS), frames, min(h, 8), min(w, 12), c)
  text = draw(2, config.max_text_seq_length, config.text_embed_dim)
  image = None
  if config.in_channels > c:
    image = draw(*shape[:1], 1, *shape[2:])
  return draw(*shape), draw(*shape), text, image


def torch_loss(module, scheduler, x0, noise, text, image):
  """The loss as diffusers' training example writes it, each in v."""
  channels = lambda x: torch.from_numpy(x.transpose(0, 1, 4, 2, 3).copy())
  x0, noise = channels(x0), channels(noise)
  t = torch.tensor(TIMESTEPS)
  noisy = scheduler.add_noise(x0, noise, t)
  model_input = noisy
  if image is not None:
    image = channels(image)
    rest = torch.zeros(image.shape[0], x0.shape[1] - 1, *image.shape[2:])
    image = torch.cat([image, rest], dim=1)
    model_input = torch.cat([noisy, image], dim=2)
  ofs = None if module.config.ofs_embed_dim is None else torch.full((1,), 2.0)
  v = module(
    hidden_states=model_input,
    encoder_hidden_states=torch.from_numpy(text),
    timestep=t,
    ofs=ofs,
    image_rotary_emb=rotary(module, x0.permute(0, 1, 3, 4, 2).shape[1:]),
    return_dict=False,
  )[0]
  # get_velocity(prediction, noisy) is the predicted x0; its weight is
  # 1 / (1 - alpha²) there, which makes it the error of v.
  predicted = scheduler.get_velocity(v, noisy, t)
  weight = 1 / (1 - scheduler.alphas_cumprod[t]).view(-1, 1, 1, 1, 1)
  return (weight * (predicted - x0) ** 2).mean()


@pytest.mark.parametrize("variant", CASES)
def test_loss_and_gradients(variant, tmp_path):
  pipeline = tiny_cogvideox.write(tmp_path, variant)
  module = pipeline.transformer
  x0, noise, text, image = inputs(module, CASES[variant])
  scheduler = tiny_cogvideox.scheduler(variant)
  want = torch_loss(module, scheduler, x0, noise, text, image)
  want.backward()

  model = cogvideox.open_model(tmp_path / "checkpoint", jnp.float32)
  component = next(c for c in model.components if c.name == "transformer")
  params = checkpoint.load_component(tmp_path / "checkpoint", component)
  condition = {"text": jnp.asarray(text)}
  if image is not None:
    condition["image"] = jnp.asarray(image)

  def loss(params):
    return noising.loss(
      model,
      {"transformer": params},
      jnp.asarray(x0),
      jnp.asarray(noise),
      jnp.asarray(TIMESTEPS),
      condition,
    ).mean()

  got, grads = jax.jit(jax.value_and_grad(loss))(params)
  assert abs(float(got) / want.item() - 1) < TOLERANCE
  theirs = dict(module.named_parameters())
  ours = dict(weights.export(grads, component.table))
  # A buffer in diffusers, learned in no published code: no gradient there.
  ours.pop("patch_embed.pos_embedding", None)
  assert ours.keys() == theirs.keys()
  every = lambda g: np.concatenate([g[name].ravel() for name in sorted(g)])
  torch_grads = {n: p.grad.numpy() for n, p in theirs.items()}
  compare.check(
    "DiT", f"gradient, {variant}", every(ours), every(torch_grads), TOLERANCE
  )
  # Each tensor by itself too, where it has a gradient worth the name.
  top = max(np.abs(g).max() for g in torch_grads.values())
  for name, grad in torch_grads.items():
    if np.abs(grad).max() > 1e-3 * top:
      assert compare.error(ours[name], grad) < 10 * TOLERANCE, name
