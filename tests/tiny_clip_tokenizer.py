"""A small CLIP tokenizer, in the files that checkpoints publish."""

import json
import pathlib

# The ends of words are marked; each byte is a token, too.
_LETTERS = "abcdefghijklmnopqrstuvwxyz.,"
_ENDS = ("<|startoftext|>", "<|endoftext|>")
_MERGES = (("a", "n"), ("an", "d</w>"), ("r", "e"), ("re", "d</w>"))


def write(folder: pathlib.Path) -> None:
  """Writes it; the token of "!", 0, pads, as in Stable Diffusion 2."""
  folder.mkdir(parents=True, exist_ok=True)
  merged = ["".join(pair) for pair in _MERGES]
  tokens = ["!", *_LETTERS, *(f"{x}</w>" for x in _LETTERS), *merged, *_ENDS]
  vocabulary = {token: i for i, token in enumerate(tokens)}
  (folder / "vocab.json").write_text(json.dumps(vocabulary))
  lines = ["#version: 0.2", *(" ".join(pair) for pair in _MERGES)]
  (folder / "merges.txt").write_text("\n".join(lines) + "\n")
  config = {
    "tokenizer_class": "CLIPTokenizer",
    "bos_token": _ENDS[0],
    "eos_token": _ENDS[1],
    "unk_token": _ENDS[1],
    "pad_token": "!",
    "model_max_length": 77,
  }
  (folder / "tokenizer_config.json").write_text(json.dumps(config))
