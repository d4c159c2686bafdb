"""A machine that is taken away says so before, by SIGTERM.

So do Slurm at the end of a job's time, Kubernetes, and spot machines. A run
then takes a few steps more, until one that all processes agree on, saves, and
ends with status 143; the same command goes on from there.
"""

import signal
import threading
from types import FrameType
from types import TracebackType
from typing import Self

from absl import logging
import jax
from jax._src import distributed  # What starts the service has no public name.
from jax.experimental import multihost_utils

STATUS = 128 + signal.SIGTERM


class Stopped(Exception):
  """A run has ended before its last step, because it was told to."""


class Notice:
  """What SIGTERM has said of this run; a context manager that listens.

  A second SIGTERM ends the process as ever. Among several processes JAX's
  preemption service listens, tells the others, and has all of them stop after
  the same step.

  Attributes:
    step: after which the run stops, None as long as it does not.
  """

  def __init__(self) -> None:
    """Does nothing yet."""
    self.step: int | None = None
    self._is_given = threading.Event()
    self._listens = False

  def __enter__(self) -> Self:
    if jax.process_count() > 1:
      _start_service()
    elif (
      # Elsewhere Python takes no handlers; submitit has one of its own.
      threading.current_thread() is threading.main_thread()
      and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    ):
      signal.signal(signal.SIGTERM, self._take)
      self._listens = True
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    if self._listens:
      signal.signal(signal.SIGTERM, signal.SIG_DFL)

  def _take(self, number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    self._is_given.set()
    logging.warning('SIGTERM: saving after one of the next steps')

  def stops_after(self, step: int) -> bool:
    """Whether the run stops after this step.

    Args:
      step: to be asked for one after the other, in every process.
    """
    if self.step is None and self._is_time(step):
      self.step = step
    return self.step == step

  def _is_time(self, step: int) -> bool:
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._is_given.is_set()


def _start_service() -> None:
  """Lets JAX listen, but not before there is somebody to ask it.

  It takes SIGTERM for good: a process that does not ask would not end.
  """
  if distributed.global_state.preemption_sync_manager is None:
    jax.config.update('jax_enable_preemption_service', True)
    distributed.global_state.initialize_preemption_sync_manager()
