"""Makes a T5 tokenizer of a closed list of words: each word is one token.

The files are those of a published checkpoint's tokenizer/ folder, so `load` of
vidgen.encoders.tokenizer and transformers read them as any other's.
"""

import json
import pathlib
import secrets
import shutil
import string
from collections.abc import Sequence

from vidgen import errors, tensorfile
from vidgen.encoders import tokenizer

# The log probabilities of the pieces. A text becomes the pieces of the largest
# sum: a word alone beats any of its spellings.
_WORD, _MARK, _LETTER = -4.0, -8.0, -12.0
_MARKS = ".,!?;:'\"()-" + string.digits
_SPACE = "▁"  # What SentencePiece writes before a word.
_SPECIAL = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}


def vocab_size(words: Sequence[str]) -> int:
  """Returns how many ids the tokenizer of these words has.

  Raises:
    InputError: A word is no single lower-case word.
  """
  return _model(words)[1]


def write(folder: pathlib.Path, words: Sequence[str]) -> int:
  """Writes a tokenizer's files into `folder`; returns its vocabulary's size.

  Upper and lower case are one. A word that is not of the list is spelt: in
  letters, digits and marks, or as the unknown token where it has others.

  Args:
    folder: Is made; it may exist if it is empty.
    words: Lower-case words, each once; their order decides the ids.

  Raises:
    InputError: The folder is full, or a word is no single lower-case word.
    StorageError: It could not be written; nothing of it is left.
  """
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise errors.InputError(f"{folder}: exists; name an empty folder.")
  model, size = _model(words)
  draft = folder.with_name(f".{folder.name}.tmp-{secrets.token_hex(8)}")
  try:
    draft.mkdir(parents=True)
    (draft / "spiece.model").write_bytes(model)
    for name, value in _settings().items():
      text = json.dumps(value, indent=2, ensure_ascii=False)
      (draft / name).write_text(text + "\n", encoding="utf-8")
    tokenizer.write_saved(draft)
    for path in (*draft.iterdir(), draft):
      tensorfile.sync(path)
    draft.replace(folder)
    tensorfile.sync(folder.parent)
  except OSError as e:
    raise errors.StorageError(
      f"{folder}: cannot be written: {e.strerror}; check that there is room "
      "and that the folder above may be written to."
    ) from e
  finally:
    shutil.rmtree(draft, ignore_errors=True)
  return size


def _model(words: Sequence[str]) -> tuple[bytes, int]:
  """Returns spiece.model and how many pieces it has."""
  import sentencepiece
  from sentencepiece import sentencepiece_model_pb2

  # The rules of Unicode's NFKC and of case folding, as SentencePiece has them.
  normalizer = sentencepiece.SentencePieceNormalizer(rule_name="nmt_nfkc_cf")
  _check(words, normalizer)
  proto = sentencepiece_model_pb2.ModelProto()
  proto.ParseFromString(normalizer.serialized_model_proto())
  kind = sentencepiece_model_pb2.ModelProto.SentencePiece
  special = [(_SPECIAL[name], 0.0) for name in _SPECIAL]
  kinds = [kind.CONTROL, kind.CONTROL, kind.UNKNOWN]
  pieces = [
    *special,
    *((_SPACE + word, _WORD) for word in words),
    (_SPACE, _LETTER),
    *((mark, _MARK) for mark in _MARKS),
    *((letter, _LETTER) for letter in string.ascii_lowercase),
  ]
  kinds += [kind.NORMAL] * (len(pieces) - len(kinds))
  del proto.pieces[:]
  for (text, score), type_ in zip(pieces, kinds, strict=True):
    proto.pieces.add(piece=text, score=score, type=type_)
  spec = proto.trainer_spec
  spec.model_type = sentencepiece_model_pb2.TrainerSpec.UNIGRAM
  spec.vocab_size = len(pieces)
  spec.pad_id, spec.eos_id, spec.unk_id, spec.bos_id = 0, 1, 2, -1
  spec.pad_piece, spec.eos_piece, spec.unk_piece = _SPECIAL.values()
  return proto.SerializeToString(deterministic=True), len(pieces)


def _check(words: Sequence[str], normalizer) -> None:
  """Refuses what would not be one token."""
  seen = set()
  for word in words:
    if not word or normalizer.Normalize(word) != _SPACE + word:
      raise errors.InputError(
        f"word {word!a}: not a single word in lower case; give it as "
        "SentencePiece's nmt_nfkc_cf would leave it."
      )
    if word in seen:
      raise errors.InputError(f"word {word!a}: is given twice; name it once.")
    seen.add(word)


def _settings() -> dict[str, dict]:
  """Returns what the published JSON files hold, by file name."""
  flags = dict(lstrip=False, normalized=False, rstrip=False, single_word=False)
  tokens = {
    name: dict(content=text, **flags) for name, text in _SPECIAL.items()
  }
  config = dict(
    add_prefix_space=True,
    added_tokens_decoder={
      str(i): dict(**token, special=True)
      for i, token in enumerate(tokens.values())
    },
    additional_special_tokens=[],
    clean_up_tokenization_spaces=True,
    # T5's sentinels are for its own training: a network that reads prompts
    # has no use for them.
    extra_ids=0,
    legacy=True,
    sp_model_kwargs={},
    tokenizer_class="T5Tokenizer",
    **_SPECIAL,
  )
  return {"tokenizer_config.json": config, "special_tokens_map.json": tokens}
