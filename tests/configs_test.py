"""Every config loads by itself and asks for something legal."""

import pathlib
import re

import pytest
from absl import flags
from ml_collections import config_flags

from vidgen import sample
from vidgen.cli import default_sample_config, parse

FOLDER = pathlib.Path(__file__).parent.parent / "configs"
CONFIGS = sorted(FOLDER.glob("*_sample.py"))


def load(path):
  def define(values, argv):
    parse.define_config(values, argv, sample.SampleConfig, "")

  values = parse.parse(define, "vidgen sample", [f"--config={path}"])
  return values["config"].value


def test_the_published_variants_are_there():
  names = ["2b", "5b", "5b_i2v", "1_5_5b", "1_5_5b_i2v"]
  assert {path.name for path in CONFIGS} >= {
    f"cogvideox_{name}_sample.py" for name in names
  }


def _is_cogvideox(path):
  return path.name.startswith("cogvideox")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_is_legal(path):
  config = load(path)
  config.prompt = "A panda."
  (clip,) = sample.plan(config)
  if not _is_cogvideox(path):
    assert (clip.num_steps, clip.num_frames) in {(25, 14), (25, 25)}
    return
  assert clip.num_steps == 50
  # The causal VAE takes one frame, then groups of four.
  assert clip.num_frames % 4 == 1
  assert clip.height % 16 == clip.width % 16 == 0


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_docstring_holds_the_command(path):
  text = path.read_text()
  assert f"--config=configs/{path.name}" in text
  for word in ("Hardware:", "Cost:", "Expect:"):
    assert word in text
  image = "Image to video" in text
  name = load(path).checkpoint
  assert ("--image=" in text) == image == ("I2V" in name or "img2vid" in name)


def test_the_sizes_are_the_published_ones():
  for path in filter(_is_cogvideox, CONFIGS):
    config = load(path)
    size = (config.num_frames, config.height, config.width)
    want = (81, 768, 1360) if "1_5" in path.name else (49, 480, 720)
    assert size == want
    assert re.fullmatch(r"THUDM/CogVideoX.*", config.checkpoint)


def test_defaults_are_those_of_the_dataclass():
  assert default_sample_config.get_config() == sample.SampleConfig()


def test_configs_load_with_plain_config_flags(monkeypatch):
  monkeypatch.setattr("sys.argv", ["x"])
  values = flags.FlagValues()
  with pytest.warns(DeprecationWarning):
    config_flags.DEFINE_config_file(
      "config", str(CONFIGS[0]), flag_values=values
    )
  assert isinstance(values["config"].value, sample.SampleConfig)
