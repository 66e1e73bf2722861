import dataclasses
import errno
import os
import pathlib
import subprocess
import sys
import time
import types
import warnings

import numpy as np
import pytest

import vidgen
from vidgen import errors, prompts, sample, sharding, version, video
from vidgen.cli import cache, main
from vidgen.cli import sample as sample_command

ROOT = pathlib.Path(__file__).parent.parent


class FakePipeline:
  """Stands in for a loaded model."""

  fps = 8
  why_mesh = ""

  def __init__(self):
    self.mesh = sharding.make_mesh(None)
    self.model = types.SimpleNamespace(
      fps=8,
      plan=lambda request: None,
      takes_text=True,
      takes_fps=False,
      takes_image=False,
      components=(),
    )

  def sample(self, prompt, *, progress, **arguments):
    with progress.stage("denoise"):
      progress.step(1, 1)
    return np.zeros((1, 2, 16, 16, 3), np.uint8)


@pytest.fixture
def jobs(monkeypatch, tmp_path):
  """The configs that the sampling job was called with."""
  seen, run = [], sample.run
  monkeypatch.chdir(tmp_path)

  def spy(config, progress, **kwargs):
    seen.append(config)
    return run(config, progress, **kwargs)

  monkeypatch.setattr(sample, "run", spy)
  monkeypatch.setattr(cache, "enable", lambda: None)

  def load(*args, check, **kwargs):
    fake = FakePipeline()
    check(fake.model, tmp_path)
    return fake

  monkeypatch.setattr(vidgen, "load", load, raising=False)
  return seen


def call(capsys, *argv):
  code = main.main(argv)
  out, err = capsys.readouterr()
  return code, out, err


def fails(capsys, *argv, code=2):
  """Returns the one line of a command that fails."""
  got, out, err = call(capsys, *argv)
  assert got == code
  assert out == ""
  assert err.startswith("vidgen: error: ")
  assert err.count("\n") == 1
  return err.removeprefix("vidgen: error: ").rstrip("\n")


def test_help_lists_the_commands(capsys):
  for argv in ((), ("--help",), ("-h",), ("help",)):
    code, out, err = call(capsys, *argv)
    assert (code, err) == (0, "")
    for name in main.COMMANDS:
      assert f"\n  {name} " in out


def test_version(capsys):
  assert call(capsys, "--version")[:2] == (0, f"vidgen {version.VERSION}\n")


def test_help_of_sample_names_every_flag_and_field(capsys):
  code, out, _ = call(capsys, "sample", "--seed=3", "--help")
  assert code == 0
  for field in dataclasses.fields(sample.SampleConfig):
    assert field.name in out
  for name in sample_command._TEXT:
    assert f"--{name}=" in out
  assert "alsologtostderr" not in out
  assert max(map(len, out.splitlines())) <= 80


def test_mistaken_commands(capsys):
  line = fails(capsys, "smaple")
  assert line == "there is no command 'smaple'; did you mean sample?"
  assert "--help" in fails(capsys, "xyz")
  assert "a command comes first" in fails(capsys, "--prompt=a")


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    (["--promt=a"], "--promt: there is no such flag. Did you mean --pro"),
    (["--num_steps=3"], "Use --config.num_steps=VALUE."),
    (["--config.num_step=3"], "Did you mean num_steps?"),
    (["--config.num_steps=abc"], "=abc: must be a whole number."),
    (["--config.num_steps=2.5"], "=2.5: must be a whole number."),
    (["--config.guidance_scale=x"], "=x: must be a number."),
    (["--config.tiling=maybe"], "--config.tiling=maybe: "),
    (["--config.mesh.cfg=two"], "--config.mesh.cfg=two: must be of type"),
    (["--config.mesh=2"], "mesh: '2' is unknown; give auto, one of data,"),
    (["--config.options=2"], "--config.options.NAME=VALUE"),
    (["--config.mesh.cfg"], "--config.mesh.cfg: has no value"),
    (["--config.prompt.x=2"], "--config.prompt.x"),
    (["--seed=x"], "--seed=x: "),
    (["--prompt"], "Missing value for flag --prompt"),
    (["a", "panda"], "'a' is no flag"),
    (["--config=no.py"], "--config=no.py: there is no such file."),
    ([], "--prompt=TEXT or --prompts=FILE"),
    (["--prompt=a", "--prompts=b.txt"], "either --prompt=TEXT"),
    (["--prompt=a", "--config.height=0"], "at least 1, not 0"),
  ],
)
def test_mistaken_flags(capsys, jobs, argv, message):
  assert message in fails(capsys, "sample", *argv)


def test_a_mistaken_field_of_a_field(capsys, tmp_path):
  config = "--config=configs/demo_vae_train.py"
  workdir = f"--workdir={tmp_path / 'run'}"
  line = fails(capsys, "train", config, workdir, "--config.task.los.l1=2.0")
  assert "AutoencoderTaskConfig has no field 'los'" in line
  assert line.endswith("Did you mean loss?")


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("stages.0.num_steps=3", "a field of one, --config.stages[0].num_steps="),
    ("stages=3", "set a field of one, --config.stages[0].FIELD=VALUE."),
    ("stages[9].num_steps=3", "a --config.FIELD[N] counts from 0"),
  ],
)
def test_a_mistaken_field_of_a_stage(capsys, tmp_path, flag, message):
  config = "--config=configs/demo_vae_train.py"
  workdir = f"--workdir={tmp_path / 'run'}"
  assert message in fails(capsys, "train", config, workdir, f"--config.{flag}")


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("def get_config(:\n", "c.py:1: "),
    ("import nothing_of_this_name\n", "c.py:1: ModuleNotFoundError: No"),
    ("x = 1\n\ny = x / 0\n", "c.py:3: ZeroDivisionError: "),
    ("x = 1\n", "has no attribute 'get_config'"),
    ("def get_config():\n  return 3\n", "must return a SampleConfig, not"),
    (
      "from vidgen import sample\n"
      "def get_config():\n"
      "  return sample.SampleConfig(num_step=3)\n",
      "c.py:3: TypeError: ",
    ),
  ],
)
def test_mistaken_config_files(capsys, jobs, tmp_path, text, message):
  (tmp_path / "c.py").write_text(text)
  line = fails(capsys, "sample", f"--config={tmp_path}/c.py", "--prompt=a")
  assert str(tmp_path / "c.py") in line
  assert message in line


def test_flags_override_the_config(capsys, jobs, tmp_path):
  (tmp_path / "c.py").write_text(
    "from vidgen import sample\n"
    "def get_config(size='a'):\n"
    "  return sample.SampleConfig(num_steps=9, prompts='no.txt', seed=3,\n"
    "      dtype='float32', revision=size, out='no', mesh={'data': 1})\n"
  )
  code, out, err = call(
    capsys,
    "sample",
    "--config.num_steps=7",
    "--config.guidance_scale=5",
    "--config.options.dynamic_guidance=True",
    "--config.options.flavour",
    "sweet",
    "--config.mesh.cfg=2",
    "--config.tiling",
    "--config.formats=gif,mp4",
    f"--config={tmp_path}/c.py:b",
    "--prompt",
    "A panda, happy.",
    f"--out={tmp_path}/out",
    "--seed=4",
  )
  assert code == 0, err
  assert jobs == [
    sample.SampleConfig(
      prompt="A panda, happy.",
      seed=4,
      num_steps=7,
      guidance_scale=5.0,
      dtype="float32",
      revision="b",
      tiling=True,
      formats=("gif,mp4",),
      mesh={"data": 1, "cfg": 2},
      options={"dynamic_guidance": True, "flavour": "sweet"},
      out=f"{tmp_path}/out",
    )
  ]
  assert "peak memory" in out
  assert f"1 clip in {tmp_path}/out:" in out
  assert sum(line.endswith((".gif", ".mp4")) for line in out.split()) == 2
  assert "denoise took" in err


@pytest.mark.parametrize(
  ("argv", "want"),
  [
    (["--config.lora={0}/a.st"], "{0}/a.st"),
    (
      ["--config.lora.{0}/a.st=0.5", "--config.lora.{0}/b.c.st=-1"],
      {"{0}/a.st": 0.5, "{0}/b.c.st": -1.0},
    ),
  ],
)
def test_one_lora_or_several_by_weight(capsys, jobs, tmp_path, argv, want):
  for name in ("a.st", "b.c.st"):
    (tmp_path / name).write_bytes(b"")
  argv = [text.format(tmp_path) for text in argv]
  code, _, err = call(capsys, "sample", "--prompt=a", *argv)
  assert code == 0, err
  if isinstance(want, dict):
    want = {name.format(tmp_path): weight for name, weight in want.items()}
    assert jobs[0].lora == want
  else:
    assert jobs[0].lora == want.format(tmp_path)


def test_an_image_replaces_the_video_of_a_config(capsys, jobs, tmp_path):
  video.write_png_frames(tmp_path / "a", np.zeros((1, 8, 8, 3), np.uint8))
  image = f"{tmp_path}/a/000000.png"
  argv = ["--prompt=a", f"--image={image}", f"--out={tmp_path}/out"]
  assert call(capsys, "sample", "--config.video=no.mp4", *argv)[0] == 0
  assert (jobs[0].image, jobs[0].video) == (image, None)


@pytest.fixture
def command(monkeypatch):
  """A command that raises what it is told to."""
  module = types.ModuleType("tests_command", "Fails.")
  module.define = lambda values, argv: None
  monkeypatch.setitem(sys.modules, "tests_command", module)
  monkeypatch.setitem(main.COMMANDS, "fail", ("tests_command", "fails"))

  def install(error):
    def run(values):
      raise error

    module.run = run

  return install


@pytest.mark.parametrize(
  ("error", "code"),
  [
    (errors.InputError("a\nb"), 2),
    (errors.CorruptError("a b"), 3),
    (errors.StorageError("a b"), 74),
  ],
)
def test_exit_codes(capsys, command, error, code):
  command(error)
  assert fails(capsys, "fail", code=code) == "a b"


def test_a_full_disk_anywhere(capsys, command):
  full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x/y")
  command(full)
  assert "No space left on device: 'x/y'" in fails(capsys, "fail", code=74)
  outer = RuntimeError("the cache")
  outer.__cause__ = full
  command(outer)
  assert "the cache" in fails(capsys, "fail", code=74)
  command(ValueError("RESOURCE_EXHAUSTED: No space left on device"))
  fails(capsys, "fail", code=74)


def test_interrupted(capsys, command):
  command(KeyboardInterrupt())
  assert fails(capsys, "fail", code=130) == "interrupted."


def test_a_bug_keeps_its_traceback(command):
  command(ZeroDivisionError("a bug"))
  with pytest.raises(ZeroDivisionError):
    main.main(["fail"])


def test_warnings_are_one_line(capsys, monkeypatch, command):
  command(errors.InputError("a"))
  sys.modules["tests_command"].run = lambda values: warnings.warn(
    "prompt cut:\n'and so on'", stacklevel=1
  )
  with warnings.catch_warnings():
    warnings.simplefilter("always")
    code, out, err = call(capsys, "fail")
  assert (code, out) == (0, "")
  assert err == "vidgen: warning: prompt cut: 'and so on'\n"


def test_convert_asks_for_its_flags(capsys, monkeypatch):
  seen = []
  module = types.ModuleType("vidgen.checkpoint")
  module.convert = lambda *arguments: seen.append(arguments)
  monkeypatch.setitem(sys.modules, "vidgen.checkpoint", module)
  monkeypatch.setattr(vidgen, "checkpoint", module, raising=False)
  monkeypatch.delitem(sys.modules, "vidgen.cli.convert", raising=False)
  argv = ["--source=a", "--target=b", "--layout=orbax"]
  for i, name in enumerate(("source", "target", "layout")):
    line = fails(capsys, "convert", *argv[:i], *argv[i + 1 :])
    assert f"--{name} is missing" in line
  line = fails(capsys, "convert", *argv[:2], "--layout=orbx")
  assert "published|orbax" in line
  assert call(capsys, "convert", *argv)[0] == 0
  assert seen == [("a", "b", "orbax", None)]


def shell(*argv, **environment):
  return subprocess.run(
    [sys.executable, "-m", "vidgen.cli.main", *argv],
    cwd=ROOT,
    env={**os.environ, **environment},
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )


def test_help_is_quick():
  start = time.perf_counter()
  done = shell("--help")
  assert done.returncode == 0, done.stderr
  # Importing jax alone takes longer on a slow machine.
  code = "import sys, vidgen.cli.main; print('jax' in sys.modules)"
  process = [sys.executable, "-c", code]
  out = subprocess.run(process, cwd=ROOT, capture_output=True, text=True)
  assert out.stdout == "False\n"
  assert time.perf_counter() - start < 10


def test_sampling_imports_what_it_needs():
  """Each of these takes a second or more."""
  heavy = "orbax.checkpoint", "optax", "transformers", "scipy.linalg", "grain"
  found = f"[name for name in {heavy} if name in sys.modules]"
  code = f"import sys, vidgen.sample; print({found})"
  process = [sys.executable, "-c", code]
  done = subprocess.run(process, cwd=ROOT, capture_output=True, text=True)
  assert done.stdout == "[]\n", done.stderr


def test_a_mistake_in_a_real_process(tmp_path):
  done = shell("sample", "--prompt=a", "--config.num_stepz=3")
  assert done.returncode == 2
  assert done.stdout == ""
  assert done.stderr == (
    "vidgen: error: --config.num_stepz: the config has no such field. "
    "Did you mean num_steps?\n"
  )


def test_a_closed_pipe_is_no_traceback():
  command = f"{sys.executable} -m vidgen.cli.main --help"
  done = subprocess.run(
    ["bash", "-c", f"{command} > >(exec true); sleep 0.2"],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert "Traceback" not in done.stderr


CACHE = """
import jax
from vidgen.cli import cache
cache.enable()
print(jax.config.jax_compilation_cache_dir)
jax.jit(lambda x: x * 2 + 1)(1.0)
"""


def cached(**environment):
  kept = {k: v for k, v in os.environ.items() if k != CACHE_VARIABLE}
  done = subprocess.run(
    [sys.executable, "-c", CACHE],
    cwd=ROOT,
    env={**kept, **environment},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.strip()


CACHE_VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def test_the_compilation_cache(tmp_path):
  home = tmp_path / "home"
  home.mkdir()
  folder = home / ".cache/vidgen/xla"
  assert cached(HOME=str(home), VIDGEN_CACHE="") == str(folder)
  assert os.listdir(folder)
  named = tmp_path / "named"
  assert cached(HOME=str(home), VIDGEN_CACHE=str(named)) == str(named)
  assert os.listdir(named)
  # A file is no folder: go on without.
  (tmp_path / "file").write_text("")
  assert cached(VIDGEN_CACHE=str(tmp_path / "file")) == "None"
  users = str(tmp_path / "users")
  assert cached(**{CACHE_VARIABLE: users}) == users


def test_the_help_of_the_samplers_is_up_to_date():
  assert prompts.SAMPLERS == ("ddim", "dpmpp_2m_sde")


def test_a_config_or_the_hosts_say_which_part_it_is(capsys, jobs, monkeypatch):
  place = {"COORDINATOR": "one:99", "PROCESSES": "4", "PROCESS": "2"}
  for name, value in place.items():
    monkeypatch.setenv(f"VIDGEN_{name}", value)
  for argv in ([], ["--shard=1/3"], ["--config.shard=1/3"]):
    assert call(capsys, "sample", "--prompt=a", *argv)[0] == 0
  assert [job.shard for job in jobs] == ["2/4", "1/3", "1/3"]
