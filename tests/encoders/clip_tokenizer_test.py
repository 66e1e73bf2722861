import numpy as np
import pytest

from tests import tiny_clip_tokenizer
from vidgen import errors
from vidgen.encoders import clip_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tokenizer")
  tiny_clip_tokenizer.write(folder)
  return folder


def test_prompts_are_padded_and_ended(folder):
  tokenizer = clip_tokenizer.load(folder, 8)
  ids = tokenizer(["Red and", ""])
  assert ids.shape == (2, 8) and ids.dtype == np.int32
  start, end = tokenizer.vocab_size - 2, tokenizer.vocab_size - 1
  # "red" and "and" are merged; 0 pads.
  assert ids[0].tolist() == [start, end - 2, end - 4, end, 0, 0, 0, 0]
  assert ids[1].tolist() == [start, end, 0, 0, 0, 0, 0, 0]


def test_long_prompts_are_told(folder):
  tokenizer = clip_tokenizer.load(folder, 4)
  with pytest.warns(UserWarning, match="longer than 4 tokens"):
    (ids,) = tokenizer(["a b c d e f"])
  assert len(ids) == 4 and ids[-1] == tokenizer.vocab_size - 1


def test_a_folder_without_it(tmp_path):
  with pytest.raises(errors.InputError, match=r"vocab\.json and merges\.txt"):
    clip_tokenizer.load(tmp_path, 77)


def test_a_file_that_is_none(tmp_path):
  tiny_clip_tokenizer.write(tmp_path)
  (tmp_path / "vocab.json").write_text("[")
  with pytest.raises(errors.CorruptError, match="not a tokenizer"):
    clip_tokenizer.load(tmp_path, 77)
