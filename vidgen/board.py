"""Event files for TensorBoard, by tensorboardX."""

import io
import os
import pathlib
import socket
import tempfile
import time
from collections.abc import Mapping

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from vidgen import video

# Seconds between two times that the file goes to the disk.
_FLUSH_SECONDS = 30.0


class Board:
  """One event file.

  The library's SummaryWriter queues to a thread which a full disk ends; what
  fills the queue then waits for ever. Its writer of records has no thread, and
  raises OSError.
  """

  def __init__(self, folder: pathlib.Path, step: int):
    """Opens the file of a run that goes on from `step`.

    TensorBoard drops what an older file has of later steps.
    """
    # It takes seconds to import where torch is installed, and is not always
    # needed.
    from tensorboardX import record_writer
    from tensorboardX.proto import event_pb2, summary_pb2

    self._event, self._summary = event_pb2, summary_pb2
    folder.mkdir(parents=True, exist_ok=True)
    # The time first: TensorBoard reads files in the order of their names.
    name = f"{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
    path = folder / f"events.out.tfevents.{name}"
    self._file = record_writer.RecordWriter(str(path))
    self._flushed = time.monotonic()
    self._write(0, file_version="brain.Event:2")
    status = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(step + 1, session_log=status)

  def scalars(self, values: Mapping[str, float | None], step: int) -> None:
    """Adds the values of a step; None is left out."""
    value = self._summary.Summary.Value
    points = [
      value(tag=name, simple_value=x)
      for name, x in values.items()
      if x is not None
    ]
    self._write(step, summary=self._summary.Summary(value=points))
    if time.monotonic() - self._flushed > _FLUSH_SECONDS:
      self._file.flush()
      self._flushed = time.monotonic()

  def video(
    self,
    name: str,
    frames: UInt8[np.ndarray, "F H W 3"],
    fps: int | float,
    step: int,
  ) -> None:
    """Adds a clip as a GIF, which TensorBoard plays; one frame as an image."""
    count, height, width, _ = frames.shape
    if count == 1:
      buffer = io.BytesIO()
      PIL.Image.fromarray(frames[0]).save(buffer, "PNG")
      data = buffer.getvalue()
    else:
      with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "clip.gif"
        video.write_gif(path, frames, fps)
        data = path.read_bytes()
    image = self._summary.Summary.Image(
      height=height, width=width, colorspace=3, encoded_image_string=data
    )
    point = self._summary.Summary.Value(tag=name, image=image)
    self._write(step, summary=self._summary.Summary(value=[point]))
    self._file.flush()

  def close(self) -> None:
    """Writes what is left, and closes the file."""
    try:
      self._file.flush()
    finally:
      self._file.close()

  def _write(self, step: int, **content: object) -> None:
    event = self._event.Event(wall_time=time.time(), step=step, **content)
    self._file.write(event.SerializeToString())
