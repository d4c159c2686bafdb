"""MODEL_DIR: the folder of one run, which one process at a time trains in.

MODEL_DIR/
  run.json          what the run is; see `identity`
  .lock             held by the process that trains here
  config.gin        every parameter that gin supplied, defaults included
  checkpoints/      see `checkpoints.run_folder`
  metrics.jsonl     all metrics, a row a report; events.…: the same for
                    TensorBoard
  evaluation/       predictions, as JSON lines
  best.json         which checkpoint counts, with KEEP_BEST_BY; see `best`
  report.json       at the end: what was trained, how much, and the scores
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
  """A folder that no other process trains in; a context manager.

  Attributes:
    path: of the folder.
  """

  def __init__(self, path: str | os.PathLike[str]) -> None:
    """Makes the folder, and locks it until the end of the context.

    Args:
      path: MODEL_DIR. What an interrupted run left in it stays.

    Raises:
      UserError: it cannot be written to, or another process trains in it.
    """
    self.path = epath.Path(path)
    self._lock: IO[str] | None = None
    if processes.is_first() and not object_stores.is_remote(self.path):
      self._lock = _lock(self.path)  # Object stores know no locks.
      for folder in (self.path, self.path / history.FOLDER):
        whole_files.sweep(folder)
    processes.wait_for_all()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: Any, error: BaseException | None, *_: Any) -> None:
    if self._lock is not None:
      self._lock.close()
    if error and errors.is_io(error):  # A full disk, most likely.
      reason = object_stores.reason(error, self.path)
      raise UserError(
        f'cannot write to MODEL_DIR {self.path}: {reason}; '
        f'{run_folder.what_is_whole(self.path)}'
      ) from error


def _lock(path: epath.Path) -> IO[str]:
  """Returns a file of the folder, locked as long as it is open."""
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
