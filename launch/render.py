"""Writes the file that starts a run somewhere, from the run's values.

usage: python launch/render.py WAY --values=FILE [--out=FILE]

  WAY                 local, tpu_vm, gke_jobset, xpk or slurm
  --values=FILE       a TOML file; see launch/example.toml and launch/values.py
  --out=FILE          what is written; without it, NAME.WAY and its ending

example
  python launch/render.py gke_jobset --values=run.toml --out=run.yaml
"""

import json
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import values as values_lib
from values import Machines, Values, ValuesError

HERE = pathlib.Path(__file__).resolve().parent

PORT = 8476


class Way(NamedTuple):
  """A way onto machines.

  Attributes:
    template: The file's name in `templates`.
    fill: Returns what goes into the template.
    start: The command that starts the file.
    needs: Values that it cannot do without.
    kinds: The machines that it is for.
    takes_bucket: Whether the folder of the run may be in a bucket.
  """

  template: str
  fill: Callable[[Values, Machines], dict[str, str]]
  start: str
  needs: tuple[str, ...]
  kinds: tuple[str, ...]
  takes_bucket: bool


def render(way: str, values: Values) -> str:
  """Returns the text of the file.

  Raises:
    ValuesError: An unknown way, or values that do not do for it.
  """
  if way not in WAYS:
    raise ValuesError(f"{way!r} is no way; there are {', '.join(WAYS)}.")
  this = WAYS[way]
  for name in this.needs:
    if not getattr(values, name):
      raise ValuesError(f"{name} is missing; {way} needs it.")
  machines = values_lib.machines(values)
  if machines.kind not in this.kinds:
    raise ValuesError(
      f"topology: {values.topology!r} is not for {way}, which takes "
      f"{', '.join(this.kinds)}."
    )
  if values_lib.bucket(values) and not this.takes_bucket:
    raise ValuesError(
      f"workdir: {values.workdir!r} is a bucket; {way} needs a folder that all "
      "hosts share."
    )
  text = (HERE / "templates" / this.template).read_text(encoding="utf-8")
  filled = this.fill(values, machines)
  used = set(re.findall(r"@\{(\w+)\}", text))
  assert used == filled.keys(), used ^ filled.keys()
  return re.sub(r"@\{(\w+)\}", lambda match: filled[match[1]], text)


def _command(values: Values) -> str:
  """The command, as a shell takes it."""
  return shlex.join(["vidgen", *values_lib.arguments(values)])


def _exports(values: Values) -> str:
  """The environment, as a shell takes it."""
  return "\n".join(
    f"export {name}={shlex.quote(text)}" for name, text in values.env.items()
  )


def _local(values: Values, machines: Machines) -> dict[str, str]:
  on_cpu = machines.kind == "cpu"
  return {
    "root": shlex.quote(str(HERE.parent)),
    "exports": _exports(values),
    "processes": str(values.processes),
    "devices": f"--devices={machines.devices}" if on_cpu else "",
    "restarts": str(values.restarts),
    "command": _command(values),
  }


def _slurm(values: Values, machines: Machines) -> dict[str, str]:
  directives = []
  if machines.kind == "gpu":
    directives.append(f"#SBATCH --gpus-per-node={machines.devices}")
  for name in ("partition", "account"):
    if text := getattr(values, name):
      directives.append(f"#SBATCH --{name}={text}")
  return {
    "name": values.name,
    "hosts": str(machines.hosts),
    "processes": str(values.processes),
    "time": values.time,
    "grace": str(values.grace),
    "directives": "\n".join(directives),
    "exports": _exports(values),
    "setup": values.setup,
    "restarts": str(values.restarts),
    "command": _command(values),
  }


def _xpk(values: Values, machines: Machines) -> dict[str, str]:
  # xpk puts it into a shell of its own, whose place vidgen takes.
  more = [f"--env={name}={text}" for name, text in values.env.items()]
  if values.claim:
    more.append(f"--storage={values.claim}")
  return {
    "name": shlex.quote(values.name),
    "cluster": shlex.quote(values.cluster),
    "zone": shlex.quote(values.zone),
    "project": shlex.quote(values.project),
    "accelerator": machines.accelerator,
    "slices": str(machines.slices),
    "image": shlex.quote(values.image),
    "restarts": str(values.restarts),
    "grace": str(values.grace),
    "more": shlex.join(more),
    "command": shlex.quote(f"exec {_command(values)}"),
  }


def _tpu_vm(values: Values, machines: Machines) -> dict[str, str]:
  name, many = shlex.quote(values.name), machines.slices > 1
  nodes = [values.name]
  if many:
    nodes = [f"{values.name}-{i}" for i in range(machines.slices)]
  unit = f"vidgen-{values.name}"
  running = f"systemctl show --value --property=ActiveState {unit}"
  status = f"systemctl show --value --property=ExecMainStatus {unit}"
  commands = {
    "prepare": _prepare_vm(values),
    "run": _run_on_vm(values, unit),
    "code": (
      f"case $({running}) in *ing | active) echo running ;; "
      f'failed) echo "done $({status})" ;; *) echo "done 0" ;; esac'
    ),
    "status": f"systemctl status --no-pager --lines=3 {unit}",
    "logs": f"sudo journalctl --follow --lines=100 --unit={unit}",
    "stop": f"sudo systemctl stop {unit}",
  }
  count = f"--node-count={machines.slices} --node-prefix={name}"
  return {
    "name": name,
    "zone": shlex.quote(values.zone),
    "project": shlex.quote(values.project),
    "nodes": shlex.join(nodes),
    "node_flags": count if many else f"--node-id={name}",
    "accelerator": machines.accelerator,
    "runtime": values_lib.CHIPS[machines.kind].runtime,
    "spot": "--spot" if values.spot else "",
    **{key: shlex.quote(text) for key, text in commands.items()},
  }


def _prepare_vm(values: Values) -> str:
  """What a TPU VM needs before the run: the image, and the bucket."""
  lines = ["set -e"]
  if bucket := values_lib.bucket(values):
    mount = shlex.quote(values.mount)
    site = "https://packages.cloud.google.com/apt"
    key = "/usr/share/keyrings/cloud.google.asc"
    lines += [
      "if ! command -v gcsfuse >/dev/null; then",
      f'echo "deb [signed-by={key}] {site} gcsfuse-$(lsb_release -cs) main" | '
      "sudo tee /etc/apt/sources.list.d/gcsfuse.list",
      f"curl -fsS {site}/doc/apt-key.gpg | sudo tee {key} >/dev/null",
      "sudo apt-get update -q",
      "sudo apt-get install -qy gcsfuse",
      "fi",
      f"sudo mkdir -p {mount}",
      f"mountpoint -q {mount} || sudo gcsfuse --implicit-dirs -o allow_other "
      f"{shlex.quote(bucket)} {mount}",
    ]
  registry = values.image.split("/")[0]
  if registry.endswith((".pkg.dev", "gcr.io")):
    lines.append(
      f"sudo gcloud auth configure-docker {shlex.quote(registry)} --quiet"
    )
  lines.append(f"sudo docker pull --quiet {shlex.quote(values.image)}")
  return "\n".join(lines)


def _run_on_vm(values: Values, unit: str) -> str:
  """What starts the run on a TPU VM, as a unit of systemd."""
  properties = {
    # 75 alone is a reason to start again, and an end by a signal.
    "Restart": "on-abnormal",
    "RestartForceExitStatus": "75",
    "RestartSec": "5",
    "StartLimitIntervalSec": "infinity",
    "StartLimitBurst": str(values.restarts + 1),
    "TimeoutStopSec": str(values.grace),
    "KillMode": "mixed",
  }
  run = [
    *("systemd-run", f"--unit={unit}"),
    *(f"--property={name}={text}" for name, text in properties.items()),
    *("docker", "run", "--rm", f"--name={unit}"),
    *("--privileged", "--network=host", "--user=0"),
    *(f"--stop-timeout={values.grace}",),
    *(f"--env={name}={text}" for name, text in values.env.items()),
    f"--volume={values.mount}:{values.mount}",
    values.image,
    *values_lib.arguments(values),
  ]
  # systemd takes $NAME for a variable.
  run = [text.replace("$", "$$") for text in run]
  return (
    f"sudo systemctl stop {unit} 2>/dev/null; "
    f"sudo systemctl reset-failed {unit} 2>/dev/null; "
    f"sudo docker rm --force {unit} 2>/dev/null; "
    f"sudo {shlex.join(run)}"
  )


def _gke(values: Values, machines: Machines) -> dict[str, str]:
  on_tpu = machines.kind in values_lib.CHIPS
  environ = dict(values.env)
  selector, security, devices = {}, {}, "nvidia.com/gpu"
  tolerations = [{"key": devices, "operator": "Exists", "effect": "NoSchedule"}]
  annotations, pod_annotations = {}, {}
  if on_tpu:
    # GKE tells each pod of a slice its place.
    chip, devices = values_lib.CHIPS[machines.kind], "google.com/tpu"
    tolerations[0]["key"] = devices
    selector["cloud.google.com/gke-tpu-accelerator"] = chip.gke
    selector["cloud.google.com/gke-tpu-topology"] = machines.sides
    # The devices are root's.
    security = {"privileged": True, "runAsUser": 0}
    annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] = (
      "cloud.google.com/gke-nodepool"
    )
  else:
    environ["VIDGEN_COORDINATOR"] = (
      f"{values.name}-workers-0-0.{values.name}:{PORT}"
    )
    environ["VIDGEN_PROCESSES"] = str(machines.hosts)
  if values.spot:
    selector["cloud.google.com/gke-spot"] = "true"
  volumes = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
  mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
  if bucket := values_lib.bucket(values):
    pod_annotations["gke-gcsfuse/volumes"] = "true"
    source = {
      "driver": "gcsfuse.csi.storage.gke.io",
      "volumeAttributes": {
        "bucketName": bucket,
        "mountOptions": "implicit-dirs",
      },
    }
    volumes.append({"name": "data", "csi": source})
  elif values.claim:
    source = {"claimName": values.claim}
    volumes.append({"name": "data", "persistentVolumeClaim": source})
  if len(volumes) > 1:
    mounts.append({"name": "data", "mountPath": values.mount})
  queue = {"kueue.x-k8s.io/queue-name": values.queue} if values.queue else {}
  plain = {
    "name": values.name,
    "labels": queue,
    "annotations": annotations,
    "restarts": values.restarts,
    "slices": machines.slices,
    "hosts": machines.hosts,
    "pod_annotations": pod_annotations,
    "grace": values.grace,
    "node_selector": selector,
    "tolerations": tolerations,
    "image": values.image,
    "command": ["vidgen", *values_lib.arguments(values)],
    "env": [{"name": n, "value": text} for n, text in environ.items()],
    "security": security,
    "limits": {devices: machines.devices},
    "volume_mounts": mounts,
    "volumes": volumes,
  }
  # JSON is YAML, whatever stands in a text.
  return {name: json.dumps(value) for name, value in plain.items()}


_TPUS = tuple(values_lib.CHIPS)
_CLOUD = ("image", "project", "zone")

WAYS = {
  "local": Way("local.sh", _local, "bash", (), ("cpu", "gpu"), False),
  "tpu_vm": Way("tpu_vm.sh", _tpu_vm, "bash FILE up", _CLOUD, _TPUS, True),
  "gke_jobset": Way(
    "gke_jobset.yaml",
    _gke,
    "kubectl apply -f",
    ("image",),
    (*_TPUS, "gpu"),
    True,
  ),
  "xpk": Way("xpk.sh", _xpk, "bash", (*_CLOUD, "cluster"), _TPUS, False),
  "slurm": Way("slurm.sbatch", _slurm, "sbatch", (), ("gpu", "cpu"), False),
}


def main(argv: Sequence[str]) -> int:
  """Reads the flags, writes the file, and returns the exit code."""
  if not argv or argv[0] in ("-h", "--help"):
    print(__doc__.strip())
    return 0
  way, *flags = argv
  given = dict(flag.lstrip("-").partition("=")[::2] for flag in flags)
  try:
    if unknown := sorted(given.keys() - {"values", "out"}):
      raise ValuesError(f"--{unknown[0]} is unknown; see --help.")
    if not given.get("values"):
      raise ValuesError("--values is missing; see launch/example.toml.")
    path = pathlib.Path(given["values"])
    try:
      text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
      reason = getattr(e, "strerror", None) or "is no UTF-8"
      raise ValuesError(f"{path}: cannot be read: {reason}.") from e
    values = values_lib.read(text, str(path))
    rendered = render(way, values)
    ending = pathlib.Path(WAYS[way].template).suffix
    out = pathlib.Path(given.get("out") or f"{values.name}.{way}{ending}")
    _write(out, rendered)
  except ValuesError as e:
    print(f"launch: error: {' '.join(str(e).split())}", file=sys.stderr)
    return 2
  start = WAYS[way].start
  start = start if "FILE" in start else f"{start} FILE"
  print(
    f"{out} is written; start it with: "
    f"{start.replace('FILE', shlex.quote(str(out)))}"
  )
  return 0


def _write(path: pathlib.Path, text: str) -> None:
  """Writes a file whole or not at all."""
  draft = path.with_name(f".{path.name}.tmp")
  try:
    with draft.open("w", encoding="utf-8") as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    draft.replace(path)
  except OSError as e:
    draft.unlink(missing_ok=True)
    raise ValuesError(f"{path}: cannot be written: {e.strerror}.") from e


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
