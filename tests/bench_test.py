"""`vidgen bench` times real clips and writes what it says."""

import json

from tests import tiny_cogvideox
from vidgen.cli import main


def test_bench(tmp_path, capsys):
  tiny_cogvideox.write(tmp_path, "2b")
  code = main.main(
    [
      "bench",
      f"--checkpoint={tmp_path / 'checkpoint'}",
      "--config.dtype=float32",
      "--config.num_steps=2",
      "--runs=1",
      f"--json={tmp_path / 'bench.json'}",
    ]
  )
  assert code == 0
  out = capsys.readouterr().out
  assert "9 frames of 64x96" in out
  report = json.loads((tmp_path / "bench.json").read_text())
  assert report["runs"] == 1
  assert set(report["stage_seconds"]) == {"text", "denoise", "decode"}
  assert 0 < sum(report["stage_seconds"].values()) <= report["clip_seconds"]
  assert report["compile_seconds"] > 0
