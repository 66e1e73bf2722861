"""Videos, images and latents, in and out of files.

A writer fills a temporary file beside its target, flushes it to the disk and
renames it: the target is whole or it is not there.
"""

import contextlib
import errno
import fractions
import io
import itertools
import os
import pathlib
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
import PIL.Image
import PIL.ImageOps
from av.video import reformatter
from jaxtyping import Float, UInt8

from vidgen import errors

Path = str | os.PathLike

# H.264's number for BT.709, which players assume for untagged HD but not for
# untagged SD video; a tag makes the colours the same at every size.
_BT709 = 1

# Seconds after which whoever has not touched a temporary file was killed.
_OLD = 3600

_LOCAL = {"protocol_whitelist": "file"}

# What Pillow raises for files that are cut short or are no image at all.
_IMAGE_ERRORS = (
  OSError,
  SyntaxError,
  ValueError,
  EOFError,
)
# And for those of more pixels than memory should be taken for.
_BOMBS = (
  PIL.Image.DecompressionBombError,
  PIL.Image.DecompressionBombWarning,
)


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[pathlib.Path]:
  """Yields a temporary path that becomes `path` if nothing goes wrong.

  The temporary path may be filled with a file or with a folder of files.

  Raises:
    StorageError: It could not be written; nothing of it is left.
  """
  path = pathlib.Path(path)
  # The suffix stays last: it tells encoders the format.
  temporary = _beside(path, f"tmp{path.suffix}")
  try:
    yield temporary
    _sync(temporary)
    if temporary.is_dir() and path.is_dir():
      # A folder cannot be renamed onto a full one.
      old = _beside(path, "old")
      os.rename(path, old)
      os.rename(temporary, path)
      shutil.rmtree(old)
    else:
      os.replace(temporary, path)
    _sync(path.parent)
  except OSError as error:
    raise storage_error(path, error) from error
  finally:
    # Where nothing can be written, there is nothing to remove.
    with contextlib.suppress(OSError):
      remove(temporary)


def _beside(path: pathlib.Path, kind: str) -> pathlib.Path:
  """Returns a hidden name that tells whose it is."""
  short = path.stem.isascii() and len(path.stem) <= 100
  stem = path.stem if short else "long"
  return path.with_name(f".{stem}.{secrets.token_hex(8)}.{kind}")


_HIDDEN = re.compile(r"\.(.+)\.[0-9a-f]{16}\.(tmp|old)(\.\w+)?")


def target_of(path: Path) -> str | None:
  """Returns the stem of what a temporary file was to become; None: it is none.

  A killed process leaves such files behind.
  """
  found = _HIDDEN.fullmatch(pathlib.Path(path).name)
  return found[1] if found else None


def is_old(path: Path) -> bool:
  """Says whether a temporary file is so old that nobody is filling it."""
  try:
    return time.time() - os.stat(path).st_mtime > _OLD
  except FileNotFoundError:
    return False


def remove(path: Path) -> None:
  """Removes a file or a folder, if it is there."""
  if os.path.isdir(path):
    shutil.rmtree(path, ignore_errors=True)
  else:
    pathlib.Path(path).unlink(missing_ok=True)


def storage_error(path: Path, error: OSError) -> errors.StorageError:
  """Returns the one line that tells the user of a failed write to `path`."""
  mend = "check that the folder exists and may be written to"
  if error.errno in (errno.ENOSPC, errno.EDQUOT):
    mend = "free some space or choose another folder with --out"
  reason = error.strerror or str(error)
  return errors.StorageError(f"{path}: cannot write: {reason}; {mend}.")


def write_mp4(
  path: Path, frames: UInt8[np.ndarray, "F H W 3"], fps: int | float
) -> None:
  """Writes H.264 in yuv420p, which every player and browser plays.

  The same frames give the same bytes: one thread encodes, because the output
  of x264 depends on the number of threads.

  Raises:
    InputError: An odd height or width, which yuv420p cannot hold.
    StorageError: It could not be written.
  """
  count, height, width, _ = frames.shape
  if not count:
    raise errors.InputError(f"{path}: a video needs at least one frame.")
  if height % 2 or width % 2:
    raise errors.InputError(
      f"{path}: mp4 holds even sizes only, this is {height}x{width}."
    )
  with atomic(path) as temporary:
    options = {"movflags": "+faststart"}
    with av.open(os.fspath(temporary), "w", "mp4", options=options) as file:
      stream = file.add_stream("libx264", rate=_rate(fps))
      stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
      stream.options = {"crf": "17"}
      codec = stream.codec_context
      codec.thread_count = 1
      codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
      codec.color_range = reformatter.ColorRange.MPEG
      for pixels in frames:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels))
        frame = frame.reformat(
          format="yuv420p",
          dst_colorspace=reformatter.Colorspace.ITU709,
          dst_color_range=reformatter.ColorRange.MPEG,
        )
        file.mux(stream.encode(frame))
      file.mux(stream.encode())


def write_gif(
  path: Path, frames: UInt8[np.ndarray, "F H W 3"], fps: int | float
) -> None:
  """Writes a GIF that loops for ever, all frames in one palette.

  Frames that are alike are frames of their own. Above 100 per second some are
  left out, for GIF counts hundredths of a second.

  Raises:
    InputError: No frame at all.
    StorageError: It could not be written.
  """
  if not len(frames):
    raise errors.InputError(f"{path}: a video needs at least one frame.")
  # One palette, from up to 8 frames side by side, so that colours don't
  # flicker from frame to frame.
  sample = frames[np.linspace(0, len(frames) - 1, 8).astype(int)]
  palette = PIL.Image.fromarray(np.concatenate(sample)).quantize(256)
  colors = np.zeros((256, 4), np.uint8)
  colors[:, 0] = 255  # Opaque.
  rgb = np.frombuffer(palette.palette.tobytes(), np.uint8).reshape(-1, 3)
  colors[: len(rgb), 1:] = rgb
  # Round the times, not the durations, or the error adds up.
  times = [round(100 * i / fps) for i in range(len(frames) + 1)]
  times[-1] = max(1, times[-1])
  shown = [(b - a, a) for a, b in itertools.pairwise(times)]
  final = next(duration for duration, _ in reversed(shown) if duration)
  # Not by Pillow, which would make one frame of those that are alike.
  options = {"loop": "0", "final_delay": str(final)}
  with (
    atomic(path) as temporary,
    av.open(os.fspath(temporary), "w", "gif", options=options) as file,
  ):
    stream = file.add_stream("gif", rate=100)
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = "pal8"
    for pixels, (duration, time) in zip(frames, shown, strict=True):
      if not duration:
        continue
      image = PIL.Image.fromarray(pixels).quantize(palette=palette)
      pair = np.asarray(image), colors
      frame = av.VideoFrame.from_ndarray(pair, format="pal8")
      frame.pts = time
      file.mux(stream.encode(frame))
    file.mux(stream.encode())


def write_png_frames(
  folder: Path, frames: UInt8[np.ndarray, "F H W 3"]
) -> None:
  """Writes `folder`/000000.png, 000001.png and so on; replaces the folder.

  Raises:
    StorageError: They could not be written.
  """
  with atomic(folder) as temporary:
    temporary.mkdir()
    for i, pixels in enumerate(frames):
      PIL.Image.fromarray(pixels).save(temporary / f"{i:06d}.png")


def write_latents(path: Path, latents: Float[np.ndarray, "f h w c"]) -> None:
  """Writes the scaled latents of one clip as array `latents` of an .npz file.

  Raises:
    StorageError: They could not be written.
  """
  if latents.dtype.kind == "V":
    # numpy knows no bfloat16: its files would hold raw bytes.
    latents = latents.astype(np.float32)
  with atomic(path) as temporary, open(temporary, "wb") as file:
    np.savez(file, latents=latents)


def read_video(
  path: Path, limit: int | None = None
) -> UInt8[np.ndarray, "F H W 3"]:
  """Reads the first `limit` frames of a video, or all, in any codec of FFmpeg.

  A frame that its file says to turn (as phones write them) is turned.

  Raises:
    InputError: There is no such file, or it is no video.
  """
  if not os.path.isfile(path):
    raise errors.InputError(f"{path}: there is no such video file.")
  frames = []
  try:
    # A playlist could name addresses elsewhere: read files only.
    with av.open(os.fspath(path), options=_LOCAL) as file:
      # FFmpeg paints any text file as a terminal would show it.
      if not file.streams.video or file.format.name == "tty":
        raise errors.InputError(f"{path}: is not a video.")
      for frame in file.decode(video=0):
        # FFmpeg turns counter-clockwise, in degrees, as numpy does.
        turned = np.rot90(
          frame.to_ndarray(format="rgb24"), round(frame.rotation / 90)
        )
        frames.append(turned)
        if len(frames) == limit:
          break
  except (av.FFmpegError, OSError, UnicodeError) as error:
    raise errors.InputError(
      f"{path}: cannot be read as a video: {_reason(error)}."
    ) from error
  if not frames:
    raise errors.InputError(f"{path}: holds no frame that can be decoded.")
  if len({frame.shape for frame in frames}) > 1:
    raise errors.InputError(f"{path}: the frames change their size midway.")
  return np.stack(frames)


def read_image(image: Any) -> PIL.Image.Image:
  """Returns a path, an array or a PIL image as a PIL image in RGB.

  The EXIF orientation is honoured; transparency is dropped. An array is
  `H W 3`, `H W 4` or `H W`, of uint8, or of floats in [0, 1].

  Raises:
    InputError: It is no image, or one of more than 89 million pixels.
  """
  if isinstance(image, PIL.Image.Image):
    return _rgb(image)
  if isinstance(image, str | os.PathLike):
    return _open_image(image)
  return _rgb(PIL.Image.fromarray(_pixels(np.asarray(image))))


def fit(image: Any, height: int, width: int) -> Float[np.ndarray, "H W 3"]:
  """Returns an image as networks take it: resized, float32, in [-1, 1].

  Lanczos to exactly `height` x `width`, whatever the aspect; it equals
  `diffusers.video_processor.VideoProcessor.preprocess` bit by bit.

  Raises:
    InputError: It is no image.
  """
  image = read_image(image)
  image = image.resize((width, height), PIL.Image.Resampling.LANCZOS)
  return 2.0 * (np.asarray(image).astype(np.float32) / 255.0) - 1.0


def _open_image(path: Path) -> PIL.Image.Image:
  """Reads an image file whole; every way it can be broken is an InputError."""
  if not os.path.isfile(path):
    raise errors.InputError(f"{path}: there is no such image file.")
  try:
    with warnings.catch_warnings():
      # Pillow warns of a bomb, and fails only at twice the size.
      warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
      with open(path, "rb") as file:
        data = io.BytesIO(file.read())
      with PIL.Image.open(data) as image:
        return _rgb(image)
  except PIL.UnidentifiedImageError as error:
    raise errors.InputError(
      f"{path}: is not an image; give a PNG, a JPEG or the like."
    ) from error
  except _BOMBS as error:
    raise errors.InputError(
      f"{path}: the image exceeds limits, {PIL.Image.MAX_IMAGE_PIXELS} pixels; "
      "make it smaller."
    ) from error
  except _IMAGE_ERRORS as error:
    raise errors.InputError(
      f"{path}: cannot be read as an image: {_reason(error)}."
    ) from error


def _rgb(image: PIL.Image.Image) -> PIL.Image.Image:
  """Turns an image upright and makes it 8-bit RGB."""
  image = PIL.ImageOps.exif_transpose(image)
  if image.mode.startswith("I;16"):
    # Pillow would clip 16 bits to 8 instead of scaling them.
    image = PIL.Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
  if image.mode == "P" and "transparency" in image.info:
    image = image.convert("RGBA")
  return image.convert("RGB")


def _pixels(array: np.ndarray) -> np.ndarray:
  """Returns an array of an image as uint8."""
  shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (3, 4))
  if not shaped or not array.size:
    raise errors.InputError(
      f"image: an array must be (height, width, 3), not {array.shape}."
    )
  if array.dtype == np.uint8:
    return np.ascontiguousarray(array)
  if not np.issubdtype(array.dtype, np.floating):
    raise errors.InputError(
      f"image: an array must be uint8, or floats in [0, 1], not {array.dtype}."
    )
  # The comparison is false for a NaN too.
  if not (array.min() >= 0 and array.max() <= 1):
    raise errors.InputError("image: an array of floats must lie in [0, 1].")
  return (array * 255).round().astype(np.uint8)


def _reason(error: Exception) -> str:
  """Returns what a library says went wrong, in part of a line."""
  text = str(error)
  if isinstance(error, OSError | av.FFmpegError) and error.strerror:
    text = error.strerror
  return " ".join(text.split()).rstrip(".") or "it is broken"


def _rate(fps: int | float) -> fractions.Fraction:
  """Returns the frame rate as a fraction that H.264's clock can hold."""
  return fractions.Fraction(fps).limit_denominator(1001)


def _sync(path: pathlib.Path) -> None:
  """Flushes a file, or a folder and the files in it, to the disk."""
  if path.is_dir():
    for entry in sorted(path.glob("*.png")):
      _sync(entry)
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)
