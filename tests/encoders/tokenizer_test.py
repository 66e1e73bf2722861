"""Ids equal transformers' own, and broken files are named."""

import json
import logging
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
import sentencepiece
import transformers
from sentencepiece import sentencepiece_model_pb2

from tests import tiny_tokenizer
from vidgen import errors
from vidgen.encoders import tokenizer

PROMPTS = {
  "empty": "",
  "plain": "A panda plays in the forest. Cinematic light, close-up.",
  "unicode": "Ein Äffchen läuft über die Straße, \ufb01lm \uff21\uff11 №",
  "emoji": "a red kite 🪁 by the sea 👩‍🚀😀",
  "other script": "熊猫在森林里弹吉他",
  "long": "two otters drift slowly on a quiet street, " * 60,
  "long word": "x" * 3000,
  "white space": "the sea\n\n\tturns \r\n at   night\u00a0now\u3000end",
  "leading": "   my robot looks up",
  "special tokens": "<extra_id_0> a panda </s> sings <pad> <unk>",
  "controls": "the\0 old\x1b[31m train\u200b",
}


@pytest.fixture(scope="module", params=["spiece", "json"])
def folder(request, tmp_path_factory):
  path = tmp_path_factory.mktemp("tokenizer")
  tiny_tokenizer.write(path, layout=request.param)
  return path


@pytest.fixture
def published(tmp_path):
  tiny_tokenizer.write(tmp_path)
  return tmp_path


@pytest.mark.parametrize("length", [8, 32, 226])
def test_ids_are_those_of_the_pipeline(folder, length):
  """The two calls of diffusers' CogVideoXPipeline, prompt by prompt."""
  reference = transformers.T5Tokenizer.from_pretrained(folder)
  prompts = list(PROMPTS.values())
  want = reference(
    prompts,
    padding="max_length",
    max_length=length,
    truncation=True,
    add_special_tokens=True,
    return_tensors="np",
  ).input_ids
  got = tokenizer.load(folder)(prompts, length)
  assert got.ids.dtype == np.int32
  np.testing.assert_array_equal(got.ids, want)

  for prompt, cut in zip(prompts, got.truncated, strict=True):
    full = reference([prompt], padding="longest", verbose=False).input_ids
    if len(full[0]) <= length:
      assert cut is None
    else:
      assert [cut] == reference.batch_decode(
        [row[length - 1 : -1] for row in full]
      )


def test_ids_are_those_of_sentencepiece(published):
  """What T5 was trained with; transformers 5 runs another implementation."""
  model = str(published / "spiece.model")
  reference = sentencepiece.SentencePieceProcessor(model_file=model)
  reads = tokenizer.load(published)
  for name in ("empty", "plain", "unicode", "white space", "leading"):
    want = [*reference.encode(PROMPTS[name]), 1]
    got = reads([PROMPTS[name]], 226).ids[0]
    assert got.tolist() == want + [0] * (226 - len(want)), name


def test_ids_are_no_padding_and_no_unknowns(published):
  """Guards the tests above: equal would also be all `<unk>` on both sides."""
  reads = tokenizer.load(published)
  ids = reads([PROMPTS["plain"]], 64).ids[0]
  length = ids.tolist().index(1) + 1
  assert length > 10
  assert (ids[: length - 1] > 2).all()
  assert (ids[length:] == 0).all()
  assert len(set(ids.tolist())) > 10
  assert reads.vocab_size == tiny_tokenizer.PIECES + 100


def test_truncation_starts_where_the_prompt_no_longer_fits(published):
  reads = tokenizer.load(published)
  ids = reads(["a panda sings"], 64).ids[0]
  fits = ids.tolist().index(1) + 1
  assert reads(["a panda sings"], fits).truncated == [None]
  shorter = reads(["a panda sings", ""], fits - 1)
  assert shorter.truncated[1] is None
  assert "a panda sings".endswith(shorter.truncated[0])
  assert shorter.ids[0].tolist() == [*ids[: fits - 2], 1]


def test_no_prompts(published):
  tokens = tokenizer.load(published)([], 16)
  assert tokens.ids.shape == (0, 16)
  assert tokens.truncated == []


def test_logging_is_left_as_it_was(published):
  tokenizer.load(published)
  assert logging.root.manager.disable == 0


def test_it_is_quiet_without_torch(published):
  """transformers tells of a missing torch, and of each long prompt."""
  script = textwrap.dedent(f"""
      import importlib.util, pathlib, sys
      find = importlib.util.find_spec
      importlib.util.find_spec = (
          lambda name, *a: None if name == "torch" else find(name, *a))
      sys.modules["torch"] = None
      from vidgen.encoders import tokenizer
      assert "transformers" not in sys.modules
      reads = tokenizer.load(pathlib.Path({str(published)!r}))
      reads(["a panda " * 300], 226)
      print(reads(["a panda"], 16).ids.tolist())
  """)
  done = subprocess.run(
    [sys.executable, "-W", "error", "-c", script],
    capture_output=True,
    text=True,
    check=False,
  )
  assert (done.returncode, done.stderr) == (0, "")
  want = tokenizer.load(published)(["a panda"], 16).ids.tolist()
  assert done.stdout.strip() == str(want)


def test_half_a_surrogate_pair_is_refused(published):
  reads = tokenizer.load(published)
  with pytest.raises(errors.InputError, match=r"prompt 2: character 3 is half"):
    reads(["fine", "ab\ud83d"], 16)


def test_length_without_room_is_refused(published):
  with pytest.raises(errors.InputError, match="max_text_length is 1"):
    tokenizer.load(published)(["a"], 1)


def one_line(error, path):
  """The message is one line that names the file."""
  message = str(error.value)
  assert str(path) in message
  assert "\n" not in message
  assert "tiktoken" not in message


def test_missing_folder(tmp_path):
  with pytest.raises(errors.InputError, match=r"spiece\.model") as error:
    tokenizer.load(tmp_path / "tokenizer")
  one_line(error, tmp_path / "tokenizer")


def test_missing_model(published):
  (published / "spiece.model").unlink()
  with pytest.raises(
    errors.InputError, match=r"neither spiece\.model"
  ) as error:
    tokenizer.load(published)
  one_line(error, published)


def test_the_json_files_beside_the_model_may_be_missing(published):
  want = tokenizer.load(published)([PROMPTS["plain"]], 64).ids
  for path in published.glob("*.json"):
    path.unlink()
  got = tokenizer.load(published)([PROMPTS["plain"]], 64).ids
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
  "name",
  [
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
  ],
)
@pytest.mark.parametrize(
  "content", [b"{", b"[1]", b"", b"\xff\xfe\x00", b"[" * 100_000]
)
def test_broken_json(published, name, content):
  (published / name).write_bytes(content)
  with pytest.raises(errors.CorruptError) as error:
    tokenizer.load(published)
  one_line(error, published / name)


@pytest.mark.parametrize("content", ["{}", '{"model": {}}', '{"version": 1}'])
def test_json_that_is_no_tokenizer(published, content):
  (published / "tokenizer.json").write_text(content)
  with pytest.raises(errors.CorruptError) as error:
    tokenizer.load(published)
  one_line(error, published / "tokenizer.json")


def test_model_cut_anywhere(published):
  """Protocol buffers parse when they end between two fields: no cut passes."""
  path = published / "spiece.model"
  content = path.read_bytes()
  step = len(content) // 40
  for end in [0, 1, *range(step, len(content), step), len(content) - 1]:
    path.write_bytes(content[:end])
    with pytest.raises(errors.CorruptError) as error:
      tokenizer.load(published)
    one_line(error, path)


@pytest.mark.parametrize("part", ["pieces", "trainer_spec", "normalizer_spec"])
def test_model_without_a_part(published, part):
  """Still a message that parses, for every part is optional in the format."""
  path = published / "spiece.model"
  proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
  proto.ClearField(part)
  path.write_bytes(proto.SerializeToString())
  with pytest.raises(errors.CorruptError, match="all of its parts") as error:
    tokenizer.load(published)
  one_line(error, path)


@pytest.mark.parametrize("content", [b"\x80\x04K\x01.", bytes(range(256)) * 9])
def test_model_of_another_kind(published, content):
  (published / "spiece.model").write_bytes(content)
  with pytest.raises(errors.CorruptError) as error:
    tokenizer.load(published)
  one_line(error, published / "spiece.model")


def test_tokenizer_of_another_class(published):
  path = published / "tokenizer_config.json"
  config = json.loads(path.read_text())
  path.write_text(json.dumps(config | {"tokenizer_class": "CLIPTokenizer"}))
  with pytest.raises(errors.InputError, match="CLIPTokenizer") as error:
    tokenizer.load(published)
  one_line(error, path)


def test_code_of_the_checkpoint_does_not_run(published, tmp_path):
  path = published / "tokenizer_config.json"
  config = json.loads(path.read_text())
  auto_map = {"AutoTokenizer": ["hostile.Tokenizer", None]}
  path.write_text(json.dumps(config | {"auto_map": auto_map}))
  (published / "hostile.py").write_text(
    f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
  )
  assert tokenizer.load(published)(["a"], 8).ids.shape == (1, 8)
  assert not (tmp_path / "ran").exists()


def test_other_special_ids_are_refused(published):
  path = published / "tokenizer_config.json"
  config = json.loads(path.read_text())
  path.write_text(json.dumps(config | {"pad_token": "▁"}))
  (published / "special_tokens_map.json").unlink()
  with pytest.raises(errors.InputError, match="not T5's tokenizer") as error:
    tokenizer.load(published)
  one_line(error, published / "spiece.model")


def test_warning_filters_are_left_as_they_were(published):
  before = list(warnings.filters)
  tokenizer.load(published)
  assert warnings.filters == before
