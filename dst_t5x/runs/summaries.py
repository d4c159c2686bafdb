"""Writes a run's metrics to TensorBoard, JSON lines, and the terminal."""

from collections.abc import Iterator, Mapping
import contextlib
import math
import os
import sys
import time
from typing import TextIO

from dst_t5x.runtime import quiet_tensorflow  # noqa: F401

# isort: split
from absl import logging
from clu import asynclib
from clu import metric_writers
import numpy as np
from tensorboard.compat.proto import event_pb2
from tensorboard.plugins.histogram import metadata as histograms
import tensorflow as tf
import tqdm

from dst_t5x.core import metrics_file
from dst_t5x.core import object_stores
from dst_t5x.runtime import processes


class Summaries:
  """Writes the metrics of a run; TensorBoard's in the background.

  Only the first process writes.
  """

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
    self._tensorboard: metric_writers.AsyncWriter | None = None
    if not processes.is_first():
      return
    metrics_file.drop_after(folder, first_step)
    self._events = object_stores.Mirror(folder)
    writer = metric_writers.SummaryWriter(self._events.folder)
    _purge_after(writer, first_step)
    self._tensorboard = metric_writers.AsyncWriter(writer)

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Writes scalars. NaN means "not measured" and is left out.

    Raises:
      OSError: these or earlier ones cannot be written.
    """
    if self._tensorboard is None:
      return
    known = {k: float(v) for k, v in values.items() if not math.isnan(v)}
    with _as_os_error():
      self._tensorboard.write_scalars(step, known)
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
    with _as_os_error():
      self._tensorboard.write_summaries(step, {name: bins}, {name: kind})

  def text(self, step: int, texts: Mapping[str, str]) -> None:
    """Writes Markdown texts to TensorBoard."""
    if self._tensorboard is None:
      return
    with _as_os_error():
      self._tensorboard.write_texts(step, dict(texts))

  def flush(self) -> None:
    """Waits until all metrics are written."""
    if self._tensorboard is None:
      return
    with _as_os_error():
      self._tensorboard.flush()
    self._events.upload()

  def close(self) -> None:
    """Writes all metrics and ends the background thread."""
    if self._tensorboard is None:
      return
    with _as_os_error():
      self._tensorboard.close()
    self._events.upload()


def _purge_after(writer: metric_writers.SummaryWriter, step: int) -> None:
  """Makes TensorBoard drop the events of earlier files beyond a step.

  TensorBoard does so when a file has an event for the start of a session.
  Neither CLU nor TensorFlow has a public function that writes one.
  """
  start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
  event = event_pb2.Event(
    wall_time=time.time(), step=step + 1, session_log=start
  )
  tf.raw_ops.ImportEvent(
    writer=writer._summary_writer._resource, event=event.SerializeToString()
  )


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
  """Turns errors of the background writer into OSErrors."""
  try:
    yield
  except asynclib.AsyncError as e:
    line = (str(e.__cause__).splitlines() or ['TensorBoard'])[0]
    raise OSError(line.split('}} ')[-1]) from e


class Progress:
  """Shows rate and remaining time: a bar on a terminal, log lines elsewhere.

  `clu.periodic_actions.ReportProgress` does not replace this: its rate counts
  evaluations and checkpoints as training time, and it shows no metrics.
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
