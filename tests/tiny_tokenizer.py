"""Makes a small T5 tokenizer in the layout of the published checkpoints."""

import io
import json
import pathlib
import random
import shutil

import sentencepiece

EXTRA_IDS = 100
PIECES = 200

_SUBJECTS = "a panda|two otters|the old train|a red kite|my robot|the sea"
_VERBS = "plays|runs|drifts|sings|rolls slowly|looks up|turns"
_PLACES = "in the forest|on a quiet street|under water|at night, 4 a.m.|by it"
_STYLES = "cinematic light|close-up|the camera pans left|film grain!|8K; slow"


def write(folder: pathlib.Path, *, layout: str = "spiece") -> int:
  """Writes a tokenizer into `folder`, and returns the size of its vocabulary.

  Args:
    folder: Is made if it is not there.
    layout: "spiece", as CogVideoX publishes it: spiece.model and three JSON
      files; or "json", as transformers 5 saves it: tokenizer.json.
  """
  folder.mkdir(parents=True, exist_ok=True)
  if layout == "json":
    import transformers

    published = folder / "published"
    write(published)
    tokenizer = transformers.T5Tokenizer.from_pretrained(published)
    tokenizer.save_pretrained(folder)
    shutil.rmtree(published)
  else:
    (folder / "spiece.model").write_bytes(_train())
    for name, value in _settings().items():
      text = json.dumps(value, indent=2, ensure_ascii=False)
      (folder / name).write_text(text + "\n", encoding="utf-8")
  return PIECES + EXTRA_IDS


def _train() -> bytes:
  """Returns a SentencePiece model with T5's special tokens."""
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(_sentences()),
    model_writer=model,
    model_type="unigram",
    vocab_size=PIECES,
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    character_coverage=1.0,
    normalization_rule_name="nmt_nfkc",
    minloglevel=2,
  )
  return model.getvalue()


def _settings() -> dict[str, dict]:
  """Returns what the published JSON files hold, by file name."""
  # <extra_id_0> is the last token of the vocabulary.
  last = PIECES + EXTRA_IDS - 1
  extra = {f"<extra_id_{i}>": last - i for i in range(EXTRA_IDS)}
  special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
  ids = {"<pad>": 0, "</s>": 1, "<unk>": 2, **extra}
  flags = dict(lstrip=False, normalized=False, rstrip=False, single_word=False)
  token = lambda text: dict(content=text, **flags)
  config = dict(
    add_prefix_space=True,
    added_tokens_decoder={
      str(i): dict(**token(text), special=True)
      for text, i in sorted(ids.items(), key=lambda item: item[1])
    },
    additional_special_tokens=list(extra),
    clean_up_tokenization_spaces=True,
    extra_ids=EXTRA_IDS,
    legacy=True,
    model_max_length=226,
    sp_model_kwargs={},
    tokenizer_class="T5Tokenizer",
    **special,
  )
  tokens = {name: token(text) for name, text in special.items()}
  return {
    "tokenizer_config.json": config,
    "special_tokens_map.json": dict(
      additional_special_tokens=list(extra), **tokens
    ),
    "added_tokens.json": extra,
  }


def _sentences() -> list[str]:
  """Returns a few hundred made-up sentences, always the same."""
  draw = random.Random(0)
  starts, ends = "bcdfghklmnprstvw", ["a", "e", "i", "o", "u", "an", "er"]
  syllable = lambda: draw.choice(starts) + draw.choice(ends)
  words = [
    "".join(syllable() for _ in range(draw.randint(1, 3))) for _ in range(90)
  ]
  parts = [p.split("|") for p in (_SUBJECTS, _VERBS, _PLACES, _STYLES)]
  lines = []
  for _ in range(400):
    subject, verb, place, style = (draw.choice(part) for part in parts)
    made_up = " ".join(draw.choices(words, k=5))
    lines.append(f"{subject.capitalize()} {verb} {place}. {style}, {made_up}.")
  return [*lines, "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ é ß ?"]
