"""Clips as the bytes of a video file: encoded, checked, decoded in windows.

One thread encodes and decodes: with more, the bytes of x264 differ from machine
to machine, and a loader has threads of its own.
"""

import collections
import contextlib
import fractions
import io
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

import av
import numpy as np
import PIL.Image
from av.video import reformatter
from jaxtyping import Int, UInt8

from vidgen import errors

# Pixels of a frame: 8K has 33 million. A header may claim anything.
MAX_PIXELS = 2**26

# A playlist could name files and addresses elsewhere: nothing else is opened.
_SEALED = {"protocol_whitelist": "none", "max_pixels": str(MAX_PIXELS)}

# Before that frame, decoding from the start is as quick as looking for a key.
_SEEK_FROM = 32


class Facts(NamedTuple):
  """What a video is: its decoded frames, upright, and frames per second."""

  num_frames: int
  height: int
  width: int
  fps: float


def encode(
  frames: Iterable[UInt8[np.ndarray, "H W 3"]], fps: int | float, crf: int = 0
) -> bytes:
  """Returns frames as an mp4 of H.264 in RGB, which any size fits.

  Args:
    frames: At least one, all of one size.
    fps: Frames per second.
    crf: x264's quality; 0 loses nothing, bit by bit.
  """
  frames = iter(frames)
  first = next(frames)
  target = io.BytesIO()
  with av.open(target, "w", "mp4") as file:
    rate = fractions.Fraction(fps).limit_denominator(1001)
    stream = file.add_stream("libx264rgb", rate=rate)
    stream.height, stream.width, stream.pix_fmt = *first.shape[:2], "rgb24"
    # A third less time to decode for a tenth more bytes.
    stream.options = {"crf": str(crf), "tune": "fastdecode"}
    stream.codec_context.thread_count = 1
    for pixels in _chain(first, frames):
      pixels = np.ascontiguousarray(pixels)
      file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
    file.mux(stream.encode())
  return target.getvalue()


def check(file: bytes | BinaryIO, where: str) -> Facts:
  """Decodes a video whole and returns what it is.

  Args:
    file: The content of the file, or the file, open.
    where: What a message calls it.

  Raises:
    InputError: It is no video, or cut short, or broken somewhere.
  """
  packets = frames = hidden = 0
  interlaced, ends, times, sizes = False, [0.0], [], set()
  with _opened(file, where) as (container, stream):
    for packet in container.demux():
      if packet.is_corrupt:
        raise errors.InputError(f"{where}: is cut short or damaged.")
      if packet.size and packet.pts is not None and packet.time_base:
        end = packet.pts + (packet.duration or 0)
        ends.append(float(end * packet.time_base))
      if packet.stream is not stream:
        continue
      packets += packet.size > 0
      hidden += packet.size > 0 and packet.is_discard
      for frame in packet.decode():
        if frame.is_corrupt:
          raise errors.InputError(f"{where}: frame {frames} is damaged.")
        frames += 1
        interlaced |= frame.interlaced_frame
        times = [*times[:1], frame.time]
        turned = round(frame.rotation / 90) % 2
        size = (frame.height, frame.width)
        sizes.add(size[::-1] if turned else size)
    _check_whole(container, stream, where, packets, max(ends))
    rate = stream.average_rate or stream.guessed_rate
    # A field may have a packet of its own, and so may what is never shown
    # outside of these two kinds of container.
    whole = _is(container, "mp4") or _is(container, "matroska")
  if not frames:
    raise errors.InputError(f"{where}: holds no frame that can be decoded.")
  if whole and not interlaced and frames < packets - hidden:
    raise errors.InputError(
      f"{where}: {packets - hidden - frames} of its frames are damaged."
    )
  if len(sizes) > 1:
    raise errors.InputError(f"{where}: the frames change their size midway.")
  return Facts(frames, *sizes.pop(), _fps(frames, times, rate))


def frames(
  file: bytes | BinaryIO, where: str
) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
  """Yields the frames of a video, upright, one after the other.

  Raises:
    InputError: It cannot be decoded.
  """
  reform = reformatter.VideoReformatter()
  with _opened(file, where) as (container, stream):
    for frame in container.decode(stream):
      yield _pixels(frame, reform)


def read(
  data: bytes, indices: Int[np.ndarray, " F"], where: str
) -> UInt8[np.ndarray, "F H W 3"]:
  """Returns some frames of a video.

  Args:
    data: The content of the file.
    indices: Which, counted from 0 in the order in which they are shown; they
      never fall.
    where: What a message calls the video.

  Raises:
    InputError: It cannot be decoded, or has too few frames.
  """
  picked = None
  if indices[0] >= _SEEK_FROM:
    picked = _read_from_key(data, indices, where)
  if picked is None:
    picked = _read_from_start(data, indices, where)
  if len({pixels.shape for pixels in picked}) > 1:
    raise errors.InputError(f"{where}: the frames change their size midway.")
  return np.stack(picked)


def cover(
  frames: UInt8[np.ndarray, "F H W 3"], height: int, width: int
) -> UInt8[np.ndarray, "F h w 3"]:
  """Resizes frames to cover `height` x `width`; crops what is over, centred.

  Bicubic, over the area that a pixel covers; frames of that size keep their
  bits.
  """
  _, old_height, old_width, _ = frames.shape
  if (old_height, old_width) == (height, width):
    return frames
  scale = max(height / old_height, width / old_width)
  # Rounding may leave a box a hair outside the frame, which Pillow refuses.
  wide, high = min(width / scale, old_width), min(height / scale, old_height)
  left, top = (old_width - wide) / 2, (old_height - high) / 2
  box = (left, top, left + wide, top + high)
  resized = [
    PIL.Image.fromarray(pixels).resize(
      (width, height), PIL.Image.Resampling.BICUBIC, box
    )
    for pixels in frames
  ]
  return np.stack([np.asarray(image) for image in resized])


def _chain(first: Any, rest: Iterable[Any]) -> Iterator[Any]:
  yield first
  yield from rest


@contextlib.contextmanager
def _opened(
  file: bytes | BinaryIO, where: str
) -> Iterator[tuple[Any, av.VideoStream]]:
  """Opens a video whose header claims nothing absurd; its mistakes are ours."""
  file = io.BytesIO(file) if isinstance(file, bytes) else file
  try:
    with av.open(file, options=_SEALED, metadata_errors="replace") as container:
      streams = [
        stream
        for stream in container.streams.video
        if not stream.disposition & av.stream.Disposition.attached_pic
      ]
      # FFmpeg paints any text file as a terminal would show it.
      if not streams or container.format.name == "tty":
        raise errors.InputError(f"{where}: is not a video.")
      codec = streams[0].codec_context
      if codec is None:
        raise errors.InputError(f"{where}: is in a codec that nobody knows.")
      if codec.width * codec.height > MAX_PIXELS:
        raise errors.InputError(
          f"{where}: its header claims {codec.width}x{codec.height} pixels; "
          f"at most {MAX_PIXELS} are read."
        )
      codec.thread_count = 1
      codec.options = {"max_pixels": str(MAX_PIXELS)}
      yield container, streams[0]
  except (av.FFmpegError, OSError, UnicodeError, MemoryError) as error:
    text = getattr(error, "strerror", None) or str(error) or "it is broken"
    text = " ".join(text.split()).rstrip(".")
    raise errors.InputError(
      f"{where}: cannot be read as a video: {text}."
    ) from error


def _check_whole(
  container: Any, stream: Any, where: str, packets: int, end: float
) -> None:
  """Raises if the header promises more than the file held.

  Args:
    container: The open file.
    stream: Of the video.
    where: What a message calls it.
    packets: Of the video, as many as there were.
    end: When the last packet of any stream ended, in seconds.
  """
  # An mp4 may leave out frames that it counts, but not any of its index.
  promised = stream.frames
  if _is(container, "mp4"):
    promised = len(stream.index_entries)
  if packets < promised:
    raise errors.InputError(
      f"{where}: is cut short: {packets} of its {promised} frames are there."
    )
  # Matroska counts no frames, but tells how long it is; other formats have
  # their durations estimated from a bit rate.
  if _is(container, "matroska") and container.duration:
    promised = container.duration / av.time_base
    start = (container.start_time or 0) / av.time_base
    if end - start < promised - max(0.2, 0.01 * promised):
      raise errors.InputError(
        f"{where}: is cut short: {end - start:.2f} of its {promised:.2f} "
        "seconds are there."
      )


def _is(container: Any, name: str) -> bool:
  return name in container.format.name.split(",")


def _fps(count: int, times: list[float | None], rate: Any) -> float:
  """Returns the frames per second, from the first and the last time."""
  rate = float(rate) if rate else 0.0
  if count == 1 or None in times or times[-1] <= times[0]:
    return rate or 1.0
  measured = (count - 1) / (times[-1] - times[0])
  # A container's clock may be coarse: the rate that it tells is cleaner.
  return rate if abs(rate - measured) < 0.01 * measured else measured


def _pixels(
  frame: av.VideoFrame, reform: reformatter.VideoReformatter
) -> UInt8[np.ndarray, "H W 3"]:
  """Returns a frame in RGB, upright."""
  turns = round(frame.rotation / 90)
  # Planes of RGB are copied; the scaler would take as long as decoding.
  if frame.format.name != "gbrp":
    # More threads are started anew for each frame: 3 times as slow.
    frame = reform.reformat(frame, format="rgb24", threads=1)
  # FFmpeg turns counter-clockwise, in degrees, as numpy does.
  return np.rot90(frame.to_ndarray(), turns)


def _read_from_start(
  data: bytes, indices: Int[np.ndarray, " F"], where: str
) -> list[UInt8[np.ndarray, "H W 3"]]:
  """Decodes from the first frame to the last wanted one."""
  wanted = collections.Counter(indices.tolist())
  reform, picked, index = reformatter.VideoReformatter(), [], -1
  with _opened(data, where) as (container, stream):
    for index, frame in enumerate(container.decode(stream)):
      if index in wanted:
        picked += [_pixels(frame, reform)] * wanted[index]
      if len(picked) == len(indices):
        return picked
  raise errors.InputError(
    f"{where}: {index + 1} frames decode, not {indices[-1] + 1}."
  )


def _read_from_key(
  data: bytes, indices: Int[np.ndarray, " F"], where: str
) -> list[UInt8[np.ndarray, "H W 3"]] | None:
  """Decodes from the key frame before the first wanted one.

  Returns None where the file's times do not tell which frame is which, or
  where the key frame is the first.
  """
  with _opened(data, where) as (container, stream):
    packets = [
      (packet.pts, packet.is_keyframe)
      for packet in container.demux(stream)
      if packet.size and not packet.is_discard
    ]
    times = [pts for pts, _ in packets]
    if None in times or len(set(times)) < len(times):
      return None
    order = {pts: index for index, pts in enumerate(sorted(times))}
    keys = [pts for pts, key in packets if key and order[pts] <= indices[0]]
    if indices[-1] >= len(order) or not keys or not order[max(keys)]:
      return None
  wanted = collections.Counter(indices.tolist())
  reform, picked = reformatter.VideoReformatter(), []
  # Opened anew: a decoder that has seen the end takes no more.
  with _opened(data, where) as (container, stream):
    container.seek(max(keys), stream=stream)
    for frame in container.decode(stream):
      if frame.pts not in order:
        return None
      index = order[frame.pts]
      picked += [_pixels(frame, reform)] * wanted.get(index, 0)
      if len(picked) == len(indices):
        return picked
  return None
