"""Which checkpoint of a run counts: `MODEL_DIR/best.json`.

One rule: the checkpoint with the best value of KEEP_BEST_BY, of several equal
ones the latest, and the scores that count are those of this one checkpoint. For
a mixture that is its average (`super_glue/average`). Beside it stands the best
of each task, whichever checkpoint that was: to see what mixing costs, not to be
averaged, as no single model has these scores.
"""

from collections.abc import Collection, Mapping, Sequence
import json
import os
from typing import Any

from etils import epath
import numpy as np

from dst_t5x.core import json_text
from dst_t5x.core import metrics_file
from dst_t5x.core import whole_files

BEST_FILE = 'best.json'
# Groups of metrics that are no task's.
_NOT_TASKS = (
  'eval',
  'train',
  'speed',
  'free',
  'share',
  'threshold',
  'overlap',
)


def is_lower_better(metric: str) -> bool:
  """Whether the lowest value is the best."""
  return metric.endswith('loss')


def best_step(values: Mapping[int, float], by: str) -> int | None:
  """Returns the step with the best value, of equal ones the latest.

  Args:
    values: step -> value; NaN is no value.
    by: the metric.
  """
  sign = -1 if is_lower_better(by) else 1
  known = {step: value for step, value in values.items() if value == value}
  return max(known, key=lambda s: (sign * known[s], s)) if known else None


def find_best(
  rows: Sequence[Mapping[str, float]], by: str, steps: Collection[int]
) -> dict[str, Any] | None:
  """Returns the content of `best.json`, None if no checkpoint counts yet.

  Args:
    rows: metrics of the run, with their `step`.
    by: the metric of KEEP_BEST_BY.
    steps: of the checkpoints that there are. A step that was evaluated and has
      none, such as a refused one, does not count.

  Returns:
    `step`, `by`, `value`; `scores`: all metrics of tasks at that step;
    `best_of_each_task`: task -> `step` and `value`, the mean of its metrics.
  """
  evaluations = {int(row['step']): row for row in rows if by in row}
  values = {step: row[by] for step, row in evaluations.items() if step in steps}
  step = best_step(values, by)
  if step is None:
    return None
  best = evaluations[step]
  means = {step: _means(row) for step, row in evaluations.items()}
  each = {}
  for task in _means(best):
    of_task = {at: found[task] for at, found in means.items() if task in found}
    at = max(of_task, key=lambda at: (of_task[at], at))
    each[task] = {'step': at, 'value': of_task[at]}
  mixture, _, metric = by.partition('/')
  if metric == 'average':
    del each[mixture]
  return {
    'step': step,
    'by': by,
    'value': best[by],
    'scores': {name: value for name, value in best.items() if task_of(name)},
    'best_of_each_task': each,
  }


def write(
  folder: str | os.PathLike[str], by: str | None, steps: Collection[int]
) -> None:
  """Writes `best.json` from a run's metrics, or removes what does not hold.

  Args:
    folder: MODEL_DIR.
    by: KEEP_BEST_BY. Without, what was written before stays as long as there is
      its checkpoint.
    steps: of the checkpoints that there are.
  """
  path = epath.Path(folder) / BEST_FILE
  if by is None:
    found = read(folder)
    if found is not None and found['step'] not in steps:
      path.unlink()
    return
  found = find_best(metrics_file.read(folder), by, steps)
  if found is not None:
    whole_files.write_text(path, json_text.dumps(found, indent=2) + '\n')
  else:
    path.unlink(missing_ok=True)


def results_of(
  rows: Sequence[Mapping[str, float]],
  step: int | None,
  last: Mapping[str, float],
) -> Mapping[str, float]:
  """Returns the metrics of the evaluation that counts.

  Args:
    rows: metrics of the run.
    step: `best.json`'s; None if there is none.
    last: `report.json`'s results, which count then.
  """
  found = [row for row in rows if row['step'] == step and 'eval/loss' in row]
  return found[-1] if found else last


def read(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
  """Returns what `write` wrote, if anything."""
  path = epath.Path(folder) / BEST_FILE
  return json.loads(path.read_text()) if path.exists() else None


def task_of(name: str) -> str:
  """Returns the task of a metric's name, or nothing."""
  task, slash, _ = name.partition('/')
  return task if slash and task not in _NOT_TASKS else ''


def _means(row: Mapping[str, float]) -> dict[str, float]:
  """Returns task -> mean of its metrics."""
  by_task: dict[str, list[float]] = {}
  for name, value in row.items():
    if task := task_of(name):
      by_task.setdefault(task, []).append(value)
  return {task: float(np.mean(values)) for task, values in by_task.items()}
