"""Writes a run's metrics to TensorBoard, JSON lines, and the terminal."""

from collections.abc import Iterable, Mapping
import math
import os
import pathlib
import socket
import sys
import time
from typing import TextIO

from absl import logging
import numpy as np
from tensorboard.compat.proto import event_pb2
from tensorboard.compat.proto import summary_pb2
from tensorboard.plugins.histogram import metadata as histograms
from tensorboard.plugins.scalar import metadata as scalars
from tensorboard.plugins.text import metadata as texts_metadata
from tensorboard.summary.writer import record_writer
from tensorboard.util import tensor_util
import tqdm

from dst_t5x.core import metrics_file
from dst_t5x.core import object_stores
from dst_t5x.runtime import processes


class Summaries:
  """Writes the metrics of a run. Only the first process writes."""

  def __init__(
    self, folder: str | os.PathLike[str], first_step: int = 0
  ) -> None:
    """Opens the files.

    Args:
      folder: MODEL_DIR.
      first_step: the step that a resumed run starts at. Metrics of later steps,
        from before the interruption, are dropped here and in TensorBoard.
    """
    self._folder = folder
    self._tensorboard: _Events | None = None
    if not processes.is_first():
      return
    metrics_file.drop_after(folder, first_step)
    self._mirror = object_stores.Mirror(folder)
    self._tensorboard = _Events(self._mirror.folder, first_step)

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Writes scalars. NaN means "not measured" and is left out.

    Raises:
      OSError: these or earlier ones cannot be written.
    """
    if self._tensorboard is None:
      return
    known = {k: float(v) for k, v in values.items() if not math.isnan(v)}
    self._tensorboard.add(
      step,
      (
        _value(name, np.float32(value), scalars.create_summary_metadata('', ''))
        for name, value in known.items()
      ),
    )
    metrics_file.append(self._folder, step, known)

  def histogram(
    self, step: int, name: str, bins: np.ndarray, about: str
  ) -> None:
    """Writes a histogram to TensorBoard.

    Args:
      step: the step.
      name: the histogram's tag.
      bins: [bins, 3], lower edge, upper edge and count of each bin.
      about: the histogram's description.
    """
    if self._tensorboard is None or not len(bins):
      return
    kind = histograms.create_summary_metadata(name, about)
    self._tensorboard.add(step, [_value(name, bins, kind)])

  def text(self, step: int, texts: Mapping[str, str]) -> None:
    """Writes Markdown texts to TensorBoard."""
    if self._tensorboard is None:
      return
    kind = texts_metadata.create_summary_metadata('', '')
    self._tensorboard.add(
      step,
      (
        _value(name, np.array(text.encode(), object), kind)
        for name, text in texts.items()
      ),
    )

  def flush(self) -> None:
    """Waits until all metrics are written."""
    if self._tensorboard is None:
      return
    self._tensorboard.flush()
    self._mirror.upload()

  def close(self) -> None:
    """Writes all metrics, and closes the files."""
    if self._tensorboard is None:
      return
    self._tensorboard.close()
    self._mirror.upload()


class _Events:
  """A file of events in TensorBoard's format, without TensorFlow.

  TensorBoard's `EventFileWriter` does not replace this: it imports TensorFlow
  where there is one, and a full disk ends its thread with a traceback.
  """

  def __init__(self, folder: str, first_step: int) -> None:
    """Makes the file; TensorBoard drops events of others after a step."""
    # TensorBoard reads files in the order of their names.
    seconds, rest = divmod(time.time_ns(), 10**9)
    name = (
      f'events.out.tfevents.{seconds:010d}.{socket.gethostname()}.'
      f'{os.getpid()}.{rest:09d}'
    )
    self._file = (pathlib.Path(folder) / name).open('xb')
    self._records = record_writer.RecordWriter(self._file)
    self._write(file_version='brain.Event:2')
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(step=first_step + 1, session_log=start)

  def add(self, step: int, values: Iterable[summary_pb2.Summary.Value]) -> None:
    """Appends values of a step."""
    self._write(step=step, summary=summary_pb2.Summary(value=values))

  def _write(self, **content: object) -> None:
    event = event_pb2.Event(wall_time=time.time(), **content)
    self._records.write(event.SerializeToString())

  def flush(self) -> None:
    """Writes what is in memory."""
    self._records.flush()

  def close(self) -> None:
    """Writes what is in memory, and closes the file."""
    self._records.close()


def _value(
  tag: str, value: np.ndarray | np.generic, kind: summary_pb2.SummaryMetadata
) -> summary_pb2.Summary.Value:
  tensor = tensor_util.make_tensor_proto(value)
  return summary_pb2.Summary.Value(tag=tag, tensor=tensor, metadata=kind)


class Progress:
  """Shows rate and remaining time: a bar on a terminal, log lines elsewhere.

  Evaluations and checkpoints do not count as training time.
  """

  def __init__(
    self, first_step: int, steps: int, stream: TextIO = sys.stderr
  ) -> None:
    """Starts the clock.

    Args:
      first_step: the number of steps that are done already.
      steps: the number of steps in total.
      stream: the stream of the bar.
    """
    self._steps = steps
    self._done = first_step
    self._since = (first_step, time.perf_counter())
    self._bar = (
      tqdm.tqdm(total=steps, initial=first_step, unit='step', file=stream)
      if stream.isatty() and processes.is_first()
      else None
    )

  def advance(self) -> None:
    """Counts one step."""
    self._done += 1
    if self._bar is not None:
      self._bar.update()

  def pause(self) -> None:
    """Stops the clock until `restart`."""
    self._paused = time.perf_counter()

  def restart(self) -> None:
    """Restarts the clock after `pause`."""
    step, since = self._since
    self._since = (step, since + time.perf_counter() - self._paused)

  def report(self, values: Mapping[str, float]) -> float:
    """Shows values; returns the steps per second since the last report."""
    step, since = self._since
    now = time.perf_counter()
    rate = (self._done - step) / max(now - since, 1e-9)
    self._since = (self._done, now)
    text = '  '.join(f'{name} {value:.4g}' for name, value in values.items())
    if self._bar is not None:
      self._bar.set_postfix_str(text)
    else:
      left = (self._steps - self._done) / max(rate, 1e-9)
      logging.info(
        'step %d of %d  %s  %.3g steps/s  %s left',
        self._done,
        self._steps,
        text,
        rate,
        tqdm.tqdm.format_interval(left),
      )
    return rate

  def close(self) -> None:
    """Ends the bar, which stays visible."""
    if self._bar is not None:
      self._bar.close()
