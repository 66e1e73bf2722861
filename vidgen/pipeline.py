"""A loaded model on a mesh: condition, denoise, decode."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from vidgen import (
  ahead,
  arguments,
  diffusion,
  errors,
  placement,
  samplers,
  sharding,
  video,
)
from vidgen.models import base


@runtime_checkable
class Progress(Protocol):
  """Who is told how far a call has come."""

  def stage(self, name: str) -> contextlib.AbstractContextManager[None]:
    """Is entered for as long as a stage lasts."""

  def step(self, done: int, total: int) -> None:
    """Is called after each denoising step."""


def to_float(frames: Array) -> Array:
  """Maps [-1, 1] to [0, 1], clipped, in float32."""
  return jnp.clip(frames.astype(jnp.float32) * 0.5 + 0.5, 0, 1)


def to_uint8(frames: Array) -> Array:
  """Maps [-1, 1] to bytes, rounded half to even."""
  return jnp.round(to_float(frames) * 255).astype(jnp.uint8)


_POSTS = {"uint8": to_uint8, "float": to_float}


class Pipeline:
  """Samples videos from a model.

  Attributes:
    model: The model, without its parameters.
    params: The parameters of each component: on their devices, or on the host
      where they come and go with the stages (`residency="stage"`).
    mesh: The mesh that everything runs on.
    why_mesh: Why it is this mesh, in a line, where it was chosen; else empty.
    ready: Programs that need not be compiled when they are called.
    conditioners: The stages of conditioning, and what runs each.
    denoise: Runs steps; `encoder` and `decoder` do what they say. Compiled.
  """

  def __init__(
    self,
    model: base.Model,
    params: dict[str, PyTree],
    mesh: Mesh,
    *,
    on_host: bool = False,
  ):
    self.model = model
    self.params = params
    self.mesh = mesh
    self.why_mesh = ""
    self._on_host = on_host
    self.ready = ahead.Ready()
    self._where = {
      component.name: sharding.shardings(component.shapes(), mesh)
      for component in model.components
    }
    # The embeddings of unconditional prompts, the empty one above all.
    self._unconditional: dict[Any, dict[str, Array]] = {}
    self.conditioners = [
      (stage, jax.jit(functools.partial(stage.apply, tiling=False)))
      for stage in model.conditioners
    ]
    self.encoder = jax.jit(
      functools.partial(model.encode, tiling=False),
      static_argnames=("slicing",),
    )
    self.decoder = jax.jit(
      functools.partial(model.decode, tiling=False),
      static_argnames=("post", "slicing", "decode_chunk"),
    )
    self.denoise = jax.jit(
      self._denoise, donate_argnames="state", static_argnames="stochastic"
    )

  @property
  def fps(self) -> int:
    """Frames a second of the model's videos."""
    return self.model.fps

  @property
  def _images(self) -> int:
    """How many images a clip is made from, where it is made from any."""
    return max(1, len(self.model.training.image_frames))

  def replace(self, params: dict[str, PyTree]) -> None:
    """Takes other parameters; what has been compiled stays."""
    self.params = params
    self._unconditional.clear()

  def sample(
    self,
    prompt: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] | None = "",
    image: Any = None,
    video: Any = None,
    strength: float = 0.8,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    num_steps: int | None = None,
    guidance_scale: float | None = None,
    sampler: str | None = None,
    seed: int | Sequence[int] = 0,
    latents: Any = None,
    output: str = "uint8",
    *,
    clips: Sequence[int] | None = None,
    tiling: bool = False,
    slicing: bool = False,
    progress: Progress | None = None,
    **options: Any,
  ) -> np.ndarray:
    """Returns videos, one for each prompt, or for each image without any.

    What is None is the model's own default.

    Args:
      prompt: A prompt or several; None for models that take no text.
      negative_prompt: What to keep away from; one serves all.
      image: The first frame, for models that take one: a path, an array
        `H W 3` or a PIL image, or several; one serves all prompts. An alpha
        channel is dropped, as PIL drops it.
      video: A video to make anew in part: a path or an array `F H W 3`, or
        several; one serves all.
      strength: How much of `video` is made anew, in (0, 1].
      num_frames: Frames; 8k + 1 for CogVideoX.
      height: Pixels.
      width: Pixels.
      num_steps: Denoising steps.
      guidance_scale: Classifier-free guidance; at most 1 is none.
      sampler: "ddim", which is "euler", too, or "dpmpp_2m_sde".
      seed: With a clip's id, it decides the clip's noise; one, or one for each.
      latents: Replaces the initial unit-variance noise, `b f h w c`.
      output: "uint8" is `b F H W 3`, "float" the same in [0, 1], "latents" the
        scaled latents `b f h w c` without padding.
      clips: The clips' ids, 0 to b - 1 by default. A clip's noise depends on
        the seed and its id alone, not on its batch or the mesh.
      tiling: Encode and decode in overlapping tiles: less memory, other pixels.
      slicing: Encode and decode clip by clip.
      progress: Is told of stages and steps.
      **options: What the family alone has.

    Raises:
      InputError: An argument that is wrong, or that this model cannot use.
    """
    progress = _Silent() if progress is None else progress
    memory = arguments.flags(tiling=tiling, slicing=slicing)
    prompts, negatives = self._texts(prompt, negative_prompt, image)
    arguments.check_output(output)
    seeds = arguments.seeds(seed, len(prompts))
    clips = arguments.clips(clips, len(prompts))
    videos = None
    if video is not None:
      num_frames = arguments.whole("num_frames", num_frames)
      videos = arguments.videos(video, len(prompts), num_frames)
      num_frames = len(videos[0])
    if strength is None or (videos is None and strength != 0.8):
      raise errors.InputError("strength: a number, of use with a video alone.")
    sizes = {"num_frames": num_frames, "height": height, "width": width}
    sizes["num_steps"] = num_steps
    strength = None if videos is None else strength
    plan = self.model.plan(
      arguments.request(
        sizes, guidance_scale, sampler, strength, image, options, tiling
      )
    )
    for negative in negatives:
      arguments.check_negative(plan.guidance is not None, negative)
    images = (
      None
      if image is None
      else arguments.images(image, self._images * len(prompts), plan)
    )
    if latents is not None:
      latents = arguments.latents(latents, (len(prompts), *plan.latents))

    with sharding.use(self.mesh):
      keys = functools.partial(samplers.keys, seeds, clips)
      condition, unconditional = self._condition(
        prompts, negatives, images, plan, keys, memory, progress
      )
      if latents is None:
        latents = samplers.normal(keys(samplers.INITIAL), plan.latents)
      if videos is not None:
        drawn = keys(samplers.POSTERIOR)
        latents = self._start(videos, latents, drawn, plan, memory, progress)
      latents = self._loop(
        latents,
        condition,
        unconditional,
        keys(samplers.STEP),
        plan,
        progress,
      )
      if output == "latents":
        return placement.to_host(latents)
      chunk = plan.decode_chunk
      return self._decoded(latents, output, memory, chunk, progress)

  def condition(
    self, prompt: str | Sequence[str] | None = None, **options: Any
  ) -> PyTree:
    """Returns the embeddings of prompts, leaves with a leading batch axis."""
    image = options.pop("image", None)
    prompts, _ = self._texts(prompt, "", image)
    plan = self.model.plan(
      base.Request(image=image is not None, options=options)
    )
    images = (
      None
      if image is None
      else arguments.images(image, self._images * len(prompts), plan)
    )
    with sharding.use(self.mesh):
      inputs = self.model.inputs(prompts, images, plan)
      memory = {"tiling": False, "slicing": False}
      return _stack(self._embed(inputs, None, memory, _Silent()))

  def encode(
    self, video: Any, *, tiling: bool = False, slicing: bool = False
  ) -> np.ndarray:
    """Returns the scaled latents `b f h w c` of a video, the posterior's mean.

    Args:
      video: `b F H W 3`, floats in [-1, 1].
      tiling: In overlapping tiles.
      slicing: Clip by clip.
    """
    memory = arguments.flags(tiling=tiling, slicing=slicing)
    video = arguments.pixels(video)
    with sharding.use(self.mesh), self._resident("vae") as params:
      return placement.to_host(self._encoded(params, video, None, memory))

  def decode(
    self,
    latents: Any,
    output: str = "uint8",
    *,
    tiling: bool = False,
    slicing: bool = False,
    decode_chunk: int | None = None,
  ) -> np.ndarray:
    """Returns the videos `b F H W 3` of scaled latents; see `sample`.

    `decode_chunk` is how many frames are decoded at a time, for models that
    leave it open.
    """
    arguments.check_output(output)
    memory = arguments.flags(tiling=tiling, slicing=slicing)
    shape = (None, None, None, None, self.model.latent_channels)
    latents = arguments.latents(latents, shape)
    if output == "latents":
      return np.asarray(latents)
    chunk = arguments.whole("decode_chunk", decode_chunk)
    # Where `sample` has them: the same program does.
    where = sharding.batch_sharding(self.mesh, len(latents))
    latents = jax.device_put(latents, where)
    with sharding.use(self.mesh):
      return self._decoded(latents, output, memory, chunk, _Silent())

  def _texts(self, prompt, negative_prompt, image):
    """The prompts and the negative ones; without text, as many as images."""
    arguments.check_text(self.model.takes_text, prompt)
    if self.model.takes_text:
      return arguments.prompts(prompt, negative_prompt)
    arguments.check_negative_text(False, negative_prompt)
    return [""] * arguments.count_clips(image, self._images), []

  @contextlib.contextmanager
  def _resident(self, name: str) -> Iterator[dict[str, PyTree]]:
    """Gives a component's parameters on the devices, for as long as needed."""
    held = self.held(name)
    if not self._on_host:
      yield held
      return
    placed = {n: jax.device_put(x, self._where.get(n)) for n, x in held.items()}
    try:
      yield placed
    finally:
      jax.tree.map(lambda leaf: leaf.delete(), placed)

  def held(self, name: str) -> dict[str, PyTree]:
    """Returns the parameters of a component, and of a LoRA for it."""
    names = (name, f"{name}_lora")
    return {n: self.params[n] for n in names if n in self.params}

  def _condition(
    self, prompts, negatives, images, plan, keys, memory, progress
  ):
    """The embeddings of both branches; the unconditional one may be None."""
    inputs = self.model.inputs(prompts, images, plan)
    if plan.guidance is None:
      return _stack(self._embed(inputs, keys, memory, progress)), None
    texts = list(dict.fromkeys(negatives))
    extra = dict(zip(texts, self.model.inputs(texts, None, plan), strict=True))
    new = [t for t in texts if _content(extra[t]) not in self._unconditional]
    inputs += [extra[text] for text in new]
    parts = self._embed(inputs, keys, memory, progress)
    b = len(prompts)
    embedded = dict(zip(new, parts[b:], strict=True))
    if "" in embedded:
      self._unconditional[_content(extra[""])] = embedded[""]
    known = lambda text: self._unconditional[_content(extra[text])]
    find = lambda text: embedded[text] if text in embedded else known(text)
    condition = _stack(parts[:b])
    negative = _stack([find(t) for t in negatives]) if negatives else {}
    return condition, self.model.unconditional(condition, negative)

  def _embed(self, inputs, keys, memory, progress):
    """Runs each stage over all the clips, one by one: no clip sees a batch.

    `keys` gives the clips' keys of a purpose; inputs beyond the clips, which
    are of texts alone, have none. Without keys nothing is drawn.
    """
    embedded = [{} for _ in inputs]
    for stage, apply in self.conditioners:
      todo = [
        i
        for i, one in enumerate(inputs)
        if all(name in one for name in stage.needs)
      ]
      if not todo:
        continue
      name = stage.stage
      if stage.tiles and memory["tiling"]:
        apply = functools.partial(stage.apply, tiling=True)
        name += " in tiles"
      with (
        progress.stage(stage.stage),
        self._resident(stage.component) as params,
      ):
        drawn = keys(stage.purpose) if keys and stage.draws else ()
        for i in todo:
          key = drawn[i : i + 1] if i < len(drawn) else None
          embedded[i] |= self.ready.call(
            name, apply, params[stage.component], inputs[i], key
          )
        jax.block_until_ready(embedded)
    return embedded

  def _start(self, videos, noise, keys, plan, memory, progress):
    """The latents of given videos, noised to the level of the first step."""
    frames = np.stack(
      [
        np.stack([video.fit(frame, plan.height, plan.width) for frame in v])
        for v in videos
      ]
    )
    with progress.stage("video"), self._resident("vae") as params:
      latents = self._encoded(params, jnp.asarray(frames), keys, memory)
      # Padding repeats the first latent; it is dropped again.
      first = [latents[:, :1]] * plan.padding
      latents = jnp.concatenate([*first, latents], axis=1)
      level = jax.tree.map(lambda a: np.float32(a[0]), plan.schedule.now)
      latents = diffusion.add_noise(latents, noise, level)
      return latents.block_until_ready()

  def _encoded(self, params, video, keys, memory):
    """Scaled latents; tiles compile by themselves, all else as a whole."""
    if memory["tiling"]:
      return self.model.encode(params, video, keys, **memory)
    return self.encoder(params, video, keys, slicing=memory["slicing"])

  def _loop(self, x, condition, unconditional, keys, plan, progress):
    """Denoises; returns latents without padding."""
    table, static = self.steps(plan)
    steps = len(plan.schedule)
    where = sharding.batch_sharding(self.mesh, len(x))
    place = lambda tree: jax.device_put(tree, where)
    condition, unconditional = place(condition), place(unconditional)
    state = place(samplers.init(x))
    silent = isinstance(progress, _Silent)
    stride = steps if silent else 1
    denoiser = self.model.denoiser
    with progress.stage("denoise"), self._resident(denoiser) as params:
      for i in range(0, steps, stride):
        state = self.ready.call(
          "denoise",
          self.denoise,
          params,
          state,
          condition,
          unconditional,
          table,
          keys,
          i,
          i + stride,
          **static,
        )
        jax.block_until_ready(state.x)
        progress.step(i + stride, steps)
    finite = jnp.isfinite(state.x).all(axis=(1, 2, 3, 4))
    _check_finite(placement.to_host(finite))
    return state.x[:, plan.padding :]

  def steps(self, plan: base.Plan) -> tuple[samplers.Table, dict[str, bool]]:
    """Returns what each step of `denoise` reads, and its static arguments."""
    coefficients = samplers.SAMPLERS[plan.sampler](plan.schedule)
    steps = len(plan.schedule)
    scale = np.ones(steps) if plan.guidance is None else plan.guidance
    table = samplers.table(plan.schedule, coefficients, scale)
    return table, {"stochastic": bool(np.any(coefficients.noise))}

  def chunks(self, decode_chunk: int | None) -> dict[str, int]:
    """Returns the static arguments of `decoder` that say what is chunked."""
    return {} if decode_chunk is None else {"decode_chunk": decode_chunk}

  def post(self, output: str) -> Callable[[Array], Array]:
    """Returns what makes an output of frames in [-1, 1].

    Floats where frames may overflow: bytes could not tell of it.
    """
    narrow = jnp.dtype(self.model.dtype) == jnp.float16
    return to_float if narrow else _POSTS[output]

  def _denoise(
    self,
    params,
    state,
    condition,
    unconditional,
    table,
    keys,
    start,
    stop,
    *,
    stochastic,
  ):
    """The loop that is compiled."""
    denoise = lambda x, level, condition: self.model.denoise(
      params,
      sharding.constrain(x, "batch", *[None] * (x.ndim - 1)),
      level,
      condition,
    )
    return samplers.run(
      samplers.guided(denoise, condition, unconditional),
      state,
      table,
      keys,
      start,
      stop,
      stochastic=stochastic,
    )

  def _decoded(self, latents, output, memory, chunk, progress):
    chunks = self.chunks(chunk)
    with progress.stage("decode"), self._resident("vae") as params:
      if memory["tiling"]:
        post = self.post(output)
        frames = self.model.decode(params, latents, post, **memory, **chunks)
      else:
        frames = self.ready.call(
          "decode",
          self.decoder,
          params,
          latents,
          post=self.post(output),
          slicing=memory["slicing"],
          **chunks,
        )
      frames = placement.to_host(frames)
    if frames.dtype == np.uint8:
      return frames
    _check_finite(np.isfinite(frames).all(axis=(1, 2, 3, 4)))
    if output == "uint8":
      return np.round(frames * 255).astype(np.uint8)
    return frames


def _check_finite(finite: np.ndarray) -> None:
  """Raises InputError unless all clips of a batch are finite."""
  if not finite.all():
    bad = np.flatnonzero(~finite).tolist()
    raise errors.InputError(
      f"clips {bad} of the batch came out as NaN or infinity; the usual cause "
      "is dtype=float16 with weights trained in bfloat16: use dtype=bfloat16 "
      "or float32."
    )


class _Silent:
  """Progress that nobody sees: the loop runs as one call."""

  def stage(self, name: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()

  def step(self, done: int, total: int) -> None:
    pass


def _content(inputs: dict[str, np.ndarray]) -> tuple[tuple[str, bytes], ...]:
  """What tells inputs apart."""
  return tuple((name, inputs[name].tobytes()) for name in sorted(inputs))


def _stack(parts: list[dict[str, Array]]) -> dict[str, Array]:
  return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
