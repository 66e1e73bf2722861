"""Prompts to token ids, with the tokenizer that CLIP's text tower reads."""

import pathlib
import warnings
from typing import Any

import numpy as np
from jaxtyping import Int32

from vidgen import errors

# Published as these files, or as the one that transformers 5 saves.
_FILES, _SAVED = ("vocab.json", "merges.txt"), "tokenizer.json"


class Tokenizer:
  """A checkpoint's tokenizer; `load` makes it.

  Attributes:
    length: Tokens of each prompt.
  """

  def __init__(self, backend: Any, length: int):
    self._backend, self.length = backend, length

  @property
  def vocab_size(self) -> int:
    """Number of ids: every id is smaller."""
    return len(self._backend)

  def __call__(self, prompts: list[str]) -> Int32[np.ndarray, "b length"]:
    """Returns `prompts` as `length` tokens each, padded as CLIP is.

    Warns of text that does not fit.
    """
    ids = []
    for prompt in prompts:
      tokens = self._backend(prompt, truncation=False, verbose=False)
      if len(tokens["input_ids"]) > self.length:
        warnings.warn(
          f"prompt {prompt[:40]!r}...: longer than {self.length} tokens; the "
          "model does not read its end.",
          stacklevel=3,
        )
      cut = self._backend(
        prompt, truncation=True, max_length=self.length, padding="max_length"
      )
      ids.append(cut["input_ids"])
    return np.array(ids, np.int32).reshape(len(prompts), self.length)


def load(folder: pathlib.Path, length: int) -> Tokenizer:
  """Returns the tokenizer in a checkpoint's tokenizer/ folder.

  Nothing is fetched, and no code of the checkpoint runs.

  Args:
    folder: Holds vocab.json and merges.txt, or tokenizer.json.
    length: Tokens of each prompt.

  Raises:
    InputError: A file is missing.
    CorruptError: A file cannot be read.
  """
  published = all((folder / name).is_file() for name in _FILES)
  if not published and not (folder / _SAVED).is_file():
    raise errors.InputError(
      f"{folder}: neither {' and '.join(_FILES)} nor {_SAVED} is there; fetch "
      "the checkpoint's tokenizer/ folder whole."
    )
  import transformers  # Seconds to import: only who reads a prompt pays.

  try:
    backend = transformers.CLIPTokenizer.from_pretrained(
      folder, local_files_only=True, trust_remote_code=False
    )
  except Exception as e:  # The tokenizers library raises plain Exception.
    reason = str(e).splitlines()[0] if str(e) else type(e).__name__
    raise errors.CorruptError(
      f"{folder}: not a tokenizer that transformers reads ({reason}); fetch "
      "the checkpoint's tokenizer/ folder again."
    ) from e
  return Tokenizer(backend, length)
