"""MODEL_DIR: the folder of one run. Only one process at a time trains in it.

MODEL_DIR/
  run.json          the run's identity; see `identity`
  .lock             locked by the process that trains here
  config.gin        every parameter that gin supplied, defaults included
  checkpoints/      see `checkpoints.run_folder`
  metrics.jsonl     all metrics, one row per report
  events.…          the same metrics for TensorBoard
  evaluation/       predictions, as JSON lines
  held_out.json     the seed's loss on held-out text; see `held_out`
  best.json         the best checkpoint by KEEP_BEST_BY; see `best`
  report.json       written at the end: the budget and the scores
  last.dst, best.dst, or last_adapter/, best_adapter/: see `artifacts`
  subsets/          the subset of each checkpoint; see `history`
"""

import fcntl
import os
from typing import IO, Any, Self

from etils import epath

from dst_t5x.checkpoints import run_folder
from dst_t5x.core import errors
from dst_t5x.core import object_stores
from dst_t5x.core import whole_files
from dst_t5x.core.errors import UserError
from dst_t5x.runs import history
from dst_t5x.runtime import processes


class ModelDir:
  """A locked MODEL_DIR; a context manager.

  Attributes:
    path: the folder's path.
  """

  def __init__(self, path: str | os.PathLike[str]) -> None:
    """Makes the folder, and locks it until the end of the context.

    Args:
      path: MODEL_DIR. The results of an interrupted run stay in it.

    Raises:
      UserError: it cannot be written to, or another process trains in it.
    """
    self.path = epath.Path(path)
    self._lock: IO[str] | None = None
    if processes.is_first() and not object_stores.is_remote(self.path):
      self._lock = _lock(self.path)  # Object stores have no locks.
      for folder in (self.path, self.path / history.FOLDER):
        whole_files.sweep(folder)
    processes.wait_for_all()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: Any, error: BaseException | None, *_: Any) -> None:
    if self._lock is not None:
      self._lock.close()
    if error and errors.is_io(error):  # Most likely a full disk.
      reason = object_stores.reason(error, self.path)
      raise UserError(
        f'cannot write to MODEL_DIR {self.path}: {reason}; '
        f'{run_folder.what_is_whole(self.path)}'
      ) from error


def _lock(path: epath.Path) -> IO[str]:
  """Returns the folder's lock file, which is locked until it is closed."""
  try:
    path.mkdir(parents=True, exist_ok=True)
    lock: IO[str] = (path / '.lock').open('w')
  except OSError as e:
    raise UserError(f'MODEL_DIR {path} cannot be written to: {e}') from e
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as e:
    raise UserError(
      f'another process trains in MODEL_DIR {path}: wait until it has '
      'ended, or choose another MODEL_DIR'
    ) from e
  return lock
