"""Which checkpoint of a run counts: `MODEL_DIR/best.json`.

One rule: the checkpoint with the best value of KEEP_BEST_BY, of several equal
ones the latest, and the scores that count are those of this one checkpoint. For
a mixture that is its average (`super_glue/average`). Beside it stands the best
of each task, whichever checkpoint that was: to see what mixing costs, not to be
averaged, as no single model has these scores.
"""

from collections.abc import Mapping, Sequence
import json
import math
import os
from typing import Any

from etils import epath
import numpy as np

from dst_t5x import json_text
from dst_t5x import metrics_file
from dst_t5x import whole_files

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


def find_best(
  rows: Sequence[Mapping[str, float]], by: str
) -> dict[str, Any] | None:
  """Returns the content of `best.json`, None before the first evaluation.

  Args:
    rows: metrics of the run, with their `step`.
    by: the metric of KEEP_BEST_BY.

  Returns:
    `step`, `by`, `value`; `scores`: all metrics of tasks at that step;
    `best_of_each_task`: task -> `step` and `value`, the mean of its metrics.
  """
  evaluations = [row for row in rows if not math.isnan(row.get(by, math.nan))]
  if not evaluations:
    return None
  sign = -1 if is_lower_better(by) else 1
  best = max(evaluations, key=lambda row: (sign * row[by], row['step']))
  means = {int(row['step']): _means(row) for row in evaluations}
  each = {}
  for task in _means(best):
    values = {step: of[task] for step, of in means.items() if task in of}
    step = max(values, key=lambda step: (values[step], step))
    each[task] = {'step': step, 'value': values[step]}
  mixture, _, metric = by.partition('/')
  if metric == 'average':
    del each[mixture]
  return {
    'step': int(best['step']),
    'by': by,
    'value': best[by],
    'scores': {name: value for name, value in best.items() if task_of(name)},
    'best_of_each_task': each,
  }


def write(folder: str | os.PathLike[str], by: str | None) -> None:
  """Writes `best.json` from a run's metrics, if there is a metric to go by."""
  found = find_best(metrics_file.read(folder), by) if by else None
  if found is not None:
    path = epath.Path(folder) / BEST_FILE
    whole_files.write_text(path, json_text.dumps(found, indent=2) + '\n')


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
