"""The spatio-temporal UNet against diffusers: same weights, same numbers."""

import copy
import dataclasses
import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn

from tests import tiny_cogvideox, tiny_svd
from tests.parity import compare
from vidgen import weights
from vidgen.models.svd import unet, unet_weights

TOLERANCE = 1e-5
# Compiles in half the time; the arithmetic is the same.
_jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def convert(module, table, shapes):
  """Returns our parameters, which all of the module's tensors must fill."""
  state = {k: v.numpy() for k, v in module.state_dict().items()}
  targets = weights.match({k: v.shape for k, v in state.items()}, table, shapes)
  assert targets.keys() == state.keys()
  turn = lambda x, axes: np.transpose(x, axes) if axes else x
  leaves = {t.path: turn(state[k], t.axes) for k, t in targets.items()}
  return jax.tree.map(jnp.asarray, weights.unflatten(leaves, shapes))


def shapes(config, **kwargs):
  init = lambda key: unet.init(config, key, **kwargs)
  return nn.unbox(jax.eval_shape(init, jax.random.key(0)))


def first(x):
  """Channels first, for torch."""
  return torch.from_numpy(np.array(np.moveaxis(x, -1, 2), order="C"))


def normal(*shape):
  rng = np.random.default_rng(sum(shape))
  return rng.standard_normal(shape, np.float32)


class Pair:
  """A random UNet of diffusers', ours, and inputs for both."""

  def __init__(self, module):
    self.module = module
    self.config = unet.unet_config(dict(module.config))
    self.params = convert(module, unet_weights.UNET_TABLE, shapes(self.config))
    self.run = _jit(unet.Unet(self.config).apply)

  def inputs(self, batch, frames, size, tokens):
    config = self.config
    numbers = np.array([[6.0, 127.0, 0.02], [11.0, 255.0, 0.5]], np.float32)
    return {
      "x": normal(batch, frames, *size, config.in_channels),
      "timestep": np.array([1.6378, -1.5537], np.float32)[:batch],
      "context": normal(batch, tokens, config.cross_attention_dim),
      "numbers": numbers[:batch],
    }

  def got(self, inputs, **kwargs):
    dim = self.config.addition_time_embed_dim
    vector = unet.embed_numbers(jnp.asarray(inputs["numbers"]), dim)
    return self.run(
      {"params": self.params},
      jnp.asarray(inputs["x"]),
      jnp.asarray(inputs["timestep"]),
      jnp.asarray(inputs["context"]),
      vector[:, None],
      **kwargs,
    )

  def want(self, inputs):
    return want(self.module, inputs)


@torch.no_grad()
def want(module, inputs):
  cast = lambda name: torch.from_numpy(inputs[name]).to(module.dtype)
  y = module(
    first(inputs["x"]).to(module.dtype),
    torch.from_numpy(inputs["timestep"]),
    cast("context"),
    torch.from_numpy(inputs["numbers"]),
  ).sample
  return np.moveaxis(y.float().numpy(), 2, -1)


@pytest.fixture(scope="module")
def pair():
  return Pair(tiny_svd.unet())


@pytest.mark.slow
def test_two_layers_in_each_block():
  """As published; the other tests have one, which compiles sooner."""
  pair = Pair(tiny_svd.unet(layers_per_block=2))
  inputs = pair.inputs(1, 2, (4, 8), 1)
  check("two layers", pair.got(inputs), pair.want(inputs))


def check(case, got, want):
  compare.check("SVD UNet", case, got, want, TOLERANCE)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 1), (2, 2)])
def test_unet(pair, batch, tokens):
  inputs = pair.inputs(batch, 3, (8, 12), tokens)
  case = f"batch {batch}, {tokens} tokens"
  check(case, pair.got(inputs), pair.want(inputs))


def test_a_size_that_halving_rounds_up(pair):
  inputs = pair.inputs(1, 3, (7, 9), 1)
  check("7x9 latents", pair.got(inputs), pair.want(inputs))


def test_one_frame(pair):
  inputs = pair.inputs(1, 1, (8, 8), 2)
  check("one frame", pair.got(inputs), pair.want(inputs))


@pytest.mark.slow
def test_epsilons(pair):
  """Activations so small that 1e-6 and 1e-5 differ in each of the norms.

  In float64, as PyTorch's float32 norms lose digits of small differences.
  """
  small = Pair(tiny_svd.quiet(copy.deepcopy(pair.module)))
  small.module.double()
  small.run = pair.run
  inputs = small.inputs(2, 3, (8, 12), 2)
  want = small.want(inputs)
  check("small activations", small.got(inputs), want)
  # The original code's epsilon, which upstream's weights were trained with.
  module = unet.Unet(dataclasses.replace(small.config, norms="sgm"))
  small.run = _jit(module.apply)
  assert compare.error(small.got(inputs), want) > 1e-3


@pytest.mark.slow
def test_frames_that_are_images(pair):
  """Single frames in a video, and a row of nothing but images."""
  inputs = pair.inputs(2, 3, (8, 12), 2)
  image_only = np.zeros((2, 3), bool)
  image_only[0, 1] = image_only[1] = True

  def switch(module, args, kwargs):
    del module
    return args, {
      **kwargs,
      "image_only_indicator": torch.from_numpy(image_only).float(),
    }

  kinds = ("SpatioTemporalResBlock", "TransformerSpatioTemporalModel")
  hooks = [
    module.register_forward_pre_hook(switch, with_kwargs=True)
    for module in pair.module.modules()
    if type(module).__name__ in kinds
  ]
  want = pair.want(inputs)
  for hook in hooks:
    hook.remove()
  got = pair.got(inputs, image_only=jnp.asarray(image_only))
  check("images among frames", got, want)
  assert compare.error(pair.got(inputs), want) > 0.01


@pytest.mark.slow
def test_bfloat16_loses_no_more_than_upstream(pair):
  inputs = pair.inputs(1, 3, (8, 12), 1)
  exact = pair.want(inputs)
  theirs = want(copy.deepcopy(pair.module).to(torch.bfloat16), inputs)
  half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), pair.params)
  module = unet.Unet(pair.config, dtype=jnp.bfloat16)
  ours = copy.copy(pair)
  ours.params, ours.run = half, _jit(module.apply)
  got = ours.got(inputs)
  assert got.dtype == jnp.float32
  assert compare.error(got, exact) <= 1.05 * compare.error(theirs, exact)


@pytest.mark.slow
def test_image_model():
  """Without layers over time it is Stable Diffusion 2's, with sgm's epsilon."""
  module = diffusers.UNet2DConditionModel(
    block_out_channels=(32, 64),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    attention_head_dim=(2, 4),
    cross_attention_dim=tiny_svd.CROSS_DIM,
    layers_per_block=1,
    use_linear_projection=True,
  )
  module = tiny_cogvideox.randomize(module, 5)
  config = unet.unet_config(dict(tiny_svd.unet().config))
  config = dataclasses.replace(
    config,
    in_channels=4,
    projection_class_embeddings_input_dim=0,
    norms="sgm",
  )
  params = convert(
    module, unet_weights.IMAGE_TABLE, shapes(config, images=True)
  )
  x, context = normal(2, 3, 8, 8, 4), normal(2, 7, tiny_svd.CROSS_DIM)
  with torch.no_grad():
    want = module(
      first(x).flatten(0, 1),
      torch.tensor([7.0] * 6),
      torch.from_numpy(context).repeat_interleave(3, dim=0),
    ).sample
  got = _jit(unet.Unet(config, images=True).apply)(
    {"params": params}, jnp.asarray(x), jnp.full(2, 7.0), jnp.asarray(context)
  )
  want = np.moveaxis(want.unflatten(0, (2, 3)).numpy(), 2, -1)
  check("image model", got, want)


def test_full_size():
  """Counts, and every key of diffusers' state dict."""
  config = unet.UnetConfig()
  ours = shapes(config)
  count = lambda keep: sum(
    leaf.size for path, leaf in weights.flatten(ours).items() if keep(path)
  )
  assert count(lambda path: True) == 1_524_623_082
  time = ("/temporal", "/blend/", "/frames/")
  assert count(lambda path: any(t in path for t in time)) == 656_076_838
  with torch.device("meta"):
    module = diffusers.UNetSpatioTemporalConditionModel()
  assert unet.unet_config(dict(module.config)) == config
  sizes = {k: tuple(v.shape) for k, v in module.state_dict().items()}
  matched = weights.match(sizes, unet_weights.UNET_TABLE, ours)
  assert matched.keys() == sizes.keys()


@pytest.mark.slow
def test_traces_at_full_size():
  config = unet.UnetConfig()
  struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  half = lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
  out = jax.eval_shape(
    unet.Unet(config, dtype=jnp.bfloat16).apply,
    {"params": jax.tree.map(half, shapes(config))},
    struct(2, 14, 72, 128, 8),
    struct(2),
    struct(2, 1, 1024),
    struct(2, 1, 768),
  )
  assert out.shape == (2, 14, 72, 128, 4)
  assert out.dtype == jnp.float32
