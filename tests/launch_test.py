"""Getting a run onto machines: the launcher here, and what is rendered."""

import importlib.util
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys

import jsonschema
import numpy as np
import pytest
import yaml

import vidgen
from tests import tiny_training, toy_training
from vidgen import runs, statefile, train

ROOT = pathlib.Path(vidgen.__file__).parent.parent

# A training command on several processes, as `vidgen train` is one.
COMMAND = """
import dataclasses, os, sys
from vidgen import errors, hosts, joining, supervisor
try:
  if place := hosts.find(os.environ):
    again = [sys.executable, "-c", sys.argv[1], *sys.argv[1:]]
    sys.exit(supervisor.run(place, again, os.environ))
  from tests import toy_training
  from vidgen import train
  _, data, workdir = sys.argv[1:]
  config = toy_training.config(data, 1000, 0.1, mesh={"data": 2})
  with joining.joined(os.environ, dataclasses.asdict(config)):
    print("worker", os.getpid(), flush=True)
    train.run(config, workdir)
except errors.VidgenError as error:
  print("vidgen: error:", error, file=sys.stderr)
  sys.exit(error.exit_code)
"""


def launch(arguments, command, **environ):
  """Starts the launcher."""
  return subprocess.Popen(
    [sys.executable, "launch/local.py", *arguments, "--", *command],
    cwd=ROOT,
    env={**os.environ, **environ},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def until(child, *words):
  """Reads what a launcher writes up to a line with all of the words."""
  lines = []
  for line in child.stdout:
    lines.append(line)
    if all(word in line for word in words):
      return lines
  raise AssertionError("".join(lines))


def rest(child):
  """Waits for a launcher; returns its exit code and what was left to read."""
  out, _ = child.communicate(timeout=300)
  return child.returncode, out.splitlines()


def shell(script):
  return [sys.executable, "-c", script]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  return tiny_training.shapes(tmp_path_factory.mktemp("data"))


def final(workdir):
  step = max(runs.checkpoint_steps(workdir))
  path = workdir / "checkpoints" / f"{step:09d}"
  held = statefile.held(path)
  like = {n: np.empty(x.shape, x.dtype) for n, x in held.items()}
  return step, statefile.read(path, like)


def test_a_killed_worker_and_the_run_goes_on(data_dir, tmp_path):
  """Two processes, one killed, then told to stop: where one process is."""
  command = [*shell(COMMAND), COMMAND, data_dir, str(tmp_path / "killed")]
  child = launch(["--processes=2", "--devices=1"], command)
  try:
    lines = until(child, "] step 7/")
    worker = next(x for x in lines if x.startswith("[1] worker"))
    os.kill(int(worker.split()[2]), signal.SIGKILL)
    lines = until(child, "launch: starting again (1 of 100)")
    told = [x for x in lines if "error:" in x]
    assert len(told) == 2, lines
    assert all("process 1 " in x and "ended by SIGKILL" in x for x in told)
    first = until(child, "] step ")[-1]
    assert "] step 6/" in first, "the last checkpoint was of step 5"
    until(child, "] step 8/")
    child.send_signal(signal.SIGTERM)
    code, out = rest(child)
  finally:
    child.kill()
    child.communicate()
  assert code == 75, out
  saved = [x for x in out if "stopped and saved at step" in x]
  assert len(saved) == 2, out
  step, got = final(tmp_path / "killed")
  assert all(f"at step {step};" in x for x in saved)
  config = toy_training.config(data_dir, 1000, mesh={"data": 2})
  config = tiny_training.replace(config, num_steps=step)
  train.run(config, tmp_path / "whole")
  other, want = final(tmp_path / "whole")
  assert other == step
  assert want.keys() == got.keys()
  assert all(want[n].tobytes() == got[n].tobytes() for n in want)


def test_it_starts_again_where_that_helps(tmp_path):
  """As often as it may, and not after an error that stays."""
  script = (
    "import os, pathlib, sys\n"
    "path = pathlib.Path(sys.argv[1], os.environ['VIDGEN_PROCESS'])\n"
    "starts = len(path.read_text()) if path.exists() else 0\n"
    "path.write_text('x' * (starts + 1))\n"
    "sys.exit(int(sys.argv[2 + min(starts, len(sys.argv) - 3)]))\n"
  )
  for codes, flags, want, starts in (
    (["75", "75", "0"], [], 0, 3),
    (["0"], [], 0, 1),
    (["75", "2"], [], 2, 2),
    (["75"], ["--restarts=1"], 75, 2),
  ):
    folder = tmp_path / "-".join(codes)
    folder.mkdir()
    command = [*shell(script), str(folder), *codes]
    child = launch(["--processes=2", *flags], command)
    assert rest(child)[0] == want
    assert {len((folder / p).read_text()) for p in "01"} == {starts}


def test_told_to_stop_the_launcher_does_not_start_again():
  script = "import time; print('up', flush=True); time.sleep(60)"
  child = launch(["--processes=2"], shell(script))
  until(child, "up")
  until(child, "up")
  child.send_signal(signal.SIGTERM)
  code, out = rest(child)
  assert code == 75
  assert not any("again" in line for line in out)


@pytest.mark.parametrize(
  "arguments, word",
  [
    ([], "write it after --"),
    (["--processes=2"], "write it after --"),
    (["--", "x"], "--processes is missing"),
    (["--processes=0", "--", "x"], "--processes is missing"),
    (["--processes=two", "--", "x"], "invalid int"),
    (["--prosesses=2", "--", "x"], "unrecognized"),
    (["--processes=2", "--restarts=-1", "--", "x"], "0 or more"),
    (["--processes=2", "--", "no-such-command"], "no-such-command"),
  ],
)
def test_bad_flags(arguments, word):
  done = subprocess.run(
    [sys.executable, "launch/local.py", *(arguments or ["x"])],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert done.returncode == 2
  assert done.stderr.count("\n") == 1
  assert word in done.stderr


def test_gpus_are_shared_out():
  script = "import os; print('has', os.environ['CUDA_VISIBLE_DEVICES'])"
  child = launch(
    ["--processes=2"], shell(script), CUDA_VISIBLE_DEVICES="4,5,6,7"
  )
  _, out = rest(child)
  assert sorted(out) == ["[0] has 4,5", "[1] has 6,7"]
  child = launch(["--processes=2"], shell(script), CUDA_VISIBLE_DEVICES="4")
  code, out = rest(child)
  assert code == 2
  assert "1 GPUs cannot be shared" in out[0]


# What is rendered.


def module(name):
  """A script of launch/, as a module."""
  spec = importlib.util.spec_from_file_location(
    name, ROOT / "launch" / f"{name}.py"
  )
  made = importlib.util.module_from_spec(spec)
  sys.modules[name] = made
  spec.loader.exec_module(made)
  return made


values_lib = module("values")
render = module("render")

# Letters that a shell, YAML or systemd would take for something else.
ODD = 'a\'b "c" $HOME `id` $(id); x: {y} # %n \\ * é @{name}'

BASE = {
  "name": "run-1",
  "command": ["train", "--config=configs/demo_dit_train.py"],
  "workdir": "/shared/run 1",
  "topology": "v6e:4x4",
  "image": "us-docker.pkg.dev/p/r/vidgen:1",
  "project": "p",
  "zone": "z",
  "cluster": "c",
}


def values(**fields):
  return values_lib.Values(**{**BASE, **fields})


def toml(fields):
  """The same as TOML: JSON's texts, numbers and lists are TOML's too."""
  tables = {k: v for k, v in fields.items() if isinstance(v, dict)}
  lines = [
    f"{k} = {json.dumps(v)}" for k, v in fields.items() if k not in tables
  ]
  for name, table in tables.items():
    lines.append(f"[{name}]")
    lines += [f"{json.dumps(k)} = {json.dumps(v)}" for k, v in table.items()]
  return "\n".join(lines) + "\n"


# For each way the values that it takes.
WAYS = {
  "local": {"topology": "cpu:4", "processes": 2},
  "slurm": {"topology": "gpu:8", "hosts": 4, "partition": "big"},
  "xpk": {},
  "tpu_vm": {"topology": "2*v5p:4x4x4", "workdir": "gs://bucket/runs/1"},
  "gke_jobset": {"spot": True, "queue": "q", "workdir": "gs://bucket/runs/1"},
}


@pytest.fixture
def stubs(tmp_path, monkeypatch):
  """Makes commands that note how they are called; returns what reads that."""
  folder = tmp_path / "bin"
  folder.mkdir()
  log = tmp_path / "calls"

  def make(name, then=""):
    note = (
      "import json, os, sys\n"
      f"open({str(log)!r}, 'a').write(json.dumps([{name!r}, *sys.argv[1:]])"
      " + '\\n')\n"
    )
    path = folder / name
    path.write_text(f"#!{sys.executable} -SE\n{note}{then}\n")
    path.chmod(0o755)

  def calls(name):
    lines = map(json.loads, log.read_text().splitlines())
    return [line[1:] for line in lines if line[0] == name]

  monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
  make.calls = calls
  return make


def start(way, tmp_path, *words, **fields):
  """Renders a script and runs it, with stubs in the place of its commands."""
  text = render.render(way, values(**{**WAYS[way], **fields}))
  path = tmp_path / f"script.{way}"
  path.write_text(text)
  return subprocess.run(
    ["bash", str(path), *words],
    capture_output=True,
    text=True,
    timeout=120,
    cwd=tmp_path,
    env={**os.environ, "SLURM_JOB_ID": "7"},
  )


@pytest.mark.parametrize("fields", [{}, {"env": {"A": ODD}, "claim": "c"}])
@pytest.mark.parametrize("way", [w for w in WAYS if w != "gke_jobset"])
def test_scripts_are_bash(way, fields, tmp_path):
  text = render.render(way, values(**{**WAYS[way], **fields}))
  path = tmp_path / "script.sh"
  path.write_text(text)
  subprocess.run(["bash", "-n", str(path)], check=True)
  check = ["shellcheck", "--severity=warning", str(path)]
  done = subprocess.run(check, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


COMMAND_ODD = ["train", "--config=x.py", f"--config.task.words={ODD}"]
WANT_ODD = ["train", "--config=x.py", f"--config.task.words={ODD}"]


def test_local_script(tmp_path, stubs):
  stubs("vidgen", "print('is', os.environ['A'])")
  done = start("local", tmp_path, command=COMMAND_ODD, env={"A": ODD})
  assert done.returncode == 0, done.stderr
  want = [*WANT_ODD, "--workdir=/shared/run 1"]
  assert stubs.calls("vidgen") == [want, want]
  assert sorted(done.stdout.splitlines()) == [
    f"[0] is {ODD}",
    f"[1] is {ODD}",
  ]


def test_slurm_script(tmp_path, stubs):
  stubs("srun", "print('is', os.environ['A']); sys.exit(75)")
  stubs("scontrol")
  done = start(
    "slurm",
    tmp_path,
    command=COMMAND_ODD,
    env={"A": ODD},
    setup="test -n here\nexport B=1",
  )
  assert done.returncode == 75
  assert done.stdout == f"is {ODD}\n"
  (call,) = stubs.calls("srun")
  at = call.index("vidgen")
  assert call[at + 1 :] == [*WANT_ODD, "--workdir=/shared/run 1"]
  assert stubs.calls("scontrol") == [["requeue", "7"]]
  text = (tmp_path / "script.slurm").read_text()
  lines = [x for x in text.splitlines() if x.startswith("#SBATCH")]
  assert "#SBATCH --signal=TERM@120" in lines
  assert "#SBATCH --gpus-per-node=8" in lines
  assert "#SBATCH --partition=big" in lines
  # Only lines before the first command count.
  assert text.index(lines[-1]) < text.index("set -u")


@pytest.mark.parametrize("code, again", [(0, False), (2, False), (75, True)])
def test_slurm_queues_again_what_may_go_on(code, again, tmp_path, stubs):
  stubs("srun", f"sys.exit({code})")
  stubs("scontrol")
  done = start("slurm", tmp_path)
  assert done.returncode == code
  assert (stubs.calls("scontrol") != []) == again


def test_xpk_script(tmp_path, stubs):
  stubs("xpk")
  done = start("xpk", tmp_path, command=COMMAND_ODD, env={"A": ODD}, claim="s")
  assert done.returncode == 0, done.stderr
  (call,) = stubs.calls("xpk")
  flags = dict(x.partition("=")[::2] for x in call if x.startswith("--"))
  assert flags["--tpu-type"] == "v6e-16"
  assert flags["--restart-on-exit-codes"] == "75"
  assert flags["--env"] == f"A={ODD}"
  assert flags["--storage"] == "s"
  words = shlex.split(flags["--command"])
  assert words == ["exec", "vidgen", *WANT_ODD, "--workdir=/shared/run 1"]


# The other side of gcloud: a TPU VM that runs what it is told, is taken away
# once, and ends with an exit code.
GCLOUD = """
state = open("state").read() if os.path.exists("state") else ""
if "create" in sys.argv:
  open("state", "w").write("ACTIVE")
elif "delete" in sys.argv:
  os.remove("state")
elif "describe" in sys.argv:
  print(state)
elif "ssh" in sys.argv:
  command = next(x for x in sys.argv if x.startswith("--command="))
  os.execvp("bash", ["bash", "-c", command[10:]])
"""
SYSTEMCTL = """
if "--property=ActiveState" in sys.argv:
  if os.path.exists("polled"):
    print("failed")
  elif os.path.exists("taken"):
    open("polled", "w").close()
    print("active")
  else:
    open("taken", "w").close()
    open("state", "w").write("SUSPENDED")
    print("activating")
elif "--property=ExecMainStatus" in sys.argv:
  print(74)
"""


def test_tpu_vm_script(tmp_path, stubs):
  stubs("gcloud", GCLOUD)
  stubs("systemctl", SYSTEMCTL)
  stubs("sudo", "os.execvp(sys.argv[1], sys.argv[1:])")
  for name in ("sleep", "docker", "gcsfuse", "systemd-run", "mkdir"):
    stubs(name)
  stubs("mountpoint", "sys.exit(1)")
  done = start("tpu_vm", tmp_path, "up", command=COMMAND_ODD, env={"A": ODD})
  # The machines are taken away once; then the command ends with 74.
  assert done.returncode == 74, done
  assert "taken away" in done.stderr
  calls = stubs.calls("gcloud")
  made = [call for call in calls if "create" in call]
  assert len(made) == 2
  assert "--accelerator-type=v5p-128" in made[0]
  assert "--runtime-version=v2-alpha-tpuv5" in made[0]
  assert {"--node-count=2", "--node-prefix=run-1"} < set(made[0])
  runs = stubs.calls("systemd-run")
  assert len(runs) == 4, "two slices, two times"
  assert "--property=RestartForceExitStatus=75" in runs[0]
  image = runs[0].index(BASE["image"])
  # As systemd reads it.
  words = [word.replace("$$", "$") for word in runs[0]]
  assert words[image + 1 :] == [*WANT_ODD, "--workdir=/data/runs/1"]
  assert f"--env=A={ODD}" in words
  assert ["--implicit-dirs", "-o", "allow_other", "bucket", "/data"] in (
    stubs.calls("gcsfuse")
  )


SCHEMA = json.loads((ROOT / "tests/jobset_schema.json").read_text())


def jobset(**fields):
  text = render.render("gke_jobset", values(**fields))
  made = yaml.safe_load(text)
  jsonschema.validate(made, SCHEMA)
  return made


def pod(made):
  (jobs,) = made["spec"]["replicatedJobs"]
  return jobs["template"]["spec"]["template"]["spec"]


def test_jobset_of_tpus():
  made = jobset(
    **{
      **WAYS["gke_jobset"],
      "topology": "2*v5e:4x8",
      "command": COMMAND_ODD,
      "env": {"A": ODD},
    }
  )
  (jobs,) = made["spec"]["replicatedJobs"]
  assert jobs["replicas"] == 2
  assert jobs["template"]["spec"]["parallelism"] == 8
  assert pod(made)["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
    "cloud.google.com/gke-tpu-topology": "4x8",
    "cloud.google.com/gke-spot": "true",
  }
  (container,) = pod(made)["containers"]
  assert container["command"] == [
    "vidgen",
    *WANT_ODD,
    "--workdir=/data/runs/1",
  ]
  assert container["env"] == [{"name": "A", "value": ODD}]
  assert container["resources"] == {"limits": {"google.com/tpu": 4}}
  assert pod(made)["terminationGracePeriodSeconds"] == 120
  (bucket,) = (v["csi"] for v in pod(made)["volumes"] if "csi" in v)
  assert bucket["volumeAttributes"]["bucketName"] == "bucket"


def test_jobset_starts_again_but_after_errors_that_stay():
  spec = jobset()["spec"]
  (rule,) = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"][
    "rules"
  ]
  assert rule["action"] == "FailJob"
  assert rule["onExitCodes"]["values"] == [1, 2, 3, 4, 74]
  assert spec["failurePolicy"]["maxRestarts"] == 100
  (policy,) = spec["failurePolicy"]["rules"]
  assert policy["action"] == "FailJobSet"
  assert policy["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_jobset_of_gpus():
  """Its pods find each other where vidgen looks."""
  from vidgen import hosts

  made = jobset(topology="gpu:8", hosts=4, claim="shared")
  (container,) = pod(made)["containers"]
  assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
  environ = {entry["name"]: entry["value"] for entry in container["env"]}
  place = hosts.find({**environ, "JOB_COMPLETION_INDEX": "3"})
  assert (place.host, place.processes, place.process) == (
    "run-1-workers-0-0.run-1",
    4,
    3,
  )
  claim = {"claimName": "shared"}
  assert {"name": "data", "persistentVolumeClaim": claim} in (
    pod(made)["volumes"]
  )


def test_the_schema_sees_mistakes():
  made = jobset()
  pod(made)["containers"][0]["comand"] = ["x"]
  with pytest.raises(jsonschema.ValidationError, match="comand"):
    jsonschema.validate(made, SCHEMA)


@pytest.mark.parametrize(
  "topology, want",
  [
    ("v5e:1x1", ("v5litepod-1", 1, 1, 1)),
    ("v5e:2x4", ("v5litepod-8", 1, 1, 8)),
    ("v5e:16x16", ("v5litepod-256", 1, 64, 4)),
    ("v6e:4x4", ("v6e-16", 1, 4, 4)),
    ("v5p:4x4x4", ("v5p-128", 1, 16, 4)),
    ("2*v6e:16x16", ("v6e-256", 2, 64, 4)),
  ],
)
def test_topologies(topology, want):
  got = values_lib.machines(values(topology=topology))
  assert (got.accelerator, got.slices, got.hosts, got.devices) == want


@pytest.mark.parametrize(
  "way, fields, word",
  [
    ("gke_jobset", {"name": None}, "name is missing"),
    ("gke_jobset", {"workdir": None}, "workdir is missing"),
    ("gke_jobset", {"image": ""}, "image is missing; gke_jobset needs"),
    ("tpu_vm", {"zone": ""}, "zone is missing; tpu_vm needs"),
    ("xpk", {"cluster": ""}, "cluster is missing"),
    ("gke_jobset", {"name": "a;id"}, "name: 'a;id'"),
    ("gke_jobset", {"name": "Run"}, "name: 'Run'"),
    ("gke_jobset", {"nmae": "x"}, "nmae is unknown"),
    ("gke_jobset", {"hosts": "2"}, "hosts: '2' is not a whole number"),
    ("gke_jobset", {"hosts": True}, "hosts: True is not"),
    ("gke_jobset", {"command": "train"}, "not a list of texts"),
    ("gke_jobset", {"command": ["train", 1]}, "not a list of texts"),
    ("gke_jobset", {"command": ["rm"]}, "begin with train or sample"),
    ("gke_jobset", {"command": ["train", "--workdir=x"]}, "--workdir comes"),
    ("gke_jobset", {"command": ["sample"]}, "start together only"),
    (
      "gke_jobset",
      {"command": ["sample"], "topology": "gpu:8", "processes": 8},
      "one process a host",
    ),
    ("gke_jobset", {"env": {"A B": "x"}}, "'A B' is no name"),
    ("gke_jobset", {"workdir": "a\nb"}, "line break"),
    ("gke_jobset", {"workdir": "gs://bucket"}, "gs://BUCKET/FOLDER"),
    ("gke_jobset", {"topology": "v7:2x2"}, "'v7:2x2' is not known"),
    ("gke_jobset", {"topology": "v5p:4x4"}, "'v5p:4x4' is not known"),
    ("gke_jobset", {"topology": "v6e:3x5"}, "whole hosts"),
    ("gke_jobset", {"topology": "gpu:8", "processes": 3}, "share 8 GPUs"),
    ("slurm", {}, "topology: 'v6e:4x4' is not for slurm"),
    (
      "slurm",
      {"topology": "gpu:8", "partition": "a b"},
      "partition: 'a b' has odd",
    ),
    (
      "slurm",
      {"topology": "gpu:8", "workdir": "gs://bucket/c"},
      "slurm needs a folder",
    ),
    ("cloud", {}, "'cloud' is no way"),
  ],
)
def test_bad_values(way, fields, word, tmp_path, capsys):
  given = {k: v for k, v in {**BASE, **fields}.items() if v is not None}
  path = tmp_path / "run.toml"
  path.write_text(toml(given))
  out = tmp_path / "out"
  assert render.main([way, f"--values={path}", f"--out={out}"]) == 2
  err = capsys.readouterr().err
  assert err.count("\n") == 1
  assert word in err
  assert not out.exists()


def test_the_example_renders(tmp_path, capsys):
  for way in ("tpu_vm", "gke_jobset"):
    out = tmp_path / way
    example = ROOT / "launch/example.toml"
    assert render.main([way, f"--values={example}", f"--out={out}"]) == 0
    assert f"{out} is written; start it with: " in capsys.readouterr().out
    assert "cogvideox-2b" in out.read_text()


def test_values_files_that_cannot_be_read(tmp_path, capsys):
  bad = tmp_path / "bad.toml"
  bad.write_text("name = \n")
  for path, word in ((bad, "is no TOML"), (tmp_path / "none", "No such file")):
    assert render.main(["xpk", f"--values={path}"]) == 2
    assert word in capsys.readouterr().err
