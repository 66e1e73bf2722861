"""What the small models do, against what is true.

python tests/bench/svd_small.py i2v|interpolation|multiview [--clips=N]
    [--checkpoint=runs/svd_small_NAME/published] [--data_dir=data] [--motion=M]

Prints the PSNR of the model, of doing nothing, and of the true frames as the
autoencoder gives them back, over clips of the validation split: that of the
mean squared error of all clips, and the mean of each clip's own, of those clips
whose frames differ; where they don't, doing nothing is exact. Run it where
`data` and `runs` are.
"""

import argparse
import time

import numpy as np

import vidgen
from vidgen.data import buckets, loader

# The dataset of each, the rate at which frames are taken, and how many.
_DATA = {
  "i2v": ("moving_shapes", 4.0, 9, {"things": 1}),
  "interpolation": ("moving_shapes", 4.0, 5, {"things": 1}),
  "multiview": ("orbiting_solids", 7 / 3, 7, {}),
}
# How much i2v is told that moves: the median of what training told.
_MOTION = 61.0
# A clip's frames differ where copies of the first have a larger squared error.
_MOVES = 1.0


def error(x, y):
  """The mean squared error of each clip, of 255."""
  return np.square(x.astype(np.float64) - y).mean(axis=(1, 2, 3, 4))


def psnr(error):
  """In dB."""
  return 10 * np.log10(255**2 / np.maximum(error, 1e-3))


def clips(name, data_dir, count):
  """The first clips of the validation split, as a run would read them."""
  dataset, fps, frames, where = _DATA[name]
  config = loader.DataConfig(
    dataset=dataset,
    data_dir=data_dir,
    split="validation",
    fps=fps,
    buckets=(buckets.Bucket(frames, 32, 32, count),),
    where=where,
  )
  (batch,) = loader.batches(config, seed=0, start=0, stop=1)
  return batch


def blend(video):
  """The linear blend of both ends, at the time of each frame."""
  weight = np.linspace(0, 1, video.shape[1]).reshape(1, -1, 1, 1, 1)
  return (1 - weight) * video[:, :1] + weight * video[:, -1:]


def sample(pipeline, name, batch, **options):
  """The model's videos of the clips' given frames, and their motion's score."""
  given = pipeline.model.training.image_frames
  images = [frame for clip in batch.video for frame in clip[list(given)]]
  if name != "multiview":
    options["fps"] = _DATA[name][1]
    return pipeline.sample(image=images, **options)
  made = []
  for image, labels in zip(images, batch.labels, strict=True):
    options["elevation"] = labels["elevation"]
    made.append(pipeline.sample(image=image, **options)[0])
  return np.stack(made)


def reconstruct(pipeline, video):
  """The videos as the autoencoder gives them back: the best a model can do."""
  return pipeline.decode(pipeline.encode(video.astype(np.float32) / 127.5 - 1))


def figures(name, video, made, coded):
  """Each clip's errors, by what has them."""
  inner = slice(1, -1) if name == "interpolation" else slice(1, None)
  copies = np.repeat(video[:, :1], video.shape[1], axis=1)
  videos = {"model": made, "copies of the first frame": copies}
  videos["autoencoder"] = coded
  if name == "interpolation":
    videos["linear blend"] = blend(video)
  errors = {k: error(v[:, inner], video[:, inner]) for k, v in videos.items()}
  errors["model's first frame"] = error(made[:, :1], video[:, :1])
  return errors


def travel(video):
  """How far what differs from the background goes, in pixels, in each clip."""
  ends = video[:, [0, -1]].astype(np.float64)
  # The corners are background.
  ground = np.median(ends[:, :, [0, 0, -1, -1], [0, -1, 0, -1]], axis=2)
  weight = np.abs(ends - ground[:, :, None, None]).sum(-1)
  weight = np.where(weight > 96, weight, 0) + 1e-9
  axes = np.meshgrid(*map(np.arange, weight.shape[2:]), indexing="ij")
  total = weight.sum((2, 3))
  where = np.stack([(weight * x).sum((2, 3)) / total for x in axes], axis=-1)
  return np.linalg.norm(where[:, 1] - where[:, 0], axis=-1)


def each_frame(video, made):
  """The PSNR of each frame, over all clips."""
  square = np.square(video.astype(np.float64) - made)
  return " ".join(f"{x:.1f}" for x in psnr(square.mean(axis=(0, 2, 3, 4))))


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("name", choices=sorted(_DATA))
  parser.add_argument("--clips", type=int, default=64)
  parser.add_argument("--checkpoint")
  parser.add_argument("--data_dir", default="data")
  parser.add_argument("--num_steps", type=int, default=25)
  parser.add_argument("--guidance_scale", type=float, default=1.0)
  parser.add_argument("--motion", type=float, default=_MOTION)
  args = parser.parse_args()
  folder = args.checkpoint or f"runs/svd_small_{args.name}/published"
  pipeline = vidgen.load(folder, dtype="float32")
  batch = clips(args.name, args.data_dir, args.clips)
  told = {"motion_bucket_id": args.motion} if args.name == "i2v" else {}
  start = time.monotonic()
  made = sample(
    pipeline,
    args.name,
    batch,
    **told,
    num_frames=batch.video.shape[1],
    height=32,
    width=32,
    num_steps=args.num_steps,
    guidance_scale=args.guidance_scale,
  )
  seconds = time.monotonic() - start
  coded = reconstruct(pipeline, batch.video)
  errors = figures(args.name, batch.video, made, coded)
  moves = errors["copies of the first frame"] > _MOVES
  for key, values in errors.items():
    each = psnr(values[moves])
    print(
      f"{key:26} PSNR {psnr(values.mean()):6.2f}, mean of the {len(each)} that "
      f"move {each.mean():6.2f} ± {each.std() / len(each) ** 0.5:.2f}"
    )
  print("model, frame by frame     ", each_frame(batch.video, made))
  if args.name == "i2v":
    model, true = (travel(x)[moves].mean() for x in (made, batch.video))
    print(f"first to last frame, pixels: {model:.1f}, truly {true:.1f}")
  print(f"{len(made)} clips in {seconds:.0f} s")


if __name__ == "__main__":
  main()
