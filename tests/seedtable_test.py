import dataclasses
import json
import math
import os

import numpy as np
import pytest
import scipy.stats

from tests import tiny_training, toy_sampling, toy_training
from vidgen import errors, seedtable, train
from vidgen.cli import main


def test_interval_is_that_of_scipys_t_test():
  values = np.array([1.0, 2.5, 2.0, 4.0])
  want = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
  assert seedtable.interval(values) == pytest.approx(tuple(want))
  assert all(map(math.isnan, seedtable.interval(values[:1])))


def test_interval_holds_the_mean_as_often_as_it_says():
  draw = np.random.default_rng(0).normal(3, 2, (2000, 4))
  bounds = np.array([seedtable.interval(row) for row in draw])
  share = np.mean((bounds[:, 0] <= 3) & (bounds[:, 1] >= 3))
  assert 0.935 < share < 0.965


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
  """Training runs of three seeds."""
  home = tmp_path_factory.mktemp("runs")
  config = toy_training.config(tiny_training.shapes(home), 2)
  for seed in range(3):
    train.run(dataclasses.replace(config, seed=seed), home / str(seed))
  train.run(dataclasses.replace(config, ema_decay=0.5), home / "other")
  return home


def test_table_of_runs(seeds, tmp_path, capsys):
  paths = [os.fspath(seeds / str(seed)) for seed in range(3)]
  file = tmp_path / "table.md"
  capsys.readouterr()
  assert main.main(["repro", "report", *paths, f"--out={file}"]) == 0
  table = capsys.readouterr().out
  assert file.read_text() == table
  losses = [
    json.loads((seeds / str(s) / "manifest.json").read_text())["outputs"][
      "metrics"
    ]["loss"]
    for s in range(3)
  ]
  (row,) = [x for x in table.splitlines() if x.startswith("| loss |")]
  low, high = seedtable.interval(np.array(losses))
  assert f"| {np.mean(losses):.6g} | {low:.6g} to {high:.6g} |" in row
  assert "n = 3 runs" in table
  assert "Seeds: 0, 1, 2." in table
  assert "differ in" not in table
  assert "twice" not in table


def test_what_runs_do_not_share_is_told(seeds):
  table = seedtable.make([str(seeds / "0"), str(seeds / "other")])
  assert "Besides the seed the runs differ in: config ema_decay." in table
  assert "A seed is there twice" in table


def test_one_run_has_no_interval(seeds):
  (row,) = [
    line
    for line in seedtable.make([str(seeds / "0")]).splitlines()
    if line.startswith("| loss |")
  ]
  assert row.split(" | ")[2] == "-"


def test_evaluations(tmp_path):
  for number, value in enumerate((30.0, 32.0)):
    held = {"value": value, "low": 1.0, "high": 99.0, "n": 4, "name": "psnr"}
    text = json.dumps({"metrics": {"psnr|a": held}, "reference": "x"})
    (tmp_path / f"{number}.json").write_text(text)
  table = seedtable.make([str(tmp_path / f"{i}.json") for i in range(2)])
  assert "| psnr\\|a | 31 | 18.2938 to 43.7062 | 30 | 32 |" in table
  assert table.count("\n| psnr") == 1


def test_metrics_that_are_measured_differently_have_no_mean(tmp_path):
  for number, name in enumerate(("lpips-alex-n16", "lpips-vgg-n64")):
    metrics = {"lpips": {"value": 0.1 + number, "n": 16, "name": name}}
    text = json.dumps({"metrics": metrics})
    (tmp_path / f"{number}.json").write_text(text)
  paths = [str(tmp_path / f"{i}.json") for i in range(2)]
  with pytest.raises(errors.InputError, match="lpips is lpips-vgg-n64, that"):
    seedtable.make(paths)


def test_an_evaluation_in_the_folder_of_a_run(tmp_path, seeds):
  metrics = {"fvd": {"value": 3.0, "low": 1.0, "n": 4}}
  text = json.dumps({"metrics": metrics})
  folders = [toy_sampling.run(tmp_path / n, seed=i) for i, n in enumerate("ab")]
  for folder in (*folders, seeds / "2"):
    (folder / "evaluate.json").write_text(text)
  table = seedtable.make([str(folder) for folder in folders])
  assert table.count("\n| ") == 2  # The head, and fvd.
  assert "| fvd | 3 | 3 to 3 | 3 | 3 |" in table and "Seeds: 0, 1." in table
  table = seedtable.make([str(seeds / "2")])
  (seeds / "2" / "evaluate.json").unlink()
  assert "| fvd |" in table and "| loss |" in table


def test_what_is_no_number_is_shown(tmp_path):
  for i, (loss, far) in enumerate([("nan", "inf"), (1.0, 2.0)]):
    text = json.dumps({"metrics": {"loss": loss, "far": {"value": far}}})
    (tmp_path / f"{i}.json").write_text(text)
  table = seedtable.make([str(tmp_path / f"{i}.json") for i in range(2)])
  assert "| loss | nan | nan to nan | nan | nan |" in table
  assert "| far | inf | nan to nan | 2 | inf |" in table


def test_runs_without_metrics(tmp_path, seeds):
  clips = toy_sampling.run(tmp_path / "a", count=1)
  with pytest.raises(errors.InputError, match="has no metrics"):
    seedtable.make([str(clips)])
  other = tmp_path / "other.json"
  other.write_text('{"metrics": {"fvd": {"value": 3.0}}}')
  with pytest.raises(errors.InputError, match="no metric in common"):
    seedtable.make([str(seeds / "0"), str(other)])
