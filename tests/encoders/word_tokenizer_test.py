"""Each word is one token, whoever reads the files."""

import json

import numpy as np
import pytest
import sentencepiece
import transformers

from vidgen import errors
from vidgen.data import moving_shapes
from vidgen.encoders import tokenizer, word_tokenizer

LENGTH = 48
ODD = {
  "empty": "",
  "unknown": "A xylophone, redder than 12 zebras!",
  "unicode": "\uff32ed c\u0131rcle ﬁne Straße 熊猫 🪁",
  "white space": "  a  red\tcircle\n moves \u00a0right ",
  "special": "a red </s> circle <pad> <extra_id_0>",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("words") / "tokenizer"
  word_tokenizer.write(path, moving_shapes.words())
  return path


@pytest.fixture(scope="module")
def captions():
  rng = np.random.default_rng(0)
  scenes = [moving_shapes.draw_scene(rng, two=i % 2 == 1) for i in range(2000)]
  return [moving_shapes.caption(rng, scene) for scene in scenes]


def test_each_word_of_a_caption_is_one_token(folder, captions):
  load = tokenizer.load(folder)
  ids, truncated = load(captions, LENGTH)
  assert not any(truncated)
  assert not np.any(ids == 2)
  marks = str.maketrans({mark: f" {mark}" for mark in ".,"})
  for row, caption in zip(ids, captions, strict=True):
    want = len(caption.translate(marks).split()) + 1
    assert np.count_nonzero(row) == want, caption


def test_a_caption_by_its_pieces(folder):
  backend = transformers.T5Tokenizer.from_pretrained(folder)
  got = backend.convert_ids_to_tokens(
    backend("A red circle moves to the right.")["input_ids"]
  )
  want = [
    "▁a",
    "▁red",
    "▁circle",
    "▁moves",
    "▁to",
    "▁the",
    "▁right",
    ".",
    "</s>",
  ]
  assert got == want


def test_case_does_not_count(folder, captions):
  load = tokenizer.load(folder)
  want = load([caption.lower() for caption in captions], LENGTH).ids
  np.testing.assert_array_equal(load(captions, LENGTH).ids, want)
  upper = [caption.upper() for caption in captions]
  np.testing.assert_array_equal(load(upper, LENGTH).ids, want)


def test_transformers_reads_the_same_ids(folder, captions):
  prompts = [*captions[:300], *ODD.values()]
  got = tokenizer.load(folder)(prompts, LENGTH).ids
  for kind in (transformers.T5Tokenizer, transformers.AutoTokenizer):
    reference = kind.from_pretrained(folder)
    want = reference(
      prompts,
      padding="max_length",
      max_length=LENGTH,
      truncation=True,
      return_tensors="np",
    ).input_ids
    np.testing.assert_array_equal(got, want)


def test_sentencepiece_reads_the_same_ids(folder, captions):
  """Also of unknown words; special tokens are transformers' own affair."""
  odd = [ODD[name] for name in ("empty", "unknown", "white space")]
  prompts = [*captions[:300], *odd]
  reference = sentencepiece.SentencePieceProcessor(
    model_file=str(folder / "spiece.model")
  )
  got = tokenizer.load(folder)(prompts, LENGTH).ids
  for row, prompt in zip(got, prompts, strict=True):
    want = [*reference.encode(prompt), 1]
    assert row[: len(want)].tolist() == want
    assert not row[len(want) :].any()


def test_an_unknown_word_is_spelt(folder):
  backend = transformers.T5Tokenizer.from_pretrained(folder)
  assert backend.tokenize("xyz7") == ["▁", "x", "y", "z", "7"]
  assert backend.tokenize("熊") == ["▁", "熊"]
  assert backend("熊")["input_ids"][1:] == [2, 1]


def test_the_vocabulary_is_small_and_whole(tmp_path):
  words = ["red", "circle"]
  size = word_tokenizer.write(tmp_path / "new", words)
  assert size == tokenizer.load(tmp_path / "new").vocab_size
  vocab = transformers.T5Tokenizer.from_pretrained(tmp_path / "new").get_vocab()
  assert sorted(vocab.values()) == list(range(size))
  assert [vocab[s] for s in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
  assert [vocab["▁" + word] for word in words] == [3, 4]


def test_the_files_are_small_and_the_same_each_time(tmp_path, folder):
  again = tmp_path / "again"
  again.mkdir()
  word_tokenizer.write(again, moving_shapes.words())
  files = {path.name: path.read_bytes() for path in folder.iterdir()}
  assert files == {path.name: path.read_bytes() for path in again.iterdir()}
  assert max(map(len, files.values())) < 350_000
  assert all(json.loads(v) for k, v in files.items() if k.endswith(".json"))


@pytest.mark.parametrize(
  "words", [["Red"], ["a b"], [""], ["red", "red"], [" red"], ["ﬁne"]]
)
def test_words_that_are_none_are_refused(tmp_path, words):
  with pytest.raises(errors.InputError, match="word "):
    word_tokenizer.write(tmp_path / "new", words)
  assert not list(tmp_path.iterdir())


def test_a_full_folder_is_left_alone(tmp_path):
  (tmp_path / "mine").write_text("kept")
  with pytest.raises(errors.InputError, match="empty folder"):
    word_tokenizer.write(tmp_path, ["red"])
  assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
  def full(path):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(word_tokenizer.tensorfile, "sync", full)
  with pytest.raises(errors.StorageError, match="No space left"):
    word_tokenizer.write(tmp_path / "new", ["red"])
  assert not list(tmp_path.iterdir())
