"""The README's Python runs as it stands, on a small checkpoint."""

import pathlib
import re

import pytest

import vidgen
from tests import tiny_cogvideox

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.usefixtures("compiled_fast_once")
def test_python_example(tmp_path, monkeypatch, capsys):
  tiny_cogvideox.write(tmp_path, "2b")
  (tmp_path / "checkpoint").rename(tmp_path / "CogVideoX-2b")
  monkeypatch.chdir(tmp_path)
  (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
  scope = {}
  exec(code, scope)
  out = capsys.readouterr().out
  assert "(1, 9, 64, 96, 3) uint8" in out
  assert "(1, 3, 8, 12, 4) (1, 3, 8, 12, 4)" in out
  assert isinstance(scope["pipeline"], vidgen.Pipeline)


def test_files_that_it_names_exist():
  names = re.findall(
    r"(?<![\w/.-])((?:vidgen|configs|tests)/[\w./-]+\.\w+)", README
  )
  assert names
  for name in names:
    assert (ROOT / name).exists(), name


@pytest.mark.parametrize("word", ["/tmp", "/root", "TODO"])
def test_it_speaks_of_itself_alone(word):
  assert word not in README
