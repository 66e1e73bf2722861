"""VBench's names: of every prompt, however long, and what is not there."""

import hashlib
import json
import os

import pytest

from tests.metrics import sets_test
from vidgen import errors
from vidgen.metrics import sets, vbench

LONG = "a very long prompt " * 40
CHINESE = "一只熊猫在弹吉他。" * 30


def _export(folder, out, wanted=None):
  return vbench.export(sets.find(folder, vbench.SUFFIXES), out, wanted)


def _job(folder, prompts):
  clips = [
    (p, None if p == "fails" else sets_test.frames(i))
    for i, p in enumerate(prompts)
  ]
  return sets_test.job(folder, clips)


def test_names_count_from_zero_for_each_prompt(tmp_path):
  folder = _job(tmp_path / "a", ["a cat.", "a dog", "a cat.", "a cat."])
  out = tmp_path / "out"
  found = _export(folder, out)
  names = ["a cat.-0.mp4", "a cat.-1.mp4", "a cat.-2.mp4", "a dog-0.mp4"]
  assert sorted(p.name for p in out.iterdir()) == [*names, "names.json"]
  assert json.loads((out / "names.json").read_text()) == {}
  # In the job's order.
  for name, index in zip(names, (0, 2, 3, 1), strict=True):
    made = folder / f"{index:06d}_0123456789ab.mp4"
    assert (out / name).read_bytes() == made.read_bytes()
    assert os.path.samefile(out / name, made)
  assert (found.files, found.surplus, found.problems) == (4, [], [])
  assert found.lacking == {"a cat.": 2, "a dog": 4}


def test_prompts_that_are_no_file_name_get_one(tmp_path):
  odd = [LONG, LONG + "!", CHINESE, "either/or", "a\0b", "", ".hidden", "a\nb"]
  folder = _job(tmp_path / "a", [*odd, LONG])
  found = _export(folder, tmp_path / "out")
  names = json.loads((tmp_path / "out" / "names.json").read_text())
  assert names == found.renamed
  assert sorted(names.values()) == sorted(odd)
  for name, prompt in names.items():
    assert hashlib.sha256(prompt.encode()).hexdigest()[:12] in name
    assert (tmp_path / "out" / f"{name}-0.mp4").is_file()
    assert len(f"{name}-9999.mp4".encode()) <= 255
  (long,) = (name for name, prompt in names.items() if prompt == LONG)
  assert long.startswith("a very long prompt a very")
  assert (tmp_path / "out" / f"{long}-1.mp4").is_file()
  assert found.files == 9


def test_what_fits_is_left_as_it_is():
  for prompt in ("x" * 239, "Ünïcode 熊猫 👩‍🚀?", "a\\b: *", "ends."):
    assert vbench.file_stem(prompt) == prompt
  assert vbench.file_stem("x" * 240) != "x" * 240


def test_again_adds_what_has_come_and_nothing_twice(tmp_path):
  folder = _job(tmp_path / "a", ["a cat", "fails", "a cat"])
  out = tmp_path / "out"
  first = _export(folder, out)
  assert first.problems == ["000001_0123456789ab: failed: no such image"]
  assert first.files == 2
  assert _export(folder, out) == first
  assert sorted(p.name for p in out.iterdir()) == [
    "a cat-0.mp4",
    "a cat-1.mp4",
    "names.json",
  ]
  other = _job(tmp_path / "b", ["a dog"])
  with pytest.raises(errors.InputError, match="is of another export"):
    _export(other, out)


def test_copies_where_links_cannot_be_made(tmp_path, monkeypatch):
  folder = _job(tmp_path / "a", ["a cat"])

  def refuse(*names):
    raise OSError(18, "Invalid cross-device link")

  monkeypatch.setattr(os, "link", refuse)
  _export(folder, tmp_path / "out")
  (made,) = folder.glob("*.mp4")
  copy = tmp_path / "out" / "a cat-0.mp4"
  assert copy.read_bytes() == made.read_bytes()
  assert not os.path.samefile(copy, made)


def test_completeness_by_the_standard_set(tmp_path):
  info = tmp_path / "VBench_full_info.json"
  entry = lambda prompt, *of: {"prompt_en": prompt, "dimension": list(of)}
  info.write_text(
    json.dumps(
      [
        entry("a cat", "color"),
        entry("a still lake", "scene", "temporal_flickering"),
        entry("a still lake", "color"),
        entry("a dog", "color"),
      ]
    )
  )
  wanted = vbench.standard(info)
  assert wanted == {"a cat": 5, "a still lake": 25, "a dog": 5}
  folder = _job(tmp_path / "a", ["a still lake", *["a cat"] * 5, "a bird"])
  found = _export(folder, tmp_path / "out", wanted)
  assert found.lacking == {"a still lake": 24, "a dog": 5}
  assert found.surplus == ["a bird"]
  text = str(found)
  assert "2 prompts lack 29 videos" in text
  assert "24 of 'a still lake'" in text


@pytest.mark.parametrize("text", ["{}x", '{"a": 1}', "[1]", '[{"a": 1}]'])
def test_other_json_is_one_line(tmp_path, text):
  path = tmp_path / "info.json"
  path.write_text(text)
  with pytest.raises(errors.InputError, match=r"is not VBench_full_info\.json"):
    vbench.standard(path)


def test_videos_without_prompts_are_an_error(tmp_path):
  item = sets.Item("a", tmp_path / "a.mp4")
  with pytest.raises(errors.InputError, match="a has no prompt"):
    vbench.export([item], tmp_path / "out")
