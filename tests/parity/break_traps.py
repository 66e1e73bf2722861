r"""Breaks each known parity trap once and sees that a test goes red.

python tests/parity/break_traps.py [--only=WORD] [--skip=N]

Each row changes one line of a copy of the tree and runs the test that should
notice. The exit code says whether all did.
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

from absl import app, flags

ROOT = pathlib.Path(__file__).parents[2]
_ONLY = flags.DEFINE_string("only", "", "Only traps whose name holds this.")
_SKIP = flags.DEFINE_integer("skip", 0, "Leaves out the first so many.")


class Trap(NamedTuple):
  """A line to break: `old` of `file` becomes `new`; `test` must fail."""

  name: str
  file: str
  old: str
  new: str
  test: str


DIT = "vidgen/models/cogvideox/transformer.py"
POSITIONS = "vidgen/models/cogvideox/positions.py"
PLAN = "vidgen/models/cogvideox/plan.py"
MODEL = "vidgen/models/cogvideox/model.py"
WEIGHTS = "vidgen/models/cogvideox/transformer_weights.py"
SAMPLERS = "tests/parity/samplers_test.py"
NETWORK = "tests/parity/transformer_test.py"
PIPELINE = "tests/parity/pipeline_test.py"
VAE = "tests/parity/vae_test.py"
T5 = "tests/parity/t5_test.py"
NOISING = "vidgen/tasks/noising.py"
STEP = "vidgen/train_step.py"
TRAINING = "tests/parity/training_test.py"
SVD_MODEL = "vidgen/models/svd/model.py"
SVD_PLAN = "vidgen/models/svd/plan.py"
SVD_PIPELINE = "tests/parity/svd_pipeline_test.py"
SVD_DEFAULTS = f"{SVD_PIPELINE}::test_an_image[defaults]"

TRAPS = [
  Trap(
    "dynamic guidance by step index, not timestep",
    PLAN,
    "for t in schedule.now.timestep.tolist()",
    "for t in range(steps, 0, -1)",
    f"{PIPELINE}::test_text_to_video[5b-DDIM-True-size3]",
  ),
  Trap(
    "dynamic guidance with the full number of steps in V2V",
    PLAN,
    "  steps = len(schedule)\n  ramp",
    "  steps = 50\n  ramp",
    f"{PIPELINE}::test_video_to_video[2b-DDIM-True]",
  ),
  Trap(
    "1.5's padding latent dropped from the end",
    "vidgen/pipeline.py",
    "return state.x[:, plan.padding :]",
    "return state.x[:, : state.x.shape[1] - plan.padding]",
    f"{PIPELINE}::test_text_to_video[1.5-5b-DDIM-False-size5]",
  ),
  Trap(
    "1.5's image latents multiplied by the scaling factor",
    MODEL,
    "scale = 1 / scale if config.invert_scale_latents else scale",
    "scale = 1 * scale",
    f"{PIPELINE}::test_image_to_video[1.5-5b-i2v-DPM]",
  ),
  Trap(
    "the image's mean in place of a posterior sample",
    MODEL,
    "return posterior.sample(found, noise)",
    "return found.mean",
    f"{PIPELINE}::test_image_to_video[5b-i2v-DDIM]",
  ),
  Trap(
    "the final modulation read as scale, shift",
    DIT,
    "shift, scale = jnp.split(modulation",
    "scale, shift = jnp.split(modulation",
    f"{NETWORK}::test_transformer[2-2b]",
  ),
  Trap(
    "a block's modulation read for the text first",
    DIT,
    "video, text = jnp.split(out",
    "text, video = jnp.split(out",
    f"{NETWORK}::test_transformer[2-2b]",
  ),
  Trap(
    "queries and keys normed with the blocks' epsilon",
    DIT,
    "norm.LayerNorm(1e-6, self.param_dtype",
    "norm.LayerNorm(1e-5, self.param_dtype",
    f"{NETWORK}::test_query_and_key_norms_have_their_own_epsilon",
  ),
  Trap(
    "layer norms with SAT's epsilon",
    "vidgen/models/cogvideox/transformer.py",
    "norm_eps: float = 1e-5",
    "norm_eps: float = 1e-6",
    f"{NETWORK}::test_published_epsilon",
  ),
  Trap(
    "rotary axes in the order time, width, height",
    DIT,
    "cos, sin = rope.tables(where,",
    "cos, sin = rope.tables((where[0], where[2], where[1]),",
    f"{NETWORK}::test_transformer[2-5b]",
  ),
  Trap(
    "rotary halves in place of interleaved pairs",
    "vidgen/nn/rope.py",
    "angle = np.repeat(angle, 2, axis=-1)",
    "angle = np.tile(angle, 2)",
    f"{NETWORK}::test_transformer[2-5b]",
  ),
  Trap(
    "the text rotated too",
    DIT,
    "around(sin, 0.0)",
    "around(sin, 0.5)",
    f"{NETWORK}::test_transformer[2-5b]",
  ),
  Trap(
    "1.0's other sizes sliced, not cropped",
    DIT,
    "crop=config.patch_size_t is None",
    "crop=False",
    f"{NETWORK}::test_other_sizes[square-5b]",
  ),
  Trap(
    "the crop rounded half up",
    POSITIONS,
    "round((base_w - width) / 2)",
    "int((base_w - width) / 2 + 0.5)",
    f"{NETWORK}::test_crop_rounds_half_to_even",
  ),
  Trap(
    "sincos of 2b in the order time, height, width",
    POSITIONS,
    "spread(width, np.s_[None, None, :])",
    "spread(height, np.s_[None, :, None])",
    f"{NETWORK}::test_transformer[2-2b]",
  ),
  Trap(
    "1.5's patches flattened with the channel last",
    DIT,
    '(0, 1, 3, 5, 7, 2, 4, 6), (None, "embed")',
    '(0, 1, 3, 5, 2, 4, 6, 7), (None, "embed")',
    f"{NETWORK}::test_transformer[2-1.5-5b]",
  ),
  Trap(
    "1.5's patch projection without its bias",
    WEIGHTS,
    'Rule("patch_embed.proj.bias", "patch_embed/bias"),',
    "",
    f"{NETWORK}::test_full_size[1.5-5b]",
  ),
  Trap(
    "the output unpatched with the channel last",
    DIT,
    "x = x.reshape(-1, f, h, w, config.out_channels, t, p, p)\n"
    "    x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4)",
    "x = x.reshape(-1, f, h, w, t, p, p, config.out_channels)\n"
    "    x = x.transpose(0, 1, 4, 2, 5, 3, 6, 7)",
    f"{NETWORK}::test_transformer[2-2b]",
  ),
  Trap(
    "no offset embedding for 1.5-5B-I2V",
    DIT,
    "temb = temb + mlp(config.ofs_embed_dim",
    "temb = temb + 0 * mlp(config.ofs_embed_dim",
    f"{NETWORK}::test_transformer[2-1.5-5b-i2v]",
  ),
  Trap(
    "the learned table of 5b-I2V kept at other lengths",
    DIT,
    "if pixels == config.sample_frames:",
    "if pixels:",
    f"{NETWORK}::test_transformer[2-5b-i2v]",
  ),
  Trap(
    "the next timestep taken for the previous one",
    "vidgen/diffusion.py",
    "reached = timestep - levels // num_steps",
    "reached = np.append(timestep[1:], -1)",
    f"{SAMPLERS}::test_euler_is_ddim[30]",
  ),
  Trap(
    "leading timesteps in place of trailing ones",
    "vidgen/diffusion.py",
    "np.arange(levels, 0, -levels / num_steps)) - 1",
    "np.arange(levels, 0, -levels / num_steps)) - 20",
    f"{SAMPLERS}::test_timesteps_are_diffusers",
  ),
  Trap(
    "the shift of the signal-to-noise ratio left out",
    "vidgen/diffusion.py",
    "alpha2 = alpha2 / (snr_shift + (1 - snr_shift) * alpha2)",
    "alpha2 = alpha2 / 1.0",
    f"{SAMPLERS}::test_alpha2_is_diffusers",
  ),
  Trap(
    "DPM second order from the first step on",
    "vidgen/samplers.py",
    "second = np.zeros_like(a)",
    "second = np.full_like(a, 0.5)",
    f"{SAMPLERS}::test_dpmpp_2m_sde_is_dpm",
  ),
  Trap(
    "the noise of DPM's steps left out",
    "vidgen/samplers.py",
    "x = x + c.noise * step_noise",
    "x = x + 0 * c.noise * step_noise",
    f"{SAMPLERS}::test_dpmpp_2m_sde_is_dpm",
  ),
  Trap(
    "zeros in place of the empty prompt's embedding",
    "vidgen/pipeline.py",
    "negative = _stack([find(t) for t in negatives])",
    "negative = jax.tree.map(jnp.zeros_like, _stack([*map(find, negatives)]))",
    f"{PIPELINE}::test_two_prompts_at_once",
  ),
  Trap(
    "longer chunks of frames in the encoder",
    "vidgen/models/cogvideox/vae.py",
    "PIXEL_CHUNK = 8",
    "PIXEL_CHUNK = 16",
    f"{VAE}::test_encode[33]",
  ),
  Trap(
    "longer chunks of latents in the decoder",
    "vidgen/models/cogvideox/vae.py",
    "LATENT_CHUNK = 2",
    "LATENT_CHUNK = 4",
    f"{VAE}::test_decode[8]",
  ),
  Trap(
    "the remainder in the last chunk",
    "vidgen/models/cogvideox/chunks.py",
    "return frames - rest * chunk, rest",
    "return (chunk if rest else frames), rest",
    f"{VAE}::test_decode[5]",
  ),
  Trap(
    "neighbouring tiles not blended themselves",
    "vidgen/models/cogvideox/chunks.py",
    "lower = tile[:, :, max(h - vertical.blend, 0) :]",
    "lower = 0.9 * tile[:, :, max(h - vertical.blend, 0) :]",
    f"{VAE}::test_tiled_decode",
  ),
  Trap(
    "the posterior's log variance not clipped",
    "vidgen/nn/posterior.py",
    "jnp.clip(logvar, -30.0, 20.0)",
    "logvar",
    f"{VAE}::test_posterior",
  ),
  Trap(
    "a first frame of its own in every first chunk, even ones too",
    "vidgen/models/cogvideox/vae.py",
    '"""Repeats each frame; of an odd number the first stays alone."""\n'
    "  alone = x.shape[1] % 2",
    '"""Repeats each frame; of an odd number the first stays alone."""\n'
    "  alone = 1",
    f"{VAE}::test_decode[2]",
  ),
  Trap(
    "latents resized without their first frame apart",
    "vidgen/models/cogvideox/vae.py",
    "rest = jnp.repeat(z[:, 1:], repeats, axis=1)",
    "rest = jnp.repeat(z[:, :-1], repeats, axis=1)",
    f"{VAE}::test_decode[3]",
  ),
  Trap(
    "zeros before the first frame",
    "vidgen/nn/conv.py",
    "(history or [x[:, :1]] * 2)",
    "(history or [0 * x[:, :1]] * 2)",
    f"{VAE}::test_decode[2]",
  ),
  Trap(
    "1/sqrt(d) in T5",
    "vidgen/encoders/t5.py",
    "bias=bias, scale=1.0)",
    "bias=bias)",
    f"{T5}::test_float32",
  ),
  Trap(
    "T5's exact GELU",
    "vidgen/encoders/t5.py",
    "nn.gelu(gate.astype(jnp.float32), approximate=True)",
    "nn.gelu(gate.astype(jnp.float32), approximate=False)",
    f"{T5}::test_float32",
  ),
  Trap(
    "T5's buckets without the sign",
    "vidgen/encoders/t5.py",
    "bucket + half * (distance > 0)",
    "bucket + half * (distance < 0)",
    f"{T5}::test_float32",
  ),
  Trap(
    "the padding's tokens masked in T5",
    "vidgen/encoders/t5.py",
    "    x, _ = blocks(x, bias)",
    "    bias = jnp.where(ids[0] == 0, -1e9, bias)\n    x, _ = blocks(x, bias)",
    f"{T5}::test_float32",
  ),
  Trap(
    "the model's scaling factor left out of V2V",
    MODEL,
    "return latents * self.config.vae.scaling_factor",
    "return latents * 1.0",
    f"{PIPELINE}::test_video_to_video[5b-DPM-False]",
  ),
  Trap(
    "training: the target v with its sign turned",
    "vidgen/diffusion.py",
    "* noise - _each(level.sigma, x0) * x0",
    "* noise + _each(level.sigma, x0) * x0",
    f"{TRAINING}::test_loss_and_gradients[5b]",
  ),
  Trap(
    "training: each sample's timestep from the whole range",
    NOISING,
    "own = (index * intervals) // count",
    "own, intervals = 0 * index, 1",
    "tests/tasks/noising_test.py::test_each_sample_draws_in_its_own_interval",
  ),
  Trap(
    "training: one key for all samples",
    NOISING,
    "return jax.vmap(lambda i: fold(fold(key, i), purpose))(index)",
    "return jax.vmap(lambda i: fold(fold(key, 0 * i), purpose))(index)",
    "tests/tasks/noising_test.py::test_samples_and_purposes_draw_apart",
  ),
  Trap(
    "training: gradients summed over the parts of a batch",
    STEP,
    "return jax.tree.map(lambda x: x / parts, total)",
    "return total",
    "tests/train_step_test.py::test_parts_of_a_batch_are_the_batch[2]",
  ),
  Trap(
    "training: a step taken on a gradient that is not finite",
    STEP,
    "    finite &= jnp.isfinite(norm)",
    "    finite &= jnp.isfinite(norm) | True",
    "tests/train_step_test.py::test_a_gradient_alone_that_is_not_finite",
  ),
  Trap(
    "training: the average moved by a skipped step",
    STEP,
    "  ema = keep(ema, state.ema)",
    "  pass",
    "tests/train_step_test.py::test_what_is_not_finite_is_skipped[nan]",
  ),
  Trap(
    "training: the same key at every step",
    STEP,
    "key = jax.random.fold_in(key, state.step)",
    "key = jax.random.fold_in(key, 0)",
    "tests/train_step_test.py::test_each_step_has_a_key_of_its_own",
  ),
  Trap(
    "training: a LoRA without its alpha / rank",
    "vidgen/adapters.py",
    "leaf * (config.alpha / config.rank)",
    "leaf * 1.0",
    "tests/adapters_test.py",
  ),
  Trap(
    "SVD: one guidance scale for all frames",
    SVD_PLAN,
    "ramp = np.linspace(1.0 if least is None else least, scale, frames)",
    "ramp = np.full(frames, scale)",
    SVD_DEFAULTS,
  ),
  Trap(
    "SVD: the network told fps, not fps - 1",
    SVD_PLAN,
    "numbers.FPS: fps_id + 1 if fps is None else fps,",
    "numbers.FPS: fps_id + 1 if fps is None else fps + 1,",
    SVD_DEFAULTS,
  ),
  Trap(
    "SVD: the image's latents scaled",
    SVD_MODEL,
    "return latents if scale is None else latents * scale",
    "return latents * self.config.vae.scaling_factor",
    SVD_DEFAULTS,
  ),
  Trap(
    "SVD: no noise on the image",
    SVD_MODEL,
    "return x + strength * samplers.normal(key, x.shape[1:])",
    "return x",
    f"{SVD_PIPELINE}::test_an_image[fps, motion, noise, ramp]",
  ),
  Trap(
    "SVD: CLIP shown the image in the video's size",
    SVD_MODEL,
    "[[image.original for image in group]]",
    "[[image.pixels / 2 + 0.5 for image in group]]",
    SVD_DEFAULTS,
  ),
  Trap(
    "SVD: the image's latents in the unconditional branch",
    SVD_MODEL,
    'for name in ("context", "image")',
    'for name in ("context",)',
    SVD_DEFAULTS,
  ),
  Trap(
    "SVD: the last level not the clean sample",
    "vidgen/diffusion.py",
    "np.append(sigma[1:], 0.0)",
    "np.append(sigma[1:], sigma[-1])",
    f"{SVD_PIPELINE}::test_an_image[no guidance, 7 steps]",
  ),
]


def went_red(trap: Trap) -> bool:
  """Breaks the line in a copy of the tree and runs the test."""
  with tempfile.TemporaryDirectory() as folder:
    copy = pathlib.Path(folder) / "tree"
    ignore = shutil.ignore_patterns(
      ".git", "__pycache__", ".venv", "*.egg-info"
    )
    shutil.copytree(ROOT, copy, ignore=ignore)
    path = copy / trap.file
    text = path.read_text(encoding="utf-8")
    if text.count(trap.old) != 1:
      raise ValueError(f"{trap.name}: {trap.old!r} is not once in {trap.file}")
    path.write_text(text.replace(trap.old, trap.new), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "-x", "-q", trap.test]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
  # 1 is a failed test; a test that is not found or not collected is no proof.
  if done.returncode not in (0, 1) or " error" in done.stdout.splitlines()[-1]:
    raise ValueError(f"{trap.name}: {done.stdout[-2000:]}")
  return done.returncode == 1


def main(argv: list[str]) -> None:
  del argv
  green = []
  for trap in TRAPS[_SKIP.value :]:
    if _ONLY.value not in trap.name:
      continue
    red = went_red(trap)
    print(f"{'red' if red else 'STILL GREEN'}: {trap.name} ({trap.test})")
    green += [] if red else [trap.name]
  sys.exit(bool(green))


if __name__ == "__main__":
  app.run(main)
