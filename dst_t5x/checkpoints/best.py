"""The best checkpoint of a run: `MODEL_DIR/best.json`.

The best checkpoint has the best value of the metric KEEP_BEST_BY, for a mixture
usually its average (`super_glue/average`). Among equal values the latest wins.
A run's scores are those of this one checkpoint.

`best.json` also lists the best score of each task, at any checkpoint. It shows
the cost of mixing. Do not average these scores: no single model has them all.
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
# Prefixes of metrics that belong to no task.
_NOT_TASKS = (
  'eval',
  'held_out',
  'train',
  'speed',
  'free',
  'share',
  'threshold',
  'overlap',
)


# The last parts of the names of metrics whose lowest value is the best.
_LOWER_IS_BETTER = ('loss', 'bits_per_byte', 'forgetting')


def is_lower_better(metric: str) -> bool:
  """Returns whether the lowest value of a metric is the best."""
  return metric.endswith(_LOWER_IS_BETTER)


def best_step(values: Mapping[int, float], by: str) -> int | None:
  """Returns the step with the best value, the latest among equals.

  Args:
    values: step -> value; NaN counts as no value.
    by: the metric's name.

  Returns:
    The step; None if there is no value.
  """
  sign = -1 if is_lower_better(by) else 1
  known = {step: value for step, value in values.items() if value == value}
  return max(known, key=lambda s: (sign * known[s], s)) if known else None


def find_best(
  rows: Sequence[Mapping[str, float]], by: str, steps: Collection[int]
) -> dict[str, Any] | None:
  """Returns the content of `best.json`; None if there is no best checkpoint.

  Args:
    rows: metrics of the run, with their `step`.
    by: the metric of KEEP_BEST_BY.
    steps: the steps of existing checkpoints. An evaluated step without a
      checkpoint, such as a refused one, is ignored.

  Returns:
    `step`, `by` and `value` of the best checkpoint; `scores`, its metrics of
    tasks; `best_of_each_task`, task -> `step` and `value`, the mean of the
    task's metrics.
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
  """Writes `best.json` from a run's metrics, or removes it if it is outdated.

  Args:
    folder: MODEL_DIR.
    by: KEEP_BEST_BY. If None, an earlier `best.json` stays as long as its
      checkpoint exists.
    steps: the steps of existing checkpoints.
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
  """Returns the metrics of the best checkpoint, or else the last ones.

  Args:
    rows: metrics of the run, with their `step`.
    step: the step in `best.json`; None if there is none.
    last: the results in `report.json`, returned if `step` has no evaluation.
  """
  found = [row for row in rows if row['step'] == step and 'eval/loss' in row]
  return found[-1] if found else last


def read(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
  """Returns the content of `best.json`; None if there is no such file."""
  path = epath.Path(folder) / BEST_FILE
  return json.loads(path.read_text()) if path.exists() else None


def task_of(name: str) -> str:
  """Returns the task in a metric's name; '' if it names none."""
  task, slash, _ = name.partition('/')
  return task if slash and task not in _NOT_TASKS else ''


def _means(row: Mapping[str, float]) -> dict[str, float]:
  """Returns task -> mean of the task's metrics."""
  by_task: dict[str, list[float]] = {}
  for name, value in row.items():
    if task := task_of(name):
      by_task.setdefault(task, []).append(value)
  return {task: float(np.mean(values)) for task, values in by_task.items()}
