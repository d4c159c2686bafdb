"""Preemption: a run that receives SIGTERM saves and stops.

Slurm sends SIGTERM at the end of a job's time, Kubernetes and spot machines
before they take a machine away. The run continues to a step that all processes
agree on, saves, and ends with status 143. The same command resumes it.
"""

import signal
import threading
from types import FrameType
from types import TracebackType
from typing import Self

from absl import logging
import jax
from jax._src import distributed  # No public function starts the service.
from jax.experimental import multihost_utils

STATUS = 128 + signal.SIGTERM


class Stopped(Exception):
  """A run has stopped before its last step because of SIGTERM."""


class Notice:
  """A context manager that handles SIGTERM and decides when a run stops.

  A second SIGTERM ends the process at once. With several processes, JAX's
  preemption service receives SIGTERM and makes all stop after the same step.

  Attributes:
    step: the step after which the run stops; None if it does not.
  """

  def __init__(self) -> None:
    """Installs no handler yet."""
    self.step: int | None = None
    self._is_given = threading.Event()
    self._listens = False

  def __enter__(self) -> Self:
    if jax.process_count() > 1:
      _start_service()
    elif (
      # Python installs handlers in the main thread only. A handler that is
      # there already, such as submitit's, stays.
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
    """Returns whether the run stops after this step.

    Args:
      step: the step. Every process has to call this for every step, in order.
    """
    if self.step is None and self._is_time(step):
      self.step = step
    return self.step == step

  def _is_time(self, step: int) -> bool:
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._is_given.is_set()


def _start_service() -> None:
  """Starts JAX's preemption service.

  The service catches SIGTERM from now on, so that SIGTERM no longer ends a
  process that does not call `stops_after`.
  """
  if distributed.global_state.preemption_sync_manager is None:
    jax.config.update('jax_enable_preemption_service', True)
    distributed.global_state.initialize_preemption_sync_manager()
