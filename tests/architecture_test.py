"""Imports point down, and the package asks for nothing of torch."""

import ast
import pathlib
import subprocess
import sys

import pytest

import vidgen

ROOT = pathlib.Path(vidgen.__file__).parent

# From the bottom to the top: a module imports from lower layers or its own.
LAYERS = (
  {"errors", "version", "codehash"},
  {"meshes"},
  {"sharding", "optimizers"},
  {"layouts"},
  {"nn", "train_step", "shapefile"},
  {"diffusion", "samplers", "tensorheader", "tensorfile", "placement"},
  {"weights", "lora", "manifest", "orbaxfile"},
  {"encoders"},
  {"models"},
  {"filelock", "video", "checkpoint", "adapters", "publish"},
  {"ledger", "clips", "modelmark", "writer"},
  {"workdir", "statetree", "statefile", "runs", "preemption", "progress"},
  {"environment", "filehashes", "fingerprint", "outputs", "provenance"},
  {"links", "hosts", "joining", "rollcall", "supervisor"},
  {"meters", "goodput", "board"},
  {"data"},
  {"metrics"},
  {"posters", "runfiles", "report"},
  {"executables", "hlo"},
  {"arguments", "ahead", "pipeline", "interpolation", "loading"},
  {"tasks"},
  {"prompt_text", "prompt_records", "prompts"},
  {"sample_plan", "sample_model"},
  {"sample_folder", "sample"},
  {"train_config", "trainer"},
  {"bench", "prepare", "train", "encode", "evaluate"},
  {"likeness", "agreement", "repro", "rerun", "seedtable"},
  {"topology", "compile", "programs"},
  {"cli"},
)
LEVEL = {name: i for i, layer in enumerate(LAYERS) for name in layer}


def imports(path):
  """The parts of vidgen that a file imports when it is imported."""
  tree = ast.parse(path.read_text(encoding="utf-8"))
  for node in ast.walk(tree):
    if isinstance(node, ast.ImportFrom) and node.module:
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    elif isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    else:
      continue
    for name in names:
      parts = name.split(".")
      if parts[0] == "vidgen" and len(parts) > 1:
        yield parts[1:]


FILES = sorted(p for p in ROOT.rglob("*.py") if p.name != "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
  own = path.relative_to(ROOT).with_suffix("").parts
  assert own[0] in LEVEL, f"give {own[0]} a layer"
  for other in imports(path):
    if other[0] in LEVEL:
      assert LEVEL[other[0]] <= LEVEL[own[0]], (own, other)
    if own[0] == other[0] == "models" and len(own) > 2:
      assert other[1] in ("base", own[1]), "families never import each other"
  if own[0] == "nn":
    assert {other[0] for other in imports(path)} <= {"nn", "sharding"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_a_family_names_itself(path):
  own = path.relative_to(ROOT).with_suffix("").parts
  if own[:2] == ("models", "cogvideox") or own[0] == "cli":
    return
  assert "cogvideox" not in {o for other in imports(path) for o in other}


def test_runs_without_torch():
  code = (
    "import sys\n"
    "for name in ('torch', 'diffusers', 'tensorflow'):\n"
    "  sys.modules[name] = None\n"
    "import vidgen.loading, vidgen.sample, vidgen.cli.main\n"
    "from vidgen.models import cogvideox\n"
  )
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)
