import errno
import json
import os
import pathlib
import pickle
import resource
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from vidgen import errors, tensorfile, tensorheader


def pack(header: bytes | dict, data: bytes = b"") -> bytes:
  if isinstance(header, dict):
    header = json.dumps(header).encode()
  return struct.pack("<Q", len(header)) + header + data


def item(shape, begin, end, dtype="F32") -> dict:
  return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def structs(tensors: dict) -> dict:
  return {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tensors.items()
  }


ONE = item([1], 0, 4)
TWICE = b'{"a":%s,"a":%s}' % ((json.dumps(ONE).encode(),) * 2)
DEEP = b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"

HOSTILE = {
  "empty": (b"", "truncated"),
  "7 bytes": (b"\x01" * 7, "truncated"),
  "header of 2^63": (struct.pack("<Q", 2**63) + b"{}", "truncated"),
  "header of 2^64-1": (struct.pack("<Q", 2**64 - 1) + b"{}", "truncated"),
  "99 MB claimed": (struct.pack("<Q", 99_000_000) + b"{}", "truncated"),
  "header short by one": (pack({"a": ONE}, b"1234")[:-5], "truncated"),
  "truncated data": (pack({"a": ONE}, b"123"), "truncated"),
  "trailing bytes": (pack({"a": ONE}, b"12345"), "1 bytes follow"),
  "overlap": (
    pack({"a": item([2], 0, 8), "b": item([1], 4, 8)}, b"x" * 8),
    "b overlaps",
  ),
  "same place": (pack({"a": ONE, "b": ONE}, b"x" * 4), "b overlaps"),
  "hole": (
    pack({"a": ONE, "b": item([1], 8, 12)}, b"x" * 12),
    "b follows a hole",
  ),
  "hole first": (pack({"a": item([1], 4, 8)}, b"x" * 8), "a follows a hole"),
  "size and shape": (pack({"a": item([2], 0, 4)}, b"x" * 4), "needs 8"),
  "overflow": (pack({"a": item([2**62, 4], 0, 0)}), "overflows"),
  "zero times overflow": (pack({"a": item([0, 2**62], 0, 0)}), "overflows"),
  "huge size": (pack({"a": item([10**4000], 0, 4)}), "overflows"),
  "negative size": (pack({"a": item([-1], 0, 4)}, b"x" * 4), "shape"),
  "fraction": (pack({"a": item([1.0], 0, 4)}, b"x" * 4), "shape"),
  "true for one": (pack({"a": item([True], 0, 4)}, b"x" * 4), "shape"),
  "rank 10001": (pack({"a": item([1] * 10001, 0, 4)}, b"x" * 4), "shape"),
  "shape is text": (pack({"a": item("1", 0, 4)}, b"x" * 4), "shape"),
  "backwards": (pack({"a": item([1], 4, 0)}, b"x" * 4), "no range"),
  "three offsets": (
    pack({"a": {**ONE, "data_offsets": [0, 4, 4]}}, b"x" * 4),
    "no range",
  ),
  "unknown dtype": (pack({"a": item([1], 0, 4, "Q4")}, b"x" * 4), "Q4"),
  "dtype is a list": (pack({"a": item([1], 0, 4, [1])}, b"x" * 4), "dtype"),
  "no dtype": (
    pack({"a": {"shape": [1], "data_offsets": [0, 4]}}, b"x" * 4),
    "needs dtype",
  ),
  "further field": (pack({"a": {**ONE, "x": 1}}, b"x" * 4), "needs dtype"),
  "entry is a list": (pack({"a": []}), "needs dtype"),
  "duplicate key": (pack(TWICE, b"x" * 4), "'a' is twice"),
  "deep": (pack(DEEP), "too deeply"),
  "a list": (pack(b"[]"), "not a JSON object"),
  "space first": (pack(b" {}"), "not a JSON object"),
  "not JSON": (pack(b"{nonsense"), "not JSON"),
  "NaN": (pack(b'{"a":NaN}'), "NaN"),
  "endless number": (pack(b'{"a":' + b"9" * 10**5 + b"}"), "not JSON"),
  "bad UTF-8": (pack(b'{"\xff":1}'), "not JSON in UTF-8"),
  "metadata is a list": (pack({"__metadata__": []}), "__metadata__"),
  "metadata is a number": (pack({"__metadata__": {"a": 1}}), "__metadata__"),
  "up": (pack({"../a": ONE}, b"x" * 4), "'../a' is not allowed"),
  "up within": (pack({"a/../../b": ONE}, b"x" * 4), "is not allowed"),
  "absolute": (pack({"/etc/passwd": ONE}, b"x" * 4), "is not allowed"),
  "backslash": (pack({"a\\b": ONE}, b"x" * 4), "is not allowed"),
  "NUL": (pack({"a\0b": ONE}, b"x" * 4), "is not allowed"),
  "line break": (pack({"a\nb": ONE}, b"x" * 4), "is not allowed"),
  "lone surrogate": (pack(b'{"\\ud800":1}'), "is not allowed"),
  "no name": (pack({"": ONE}, b"x" * 4), "is not allowed"),
  "endless name": (pack({"a" * 10**6: ONE}, b"x" * 4), "is not allowed"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_file_is_one_line_at_once(case, tmp_path):
  data, word = HOSTILE[case]
  path = tmp_path / "model.safetensors"
  path.write_bytes(data)
  tracemalloc.start()
  start = time.perf_counter()
  with pytest.raises(errors.CorruptError) as info:
    tensorfile.open_folder(tmp_path)
  seconds = time.perf_counter() - start
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  text = str(info.value)
  assert word in text and str(path) in text
  assert "\n" not in text and len(text) < 1000 and text.isprintable()
  assert seconds < 1 and peak < 50e6


def test_header_over_the_limit(tmp_path):
  path = tmp_path / "model.safetensors"
  with path.open("wb") as f:
    f.write(struct.pack("<Q", 200 * 10**6) + b"{")
    f.truncate(300 * 10**6)
  with pytest.raises(errors.CorruptError, match="over the limit"):
    tensorfile.open_file(path)


def test_largest_header_takes_a_second_at_most(tmp_path):
  path = tmp_path / "model.safetensors"
  entry = b'"%06d":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
  count = tensorheader.HEADER_LIMIT // len(entry % 0) - 1
  header = b"{" + b"".join(entry % i for i in range(count))[:-1] + b"}"
  path.write_bytes(pack(header, b"x" * 4))
  # Without the type checks of the tests, which take most of the time.
  script = """
import pathlib, sys, time
from vidgen import errors, tensorfile
start = time.process_time()
try:
  tensorfile.open_file(pathlib.Path(sys.argv[1]))
except errors.CorruptError as e:
  print(time.process_time() - start, e)
"""
  done = subprocess.run(
    [sys.executable, "-c", script, path], capture_output=True, text=True
  )
  seconds, text = done.stdout.split(" ", 1)
  assert "overlaps" in text and float(seconds) < 1.5


class Gadget:
  """Leaves a mark if it is ever unpickled."""

  def __init__(self, mark):
    self.mark = mark

  def __reduce__(self):
    return (pathlib.Path.touch, (self.mark,))


@pytest.mark.parametrize("name", ["model.safetensors", "x.safetensors"])
@pytest.mark.parametrize("kind", ["2", "4", "zip"])
def test_pickle_is_refused_by_its_content(kind, name, tmp_path):
  mark = tmp_path / "mark"
  path = tmp_path / name
  if kind == "zip":
    with zipfile.ZipFile(path, "w") as archive:
      archive.writestr("archive/data.pkl", pickle.dumps(Gadget(mark)))
  else:
    path.write_bytes(pickle.dumps(Gadget(mark), protocol=int(kind)))
  with pytest.raises(errors.CorruptError, match="safe_serialization") as info:
    tensorfile.open_folder(tmp_path)
  assert "\n" not in str(info.value) and not mark.exists()


@pytest.mark.parametrize("length", [0x80, 0x0280, 0x4B50])
def test_a_header_length_may_look_like_a_pickle(length, tmp_path):
  path = tmp_path / "model.safetensors"
  header = json.dumps({"a": ONE}).encode()
  path.write_bytes(pack(header + b" " * (length - len(header)), b"1234"))
  assert path.read_bytes()[:1] in (b"\x80", b"P")
  assert list(tensorfile.open_file(path)) == ["a"]


def test_pickles_alone_say_how_to_convert(tmp_path):
  (tmp_path / "pytorch_model.bin").write_bytes(b"x")
  with pytest.raises(errors.InputError, match=r"only pytorch_model.bin.*safe_"):
    tensorfile.open_folder(tmp_path)


def test_missing_component(tmp_path):
  with pytest.raises(errors.InputError, match=r"vae is missing.*hf d"):
    tensorfile.open_folder(tmp_path / "vae")
  (tmp_path / "vae").mkdir()
  with pytest.raises(errors.InputError, match=r"component vae has no \*"):
    tensorfile.open_folder(tmp_path / "vae")
  with pytest.raises(errors.InputError, match="no such file"):
    tensorfile.open_file(tmp_path / "x.safetensors")


def test_a_pipe_is_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / "model.safetensors")
  with pytest.raises(errors.InputError, match="not a regular file"):
    tensorfile.open_folder(tmp_path)


def test_more_than_one_set_of_weights(tmp_path):
  one = {"a": np.zeros(1, np.float32)}
  for name in ("model", "model.fp16", "other"):
    safetensors.numpy.save_file(one, tmp_path / f"{name}.safetensors")
  assert list(tensorfile.open_folder(tmp_path)) == ["a"]
  (tmp_path / "model.safetensors").unlink()
  with pytest.raises(errors.InputError, match="more than one set"):
    tensorfile.open_folder(tmp_path)


def test_reads_what_the_library_writes(tmp_path):
  random = np.random.default_rng(0)
  dtypes = [d for d in tensorheader.DTYPES.values() if d != np.bool_]
  tensors = {f"t.{d}": random.integers(0, 99, (3, 5)).astype(d) for d in dtypes}
  tensors["bool"] = np.array([True, False])
  tensors["scalar"] = np.array(3.5, np.float32)
  tensors["none"] = np.zeros((0, 4), np.float32)
  path = tmp_path / "x.safetensors"
  safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
  files = tensorfile.open_file(path)
  assert files.metadata == {"format": "pt"}
  assert files.keys() == tensors.keys()
  for name, want in tensors.items():
    got = files.read(name)
    assert (files[name].shape, files[name].dtype) == (want.shape, want.dtype)
    assert got.dtype == want.dtype
    if got.size and got.dtype != bool:
      assert got.ctypes.data % 64 == 0
    np.testing.assert_array_equal(got, want)


def test_a_file_cut_while_open(tmp_path):
  path = tmp_path / "x.safetensors"
  safetensors.numpy.save_file({"a": np.zeros(64, np.float32)}, path)
  files = tensorfile.open_file(path)
  os.truncate(path, path.stat().st_size - 4)
  with pytest.raises(errors.CorruptError, match="ended while a was read"):
    files.read("a")


def sharded(folder: pathlib.Path) -> dict:
  tensors = {
    f"layer.{i}.weight": np.full((4, 8), i, ml_dtypes.bfloat16)
    for i in range(5)
  }
  tensors["scale"] = np.float32([1, 2, 3])
  paths = tensorfile.write(
    folder,
    "diffusion_pytorch_model",
    structs(tensors),
    reversed(list(tensors.items())),
    max_shard_bytes=130,
  )
  assert [p.name for p in paths] == [
    "diffusion_pytorch_model-00001-of-00003.safetensors",
    "diffusion_pytorch_model-00002-of-00003.safetensors",
    "diffusion_pytorch_model-00003-of-00003.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
  ]
  assert sorted(p.name for p in paths) == sorted(os.listdir(folder))
  return tensors


def test_shards_go_round_and_the_library_reads_them(tmp_path):
  tensors = sharded(tmp_path)
  files = tensorfile.open_folder(tmp_path)
  assert files.keys() == tensors.keys() and files.metadata == {"format": "pt"}
  read = {}
  for path in tmp_path.glob("*.safetensors"):
    read |= safetensors.numpy.load_file(path)
  for name, want in tensors.items():
    np.testing.assert_array_equal(files.read(name), want)
    np.testing.assert_array_equal(read[name], want)
  index = json.loads(next(tmp_path.glob("*.json")).read_text())
  size = sum(x.nbytes for x in tensors.values())
  assert index["metadata"]["total_size"] == size


def test_mixed_dtypes_are_aligned(tmp_path):
  tensors = {
    "a": np.ones(3, ml_dtypes.bfloat16),
    "b": np.ones(2, np.float32),
    "c": np.ones(3, np.int8),
    "d": np.ones(1, np.float64),
  }
  (path,) = tensorfile.write(
    tmp_path, "model", structs(tensors), tensors.items()
  )
  assert path.name == "model.safetensors"
  files = tensorfile.open_folder(tmp_path)
  assert all(e.offset % e.dtype.itemsize == 0 for e in files.values())
  for name, want in safetensors.numpy.load_file(path).items():
    np.testing.assert_array_equal(files.read(name), want)
    np.testing.assert_array_equal(tensors[name], want)


def edit_index(folder: pathlib.Path, change) -> None:
  path = next(folder.glob("*.index.json"))
  index = json.loads(path.read_text())
  change(index["weight_map"])
  path.write_text(json.dumps(index))


FIRST = "diffusion_pytorch_model-00001-of-00003.safetensors"
BAD_INDEX = {
  "up": (lambda w: w.update(x="../x.safetensors"), "not the name of a file"),
  "absolute": (lambda w: w.update(x="/x"), "not the name of a file"),
  "hidden": (lambda w: w.update(x=".."), "not the name of a file"),
  "a number": (lambda w: w.update(x=3), "not the name of a file"),
  "NUL": (lambda w: w.update(x="a\0"), "not the name of a file"),
  "missing shard": (lambda w: w.update(x="x.safetensors"), "are missing: x"),
  "not in shard": (lambda w: w.update(x=FIRST), "not in the shard.*'x'"),
  "wrong shard": (lambda w: w.update(scale=FIRST), "not in the shard.*'sca"),
  "not in index": (lambda w: w.pop("scale"), "does not name these.* scale"),
  "empty": (lambda w: w.clear(), "no weight_map"),
}


@pytest.mark.parametrize("case", BAD_INDEX)
def test_bad_index(case, tmp_path):
  change, words = BAD_INDEX[case]
  sharded(tmp_path)
  edit_index(tmp_path, change)
  with pytest.raises(errors.CorruptError, match=words) as info:
    tensorfile.open_folder(tmp_path)
  assert "\n" not in str(info.value)


def test_index_that_is_gone_or_no_json(tmp_path):
  sharded(tmp_path)
  index = next(tmp_path.glob("*.json"))
  index.write_bytes(b'{"weight_map": {"a": "b", "a": "b"}}')
  with pytest.raises(errors.CorruptError, match="'a' is twice"):
    tensorfile.open_folder(tmp_path)
  index.unlink()
  with pytest.raises(errors.CorruptError, match=r"index of .* is missing"):
    tensorfile.open_folder(tmp_path)


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
  def full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  for name in ("posix_fallocate", "pwrite", "fsync"):
    with monkeypatch.context() as patch:
      patch.setattr(os, name, full)
      with pytest.raises(errors.StorageError, match="No space left") as info:
        sharded(tmp_path)
    assert info.value.exit_code == 74 and "\n" not in str(info.value)
    assert os.listdir(tmp_path) == []


def test_file_size_limit_leaves_nothing(tmp_path):
  script = """
import resource, sys, jax, numpy as np
from vidgen import errors, tensorfile
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
x = np.zeros(1000, np.float32)
try:
  shapes = {"a": jax.ShapeDtypeStruct(x.shape, x.dtype)}
  tensorfile.write(sys.argv[1], "model", shapes, [("a", x)])
except errors.StorageError as e:
  print("one line:", e)
"""
  done = subprocess.run(
    [sys.executable, "-c", script, tmp_path], capture_output=True, text=True
  )
  assert done.stdout.startswith("one line:"), done.stderr
  assert "File too large" in done.stdout and os.listdir(tmp_path) == []


def test_an_error_of_the_caller_leaves_nothing(tmp_path):
  shapes = {"a": jax.ShapeDtypeStruct((2,), np.dtype(np.float32))}
  for tensors in ([], [("a", np.zeros(3, np.float32))], [("a", np.zeros(2))]):
    with pytest.raises(ValueError, match=r"Never came: a|promised"):
      tensorfile.write(tmp_path, "model", shapes, tensors)
    assert os.listdir(tmp_path) == []


def test_weights_are_never_written_over(tmp_path):
  sharded(tmp_path)
  with pytest.raises(errors.InputError, match="exists"):
    sharded(tmp_path)
  assert len(os.listdir(tmp_path)) == 4


def test_reading_one_tensor_reads_no_other(tmp_path):
  shape = (2**20, 16)
  path = tmp_path / "x.safetensors"
  header = {str(i): item(shape, 2**26 * i, 2**26 * (i + 1)) for i in range(16)}
  with path.open("wb") as f:
    f.write(pack(header))
    f.truncate(f.tell() + 2**30)
  files = tensorfile.open_file(path)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  assert files.read("7").shape == shape
  after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  assert (after - before) * 1024 < 2**26 + 2**25
