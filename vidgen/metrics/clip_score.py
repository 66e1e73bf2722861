"""CLIP score: how well the frames of a video show what its prompt says.

Hessel et al., https://arxiv.org/abs/2104.08718, without their factor of 2.5 and
not cut at zero, as video models report it: 100 times the cosine between the
embedding of the prompt and that of a frame, the mean over all frames. The CLIP
is one that transformers saved, in a local folder; numbers of different CLIPs
do not compare.
"""

import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from flax import linen as nn
from jaxtyping import Array, Float, Int, UInt8

from vidgen import errors, tensorfile, tensorheader, weights
from vidgen.encoders import clip, clip_tokenizer

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)

# Frames at once; the last batch of a video is filled up.
BATCH = 8

# What OpenAI's own configs call the end of a text, where the largest id ends
# it: CLIPTextTransformer in transformers' modeling_clip.py.
_OLD_END = 2
_END = 49407


class ClipScore:
  """A CLIP that scores; `load` makes it.

  Attributes:
    identity: The sizes and the first digits of the weights' SHA-256.
  """

  def __init__(
    self,
    identity: str,
    vision: clip.VisionTower,
    text: clip.TextTower,
    params: Mapping[str, Any],
    tokenizer: clip_tokenizer.Tokenizer,
    end: int,
  ):
    self.identity = identity
    self._size = vision.config.image_size
    self._params, self._tokenizer, self._end = params, tokenizer, end
    self._see = jax.jit(lambda p, x: vision.apply({"params": p}, x))
    self._read = jax.jit(lambda p, ids: text.apply({"params": p}, ids))

  def score(self, prompt: str, frames: UInt8[np.ndarray, "F H W 3"]) -> float:
    """Returns the score of a video, from -100 to 100."""
    text = self.text(prompt)
    images = self.images(frames)
    length = np.linalg.norm(images, axis=1) * np.linalg.norm(text)
    return float(100 * np.mean(images @ text / length))

  def text(self, prompt: str) -> Float[np.ndarray, " e"]:
    """Returns the embedding of a prompt, at the end of its text."""
    ids = self._tokenizer([prompt])
    states = self._read(self._params["text"], ids)
    at = end_of(ids, self._end)[0]
    return np.asarray(states[0, at] @ self._params["projection"], np.float64)

  def images(
    self, frames: UInt8[np.ndarray, "F H W 3"]
  ) -> Float[np.ndarray, "F e"]:
    """Returns the embedding of each frame."""
    found = []
    for i in range(0, len(frames), BATCH):
      pixels = [
        preprocess(frame, self._size) for frame in frames[i : i + BATCH]
      ]
      batch = np.zeros((BATCH, self._size, self._size, 3), np.float32)
      batch[: len(pixels)] = pixels
      seen = self._see(self._params["vision"], batch)
      found.append(np.asarray(seen, np.float64)[: len(pixels)])
    return np.concatenate(found)


def end_of(ids: Int[np.ndarray, "b l"], end: int) -> Int[np.ndarray, " b"]:
  """Returns where each text ends, which is where its embedding is read."""
  return (ids if end == _OLD_END else ids == end).argmax(axis=1)


def preprocess(
  frame: UInt8[np.ndarray, "H W 3"], size: int
) -> Float[np.ndarray, "size size 3"]:
  """Returns a frame as CLIP was trained on: its middle, resized, normalised.

  Bicubic by Pillow, the shorter side to `size`, and then the middle: what
  transformers' CLIPImageProcessor does by default.
  """
  height, width, _ = frame.shape
  short = min(height, width)
  high, wide = int(size * height / short), int(size * width / short)
  image = PIL.Image.fromarray(frame)
  image = image.resize((wide, high), PIL.Image.Resampling.BICUBIC)
  top, left = (high - size) // 2, (wide - size) // 2
  image = image.crop((left, top, left + size, top + size))
  pixels = np.asarray(image, np.float32) / np.float32(255)
  return (pixels - np.array(_MEAN, np.float32)) / np.array(_STD, np.float32)


def load(folder: str | os.PathLike) -> ClipScore:
  """Returns a CLIP of a local folder: config, weights and tokenizer.

  Nothing is fetched. The files are those of `CLIPModel.save_pretrained` and of
  its tokenizer, on the Hub's openai/clip-vit-large-patch14 for one; weights
  are read from safetensors only.

  Raises:
    InputError: A file is missing, or the CLIP is of another kind.
    CorruptError: A file is broken, or the weights do not fit the config.
  """
  folder = pathlib.Path(folder)
  if not (folder / "config.json").is_file():
    raise errors.InputError(
      f"{folder}: has no config.json; give the folder of a CLIP, with its "
      "weights and its tokenizer."
    )
  config = tensorheader.read_json(folder / "config.json")
  parts = [config.get("vision_config"), config.get("text_config")]
  width = config.get("projection_dim", 512)
  if (
    not all(isinstance(part, dict) for part in parts) or type(width) is not int
  ):
    raise errors.InputError(
      f"{folder}/config.json: is of no CLIP: vision_config, text_config and "
      "projection_dim are wanted."
    )
  see, read = parts
  vision = clip.VisionTower(clip.vision_config(see | {"projection_dim": width}))
  text = clip.TextTower(clip.text_config(read))
  files = tensorfile.open_folder(folder)
  size = vision.config.image_size
  pixels = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  length = text.config.max_position_embeddings
  ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
  params = {
    "vision": _load(files, "vi", clip.VISION_TABLE, vision, pixels),
    "text": _load(files, "text_model.", clip.TEXT_TABLE, text, ids),
    "projection": _projection(files, (width, text.config.hidden_size)),
  }
  patch = vision.config.patch_size
  name = f"clip-{width}d-p{patch}-{size}-{_digest(files)[:8]}"
  tokenizer = clip_tokenizer.load(folder, length)
  end = read.get("eos_token_id", _END)
  return ClipScore(name, vision, text, params, tokenizer, end)


def _load(
  files: tensorfile.TensorFiles,
  prefix: str,
  table: weights.Table,
  tower: nn.Module,
  example: jax.ShapeDtypeStruct,
) -> Any:
  """Returns the parameters of one tower."""
  # Older files hold the positions' numbers, 0, 1, 2, too.
  entries = {
    name: entry
    for name, entry in files.items()
    if name.startswith(prefix) and not name.endswith(".position_ids")
  }
  part = tensorfile.TensorFiles(files.where, entries, files.metadata)
  init = jax.eval_shape(tower.init, jax.random.key(0), example)
  shapes = nn.unbox(init)["params"]
  found = weights.load(part, table, shapes, dtype=jnp.float32)
  return jax.tree.map(jnp.asarray, found)


def _projection(files: tensorfile.TensorFiles, shape: tuple[int, int]) -> Array:
  name = "text_projection.weight"
  if name not in files or tuple(files[name].shape) != shape:
    raise errors.CorruptError(
      f"{files.where}: has no {name} of {list(shape)}; fetch the CLIP again."
    )
  return jnp.asarray(files.read(name).T, jnp.float32)


def _digest(files: tensorfile.TensorFiles) -> str:
  """Returns the SHA-256 of the weights' files, one after the other."""
  total = hashlib.sha256()
  for path in sorted({entry.file for entry in files.values()}):
    with open(path, "rb") as file:
      total.update(hashlib.file_digest(file, "sha256").digest())
  return total.hexdigest()
