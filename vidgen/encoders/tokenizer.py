"""Prompts to token ids, with the tokenizer of a published checkpoint.

transformers reads spiece.model, and the tokenizers library, which it rests on,
runs it; this module checks the files first, because they answer a broken one
with a misleading word or a wrong vocabulary.
"""

import contextlib
import functools
import json
import logging
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from vidgen import errors

_MODEL = "spiece.model"
_SAVED = "tokenizer.json"
_CONFIG = "tokenizer_config.json"
_OTHERS = ("special_tokens_map.json", "added_tokens.json")
_CLASSES = ("T5Tokenizer", "T5TokenizerFast")
# What T5 v1.1 was trained with, and what pads a prompt here.
_PAD, _EOS, _UNK = 0, 1, 2
_SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


class Tokens(NamedTuple):
  """Prompts as a network reads them.

  Attributes:
    ids: Each prompt's tokens, its end of sequence, then padding.
    truncated: The text of each prompt that did not fit; None where all did.
  """

  ids: Int32[np.ndarray, "b length"]
  truncated: list[str | None]


class Tokenizer:
  """A checkpoint's tokenizer; `load` makes it."""

  def __init__(self, backend: Any):
    # A `tokenizers.Tokenizer`.
    self._backend = backend

  @property
  def vocab_size(self) -> int:
    """Number of ids: every id is smaller."""
    return self._backend.get_vocab_size(with_added_tokens=True)

  def __call__(self, prompts: list[str], length: int) -> Tokens:
    """Returns `prompts` as `length` tokens each.

    Follows `_get_t5_prompt_embeds` of diffusers' pipeline_cogvideox.py, but
    each prompt is told of its own cut, without the padding of its batch.

    Raises:
      InputError: A prompt is no Unicode text, or `length` has no room for one.
    """
    if length < 2:
      raise errors.InputError(
        f"max_text_length is {length}; it must be at least 2: one token of "
        "the prompt and the end of the sequence."
      )
    for number, prompt in enumerate(prompts):
      _check_text(prompt, number)
    ids = np.full((len(prompts), length), _PAD, np.int32)
    truncated: list[str | None] = []
    for row, prompt in zip(ids, prompts, strict=True):
      tokens = self._backend.encode(prompt).ids
      cut = tokens[length - 1 : -1] if len(tokens) > length else []
      if cut:
        tokens = [*tokens[: length - 1], _EOS]
      row[: len(tokens)] = tokens
      decode = functools.partial(
        self._backend.decode, skip_special_tokens=False
      )
      truncated.append(decode(cut) if cut else None)
    return Tokens(ids, truncated)


def load(folder: pathlib.Path) -> Tokenizer:
  """Returns the tokenizer in a checkpoint's tokenizer/ folder.

  The folder holds `spiece.model`, as CogVideoX publishes it, or a
  `tokenizer.json`, as transformers 5 saves it. Nothing is fetched, and no code
  of the checkpoint runs.

  Raises:
    InputError: A file is missing, or it is not T5's tokenizer.
    CorruptError: A file cannot be read.
  """
  model, saved = folder / _MODEL, folder / _SAVED
  if not model.is_file() and not saved.is_file():
    raise errors.InputError(
      f"{folder}: neither {_MODEL} nor {_SAVED} is there; fetch the "
      "checkpoint's tokenizer/ folder whole."
    )
  path = folder / _CONFIG
  config = _read_object(path) if path.exists() else {}
  for name in _OTHERS:
    if (folder / name).exists():
      _read_object(folder / name)
  kind = config.get("tokenizer_class", _CLASSES[0])
  if kind not in _CLASSES:
    raise errors.InputError(
      f"{path}: tokenizer_class is {kind!r}; T5's is {_CLASSES[0]!r}."
    )
  # transformers takes tokenizer.json where both are there.
  source = saved if saved.is_file() else model
  with _quiet():
    if source == model:
      _check_model(model)
    else:
      _read_object(saved)
    backend = _read(folder, source)
  _check_backend(backend, source, config)
  return Tokenizer(backend)


def write_saved(folder: pathlib.Path) -> None:
  """Writes tokenizer.json beside spiece.model: it takes no time to read.

  Raises:
    CorruptError: spiece.model cannot be read.
  """
  with _quiet():
    backend = _read(folder, folder / _MODEL)
  backend.save(str(folder / _SAVED))


def _read(folder: pathlib.Path, source: pathlib.Path) -> Any:
  """Returns the `tokenizers.Tokenizer` of checked files."""
  try:
    if source.name == _SAVED:
      import tokenizers

      backend = tokenizers.Tokenizer.from_file(str(source))
    else:
      import transformers  # A second to import: only who needs it pays.

      # As diffusers does, by class: nothing in the folder can choose another.
      backend = transformers.T5Tokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
      ).backend_tokenizer
  except Exception as e:  # The tokenizers library raises plain Exception.
    reason = str(e).splitlines()[0] if str(e) else type(e).__name__
    raise errors.CorruptError(
      f"{source}: not a tokenizer that transformers reads ({reason}); fetch "
      "the checkpoint's tokenizer/ folder again."
    ) from e
  # A file keeps what its last call asked for.
  backend.no_truncation()
  backend.no_padding()
  return backend


def _check_text(prompt: str, number: int) -> None:
  """Refuses what has no UTF-8: half of a surrogate pair."""
  try:
    prompt.encode("utf-8")
  except UnicodeEncodeError as e:
    raise errors.InputError(
      f"prompt {number + 1}: character {e.start + 1} is half of a surrogate "
      f"pair ({prompt[e.start]!a}) and no text; write the prompt as UTF-8."
    ) from e


def _read_object(path: pathlib.Path) -> dict[str, Any]:
  """Returns a JSON file that holds an object."""
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except OSError as e:
    raise errors.StorageError(f"{path}: cannot be read: {e.strerror}.") from e
  except (ValueError, RecursionError) as e:
    raise errors.CorruptError(
      f"{path}: not JSON ({e}); fetch the file again."
    ) from e
  if not isinstance(content, dict):
    raise errors.CorruptError(f"{path}: not a JSON object; fetch it again.")
  return content


def _check_model(path: pathlib.Path) -> None:
  """Reads a SentencePiece file through, all of its parts."""
  from google.protobuf import message
  from sentencepiece import sentencepiece_model_pb2

  proto = sentencepiece_model_pb2.ModelProto()
  try:
    proto.ParseFromString(path.read_bytes())
  except OSError as e:
    raise errors.StorageError(f"{path}: cannot be read: {e.strerror}.") from e
  except message.DecodeError as e:
    raise errors.CorruptError(
      f"{path}: not a SentencePiece model, or cut short; fetch it again."
    ) from e
  parts = ("trainer_spec", "normalizer_spec")
  # A file may end between two parts and still parse.
  if not proto.pieces or not all(proto.HasField(part) for part in parts):
    raise errors.CorruptError(
      f"{path}: a SentencePiece model without all of its parts; fetch it again."
    )


def _check_backend(
  backend: Any, source: pathlib.Path, config: dict[str, Any]
) -> None:
  """Refuses a tokenizer that is not T5's."""
  want = [_PAD, _EOS, _UNK]
  names = [config.get(key, name) for key, name in _SPECIAL.items()]
  text = lambda name: (
    name.get("content", "") if isinstance(name, dict) else str(name)
  )
  got = [backend.token_to_id(text(name)) for name in names]
  if got != want or backend.encode("").ids != [_EOS]:
    raise errors.InputError(
      f"{source}: not T5's tokenizer: its ids of padding, end and unknown are "
      f"{got}, T5's are {want}."
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Holds back what transformers and its imports say, like a missing torch."""
  before = logging.root.manager.disable
  logging.disable(logging.WARNING)
  try:
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      yield
  finally:
    logging.disable(before)
