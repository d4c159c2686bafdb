"""The evaluations of a run so far, and the best checkpoint by them."""

from collections.abc import Collection, Mapping
import json
import math

from etils import epath

from dst_t5x.checkpoints import best
from dst_t5x.core import metrics_file
from dst_t5x.runtime import processes


class Evaluations:
  """The metrics of each evaluation of a run, by step."""

  def __init__(self, path: epath.Path, keep_best_by: str | None) -> None:
    """Starts without evaluations; see `recall`.

    Args:
      path: MODEL_DIR.
      keep_best_by: the name of a metric, KEEP_BEST_BY; see `best`.
    """
    self._path = path
    self._by = keep_best_by
    self._results: dict[int, dict[str, float]] = {}

  def recall(self, step: int) -> None:
    """Reads the evaluations up to a step from `metrics.jsonl`."""
    rows = [
      row
      for row in metrics_file.read(self._path)
      if 'eval/loss' in row and row['step'] <= step
    ]
    # The first process wrote the file; others may still see an older version.
    rows = json.loads(processes.gather(json.dumps(rows))[0])
    self._results = {row['step']: row for row in rows}

  def add(self, step: int, results: Mapping[str, float]) -> None:
    """Adds the results of an evaluation."""
    known = {k: float(v) for k, v in results.items() if not math.isnan(v)}
    self._results[step] = {'step': step} | known

  def lacks(self, step: int) -> bool:
    """Returns whether a step was not evaluated, such as after a kill in it."""
    return step > 0 and step not in self._results

  def of(self, step: int) -> dict[str, float]:
    """Returns the metrics of a step; {} if it was not evaluated."""
    return self._results.get(step, {})

  @property
  def last(self) -> dict[str, float]:
    """The metrics of the last evaluation; {} if there was none."""
    return self._results[max(self._results)] if self._results else {}

  def best_of(self, steps: Collection[int]) -> int | None:
    """Returns the best of these steps by KEEP_BEST_BY; None without a best."""
    by = self._by
    values = {
      step: results[by]
      for step, results in self._results.items()
      if step in steps and by in results
    }
    return best.best_step(values, by) if by else None

  def write_best(self, steps: Collection[int]) -> None:
    """Writes `best.json` for checkpoints at these steps; see `best.write`."""
    if processes.is_first():
      best.write(self._path, self._by, steps)

  def counting_step(self, last: int, steps: Collection[int]) -> int:
    """Returns the step of the best checkpoint in `best.json`, or else the last.

    Args:
      last: the step of the last checkpoint.
      steps: the steps of all checkpoints.
    """
    # Read from the file: an earlier call may have had KEEP_BEST_BY.
    said = (best.read(self._path) or {}).get('step')
    said = json.loads(processes.gather(json.dumps(said))[0])
    return said if said in steps else last
