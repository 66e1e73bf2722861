"""What a run needs to get onto machines, given once, in a TOML file."""

import dataclasses
import math
import re
import tomllib
import types
import typing
from typing import Any


class ValuesError(ValueError):
  """A value that cannot be used: one line, exit code 2."""


@dataclasses.dataclass
class Values:
  """A run and where it is to go.

  Attributes:
    name: Of the run; letters, digits and hyphens.
    command: What comes after `vidgen`, without the folder of the run:
      `["train", "--config=configs/cogvideox_2b_train.py"]`.
    workdir: The folder of the run, or gs://BUCKET/FOLDER, which is mounted.
    topology: `CHIP:SIDExSIDE` of TPUs, with `N*` before it for N slices, as
      `vidgen compile` takes it; or `gpu:N`, N a host; or `cpu:N`.
    image: The container image; the local and the SLURM way need none.
    hosts: How many, for GPUs and CPUs; TPUs say it by their topology.
    processes: Of each host; they share its GPUs.
    restarts: How often a run that may go on is started again.
    grace: Seconds from SIGTERM to SIGKILL: those a checkpoint takes.
    env: Further environment variables.
    zone: Of TPU VMs and of GKE.
    project: Of Google Cloud.
    cluster: Of GKE, for xpk.
    spot: Take spot machines.
    queue: A local queue of Kueue; empty is without.
    claim: A volume claim that is mounted at `mount`, or a storage of xpk;
      empty is none.
    mount: Where the claim, or the bucket, is mounted.
    partition: Of SLURM; empty is the default.
    account: Of SLURM; empty is the default.
    time: SLURM's time limit.
    setup: Lines of shell that make `vidgen` available under SLURM.
  """

  name: str
  command: list[str]
  workdir: str
  topology: str
  image: str = ""
  hosts: int = 1
  processes: int = 1
  restarts: int = 100
  grace: int = 120
  env: dict[str, str] = dataclasses.field(default_factory=dict)
  zone: str = ""
  project: str = ""
  cluster: str = ""
  spot: bool = False
  queue: str = ""
  claim: str = ""
  mount: str = "/data"
  partition: str = ""
  account: str = ""
  time: str = "24:00:00"
  setup: str = ""


class Chip(typing.NamedTuple):
  """What Google's tools call a TPU.

  Attributes:
    gke: The accelerator of a node.
    vm: The start of an accelerator type.
    cores: By which accelerator types count a chip.
    runtime: The software of a TPU VM.
    sides: Of a slice.
  """

  gke: str
  vm: str
  cores: int
  runtime: str
  sides: int


# https://cloud.google.com/tpu/docs/runtimes and GKE's "Plan TPUs in GKE".
CHIPS = {
  "v5e": Chip("tpu-v5-lite-podslice", "v5litepod", 1, "v2-alpha-tpuv5-lite", 2),
  "v5p": Chip("tpu-v5p-slice", "v5p", 2, "v2-alpha-tpuv5", 3),
  "v6e": Chip("tpu-v6e-slice", "v6e", 1, "v2-alpha-tpuv6e", 2),
}


class Machines(typing.NamedTuple):
  """The machines of a topology.

  Attributes:
    kind: "v5e", "v5p", "v6e", "gpu" or "cpu".
    sides: Of a TPU slice, "4x4".
    slices: How many.
    hosts: Of each slice.
    devices: Of each host.
  """

  kind: str
  sides: str
  slices: int
  hosts: int
  devices: int

  @property
  def accelerator(self) -> str:
    """Google's name of a slice, such as v6e-16."""
    chip = CHIPS[self.kind]
    return f"{chip.vm}-{self.hosts * self.devices * chip.cores}"


def machines(values: Values) -> Machines:
  """Returns the machines that the topology names.

  Raises:
    ValuesError: There are no such machines.
  """
  text = values.topology
  if match := re.fullmatch(r"(gpu|cpu):([1-9]\d?)", text):
    devices = int(match[2])
    if match[1] == "gpu" and devices % values.processes:
      raise ValuesError(
        f"processes: {values.processes} cannot share {devices} GPUs evenly."
      )
    return Machines(match[1], "", 1, values.hosts, devices)
  pattern = r"(?:([1-9]\d*)\*)?(\w+):([1-9]\d*(?:x[1-9]\d*)+)"
  match = re.fullmatch(pattern, text)
  chip = CHIPS.get(match[2]) if match else None
  if chip is None or match[3].count("x") + 1 != chip.sides:
    raise ValuesError(
      f"topology: {text!r} is not known; give v5e:4x4, v6e:16x16, v5p:4x4x4, "
      "2*v6e:16x16 for two slices, gpu:8 or cpu:4."
    )
  if values.processes != 1:
    raise ValuesError("processes: a host of TPUs has one; leave it out.")
  count = math.prod(int(side) for side in match[3].split("x"))
  # Slices of up to eight chips of these fit one host.
  alone = count <= 4 or (count == 8 and chip.sides == 2)
  devices = count if alone else 4
  if count % devices:
    raise ValuesError(f"topology: {text!r} is not a number of whole hosts.")
  return Machines(
    match[2], match[3], int(match[1] or 1), count // devices, devices
  )


def read(text: str, where: str = "values") -> Values:
  """Returns the values that a TOML text gives.

  Raises:
    ValuesError: A value that is missing, unknown, or cannot be used.
  """
  try:
    given = tomllib.loads(text)
  except tomllib.TOMLDecodeError as e:
    raise ValuesError(f"{where}: is no TOML: {e}.") from e
  fields = {field.name: field for field in dataclasses.fields(Values)}
  if unknown := sorted(given.keys() - fields.keys()):
    raise ValuesError(
      f"{where}: {unknown[0]} is unknown; there are {', '.join(fields)}."
    )
  missing = [
    name
    for name, field in fields.items()
    if name not in given
    and field.default is dataclasses.MISSING
    and field.default_factory is dataclasses.MISSING
  ]
  if missing:
    raise ValuesError(f"{where}: {missing[0]} is missing; set it.")
  for name, value in given.items():
    _check_type(name, value, fields[name].type)
  values = Values(**given)
  _check(values)
  return values


def _check_type(name: str, value: Any, kind: Any) -> None:
  """Checks a value, and what is in it, by its type."""
  outer = typing.get_origin(kind) or kind
  inner = typing.get_args(kind)
  items = (
    list(value.values() if isinstance(value, dict) else value or ())
    if (isinstance(kind, types.GenericAlias) and isinstance(value, outer))
    else []
  )
  if type(value) is not outer or any(type(x) is not inner[-1] for x in items):
    words = {str: "a text", int: "a whole number", bool: "true or false"}
    word = words.get(
      outer, "a list of texts" if outer is list else "a table of texts"
    )
    raise ValuesError(f"{name}: {value!r} is not {word}.")
  for text in [value, *items]:
    if isinstance(text, str) and (
      set(text) & set("\0\r") or ("\n" in text and name != "setup")
    ):
      raise ValuesError(f"{name}: {text!r} holds a line break.")


def _check(values: Values) -> None:
  """Checks what values have to be beyond their types."""
  if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", values.name):
    raise ValuesError(
      f"name: {values.name!r}; take small letters, digits and hyphens, at most "
      "40, a letter first."
    )
  if not values.command or values.command[0] not in ("train", "sample"):
    raise ValuesError(
      'command: begin with train or sample, such as ["train", '
      '"--config=configs/demo_dit_train.py"].'
    )
  for flag in ("--workdir", "--out"):
    if any(x.split("=")[0] == flag for x in values.command):
      raise ValuesError(f"command: {flag} comes from workdir; leave it out.")
  for name in ("hosts", "processes", "grace"):
    if getattr(values, name) < 1:
      raise ValuesError(f"{name}: must be 1 or more.")
  if values.restarts < 0:
    raise ValuesError("restarts: must be 0 or more.")
  for name in values.env:
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
      raise ValuesError(f"env: {name!r} is no name of a variable.")
  # These go where nothing can be quoted.
  plain = r"[\w.,:+-]*"
  for name in ("partition", "account", "time", "queue", "claim"):
    if not re.fullmatch(plain, getattr(values, name), re.ASCII):
      raise ValuesError(f"{name}: {getattr(values, name)!r} has odd letters.")
  if not values.workdir:
    raise ValuesError("workdir: is empty; name the folder of the run.")
  if values.workdir.startswith("gs://"):
    pattern = r"gs://[a-z0-9][a-z0-9._-]+/.+"
    if not re.fullmatch(pattern, values.workdir):
      raise ValuesError(
        f"workdir: {values.workdir!r} is no gs://BUCKET/FOLDER."
      )
  if not values.mount.startswith("/"):
    raise ValuesError(f"mount: {values.mount!r} is no absolute path.")
  found = machines(values)
  if values.command[0] != "sample":
    return
  if values.processes > 1:
    raise ValuesError("processes: sample runs in one process a host.")
  if found.sides and found.slices * found.hosts > 1:
    raise ValuesError(
      "command: sample runs on each host by itself, and the chips of a slice "
      "start together only; choose a topology of one host, and start one run "
      "for each part of the prompts, with --shard=i/n."
    )


def bucket(values: Values) -> str:
  """Returns the bucket of the folder of the run; empty where it is a path."""
  if not values.workdir.startswith("gs://"):
    return ""
  return values.workdir.removeprefix("gs://").split("/")[0]


def arguments(values: Values) -> list[str]:
  """Returns what comes after `vidgen`, with the folder of the run."""
  folder = values.workdir
  if name := bucket(values):
    folder = values.mount + folder.removeprefix(f"gs://{name}")
  flag = "--workdir" if values.command[0] == "train" else "--out"
  return [*values.command, f"{flag}={folder}"]
