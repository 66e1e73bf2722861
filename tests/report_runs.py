"""Folders of runs, as sampling jobs and training leave them."""

import hashlib
import json

import numpy as np

from vidgen import video

# What may be in a prompt and must not be more than text on the page.
NASTY = (
  "<script>window.xss = 1</script></script><img src=x onerror='window.xss=1'>",
  "</script><script>window.xss = 1</script><!--",
  "{{data}} {{script}} \" ' & \\ ` ${window.xss = 1}",
  "start \u202e desrever \u202c end \x00 \x1b[31m",
  "half a pair: \ud800",
  "🐼 世界 שלום",
  "long " * 2000,
)


def frames(seed, count=9, size=32):
  """A disc that moves over a plain ground."""
  random = np.random.default_rng(seed)
  disc, ground = random.integers(100, 255, 3), random.integers(0, 80, 3)
  y, x = np.mgrid[:size, :size]
  place, speed = random.uniform(8, 24, 2), random.uniform(-2, 2, 2)
  images = []
  for i in range(count):
    off = [axis - p for axis, p in zip((y, x), place + i * speed, strict=True)]
    inside = (off[0] ** 2 + off[1] ** 2 < 30)[..., None]
    images.append(np.where(inside, disc, ground))
  return np.asarray(images, np.uint8)


def clip(folder, index, prompt, *, pixels=None, status="done", **fields):
  """Makes a clip in a folder and appends its line to the ledger."""
  folder.mkdir(exist_ok=True)
  digest = hashlib.sha256(f"{folder.name} {index}".encode()).hexdigest()[:12]
  name = f"{index:06d}_{digest}"
  record = {
    "status": status,
    "index": index,
    "name": name,
    "where": f"prompts.jsonl:{index + 1}",
    "prompt": prompt,
    "seed": 0,
    "clip": index,
  }
  if status == "done":
    pixels = frames(index) if pixels is None else pixels
    file = f"{name}.mp4"
    video.write_mp4(folder / file, pixels, 8)
    data = (folder / file).read_bytes()
    record |= {
      "negative_prompt": "",
      "files": [file],
      "sha256": {file: hashlib.sha256(data).hexdigest()},
      "bytes": {file: len(data)},
      "frames_sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
      "size": list(pixels.shape[1:3]),
      "frames": len(pixels),
      "fps": 8,
      "num_steps": 4,
      "seconds": 1.5,
    }
  record |= fields
  with (folder / "clips.jsonl").open("a") as file:
    file.write(json.dumps(record) + "\n")
  return folder / f"{name}.mp4"


def job(folder, prompts):
  """A sampling job that is done."""
  return [clip(folder, i, prompt) for i, prompt in enumerate(prompts)]


def training(folder, steps=(100, 200), samples=2):
  """A training run with samples."""
  folder.mkdir()
  for step in steps:
    home = folder / "samples" / f"{step:09d}"
    home.mkdir(parents=True)
    for i in range(samples):
      video.write_mp4(home / f"{i:02d}.mp4", frames(i + step), 8)
  with (folder / "metrics.jsonl").open("w") as file:
    for step in range(1, 201):
      line = {
        "step": step,
        "loss": 5 / step + 0.1,
        "grad_norm": 1.0 + step % 7,
        "learning_rate": 1e-3,
        "seconds_per_step": None if step == 1 else 0.2,
        "mfu": None,
        "time": 1.8e9 + step,
      }
      file.write(json.dumps(line) + "\n")
  seconds = {"step": 40.0, "compile": 8.5, "data": 1.5}
  value = {"step": 200, "starts": 2, "seconds": seconds, "goodput": 0.8}
  (folder / "goodput.json").write_text(json.dumps(value))
  (folder / "config.json").write_text(json.dumps({"seed": 3, "mesh": {}}))
