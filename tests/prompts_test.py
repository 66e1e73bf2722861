import dataclasses
import os

import hypothesis
import pytest
from hypothesis import strategies as st

from vidgen import errors, prompts, sample


def read(tmp_path, name, data):
  path = tmp_path / name
  path.write_bytes(data if isinstance(data, bytes) else data.encode())
  return prompts.read(path)


def overrides(line):
  values = dataclasses.asdict(line)
  return {k: v for k, v in values.items() if v is not None and k != "where"}


def test_txt_is_a_prompt_a_line(tmp_path):
  lines = read(tmp_path, "a.txt", "A panda.\n\n  \r\nA cat, a dog.\r\nÉté")
  assert [x.prompt for x in lines] == ["A panda.", "A cat, a dog.", "Été"]
  assert [x.where.rsplit(":")[-1] for x in lines] == ["1", "4", "5"]


def test_only_line_feeds_end_a_line(tmp_path):
  text = "a\u2028b\x0bc\x0cd\x85e\x1cf\rg"
  assert [x.prompt for x in read(tmp_path, "a.txt", text)] == [text]


@pytest.mark.parametrize(
  ("name", "text"),
  [
    ("a.txt", "A panda."),
    ("a.csv", "prompt\nA panda."),
    ("a.jsonl", '{"prompt": "A panda."}'),
    ("A.TXT", "A panda."),
  ],
)
def test_a_byte_order_mark_is_no_text(tmp_path, name, text):
  assert read(tmp_path, name, "\ufeff" + text)[0].prompt == "A panda."


def test_csv_overrides_are_typed(tmp_path):
  lines = read(
    tmp_path,
    "a.csv",
    "prompt,seed,guidance_scale,height,image\n"
    '"A panda, happy.",7,5,64,in/a.png\n'
    "\n"
    '"A\ncat.", , ,,\n'
    "A dog.,,4.5,,/b.png\n",
  )
  assert overrides(lines[0]) == {
    "prompt": "A panda, happy.",
    "seed": 7,
    "guidance_scale": 5.0,
    "height": 64,
    "image": os.fspath(tmp_path / "in/a.png"),
  }
  assert type(lines[0].guidance_scale) is float
  assert overrides(lines[1]) == {"prompt": "A\ncat."}
  assert lines[1].where.endswith("a.csv:4")
  # The row before it takes two lines.
  assert lines[2].where.endswith("a.csv:6")
  assert lines[2].image == "/b.png"


def test_jsonl_sets_every_field(tmp_path):
  lines = read(
    tmp_path,
    "a.jsonl",
    '{"prompt": "A panda.", "negative_prompt": "blurry", "seed": 4294967295,'
    ' "num_frames": 9, "height": 32, "width": 48, "num_steps": 3,'
    ' "guidance_scale": 1, "sampler": "ddim", "video": "a.mp4",'
    ' "image": null, "strength": 0.5, "videos_per_prompt": 2,'
    ' "last_image": "b.png"}\n\n'
    '{"prompt": "\\u00c9t\\u00e9"}',
  )
  got = overrides(lines[0])
  assert set(got) == prompts.TYPES.keys() - {"image"}
  assert got["video"] == os.fspath(tmp_path / "a.mp4")
  assert got["last_image"] == os.fspath(tmp_path / "b.png")
  assert got["guidance_scale"] == 1.0
  assert lines[1].prompt == "Été"


def test_the_fields_are_those_of_the_config_and_the_line():
  config = {field.name for field in dataclasses.fields(sample.SampleConfig)}
  line = {field.name for field in dataclasses.fields(prompts.Line)}
  assert prompts.TYPES.keys() <= config
  assert line == prompts.TYPES.keys() | {"where"}


BAD = [
  ("a.txt", b"", "holds no prompt"),
  ("a.txt", b"\n \r\n\t\n", "holds no prompt"),
  ("a.csv", b"prompt,seed\n", "holds no prompt"),
  ("a.jsonl", b"\n", "holds no prompt"),
  ("a.json", b"{}", "is a .txt, .csv, .jsonl or .array_record"),
  ("a.txt", b"ok\nab\xff\n", ":2: is not UTF-8: byte 0xff at offset 5"),
  ("a.txt", b"\xef\xbb\xbfok\r\n\xc3", ":2: .* byte 0xc3 at offset 7"),
  ("a.txt", "A panda.".encode("utf-16"), "UTF-16"),
  ("a.csv", b"prompt,sed\na,1\n", ":1: unknown .*Did you mean seed"),
  ("a.csv", b"prompt,Num Frames\na,1\n", ":1: .*Did you mean num_frames"),
  ("a.csv", b"prompt,SEED,id\na,1,2\n", ":1: .*'SEED'. Did you mean seed"),
  ("a.csv", b"prompt,steps\na,\n", ":1: .*'steps'. Did you mean num_steps"),
  ("a.csv", b"promt\na\n", ":1: .*no column `prompt`.*'promt'"),
  ("a.csv", b"prompt,seed,seed\na,1,1\n", ":1: .*twice"),
  ("a.csv", b"prompt,seed\na\n", ":2: has 1 columns"),
  ("a.csv", b"prompt\na, b\n", ":2: has 2 columns"),
  ("a.csv", b"prompt,seed\n,1\n", ":2: has no prompt"),
  ("a.csv", b"prompt,seed\na,x\n", ":2: seed must be a whole.*'x'"),
  ("a.csv", b"prompt,strength\na,nan\n", ":2: strength must be above 0"),
  ("a.csv", b"prompt,guidance_scale\na,inf\n", ":2: .*finite"),
  ("a.csv", b'prompt\n"a\n', ":2: unexpected end"),
  ("a.csv", b'prompt\nok\n"a"b\n', ":3: "),
  ("a.jsonl", b'{"prompt": "a"}\n{"prompt" "b"}', ":2: is not JSON"),
  ("a.jsonl", b'["a"]', ":1: must be an object"),
  ("a.jsonl", b"[" * 100_000, ":1: is not JSON"),
  ("a.jsonl", b'{"prompt": "a", "prompt": "b"}', ":1: .*twice"),
  ("a.jsonl", b'{"seed": 1}', ":1: has no prompt"),
  ("a.jsonl", b'{"prompt": " "}', ":1: has no prompt"),
  ("a.jsonl", b'{"prompt": 3}', ":1: prompt must be text, not 3"),
  ("a.jsonl", b'{"prompt": "\\ud800"}', ":1: prompt must be valid"),
  ("a.jsonl", b'{"prompt": "a", "seed": true}', ":1: seed must be a whole"),
  ("a.jsonl", b'{"prompt": "a", "seed": 1.0}', ":1: seed must be a whole"),
  ("a.jsonl", b'{"prompt": "a", "seed": -1}', "from 0 to 4294967295"),
  ("a.jsonl", b'{"prompt": "a", "seed": 4294967296}', "from 0 to"),
  ("a.jsonl", b'{"prompt": "a", "height": -8}', "at least 1"),
  ("a.jsonl", b'{"prompt": "a", "width": 0}', "at least 1"),
  ("a.jsonl", b'{"prompt": "a", "num_frames": 0}', "at least 1"),
  ("a.jsonl", b'{"prompt": "a", "strength": 0}', "above 0"),
  ("a.jsonl", b'{"prompt": "a", "strength": NaN}', "above 0"),
  ("a.jsonl", b'{"prompt": "a", "sampler": "ddmi"}', "ddim, dpmpp_2m_sde"),
  ("a.jsonl", b'{"prompt": "a", "num_step": 3}', "Did you mean num_steps"),
  ("a.jsonl", b'{"prompt": "a"}\n{"promt": "b"}', ":2: .*'promt'. Did you me"),
]


# Tables as people export them, with columns that are no fields.
WIDE = {
  "a.csv": ",prompt,index,seed,,prompt_id\n0,A cat.,7,5,x,1\n1,A dog.,8,,,2\n",
  "a.jsonl": (
    '{"prompt": "A cat.", "seed": 5, "index": 7, "": {"a": [1]}}\n'
    '{"prompt": "A dog.", "index": 8, "prompt_id": null}\n'
  ),
}


@pytest.mark.parametrize("name", WIDE)
def test_what_is_no_field_is_passed_over_with_a_warning(tmp_path, name):
  with pytest.warns(UserWarning) as caught:
    lines = read(tmp_path, name, WIDE[name])
  assert list(map(overrides, lines)) == [
    {"prompt": "A cat.", "seed": 5},
    {"prompt": "A dog."},
  ]
  (text,) = [str(warning.message) for warning in caught]
  assert text.startswith(f"{tmp_path / name}:1: ") and "\n" not in text
  for other in ("'index'", "''", "'prompt_id'"):
    assert other in text
  assert "'seed'" not in text


def test_a_warning_names_the_line_and_not_every_column(tmp_path):
  many = ", ".join(f'"column{i}": 1' for i in range(20))
  with pytest.warns(UserWarning, match=r"a.jsonl:2: .* and 12 more are"):
    read(tmp_path, "a.jsonl", f'{{"prompt": "a"}}\n{{"prompt": "b", {many}}}')


@pytest.mark.parametrize(("name", "data", "message"), BAD)
def test_bad_files_are_one_line(tmp_path, name, data, message):
  with pytest.raises(errors.InputError, match=message) as caught:
    read(tmp_path, name, data)
  assert str(caught.value).startswith(str(tmp_path / name))
  assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path):
  with pytest.raises(errors.InputError, match="No such file"):
    prompts.read(tmp_path / "no.txt")
  (tmp_path / "b.txt").mkdir()
  with pytest.raises(errors.InputError, match="Is a directory"):
    prompts.read(tmp_path / "b.txt")


@hypothesis.settings(
  max_examples=200,
  deadline=None,
  suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
  name=st.sampled_from(["a.txt", "a.csv", "a.jsonl"]),
  data=st.binary(max_size=60)
  | st.text(max_size=60).map(str.encode)
  | st.text(max_size=60).map(lambda text: b"prompt,seed\n" + text.encode()),
)
def test_any_file_is_read_or_refused(tmp_path, name, data):
  try:
    lines = read(tmp_path, name, data)
  except errors.InputError:
    return
  assert lines
  assert all(line.prompt.strip() for line in lines)


def test_a_number_beyond_floats_is_a_bad_line(tmp_path):
  path = tmp_path / "a.jsonl"
  bad = '{"prompt": "a", "guidance_scale": 1' + "0" * 400 + "}"
  path.write_text(bad + '\n{"prompt": "b"}')
  bad, good = prompts.sift(path)
  assert "a.jsonl:1: guidance_scale must be a number" in bad.error
  assert good.prompt == "b"
