"""Scores of setups: tuned on one split, averaged over random seeds.

A cell is one setup: a method with one budget and any learning rate. Its trials
differ in what is tuned. One trial is chosen by its scores on the development
split; see `selection`. The report shows this trial's scores over its random
seeds, from the test split if there are any.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from dst_t5x.analysis import runs as runs_lib
from dst_t5x.analysis import setups
from dst_t5x.checkpoints import best
from dst_t5x.checkpoints import selection
from dst_t5x.core import metrics_file
from dst_t5x.core.errors import UserError, nearest

Run = runs_lib.Run
DEV, TEST = 'validation', 'test'
# The preferred metrics of a task with several; otherwise the first is used.
_PREFERRED = (
  'average',
  'bleurt',
  'bleu',
  'strict_match',
  'exact_match',
  'em',
  'accuracy',
)


@dataclasses.dataclass(frozen=True)
class Score:
  """A mean over random seeds.

  Attributes:
    values: one value for each run.
  """

  values: tuple[float, ...]

  @property
  def mean(self) -> float:
    """The mean; NaN without values."""
    return float(np.mean(self.values)) if self.values else math.nan

  @property
  def spread(self) -> float:
    """The sample's standard deviation (n - 1); NaN for less than two values."""
    if len(self.values) < 2:
      return math.nan
    return float(np.std(self.values, ddof=1))

  def over(self, reference: float) -> 'Score':
    """Returns the score in per cent of a reference."""
    return Score(tuple(100 * value / reference for value in self.values))

  def __str__(self) -> str:
    """Returns `71.23 ± 0.31 (4)`: mean, spread and number of runs."""
    if not self.values:
      return ''
    spread = '' if math.isnan(self.spread) else f' ± {self.spread:.2f}'
    return f'{self.mean:.2f}{spread} ({len(self.values)})'


@dataclasses.dataclass(frozen=True)
class Cell:
  """The results of a setup.

  Attributes:
    setup: the setup.
    chosen: the finished runs of the chosen trial.
    learning_rate: the chosen trial's learning rate.
    tried: learning rate -> mean on the development split, of all trials.
    missing: number of expected runs that are not finished.
    expected: number of expected runs.
  """

  setup: setups.Setup
  chosen: tuple[Run, ...]
  learning_rate: float | None
  tried: Mapping[float, float]
  missing: int
  expected: int

  @property
  def is_at_edge(self) -> bool:
    """Whether the best learning rate is the lowest or the highest one tried."""
    rates = sorted(self.tried)
    return len(rates) > 1 and self.learning_rate in (rates[0], rates[-1])

  @property
  def fraction(self) -> float:
    """The share of the model's parameters that is free."""
    return self.chosen[0].fraction if self.chosen else math.nan

  @property
  def free(self) -> int:
    """The most free parameters of its runs, counted at the end if they are."""
    return max((run.free for run in self.chosen), default=0)

  @property
  def forgetting(self) -> Score:
    """Forgetting of the chosen checkpoints, from the runs that have it."""
    name = metrics_file.FORGETTING
    known = [{**run.test, **run.dev} for run in self.chosen]
    return Score(tuple(found[name] for found in known if name in found))

  def has_dev(self, metric: str) -> bool:
    """Returns whether a run has the metric on the development split."""
    return any(metric in run.dev for run in self.chosen)

  def by_random_seed(self, metric: str, split: str) -> dict[int, float]:
    """Returns random seed -> a metric, of the runs that have it."""
    return {
      run.trial.random_seed: scores[metric]
      for run in self.chosen
      if metric in (scores := run.test if split == TEST else run.dev)
    }

  def score(self, metric: str, split: str) -> Score:
    """Returns a metric over the random seeds, from the runs that have it."""
    return Score(tuple(self.by_random_seed(metric, split).values()))


def best_on_dev(cells: Sequence[Cell], metric: str) -> Cell:
  """Returns the best cell by its scores on the development split.

  Without such scores, it is the one with the most free parameters.
  """
  largest_first = sorted(cells, key=lambda cell: -cell.free)
  scored = [cell for cell in largest_first if cell.has_dev(metric)]
  trials = [
    selection.Trial(
      {run.trial.random_seed: run.dev.get(metric) for run in cell.chosen}
    )
    for cell in scored
  ]
  index = selection.choose(trials, metric).chosen
  return largest_first[0] if index is None else scored[index]


def metric_of(runs: Iterable[Run], task: str, wanted: str = '') -> str:
  """Returns the metric that is shown for a task.

  Args:
    runs: all runs.
    task: a task.
    wanted: a metric's name, or the last part of it; by default that of
      KEEP_BEST_BY, or a usual one.

  Raises:
    UserError: no run of the task has the wanted metric.
  """
  of_task = [r for r in runs if r.setup.task == task]
  known = dict.fromkeys(n for r in of_task for n in [*r.dev, *r.test])
  if wanted:
    matches = [n for n in known if wanted in (n, n.rpartition('/')[2])]
    if not matches:
      raise UserError(
        f'no run of {task} has a metric {wanted!r}{nearest(wanted, known)} '
        f'(known: {", ".join(known) or "none"})'
      )
    return next((n for n in matches if n.startswith(f'{task}/')), matches[0])
  by = [r.by for r in of_task if r.by in known]
  if by:
    return max(dict.fromkeys(by), key=by.count)
  tasks = [name for name in known if best.task_of(name)]
  own = [name for name in tasks if name.startswith(f'{task}/')] or tasks
  for last in _PREFERRED:
    for name in own:
      if name.rpartition('/')[2] == last:
        return name
  return next(iter(own), 'eval/accuracy')


def make(runs: Sequence[Run], metric: str) -> list[Cell]:
  """Returns the cells of the runs of one task, in order.

  Args:
    runs: runs of one task, missing ones too.
    metric: the metric on the development split that chooses learning rates.
  """
  by_setup: dict[setups.Setup, list[Run]] = {}
  for run in runs:
    if run.setup.method and run.setup.method != setups.PRETRAINING:
      by_setup.setdefault(run.setup, []).append(run)
  return [_cell(setup, by_setup[setup], metric) for setup in sorted(by_setup)]


def _cell(setup: setups.Setup, runs: Sequence[Run], metric: str) -> Cell:
  trials: dict[Any, dict[int, Run]] = {}
  failed: set[float | None] = set()
  for run in runs:
    if run.state == runs_lib.FINISHED:
      key = (run.trial.learning_rate, run.trial.rest, run.step)
      trials.setdefault(key, {})[run.trial.random_seed] = run
    elif run.state == runs_lib.FAILED:
      failed.add(run.trial.learning_rate)
  choice = selection.choose(
    [
      selection.Trial(
        {
          random_seed: run.dev.get(metric)
          for random_seed, run in sorted(by_random_seed.items())
        },
        key[0] in failed,
      )
      for key, by_random_seed in trials.items()
    ],
    metric,
  )
  tried: dict[float, float] = {}
  sign = -1 if best.is_lower_better(metric) else 1
  for (rate, *_), mean in zip(trials, choice.means, strict=True):
    if rate is not None:
      tried[rate] = sign * max(sign * mean, sign * tried.get(rate, mean))
  chosen: tuple[Run, ...] = ()
  if choice.chosen is not None:
    by_random_seed = list(trials.values())[choice.chosen]
    chosen = tuple(run for _, run in sorted(by_random_seed.items()))
  missing = sum(run.state != runs_lib.FINISHED for run in runs)
  rate = chosen[0].trial.learning_rate if chosen else None
  return Cell(
    setup, chosen, rate, dict(sorted(tried.items())), missing, len(runs)
  )


def split_of(cells: Sequence[Cell], metric: str, wanted: str = '') -> str:
  """Returns the split whose scores are shown, the same for all of a task.

  This is the test split if all cells with runs have scores on it, otherwise
  the split that was evaluated during training.
  """
  if wanted:
    return wanted
  with_runs = [cell for cell in cells if cell.chosen]
  complete = with_runs and all(
    len(cell.score(metric, TEST).values) == len(cell.chosen)
    for cell in with_runs
  )
  return TEST if complete else DEV
