"""The autoencoder task: videos in, the same videos out.

Yang et al., https://arxiv.org/abs/2408.06072, section 2.1: L1, LPIPS and KL,
and after some thousand steps an adversarial loss. How these are weighed against
each other is that of `GeneralLPIPSWithDiscriminator` in the released code
(zai-org/CogVideo, sat/sgm/modules/autoencoding/losses), in means instead of
sums.
"""

import dataclasses
import pathlib
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from vidgen import errors, samplers, sharding
from vidgen.metrics import lpips, pixels
from vidgen.nn import discriminator
from vidgen.nn import posterior as posterior_lib
from vidgen.tasks import noising

# One key a purpose: `fold_in(fold_in(key of the step, sample), purpose)`.
_POSTERIOR, _FRAME, _LATENT_NOISE, _LATENT_NOISE_LEVEL = range(4)
_MAX_ADAPTIVE = 1e4
_AMOUNTS = (
  "l1", "mse", "gradient", "contrast", "lpips", "kl", "adversarial",
  "latent_noise",
)  # fmt: skip


@dataclasses.dataclass
class AutoencoderLossConfig:
  """What the loss consists of. Videos are in [-1, 1]; every term is a mean.

  Attributes:
    l1: Weight of the absolute error.
    mse: Weight of the squared error.
    gradient: Weight of the absolute error of the differences between
      neighbouring pixels of a frame, down and across.
    contrast: Makes a pixel's `l1` and `mse` count 1 + contrast * |x - the mean
      of its frame and channel| times: small things before a plain ground.
    lpips: Weight of the perceptual distance, of one random frame per video.
    lpips_net: Its network, one of `lpips.NETS`.
    kl: Weight of the divergence of the posterior from the standard normal, in
      nats per element of the latents.
    adversarial: Weight of what the critic says; 0 has no critic.
    adversarial_start: The step at which the critic starts, and starts to count.
    adaptive: Whether `adversarial` is multiplied by the ratio of the gradients
      that the rest and the critic have at the decoder's last kernel.
    discriminator_features: Channels of the critic's first layer.
    discriminator_layers: Layers of the critic that halve the video.
    freeze_past_taps: Whether batches of single frames leave the weights that
      are for past frames as they are.
    freeze_encoder: Whether the decoder alone is trained, so that latents stay
      what they are. An optimiser that has moved the encoder before goes on
      moving it a little: start a run of its own for this.
    latent_noise: The most noise that is added to latents, a deviation: how much
      is uniform from 0. A decoder that is to make videos from what a denoiser
      leaves has to read latents that are a little off.
  """

  l1: float = 1.0
  mse: float = 0.0
  gradient: float = 0.0
  contrast: float = 0.0
  lpips: float = 1.0
  lpips_net: str = "vgg16"
  kl: float = 1e-6
  adversarial: float = 0.0
  adversarial_start: int = 0
  adaptive: bool = True
  discriminator_features: int = 64
  discriminator_layers: int = 3
  freeze_past_taps: bool = False
  freeze_encoder: bool = False
  latent_noise: float = 0.0


def check(config: AutoencoderLossConfig) -> None:
  """Raises InputError where a config asks for what cannot be."""
  for name in _AMOUNTS:
    if not 0 <= getattr(config, name) < float("inf"):
      raise errors.InputError(f"config: {name} must be 0 or more.")
  if config.lpips_net not in lpips.NETS:
    raise errors.InputError(
      f"config: lpips_net {config.lpips_net!r} is unknown; known are "
      f"{', '.join(lpips.NETS)}."
    )
  for name in ("discriminator_features", "discriminator_layers"):
    if getattr(config, name) < 1:
      raise errors.InputError(f"config: {name} must be 1 or more.")
  if config.adversarial_start < 0:
    raise errors.InputError("config: adversarial_start must be 0 or more.")


@runtime_checkable
class Autoencoder(Protocol):
  """What the task knows of a family's autoencoder.

  Attributes:
    last_kernel: The path of the decoder's last kernel in the parameters.
  """

  last_kernel: tuple[str, ...]

  def init(self, key: Key[Array, ""]) -> PyTree:
    """Returns random parameters, float32, boxed with logical axes."""

  def encode(self, params: PyTree, video: Array) -> posterior_lib.Posterior:
    """Returns the posterior of a video `b F H W 3` in [-1, 1]."""

  def decode(self, params: PyTree, latents: Array) -> Array:
    """Returns the video `b F H W 3`, float32, nominally in [-1, 1]."""

  def drop_past(self, tree: PyTree) -> PyTree:
    """Returns a tree like the parameters with zeros for past frames."""

  def normalise(self, params: PyTree, mean: Any, basis: Any) -> PyTree:
    """Returns parameters for latents that were `latents @ basis + mean`."""


def noise(
  key: Key[Array, ""], index: Int[Array, " b"], shape: tuple[int, ...]
) -> Float[Array, " b *shape"]:
  """Returns the noise of each sample's latents, of `shape`, unit variance."""
  return samplers.normal(noising.keys_of(key, index, _POSTERIOR), shape)


def latent_noise(
  key: Key[Array, ""],
  index: Int[Array, " b"],
  shape: tuple[int, ...],
  most: float,
) -> Float[Array, " b *shape"]:
  """Returns noise whose deviation is uniform in [0, most], one a sample."""
  level = jax.vmap(jax.random.uniform)(
    noising.keys_of(key, index, _LATENT_NOISE_LEVEL)
  )
  eps = samplers.normal(noising.keys_of(key, index, _LATENT_NOISE), shape)
  return most * level.reshape(-1, *[1] * len(shape)) * eps


def kl(posterior: posterior_lib.Posterior) -> Float[Array, ""]:
  """Divergence from the standard normal in nats per element."""
  return jnp.mean(posterior_lib.kl(posterior)) / posterior.mean[0].size


def pixel_losses(
  config: AutoencoderLossConfig,
  x: Float[Array, "b F H W 3"],
  y: Float[Array, "b F H W 3"],
) -> dict[str, Float[Array, ""]]:
  """Returns the losses "l1", "mse" and "gradient" of `y` where `x` was asked.

  The first two count high contrast more, as the config has it.
  """
  frame_mean = jnp.mean(x, axis=(2, 3), keepdims=True)
  weight = 1 + config.contrast * jnp.abs(x - frame_mean)
  error = y - x
  slope = lambda axis: jnp.mean(jnp.abs(jnp.diff(error, axis=axis)))
  return {
    "l1": jnp.mean(weight * jnp.abs(error)),
    "mse": jnp.mean(weight * jnp.square(error)),
    "gradient": slope(2) + slope(3),
  }


def adaptive_weight(
  nll: Float[Array, "..."], adversarial: Float[Array, "..."]
) -> Float[Array, ""]:
  """How much more the rest pulls at the last kernel than the critic does.

  Args:
    nll: The gradient of the reconstruction loss (KL left out).
    adversarial: The gradient of the critic's loss, its weight left out.
  """
  norm = lambda x: jnp.sqrt(jnp.sum(jnp.square(x)))
  ratio = norm(nll) / (norm(adversarial) + 1e-4)
  return jnp.clip(ratio, 0, _MAX_ADAPTIVE)


def side_by_side(
  video: UInt8[np.ndarray, "b F H W 3"],
  reconstruction: UInt8[np.ndarray, "b F H W 3"],
) -> UInt8[np.ndarray, "b F H 2*W 3"]:
  """Puts what went in to the left of what came out."""
  return np.concatenate([video, reconstruction], axis=3)


class _Verdict(NamedTuple):
  """What the critic says: its losses, and where they pull.

  Attributes:
    g_loss: The autoencoder's part: minus the mean logit of what it made.
    video: The gradient of `g_loss` at the reconstruction.
    d_loss: The critic's own hinge loss.
    params: The gradient of `d_loss`.
  """

  g_loss: Float[Array, ""]
  video: Float[Array, "b F H W 3"]
  d_loss: Float[Array, ""]
  params: PyTree


class AutoencoderTask:
  """Trains an autoencoder, and a critic where the config has one.

  See `vidgen.tasks.base.Task`. Before `adversarial_start` the critic is not run
  and its gradient is zero. A zero gradient moves nothing under Adam, but decay
  of weights does: leave it off in the critic's optimiser.

  A batch in equal parts has the gradient of the whole as long as there is no
  critic. With one, each part has an adaptive weight of its own, and the average
  is near the whole's, not equal.
  """

  def __init__(
    self,
    model: Autoencoder,
    config: AutoencoderLossConfig,
    lpips_folder: str | None = None,
  ):
    """Raises InputError where the config asks for what cannot be.

    Args:
      model: The autoencoder.
      config: The loss.
      lpips_folder: Where LPIPS's weights are kept; see `lpips.load`.
    """
    check(config)
    self.model = model
    self.config = config
    self.groups = ("vae",)
    self.averaged = ("vae",)
    self.heads = None
    if config.adversarial:
      self.groups += ("discriminator",)
    self._lpips_folder = lpips_folder
    self._discriminator = discriminator.Discriminator(
      config.discriminator_features, config.discriminator_layers
    )

  def init(self, key: Key[Array, ""]) -> dict[str, PyTree]:
    """Returns random parameters by group, float32, boxed."""
    keys = jax.random.split(key)
    params = {"vae": self.model.init(keys[0])}
    if "discriminator" in self.groups:
      size = 2 ** (self.config.discriminator_layers + 1)
      video = jnp.zeros((1, 1, size, size, 3))
      variables = self._discriminator.init(keys[1], video)
      params["discriminator"] = variables["params"]
    return params

  def start(
    self, places: dict[str, PyTree], key: Key[Array, ""]
  ) -> dict[str, PyTree]:
    """Returns nothing: every group starts at random."""
    del places, key
    return {}

  def reads(self) -> dict[str, pathlib.Path]:
    """Returns nothing: LPIPS's weights come with a package."""
    return {}

  def frozen(
    self, mesh: Any, *, cached: bool = False, sampled: bool = True
  ) -> dict[str, PyTree]:
    """Returns LPIPS's weights as "lpips", on every device, where it counts.

    Raises:
      InputError, CorruptError, StorageError: As `lpips.load`.
    """
    del cached, sampled
    if not self.config.lpips:
      return {}
    params = lpips.load(self.config.lpips_net, self._lpips_folder)
    params = jax.device_get(params)
    return {"lpips": jax.device_put(params, sharding.shardings(params, mesh))}

  def frozen_shapes(
    self, mesh: Any, *, cached: bool = False, sampled: bool = True
  ) -> dict[str, PyTree]:
    """Returns what `frozen` would, as shapes with shardings."""
    del cached, sampled
    if not self.config.lpips:
      return {}
    params = {"lpips": lpips.load(self.config.lpips_net, self._lpips_folder)}
    return sharding.placed(params, sharding.shardings(params, mesh))

  def host_batch(self, batch: Any) -> dict[str, np.ndarray]:
    """Returns what of a batch of the loader's goes to the devices.

    Raises:
      InputError: The batch comes from a cache, which holds no pixels.
    """
    if batch.made_by is not None:
      raise errors.InputError(
        "config: data.cache: an autoencoder trains on videos; drop the cache."
      )
    return {"video": batch.video}

  def gradients(
    self,
    params: dict[str, PyTree],
    frozen: dict[str, PyTree],
    batch: dict[str, Array],
    key: Key[Array, ""],
    step: Int[Array, ""],
  ) -> tuple[dict[str, PyTree], dict[str, Array]]:
    """Returns each group's gradient of its own loss, and scalars to tell.

    The scalar "loss" is what the weights make of the terms without the critic:
    what it says has no scale, and its start would look like a spike. "kl" is in
    nats per element of the latents and "psnr" in dB.

    Args:
      params: "vae", and "discriminator" if there is one; unboxed.
      frozen: As `frozen` gives it.
      batch: "video", bytes `b F H W 3`, and "index", int32 `b`: the sample's
        number in the global batch.
      key: The step's own.
      step: Steps taken.
    """
    x, index = noising.to_signed(batch["video"]), batch["index"]
    run = lambda p: self._autoencode(p, x, index, key)
    (y, posterior), back = jax.vjp(run, params["vae"])
    frames = noising.keys_of(key, index, _FRAME)
    rate = lambda y: self._rate(frozen, x, y, frames)
    (nll, scalars), at_video = jax.value_and_grad(rate, has_aux=True)(y)
    divergence, at_posterior = jax.value_and_grad(kl)(posterior)
    scaled = jax.tree.map(lambda d: self.config.kl * d, at_posterior)
    scalars |= {
      "loss": nll + self.config.kl * divergence,
      "kl": divergence,
      "psnr": pixels.psnr(*map(_to_unit, (x, y))).mean(),
    }
    grads = {}
    if "discriminator" in self.groups:
      verdict = self._judge(params["discriminator"], x, y, step)
      zeros = jax.tree.map(jnp.zeros_like, posterior)
      # The compiler drops what of these passes lies before the last kernel.
      last = lambda d: _at(back((d, zeros))[0], self.model.last_kernel)
      weight = jnp.asarray(self.config.adversarial, jnp.float32)
      if self.config.adaptive:
        weight *= adaptive_weight(last(at_video), last(verdict.video))
      weight = jnp.where(step >= self.config.adversarial_start, weight, 0)
      at_video += weight * verdict.video
      grads["discriminator"] = verdict.params
      scalars |= {
        "g_loss": verdict.g_loss,
        "d_loss": verdict.d_loss,
        "adaptive_weight": weight / self.config.adversarial,
      }
    (grads["vae"],) = back((at_video, scaled))
    if self.config.freeze_past_taps and x.shape[1] == 1:
      grads["vae"] = self.model.drop_past(grads["vae"])
    return grads, scalars

  def reconstruct(
    self,
    params: dict[str, PyTree],
    frozen: dict[str, PyTree],
    video: UInt8[Array, "b F H W 3"],
  ) -> tuple[UInt8[Array, "b F H W 3"], dict[str, Float[Array, " b"]]]:
    """Returns what the posterior's mean decodes to, and metrics per video.

    They are of the bytes that come out: "psnr" in dB, "ssim", "flicker" and
    "flicker_original" in units of 0 to 255, and "lpips" where `frozen` has its
    weights. Run it under jit.

    Raises:
      InputError: Frames that are too small for a metric.
    """
    x = noising.to_signed(video)
    posterior = self.model.encode(params["vae"], x)
    y = self._decode(params["vae"], posterior.mean, x)
    y = jnp.round(255 * _to_unit(y)).astype(jnp.uint8)
    a, b = video.astype(jnp.float32) / 255, y.astype(jnp.float32) / 255
    metrics = {
      "psnr": pixels.psnr(a, b),
      "ssim": pixels.ssim(a, b),
      "flicker": pixels.flicker(b),
      "flicker_original": pixels.flicker(a),
    }
    if "lpips" in frozen:
      net = self.config.lpips_net
      metrics["lpips"] = lpips.videos(frozen["lpips"], net, a, b)
    return y, metrics

  def _autoencode(self, params, x, index, key):
    posterior = self.model.encode(params, x)
    if self.config.freeze_encoder:
      posterior = jax.lax.stop_gradient(posterior)
    eps = noise(key, index, posterior.mean.shape[1:])
    latents = posterior_lib.sample(posterior, eps)
    if self.config.latent_noise:
      latents += latent_noise(
        key, index, eps.shape[1:], self.config.latent_noise
      )
    return self._decode(params, latents, x), posterior

  def _decode(self, params, latents, x):
    y = self.model.decode(params, latents)
    if y.shape != x.shape:
      raise errors.InputError(
        f"video: {x.shape[1]} frames of {x.shape[2]}x{x.shape[3]} come back as "
        f"{y.shape[1]} of {y.shape[2]}x{y.shape[3]}; train the autoencoder on "
        "a length and a size that it returns."
      )
    return y

  def _rate(self, frozen, x, y, keys):
    """The weighed sum of the terms that compare videos, and each by itself."""
    config = self.config
    terms = pixel_losses(config, x, y)
    if config.lpips:
      draw = lambda k: jax.random.randint(k, (), 0, x.shape[1])
      pick = jax.vmap(lambda video, frame: video[frame])
      frame = jax.vmap(draw)(keys)
      a, b = pick(x, frame), pick(y, frame)
      distance = lpips.distance(frozen["lpips"], config.lpips_net, a, b)
      terms["lpips"] = distance.mean()
    return sum(getattr(config, n) * term for n, term in terms.items()), terms

  def _judge(self, params, x, y, step) -> _Verdict:
    """What the critic says once it has started, and zeros before."""
    run = lambda p, video: self._discriminator.apply({"params": p}, video)
    hinge = lambda margin: jnp.mean(jax.nn.relu(1 + margin)) / 2

    def judge() -> _Verdict:
      fake, back = jax.vjp(run, params, y)
      (_, at_video) = back(jnp.full_like(fake, -1 / fake.size))
      of_fake, at_fake = jax.value_and_grad(hinge)(fake)
      of_real, grads = jax.value_and_grad(lambda p: hinge(-run(p, x)))(params)
      grads = jax.tree.map(jnp.add, grads, back(at_fake)[0])
      return _Verdict(-fake.mean(), at_video, of_fake + of_real, grads)

    shapes = jax.eval_shape(judge)
    zeros = lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.cond(step >= self.config.adversarial_start, judge, zeros)


def _to_unit(x: Array) -> Array:
  """Maps [-1, 1] to [0, 1], and what lies beyond to its ends."""
  return (jnp.clip(x, -1, 1) + 1) / 2


def _at(tree: PyTree, path: tuple[str, ...]) -> Array:
  for name in path:
    tree = tree[name]
  return tree
