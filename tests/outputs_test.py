import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import toy_sampling
from vidgen import errors, outputs, sharding


def test_clips_and_failures(tmp_path):
  for index in (1, 0):
    toy_sampling.line(tmp_path, index, toy_sampling.frames(index))
  toy_sampling.line(tmp_path, 2, None)
  found = outputs.of_clips(tmp_path)
  assert found["done"] == 2
  assert [clip["index"] for clip in found["clips"]] == [0, 1]
  assert found["failed"][0]["error"] == "prompt: holds the number 13."
  assert all(len(clip["frames_sha256"]) == 64 for clip in found["clips"])
  before = found["digest"]
  toy_sampling.line(tmp_path, 1, toy_sampling.frames(1, seed=1))
  assert outputs.of_clips(tmp_path)["digest"] != before
  toy_sampling.line(tmp_path, 1, toy_sampling.frames(1))
  assert outputs.of_clips(tmp_path)["digest"] == before


def test_lines_of_an_older_make(tmp_path):
  (tmp_path / "clips.jsonl").write_text(
    '{"index": 0, "files": ["000_a.mp4"]}\n'
  )
  (clip,) = outputs.of_clips(tmp_path)["clips"]
  assert clip["name"] == "000_a"
  assert clip["frames_sha256"] is None


def state(mesh=None):
  tree = {
    "a": jnp.arange(64.0).reshape(8, 8),
    "b": {"c": jnp.arange(8, dtype=jnp.bfloat16), "step": np.int32(3)},
  }
  if mesh is None:
    return tree
  split = jax.sharding.NamedSharding(mesh, jax.P("data"))
  return {**tree, "a": jax.device_put(tree["a"], split)}


def test_digest_of_a_state_is_of_its_bits_alone():
  want = outputs.state_digest(state())
  assert outputs.state_digest(state(sharding.make_mesh({"data": 8}))) == want
  assert outputs.state_digest(jax.device_get(state())) == want
  other = state()
  # The last bit of one number.
  other["a"] = other["a"].at[3, 4].set(np.nextafter(np.float32(28), 99))
  assert outputs.state_digest(other) != want
  assert outputs.state_digest({**state(), "a": state()["a"].T}) != want
  cast = {**state(), "b": {**state()["b"], "step": np.int64(3)}}
  assert outputs.state_digest(cast) != want
  renamed = state()
  renamed["aa"] = renamed.pop("a")  # Which keeps the order.
  assert outputs.state_digest(renamed) != want


def test_metrics_of_the_last_step(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text(
    '{"step": 1, "loss": 2.0}\n'
    '{"step": 2, "loss": 1.5, "mfu": null, "time": 3.0, '
    '"seconds_per_step": 0.1, "videos_per_second": 9.0}\n'
    '{"step": 3, "lo'
  )
  assert outputs.last_metrics(path) == {"step": 2, "loss": 1.5}
  assert outputs.last_metrics(tmp_path / "none") == {}


def test_metrics_of_an_evaluation():
  record = {"metrics": {"psnr": {"value": 30.5, "n": 4, "name": "psnr-v1"}}}
  assert outputs.of_metrics(record) == {
    "kind": "metrics",
    "metrics": {"metrics.psnr.value": 30.5, "metrics.psnr.n": 4},
    "identities": {"psnr": "psnr-v1"},
  }


def test_what_is_no_number_is_kept():
  record = {"loss": float("nan"), "a": [np.float32("-inf")], "name": "nano"}
  assert outputs.numbers(record) == {"loss": "nan", "a.0": "-inf"}


def test_a_manifest_is_read_with_suspicion(tmp_path):
  path = tmp_path / "manifest.json"
  with pytest.raises(errors.InputError, match="no such file"):
    outputs.read_json(path)
  for text in ("", "[]", "{", '{"a": 1, "a": 2}', '{"a": NaN}', "[" * 99999):
    path.write_text(text)
    with pytest.raises(errors.CorruptError):
      outputs.read_json(path)
  path.write_text('{"a": "0123456789"}')
  with pytest.raises(errors.CorruptError, match="more than 10 bytes"):
    outputs.read_json(path, limit=10)
