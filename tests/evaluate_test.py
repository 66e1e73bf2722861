"""The command `vidgen evaluate`: what it prints, writes, skips and refuses."""

import json
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from tests.metrics import sets_test
from vidgen import errors, evaluate, filehashes, rerun, video
from vidgen.cli import main
from vidgen.metrics import (
  clip_score,
  distributions,
  i3d,
  inception,
  paired,
  set_distances,
  sets,
  temporal,
)


def _write(folder, names, seed=0, count=3, size=(16, 24)):
  folder.mkdir(exist_ok=True)
  for i, name in enumerate(names):
    pixels = sets_test.frames(seed + i, count, size)
    np.savez(folder / f"{name}.npz", frames=pixels)
  return folder


def _break(path):
  path.write_bytes(path.read_bytes()[:100])


@pytest.fixture
def folders(tmp_path):
  return _write(tmp_path / "a", "pqrs"), _write(tmp_path / "b", "pqrs", 50)


def test_numbers_are_the_means_of_the_clips(folders):
  a, b = folders
  found = evaluate.run(evaluate.Options(str(b), str(a)))
  names = ["psnr", "ssim", "flicker", "temporal_flickering"]
  assert list(found.metrics) == names
  read = lambda folder: {
    item.name: sets.read_video(item).frames for item in sets.find(folder)
  }
  x, y = read(a), read(b)
  for name, want in (
    ("psnr", {k: paired.psnr(x[k], y[k]) for k in x}),
    ("ssim", {k: paired.ssim(x[k], y[k]) for k in x}),
    ("flicker", {k: temporal.flicker(y[k]) for k in y}),
  ):
    result = found.metrics[name]
    assert result.clips == want
    assert result.estimate.value == pytest.approx(np.mean([*want.values()]))
    assert result.estimate.low < result.estimate.value < result.estimate.high
    assert (result.n, result.skipped) == (4, [])
  name = found.metrics["psnr"].name
  assert name == "psnr-rgb-video-max100-npz-3f-16x24-n4-v1"


def test_what_cannot_be_read_is_counted_and_named(folders):
  a, b = folders
  _break(a / "q.npz")
  _break(b / "r.npz")
  _write(b, "p", 9, count=2)  # Shorter than its reference.
  found = evaluate.run(evaluate.Options(str(b), str(a)))
  psnr, flicker = found.metrics["psnr"], found.metrics["flicker"]
  assert list(psnr.clips) == ["s"]
  reasons = {skip.clip: skip.reason for skip in psnr.skipped}
  assert "its reference 3 frames of 16x24" in reasons["p"]
  assert "a/q.npz: is no .npz file" in reasons["q"]
  assert "b/r.npz: is no .npz file" in reasons["r"]
  assert (flicker.n, [skip.clip for skip in flicker.skipped]) == (3, ["r"])
  assert "-mixed-n3-" in flicker.name
  text = str(found)
  assert "b/r.npz: is no .npz file" in text
  assert json.loads(found.to_json())["metrics"]["psnr"]["skipped"] == 3


def test_what_a_set_lacks_is_said(folders):
  a, b = folders
  (a / "p.npz").rename(a / "t.npz")
  with pytest.warns(UserWarning) as caught:
    found = evaluate.run(evaluate.Options(str(b), str(a)))
  lines = [str(warning.message) for warning in caught]
  assert lines == [
    "the reference set lacks 1 of the other's clips: p.",
    "the generated set lacks 1 of the other's clips: t.",
  ]
  assert found.metrics["psnr"].n == 3
  content = json.loads(found.to_json())
  assert content["reference"]["missing"] == ["p"]
  assert content["generated"]["missing"] == ["t"]


def test_n_takes_the_first_that_can_be_measured(folders):
  a, b = folders
  _break(b / "p.npz")
  options = evaluate.Options(str(b), str(a), n=2)
  psnr = evaluate.run(options).metrics["psnr"]
  assert list(psnr.clips) == ["q", "r"]
  options.n = 4
  with pytest.raises(
    errors.InputError, match=r"3, not 4, of the clips.*p\.npz"
  ):
    evaluate.run(options)
  for name in "qrs":
    _break(b / f"{name}.npz")
  with pytest.raises(errors.InputError, match=r"none of the clips.*and 3 more"):
    evaluate.run(evaluate.Options(str(b), str(a)))


def test_the_hash_of_a_set_is_of_its_files(folders):
  a, b = folders
  digest = lambda: evaluate.run(evaluate.Options(str(a))).generated.digest()
  first = digest()
  assert first == digest()
  _write(a, "p", 99)
  assert first != digest()
  assert evaluate.run(evaluate.Options(str(b))).generated.digest() != first


class _Logits:
  """In the place of I3D: a few numbers of a clip, and what it was called with.

  The network's own numbers are held in i3d_test; here is its use.
  """

  def __init__(self):
    self.shapes = []

  def apply(self, variables, x):
    self.shapes.append(x.shape)
    few = x[:, :, ::50, ::50].reshape(len(x), -1)
    return few @ variables["params"]


@pytest.fixture
def logits(monkeypatch):
  network = _Logits()
  size = 16 * 5 * 5 * 3
  weights = np.random.default_rng(0).normal(size=(size, 6)).astype(np.float32)
  monkeypatch.setattr(i3d, "I3D", lambda: network)
  monkeypatch.setattr(i3d, "load", lambda folder: weights)
  return network


@pytest.fixture
def long(tmp_path):
  a = _write(tmp_path / "a", "abcdefghij", 0, 17, (20, 20))
  return a, _write(tmp_path / "b", "abcdefghij", 40, 17, (20, 20))


def _distances(generated, reference, **options):
  options = {"metrics": ("fvd", "kvd")} | options
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = evaluate.run(
      evaluate.Options(str(generated), str(reference), **options)
    )
  return found, [str(w.message) for w in caught]


def test_fvd_is_scipys_of_the_logits(long, logits):
  a, b = long
  found, said = _distances(b, a)
  weights = i3d.load(None)

  def run(folder):
    rows = []
    for item in sets.find(folder):
      frames = i3d.resize(jnp.asarray(sets.read_video(item, 16).frames))
      rows.append(np.asarray(frames[:, ::50, ::50]).reshape(-1) @ weights)
    return np.stack(rows).astype(np.float64)

  x, y = run(a), run(b)
  s, t = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
  want = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(s + t)
  want -= 2 * np.trace(scipy.linalg.sqrtm(s @ t).real)
  fvd = found.metrics["fvd"]
  np.testing.assert_allclose(fvd.estimate.value, want, rtol=1e-4)
  assert fvd.name == "fvd-i3d400-npz-16f-224-bilinear-n10-v1"
  assert (
    found.metrics["kvd"].name == "kvd-i3d400-poly3-npz-16f-224-bilinear-n10-v1"
  )
  assert len(said) == 1 and "of 10 clips; below 2048" in said[0]
  assert found.versions["i3d weights"] == i3d.SOURCE.converted


def test_a_set_against_itself_is_at_zero(long, logits):
  a, _ = long
  found, _ = _distances(a, a)
  assert found.metrics["fvd"].estimate.value < 1e-6
  assert found.metrics["kvd"].estimate.low < 0


def test_batches_are_full_and_change_no_number(long, logits):
  a, b = long
  by_size = {}
  for size in (1, 4, 16):
    logits.shapes.clear()
    found, _ = _distances(b, a, batch_size=size)
    assert set(logits.shapes) == {(size, 16, 224, 224, 3)}
    by_size[size] = found.metrics["fvd"].estimate.value
  np.testing.assert_allclose([*by_size.values()], by_size[1], rtol=1e-5)


def test_sets_of_different_n_are_refused(long, logits):
  a, b = long
  _break(b / "c.npz")
  with pytest.raises(errors.InputError, match="give --n=9 to take the first 9"):
    _distances(b, a)
  found, _ = _distances(b, a, n=9)
  assert found.metrics["fvd"].n == 9
  assert [skip.clip for skip in found.metrics["fvd"].skipped] == ["c"]
  with pytest.raises(errors.InputError, match="9, not 10, of the clips of the"):
    _distances(b, a, n=10)


def test_short_clips_are_skipped_and_frames_can_be_chosen(long, logits):
  a, b = long
  for folder in (a, b):
    _write(folder, "d", 7, 12, (20, 20))
  found, _ = _distances(b, a, metrics=("fvd",))
  reason = found.metrics["fvd"].skipped[0].reason
  assert reason == "d: has 12 frames of 16."
  with pytest.raises(errors.InputError, match="I3D needs 9 frames or more"):
    _distances(b, a, frames=8)


def test_fid_is_of_frames_and_its_n_of_clips(long, monkeypatch):
  a, b = long
  weights = np.random.default_rng(0).normal(size=(27, 5)).astype(np.float32)
  run = lambda _, frames: frames[:, ::100, ::100].reshape(-1, 27) @ weights
  monkeypatch.setattr(set_distances, "_images", run)
  held = inception.Weights({}, "0123456789ab")
  monkeypatch.setattr(inception, "load", lambda folder: held)
  with pytest.raises(errors.InputError, match="--inception=DIR"):
    _distances(b, a, metrics=("fid",))
  options = {"metrics": ("fid",), "frames": 3, "inception": "folder"}
  found, said = _distances(b, a, **options)
  sides = []
  for folder in (a, b):
    videos = [sets.read_video(item, 3).frames for item in sets.find(folder)]
    frames = inception.resize(jnp.asarray(np.concatenate(videos)))
    sides.append(np.asarray(run(None, frames), np.float64))
  assert len(sides[0]) == 30
  fid = found.metrics["fid"]
  want = distributions.frechet(*sides)
  np.testing.assert_allclose(fid.estimate.value, want, rtol=1e-4)
  name = "fid-inception2048-01234567-npz-3f-299-bilinear-n10-v1"
  assert (fid.name, fid.n) == (name, 10)
  assert fid.estimate.low < fid.estimate.value < fid.estimate.high
  assert "of 30 frames; below 10000" in said[0]


def test_clip_score_is_of_prompts(tmp_path, monkeypatch):
  clips = [(text, sets_test.frames()) for text in ("one", "seven", None)]
  folder = sets_test.job(tmp_path / "job", clips)

  class Clip:
    identity = "clip-x"

    def score(self, prompt, frames):
      return len(prompt) + len(frames) / 10

  with pytest.raises(errors.InputError, match="--clip=DIR"):
    evaluate.run(evaluate.Options(str(folder), metrics=("clip_score",)))
  monkeypatch.setattr(clip_score, "load", lambda folder: Clip())
  options = evaluate.Options(str(folder), metrics=("clip_score",), clip="clip")
  found = evaluate.run(options).metrics["clip_score"]
  assert found.name == "clip-x-mp4-3f-16x24-n2-v1"
  np.testing.assert_allclose([*found.clips.values()], [3.3, 5.3])
  assert [skip.reason for skip in found.skipped] == [
    "000002_0123456789ab: has no prompt."
  ]


def test_flags_that_cannot_be_are_one_line(folders):
  a, b = map(str, folders)
  for options, match in (
    ({"metrics": ("pnsr",)}, "no such metric, only .*Did you mean psnr"),
    ({"metrics": ("fvd",), "reference": None}, "--metrics=fvd: compares with"),
    ({"n": 0}, "--n=0: must be 1 or more"),
    ({"reference": f"{a}/none"}, "no such file or folder"),
  ):
    with pytest.raises(errors.InputError, match=match):
      evaluate.run(evaluate.Options(b, **({"reference": a} | options)))
  other = folders[0] / "x"
  _write(other, "z")
  _write(other, "y")
  with pytest.raises(errors.InputError, match="shares no name and no index"):
    evaluate.run(evaluate.Options(b, str(other)))


def test_the_command_prints_a_table_and_writes_json(folders, tmp_path, capsys):
  a, b = folders
  path = tmp_path / "found.json"
  argv = ["evaluate", f"--generated={b}", f"--reference={a}", f"--json={path}"]
  assert main.main([*argv, "--metrics=psnr,temporal_flickering"]) == 0
  lines = capsys.readouterr().out.splitlines()
  content = json.loads(path.read_text())
  assert list(content["metrics"]) == ["psnr", "temporal_flickering"]
  psnr = content["metrics"]["psnr"]
  assert set(psnr) >= {"value", "low", "high", "n", "skipped", "name"}
  (row,) = (line for line in lines if line.startswith(" psnr"))
  assert f"{psnr['value']:.5g}" in row and psnr["name"] in row
  assert content["settings"]["seed"] == 0
  assert content["versions"]["numpy"] == np.__version__
  assert main.main(["evaluate"]) == 2
  assert "--generated is missing" in capsys.readouterr().err


def test_two_files_are_a_pair(tmp_path, capsys):
  for name in "ab":
    video.write_mp4(tmp_path / f"{name}.mp4", sets_test.frames(), 8)
  argv = [f"--generated={tmp_path}/a.mp4", f"--reference={tmp_path}/b.mp4"]
  assert main.main(["evaluate", *argv, "--metrics=psnr"]) == 0
  (row,) = (x for x in capsys.readouterr().out.splitlines() if " psnr " in x)
  # Equal: no infinity. One clip has no interval.
  assert row.split()[:5] == ["psnr", "100", "-", "1", "0"]


def test_the_command_exports_for_vbench(tmp_path, capsys):
  folder = sets_test.job(tmp_path / "job", [("a cat", sets_test.frames())])
  argv = ["evaluate", f"--generated={folder}", f"--vbench={tmp_path}/out"]
  assert main.main(argv) == 1
  assert "1 prompts lack 4 videos" in capsys.readouterr().out
  assert (tmp_path / "out" / "a cat-0.mp4").is_file()
  info = tmp_path / "info.json"
  info.write_text('[{"prompt_en": "b", "dimension": ["color"]}]')
  assert main.main([*argv, f"--vbench_info={info}", "--metrics=flicker"]) == 1
  out = capsys.readouterr().out
  assert "5 of 'b'" in out and " flicker " in out


def test_an_evaluation_has_a_manifest(folders, tmp_path, capsys):
  a, b = folders
  sides = [f"--reference={a}", f"--generated={b}", "--resamples=50"]
  file = tmp_path / "numbers.json"
  assert main.main(["evaluate", *sides, f"--json={file}"]) == 0
  held = json.loads((tmp_path / "numbers.manifest.json").read_text())
  assert (held["command"], held["exit"]["reason"]) == ("evaluate", "done")
  want = json.loads(file.read_text())["metrics"]["psnr"]["value"]
  assert held["outputs"]["metrics"]["metrics.psnr.value"] == want
  assert len(held["inputs"]["reference"]["sha256"]) == 4
  out = tmp_path / "again"
  out.mkdir()
  assert main.main(["evaluate", *sides, f"--json={out}"]) == 0
  capsys.readouterr()
  both = [str(tmp_path / "numbers.manifest.json"), str(out)]
  assert main.main(["repro", "check", *both]) == 0
  assert "identical" in capsys.readouterr().out.splitlines()[-1]
  # The same folder again has the manifest of what it holds now.
  assert main.main(["evaluate", *sides, "--seed=2", f"--json={out}"]) == 0
  assert main.main(["repro", "check", *both]) == 1
  assert not (out / "evaluate.manifest.json").exists()
  assert main.main(["evaluate", *sides, f"--json={out}"]) == 0
  # Other draws of the intervals are other numbers.
  assert main.main(["evaluate", *sides, "--seed=1", f"--json={file}"]) == 0
  assert main.main(["repro", "check", *both]) == 1


def test_an_evaluation_hides_no_shards_of_a_job(folders, tmp_path):
  a, b = folders
  sides = [f"--reference={a}", f"--generated={b}", "--resamples=50"]
  (tmp_path / "manifest-00000-of-00002.json").write_text("{}")
  assert main.main(["evaluate", *sides, f"--json={tmp_path}"]) == 0
  assert (tmp_path / "evaluate.manifest.json").exists()
  assert not (tmp_path / "manifest.json").exists()


def test_what_is_no_number_is_told(folders, tmp_path, monkeypatch):
  a, _ = folders
  monkeypatch.setattr(temporal, "flicker", lambda frames: float("nan"))
  options = evaluate.Options(str(a), metrics=("flicker",))
  found = evaluate.record(options, tmp_path / "n.json")
  assert json.loads(found.to_json())["metrics"]["flicker"]["value"] == "nan"
  held = json.loads((tmp_path / "n.manifest.json").read_text())
  assert held["outputs"]["metrics"]["metrics.flicker.value"] == "nan"


def test_the_exit_code_says_that_clips_were_left_out(tmp_path, capsys):
  made = [(str(seed), sets_test.frames(seed)) for seed in range(3)]
  folder = sets_test.job(tmp_path / "job", [*made, ("two", None)])
  argv = ["evaluate", f"--generated={folder}", "--metrics=flicker"]
  path = tmp_path / "n.json"
  assert main.main([*argv, f"--json={path}"]) == 2
  out, err = capsys.readouterr()
  assert "skipped: 1" in out and "failed: no such image" in out
  assert "several jobs" not in err
  assert json.loads(path.read_text())["metrics"]["flicker"]["skipped"] == 1
  held = json.loads((tmp_path / "n.manifest.json").read_text())
  assert held["exit"] == {"reason": "1 clips left out", "code": 2}
  # Who asks for three has got them.
  assert main.main([*argv, "--n=3"]) == 0


def test_a_folder_of_several_jobs_is_said(tmp_path):
  made = [(str(seed), sets_test.frames(seed)) for seed in range(3)]
  folder = sets_test.job(tmp_path / "job", made)
  lines = (folder / "clips.jsonl").read_text().splitlines()
  record = json.loads(lines[0]) | {"name": "000000_ba9876543210"}
  text = "\n".join([*lines, json.dumps(record)])
  (folder / "clips.jsonl").write_text(f"{text}\n")
  options = evaluate.Options(str(folder), metrics=("flicker",))
  with pytest.warns(UserWarning, match="several jobs, .*: 1 of 4 have"):
    found = evaluate.run(options)
  assert found.metrics["flicker"].n == 4


def test_inputs_are_what_was_read_and_nothing_is_read_twice(
  tmp_path, monkeypatch
):
  clips = [(str(seed), sets_test.frames(seed)) for seed in range(3)]
  a = sets_test.job(tmp_path / "a", clips, ("png",))
  video.write_mp4(tmp_path / "b.mp4", clips[0][1], 8)
  asked = []
  monkeypatch.setattr(
    filehashes.Hashes, "file", lambda self, path: asked.append(path) or "ff"
  )
  options = evaluate.Options(str(a), metrics=("flicker",), n=2)
  evaluate.record(options, tmp_path / "n.json")
  options = evaluate.Options(str(tmp_path / "b.mp4"), metrics=("flicker",))
  evaluate.record(options, tmp_path / "one.json")
  monkeypatch.undo()
  assert asked == []
  read = lambda name: json.loads((tmp_path / name).read_text())
  held, alone = read("n.manifest.json"), read("one.manifest.json")
  marks = held["inputs"]["generated"]["sha256"]
  names = [f"{i:06d}_0123456789ab" for i in range(2)]
  assert list(marks) == names
  assert list(alone["inputs"]["generated"]["sha256"]) == ["b.mp4"]
  # As who makes it again finds them.
  assert [d for d in rerun.changes(held) if d.kind == "inputs"] == []
  assert [d for d in rerun.changes(alone) if d.kind == "inputs"] == []
  (a / names[1] / "000002.png").unlink()
  (change,) = (d for d in rerun.changes(held) if d.kind == "inputs")
  assert change.name == f"generated/{names[1]}"


def test_pairs_that_are_none_are_said(tmp_path):
  one, two = sets_test.frames(0), sets_test.frames(1)
  a = sets_test.job(tmp_path / "a", [("A star.", one), ("same", two)])
  b = sets_test.job(tmp_path / "b", [("A dog.", one), ("same", two)], ("png",))
  options = evaluate.Options(str(b), str(a), metrics=("psnr",))
  with pytest.warns(UserWarning) as said:
    found = evaluate.run(options)
  name = found.metrics["psnr"].name
  assert name == "psnr-rgb-video-max100-mp4+png-3f-16x24-n2-v1"
  texts = [str(item.message) for item in said]
  assert any("1 of 2 pairs are of different prompts" in t for t in texts)
  assert any("from mp4, the other from png" in t for t in texts)
