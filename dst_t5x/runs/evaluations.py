"""The evaluations of a run so far, and which checkpoint counts by them."""

from collections.abc import Collection, Mapping
import json
import math

from etils import epath

from dst_t5x.checkpoints import best
from dst_t5x.core import metrics_file
from dst_t5x.runtime import processes


class Evaluations:
  """Step -> the metrics of its evaluation."""

  def __init__(self, path: epath.Path, keep_best_by: str | None) -> None:
    """Knows of no evaluation yet.

    Args:
      path: MODEL_DIR.
      keep_best_by: name of a metric, KEEP_BEST_BY; see `best`.
    """
    self._path = path
    self._by = keep_best_by
    self._results: dict[int, dict[str, float]] = {}

  def recall(self, step: int) -> None:
    """Remembers those that were written before, up to a step."""
    rows = [
      row
      for row in metrics_file.read(self._path)
      if 'eval/loss' in row and row['step'] <= step
    ]
    # The first process wrote them; others may see older ones.
    rows = json.loads(processes.gather(json.dumps(rows))[0])
    self._results = {row['step']: row for row in rows}

  def add(self, step: int, results: Mapping[str, float]) -> None:
    """Takes the results of an evaluation."""
    known = {k: float(v) for k, v in results.items() if not math.isnan(v)}
    self._results[step] = {'step': step} | known

  def lacks(self, step: int) -> bool:
    """Whether a step's evaluation is missing, as after a kill within it."""
    return step > 0 and step not in self._results

  def of(self, step: int) -> dict[str, float]:
    """Returns the metrics of a step; none if it was not evaluated."""
    return self._results.get(step, {})

  @property
  def last(self) -> dict[str, float]:
    """The metrics of the last evaluation, if there was one."""
    return self._results[max(self._results)] if self._results else {}

  def best_of(self, steps: Collection[int]) -> int | None:
    """Returns which of some checkpoints is the best by KEEP_BEST_BY."""
    by = self._by
    values = {
      step: results[by]
      for step, results in self._results.items()
      if step in steps and by in results
    }
    return best.best_step(values, by) if by else None

  def write_best(self, steps: Collection[int]) -> None:
    """Writes which of the checkpoints counts; see `best.write`."""
    if processes.is_first():
      best.write(self._path, self._by, steps)

  def counting_step(self, last: int, steps: Collection[int]) -> int:
    """Returns which checkpoint counts; without a best one the last.

    Args:
      last: its step.
      steps: of all checkpoints.
    """
    # An earlier call may have had a KEEP_BEST_BY that this one has not.
    said = (best.read(self._path) or {}).get('step')
    said = json.loads(processes.gather(json.dumps(said))[0])
    return said if said in steps else last
