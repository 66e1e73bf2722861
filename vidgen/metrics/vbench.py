"""The names that VBench wants of videos, and whether all are there.

Huang et al., https://arxiv.org/abs/2311.17982: `{prompt}-{i}.mp4` with i from 0
for each prompt of the standard set, 5 videos a prompt, and 25 where the prompt
is one of temporal flickering. VBench leaves out what it cannot find, and says
nothing.
"""

import collections
import dataclasses
import hashlib
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence

from vidgen import errors, tensorfile, video
from vidgen.metrics import sets

NAMES = "names.json"
SUFFIXES = (".mp4", ".gif")

PER_PROMPT = 5
PER_FLICKERING_PROMPT = 25
_FLICKERING = "temporal_flickering"

# Of a file's name, in bytes: ext4's, APFS's and NTFS's.
_LONGEST = 255
# Leaves room for a number and a suffix.
_ROOM = 16
_DIGITS = 12


@dataclasses.dataclass
class Export:
  """What was exported.

  Attributes:
    out: The folder.
    files: How many videos are in it.
    lacking: Prompts without enough videos, and how many more they need.
    surplus: Prompts that the standard set does not have.
    renamed: Short names in place of prompts that are no file's name.
    problems: Clips that have no video, and why.
  """

  out: str
  files: int
  lacking: dict[str, int]
  surplus: list[str]
  renamed: dict[str, str]
  problems: list[str]

  def __str__(self) -> str:
    """Returns a few lines."""
    lines = [f"{self.files} videos in {self.out}"]
    if self.lacking:
      total = sum(self.lacking.values())
      lines.append(f"{len(self.lacking)} prompts lack {total} videos:")
      lines += [f"  {count:3} of {p!r}" for p, count in self.lacking.items()]
    else:
      lines.append("every prompt has its videos")
    if self.surplus:
      lines.append(f"{len(self.surplus)} prompts are not of the set:")
      lines += [f"  {prompt!r}" for prompt in self.surplus]
    if self.renamed:
      lines.append(
        f"{len(self.renamed)} prompts are no name of a file; {NAMES} tells "
        "what they are called."
      )
    if self.problems:
      lines.append(f"{len(self.problems)} clips have no video:")
      lines += [f"  {problem}" for problem in self.problems]
    return "\n".join(lines)


def standard(path: str | os.PathLike) -> dict[str, int]:
  """Returns how many videos VBench_full_info.json asks for of each prompt.

  Raises:
    InputError: It is not that file.
  """
  try:
    with open(path, encoding="utf-8") as file:
      entries = json.load(file)
    wanted: dict[str, int] = {}
    for entry in entries:
      flickers = _FLICKERING in entry["dimension"]
      count = PER_FLICKERING_PROMPT if flickers else PER_PROMPT
      prompt = entry["prompt_en"]
      # A prompt may stand there once for each of its dimensions.
      wanted[prompt] = max(count, wanted.get(prompt, 0))
  except OSError as error:
    raise errors.InputError(f"{path}: {error.strerror}.") from error
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise errors.InputError(
      f"{path}: is not VBench_full_info.json: entries of prompt_en and "
      "dimension."
    ) from error
  return wanted


def export(
  items: Sequence[sets.Item],
  out: str | os.PathLike,
  wanted: Mapping[str, int] | None = None,
) -> Export:
  """Gives the videos of a job VBench's names in a folder of its own.

  Hard links, or copies where the folder is on another file system. The same
  call again adds what has come since.

  Args:
    items: The job's, from `sets.find` with `SUFFIXES`; their order counts.
    out: The folder; made if it is not there.
    wanted: How many videos of each prompt; None for `PER_PROMPT` of each that
      the job has.

  Raises:
    InputError: Clips without prompts; videos of something else in the folder.
    StorageError: A file could not be written.
  """
  out = pathlib.Path(out)
  by_prompt, problems = _sorted(items)
  if wanted is None:
    known = (item.prompt for item in items if item.prompt is not None)
    wanted = dict.fromkeys(known, PER_PROMPT)
  names = {prompt: file_stem(prompt) for prompt in by_prompt}
  targets = {
    f"{names[prompt]}-{i}{path.suffix}": path
    for prompt, paths in by_prompt.items()
    for i, path in enumerate(paths)
  }
  _check_folder(out, targets)
  renamed = {n: prompt for prompt, n in names.items() if n != prompt}
  try:
    out.mkdir(parents=True, exist_ok=True)
    for name, path in targets.items():
      _link(path, out / name)
    tensorfile.sync(out)
  except OSError as error:
    if isinstance(error, errors.VidgenError):
      raise
    raise video.storage_error(out, error) from error
  with video.atomic(out / NAMES) as temporary:
    text = json.dumps(renamed, indent=1, ensure_ascii=False) + "\n"
    temporary.write_text(text, encoding="utf-8")
  there = {prompt: len(paths) for prompt, paths in by_prompt.items()}
  return Export(
    os.fspath(out),
    len(targets),
    {p: c - there.get(p, 0) for p, c in wanted.items() if c > there.get(p, 0)},
    [prompt for prompt in by_prompt if prompt not in wanted],
    renamed,
    problems,
  )


def file_stem(prompt: str) -> str:
  """Returns a prompt as a file's name can begin; itself wherever it can.

  A prompt that is too long, or holds a slash, a NUL or a line's end, keeps its
  beginning, and the first digits of its SHA-256 tell it from others.
  """
  plain = "".join(" " if c in "/\x7f" or c < " " else c for c in prompt)
  data = plain.encode(errors="replace")
  fits = len(data) <= _LONGEST - _ROOM
  # A name that begins with a dot is hidden.
  if prompt and plain == prompt and fits and not prompt.startswith("."):
    return prompt
  digest = hashlib.sha256(prompt.encode(errors="replace")).hexdigest()
  kept = data[: _LONGEST - _ROOM - _DIGITS - 1].decode(errors="ignore")
  return f"{kept.strip(' .')}~{digest[:_DIGITS]}"


def _sorted(
  items: Iterable[sets.Item],
) -> tuple[dict[str, list[pathlib.Path]], list[str]]:
  """Returns the files of each prompt, in order, and what has none."""
  by_prompt, problems = collections.defaultdict(list), []
  for item in items:
    if item.prompt is None:
      raise errors.InputError(
        f"--vbench: {item.name} has no prompt; give the folder of a sampling "
        "job, whose clips.jsonl tells the prompts."
      )
    if item.path is None or item.problem:
      problems.append(f"{item.name}: {item.problem}")
    elif item.path.suffix not in SUFFIXES:
      problems.append(f"{item.name}: is no {' or '.join(SUFFIXES)}.")
    else:
      by_prompt[item.prompt].append(item.path)
  return dict(by_prompt), problems


def _check_folder(out: pathlib.Path, targets: Mapping[str, object]) -> None:
  """Raises if VBench would find videos there that are not of this export."""
  if not out.is_dir():
    return
  for path in sorted(out.iterdir()):
    if path.suffix in SUFFIXES and path.name not in targets:
      raise errors.InputError(
        f"{path}: is of another export; name a new folder with --vbench."
      )


def _link(source: pathlib.Path, target: pathlib.Path) -> None:
  """Makes `target` another name of a file, or else a copy of it."""
  temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
  try:
    try:
      os.link(source, temporary)
    except OSError:
      # Another file system, or one without links.
      shutil.copyfile(source, temporary)
      tensorfile.sync(temporary)
    os.replace(temporary, target)
  finally:
    # Renaming a file onto itself leaves both names.
    temporary.unlink(missing_ok=True)
