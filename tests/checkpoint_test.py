import errno
import hashlib
import http.server
import json
import os
import pathlib
import pickle
import socket
import subprocess
import sys
import threading
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vidgen import checkpoint, errors, orbaxfile, tensorfile, weights
from vidgen.models import base

BF16 = ml_dtypes.bfloat16
LAYERS = 3


class Network(nn.Module):
  """Parameters with logical axes, as the networks have them."""

  @nn.compact
  def __call__(self):
    init, boxed = nn.initializers.normal(), nn.with_logical_partitioning
    kernel = boxed(init, ("layers", "embed", "mlp"))
    self.param("kernel", kernel, (LAYERS, 8, 4))
    self.param("scale", boxed(init, ("norm",)), (4,))


TABLE = (
  weights.Rule("blocks.{layer}.weight", "kernel", axes=weights.LINEAR),
  weights.Rule("norm.weight", "scale"),
)


def component(name: str) -> base.Component:
  init = lambda key: Network().init(key)["params"]
  return base.Component(name, init, TABLE)


COMPONENTS = (component("text_encoder"), component("transformer"))


def tensors(dtype, seed: int) -> dict:
  random = np.random.default_rng(seed)
  draw = lambda *shape: random.standard_normal(shape).astype(dtype)
  layers = {f"blocks.{i}.weight": draw(4, 8) for i in range(LAYERS)}
  return {**layers, "norm.weight": draw(4).astype(np.float32)}


def write(folder: pathlib.Path, stem: str, arrays: dict, **options) -> None:
  structs = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()
  }
  tensorfile.write(folder, stem, structs, arrays.items(), **options)


def small_files() -> dict:
  index = {
    "_class_name": "FakePipeline",
    "text_encoder": ["transformers", "FakeEncoder"],
    "transformer": ["diffusers", "FakeTransformer"],
    "tokenizer": ["transformers", "FakeTokenizer"],
    "safety_checker": [None, None],
  }
  return {
    "model_index.json": json.dumps(index).encode(),
    "text_encoder/config.json": b'{"model_type": "t5"}',
    "transformer/config.json": b'{"_class_name": "FakeTransformer"}',
    "tokenizer/spiece.model": b"\x0a\x00pieces\xff",
    "tokenizer/special_tokens_map.json": b'{ "pad":  "<pad>" }\n',
    "LICENSE": b"as it is",
  }


@pytest.fixture
def published(tmp_path, monkeypatch) -> pathlib.Path:
  """A checkpoint of a family that reads no more than is tested here."""
  family = types.SimpleNamespace(
    read_config=lambda folder: None, components=lambda config: COMPONENTS
  )
  monkeypatch.setattr(base, "find_family", lambda folder: family)
  folder = tmp_path / "published"
  for name, data in small_files().items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)
  write(folder / "text_encoder", "model", tensors(np.float16, 0))
  write(
    folder / "transformer",
    "diffusion_pytorch_model",
    tensors(BF16, 1),
    max_shard_bytes=70,
  )
  # What is next to a model and is no part of it.
  (folder / "transformer" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
  (folder / ".git").mkdir()
  (folder / "notes.mp4").write_bytes(b"video")
  return folder


def tree(folder: pathlib.Path) -> dict:
  return {
    path.relative_to(folder).as_posix(): path.read_bytes()
    for path in folder.rglob("*")
    if path.is_file()
  }


def assert_trees_equal(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def stored(arrays: dict) -> dict:
  layers = [arrays[f"blocks.{i}.weight"].T for i in range(LAYERS)]
  return {"kernel": np.stack(layers), "scale": arrays["norm.weight"]}


def test_bits_survive_published_to_orbax_to_published(published, tmp_path):
  orbax, back = tmp_path / "orbax", tmp_path / "deep" / "back"
  checkpoint.convert(published, orbax, "orbax")
  checkpoint.convert(str(orbax), str(back), "published")
  small = small_files()
  held = tree(orbax)
  assert {name: held[name] for name in small} == small
  assert "MANIFEST.json" in held
  rest = {name for name in held if "/orbax/" not in name}
  assert rest == {*small, "MANIFEST.json"}
  held = tree(back)
  assert {name: held[name] for name in small} == small
  assert held.keys() - small.keys() == {
    "text_encoder/model.safetensors",
    "transformer/diffusion_pytorch_model.safetensors",
  }
  for i, (name, dtype) in enumerate(
    (("text_encoder", np.float16), ("transformer", BF16))
  ):
    files = tensorfile.open_folder(back / name)
    want = tensors(dtype, i)
    assert files.keys() == want.keys()
    for key, array in want.items():
      got = files.read(key)
      assert got.dtype == array.dtype and got.tobytes() == array.tobytes()
  assert sorted(os.listdir(tmp_path)) == ["deep", "orbax", "published"]


def mesh() -> jax.sharding.Mesh:
  return jax.make_mesh((2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("layout", checkpoint.LAYOUTS)
def test_load_component_to_its_shardings(layout, dtype, published, tmp_path):
  folder = published
  if layout == "orbax":
    folder = tmp_path / "orbax"
    checkpoint.convert(published, folder, "orbax")
  want = stored(tensors(BF16, 1))
  if dtype:
    want = jax.tree.map(lambda x: x.astype(dtype), want)
  got = checkpoint.load_component(folder, COMPONENTS[1], dtype=dtype)
  assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(got))
  assert_trees_equal(got, want)
  on = lambda *spec: NamedSharding(mesh(), PartitionSpec(*spec))
  places = {"kernel": on(None, "a", "b"), "scale": on("b")}
  with jax.set_mesh(mesh()):
    got = checkpoint.load_component(
      folder, COMPONENTS[1], shardings=places, dtype=dtype
    )
  assert_trees_equal(got, want)
  for name, array in got.items():
    assert array.sharding.is_equivalent_to(places[name], array.ndim)


@pytest.fixture
def orbax(published, tmp_path) -> pathlib.Path:
  checkpoint.convert(published, tmp_path / "orbax", "orbax")
  return tmp_path / "orbax"


def data_file(folder: pathlib.Path) -> pathlib.Path:
  files = (folder / "transformer" / "orbax").rglob("*")
  return max((f for f in files if f.is_file()), key=lambda f: f.stat().st_size)


def flip(path: pathlib.Path) -> None:
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


DAMAGE = {
  "a flipped bit": (flip, "not as MANIFEST.json has it: .*{name}"),
  "cut": (lambda f: os.truncate(f, 9), "not as MANIFEST.json .*{name}"),
  "gone": (lambda f: f.unlink(), "missing: .*{name}"),
  "one more": (
    lambda f: f.with_name("more").write_bytes(b""),
    "does not list .*more",
  ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_to_orbax_names_the_file(case, orbax):
  damage, words = DAMAGE[case]
  path = data_file(orbax)
  damage(path)
  with pytest.raises(errors.CorruptError, match=words.format(name=path.name)):
    checkpoint.load_component(orbax, COMPONENTS[1])
  checkpoint.load_component(orbax, COMPONENTS[0])


def test_damage_to_a_small_file_is_found_at_once(orbax):
  flip(orbax / "tokenizer" / "spiece.model")
  with pytest.raises(errors.CorruptError, match=r"tokenizer/spiece.model"):
    checkpoint.resolve(orbax)


@pytest.mark.parametrize(
  ("text", "words"),
  [
    (None, "missing"),
    ("[]", "not a JSON object"),
    ("{}", "lists no files"),
    ('{"files": {"../x": {"size": 0, "sha256": ""}}}', "no file of a"),
    ('{"files": {"/x": {"size": 0, "sha256": ""}}}', "no file of a"),
    ('{"files": {"x": 3}}', "needs size and sha256"),
    ('{"files": {}, "files": {}}', "twice"),
    ('{"files": {}}', "does not list"),
  ],
)
def test_bad_manifest(text, words, orbax):
  path = orbax / "MANIFEST.json"
  path.unlink() if text is None else path.write_text(text)
  with pytest.raises(errors.CorruptError, match=words) as info:
    checkpoint.load_component(orbax, COMPONENTS[1])
  assert "\n" not in str(info.value)


def test_orbax_of_other_parameters(tmp_path):
  params = {"kernel": np.zeros((2, 8, 4), np.float32), "other": np.zeros(3)}
  orbaxfile.save(tmp_path / "x", params)
  shapes = base.shapes(COMPONENTS[0])
  with pytest.raises(errors.CorruptError) as info:
    orbaxfile.restore(tmp_path / "x", shapes)
  assert str(info.value).endswith(
    "missing: scale; extra: other; "
    "misshapen: kernel [2, 8, 4] instead of [3, 8, 4]."
  )
  (tmp_path / "y").mkdir()
  with pytest.raises(errors.CorruptError, match="no Orbax checkpoint"):
    orbaxfile.restore(tmp_path / "y", shapes)


def test_manifest_is_sha256(orbax):
  files = json.loads((orbax / "MANIFEST.json").read_text())["files"]
  held = tree(orbax)
  assert files.keys() == held.keys() - {"MANIFEST.json"}
  for name, item in files.items():
    digest = hashlib.sha256(held[name]).hexdigest()
    assert item == {"size": len(held[name]), "sha256": digest}


def test_target_that_holds_something(published, tmp_path):
  for name in ("full", "file"):
    target = tmp_path / name
    if name == "full":
      target.mkdir()
      (target / "x").touch()
    else:
      target.touch()
    with pytest.raises(errors.InputError, match="exists"):
      checkpoint.convert(published, target, "orbax")
  (tmp_path / "empty").mkdir()
  checkpoint.convert(published, tmp_path / "empty", "orbax")
  with pytest.raises(errors.InputError, match="layout: 'hdf5'"):
    checkpoint.convert(published, tmp_path / "x", "hdf5")


def assert_no_litter(folder: pathlib.Path):
  assert os.listdir(folder) == ["published"]


@pytest.mark.parametrize("layout", checkpoint.LAYOUTS)
def test_failed_conversion_leaves_nothing(layout, published, tmp_path):
  os.truncate(next((published / "transformer").glob("*00003*")), 9)
  with pytest.raises(errors.CorruptError, match="truncated"):
    checkpoint.convert(published, tmp_path / "x", layout)
  assert_no_litter(tmp_path)


@pytest.mark.parametrize("layout", checkpoint.LAYOUTS)
def test_full_disk_leaves_nothing(layout, published, tmp_path, monkeypatch):
  def full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(errors.StorageError, match="No space left") as info:
    checkpoint.convert(published, tmp_path / "x", layout)
  assert "\n" not in str(info.value)
  assert_no_litter(tmp_path)


def test_full_disk_under_orbax(published, tmp_path):
  script = """
import resource, sys, pathlib, numpy as np
from vidgen import errors, orbaxfile
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
x = np.random.default_rng(0).random((2**18,))
try:
  orbaxfile.save(pathlib.Path(sys.argv[1]) / "x", {"a": x})
except errors.StorageError as e:
  print("one line:", e)
"""
  done = subprocess.run(
    [sys.executable, "-c", script, tmp_path], capture_output=True, text=True
  )
  assert done.stdout.startswith("one line:"), done.stderr
  assert done.stdout.count("\n") == 1


def test_link_out_of_the_checkpoint(published, tmp_path):
  secret = tmp_path / "secret.json"
  secret.write_text("{}")
  (published / "tokenizer" / "x.json").symlink_to(secret)
  with pytest.raises(errors.InputError, match="a link out of"):
    checkpoint.convert(published, tmp_path / "x", "orbax")
  secret.unlink()
  assert_no_litter(tmp_path)


def test_pickle_among_the_small_files(published, tmp_path):
  data = pickle.dumps({"a": 1})
  (published / "tokenizer" / "x.model").write_bytes(data)
  with pytest.raises(errors.CorruptError, match="pickle"):
    checkpoint.convert(published, tmp_path / "x", "published")
  assert_no_litter(tmp_path)


def test_weights_that_no_component_reads(published, tmp_path):
  path = published / "model_index.json"
  index = json.loads(path.read_text())
  path.write_text(json.dumps({**index, "upscaler": ["diffusers", "X"]}))
  (published / "upscaler").mkdir()
  write(published / "upscaler", "model", tensors(BF16, 0))
  with pytest.raises(errors.InputError, match="would be lost"):
    checkpoint.convert(published, tmp_path / "x", "published")
  path.write_text(json.dumps({**index, "../../x": ["diffusers", "X"]}))
  with pytest.raises(errors.CorruptError, match="is no component"):
    checkpoint.convert(published, tmp_path / "x", "published")
  assert_no_litter(tmp_path)


def test_missing_component(published, tmp_path):
  with pytest.raises(errors.InputError, match="component vae is missing"):
    checkpoint.load_component(published, component("vae"))


def test_resolve_what_is_here(published, tmp_path):
  assert checkpoint.resolve(published) == published
  assert checkpoint.resolve(str(published)) == published
  with pytest.raises(errors.InputError, match="no revision v1"):
    checkpoint.resolve(published, "v1")
  with pytest.raises(errors.InputError, match="a file"):
    checkpoint.resolve(published / "model_index.json")


@pytest.mark.parametrize(
  "name",
  [
    "",
    "nowhere",
    "/no/where",
    "./a/b",
    "a/b/c",
    "../b",
    "a\0b",
    "a/.",
    "~x/y",
    "a" * 999,
  ],
)
def test_resolve_what_is_neither_folder_nor_id(name):
  with pytest.raises(errors.InputError, match="no hub id") as info:
    checkpoint.resolve(name)
  assert "\n" not in str(info.value)


RESOLVE = """
import json, sys, time
from vidgen import checkpoint, errors
for call in json.loads(sys.argv[1]):
  start = time.perf_counter()
  try:
    result = str(checkpoint.resolve(*call))
  except errors.VidgenError as e:
    result = f"refused: {e}"
  print(json.dumps([result, time.perf_counter() - start]))
"""


def resolve(calls: list, home, **environment) -> list[str]:
  """Resolves in a process of its own: the library reads its settings once."""
  kept = ("PATH", "PYTHONPATH", "VIRTUAL_ENV")
  env = {key: os.environ[key] for key in kept if key in os.environ}
  done = subprocess.run(
    [sys.executable, "-W", "error", "-c", RESOLVE, json.dumps(calls)],
    env={**env, "HF_HOME": str(home), "JAX_PLATFORMS": "cpu", **environment},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  results = [json.loads(line) for line in done.stdout.splitlines()]
  assert len(results) == len(calls)
  assert all(seconds < 20 and "\n" not in text for text, seconds in results)
  return [text for text, _ in results]


SHA = "0123456789abcdef0123456789abcdef01234567"


def cache(home: pathlib.Path, published: pathlib.Path) -> pathlib.Path:
  """Lays out the hub's cache: a snapshot of links to blobs."""
  repository = home / "hub" / "models--owner--name"
  snapshot = repository / "snapshots" / SHA
  for i, path in enumerate(sorted(published.rglob("*"))):
    if path.is_file():
      blob = repository / "blobs" / f"{i:040x}"
      blob.parent.mkdir(parents=True, exist_ok=True)
      blob.write_bytes(path.read_bytes())
      link = snapshot / path.relative_to(published)
      link.parent.mkdir(parents=True, exist_ok=True)
      link.symlink_to(os.path.relpath(blob, link.parent))
  for ref in ("main", "v1"):
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / ref).write_text(SHA)
  return snapshot


DEAD = {"HF_ENDPOINT": "http://127.0.0.1:9"}


NETWORKS = [({"HF_HUB_OFFLINE": "1"}, "OFFLINE is set"), (DEAD, "refused")]


@pytest.mark.parametrize(("network", "why"), NETWORKS)
def test_resolve_without_network(network, why, published, tmp_path):
  home = tmp_path / "home"
  snapshot = cache(home, published)
  known = [[], ["main"], ["v1"], [SHA]]
  calls = [["owner/name", *revision] for revision in known]
  assert resolve(calls, home, **network) == [str(snapshot)] * len(calls)
  calls = [["owner/other"], ["owner/name", "v2"], ["owner/name", "f" * 40]]
  calls.append(["owner/name.git"])
  for call, got in zip(calls, resolve(calls, home, **network), strict=True):
    assert got.startswith(f"refused: {call[0]}: no such folder")
    assert why in got or "no such id" in got
    revision = "".join(f" --revision {x}" for x in call[1:])
    name = call[0].split("/")[1]
    assert f"hf download {call[0]}{revision} --local-dir {name}" in got
    assert f"--checkpoint={name}" in got and "HF_HOME" in got


@pytest.mark.slow
def test_resolve_gives_up_on_a_silent_network(tmp_path):
  with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    server.listen()
    endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
    (got,) = resolve([["owner/name"]], tmp_path, HF_ENDPOINT=endpoint)
  assert got.startswith("refused: owner/name")


ANSWERS = {
  "RepoNotFound": (404, "no such repository"),
  "GatedRepo": (403, "licence has to be accepted"),
  "RevisionNotFound": (404, "no revision v9"),
  "Broken": (500, "HTTP"),
}


class Hub(http.server.BaseHTTPRequestHandler):
  """Refuses a repository as its name says."""

  def do_GET(self):
    code = next(code for code in ANSWERS if code in self.path)
    self.send_response(ANSWERS[code][0])
    self.send_header("X-Error-Code", code)
    self.send_header("Content-Length", "0")
    self.end_headers()

  def log_message(self, *args):
    pass


def test_resolve_what_the_hub_refuses(tmp_path):
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    calls = [[f"owner/{code}", "v9"] for code in ANSWERS]
    try:
      results = resolve(calls, tmp_path, HF_ENDPOINT=endpoint)
    finally:
      server.shutdown()
      thread.join()
  for (code, (_, words)), got in zip(ANSWERS.items(), results, strict=True):
    assert got.startswith(f"refused: owner/{code}") and words in got


def test_converts_from_the_cache(published, tmp_path):
  snapshot = cache(tmp_path / "home", published)
  checkpoint.convert(snapshot, tmp_path / "x", "published")
  held = tree(tmp_path / "x")
  small = small_files()
  assert {name: held[name] for name in small} == small
  assert not any(path.is_symlink() for path in (tmp_path / "x").rglob("*"))


def test_patterns_take_the_model_and_no_pickles():
  import huggingface_hub.utils

  files = [
    "model_index.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model-00001-of-00002.safetensors",
    "transformer/diffusion_pytorch_model.safetensors.index.json",
    "tokenizer/spiece.model",
    "tokenizer/merges.txt",
    "MANIFEST.json",
    "vae/orbax/d/0123",
  ]
  others = [
    "model.safetensors",
    "transformer/pytorch_model.bin",
    "vae/diffusion_pytorch_model.fp16.safetensors",
    "x.ckpt",
    "x.pt",
    "video.mp4",
  ]
  got = huggingface_hub.utils.filter_repo_objects(
    files + others,
    allow_patterns=list(checkpoint.PATTERNS),
    ignore_patterns=list(checkpoint.IGNORED),
  )
  assert list(got) == files


def test_orbax_keeps_dtypes_unless_asked(tmp_path):
  params = {
    "a": np.arange(6, dtype=BF16).reshape(2, 3),
    "b": np.arange(3, dtype=np.int32),
  }
  orbaxfile.save(tmp_path / "x", params)
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params
  )
  assert_trees_equal(orbaxfile.restore(tmp_path / "x", shapes), params)
  got = orbaxfile.restore(tmp_path / "x", shapes, dtype="float32")
  assert [x.dtype.name for x in got.values()] == ["float32", "int32"]
