"""Who wins at which budget: the best configuration of each method.

A budget is ε times the model's parameters. It is compared with the number of
parameters that differ from the seed at the end of a run, whatever the method
was told to free: `free` of `report.json` is counted for methods that choose a
subset, and is the number of trained parameters of the others.
"""

from collections.abc import Sequence
from typing import NamedTuple

from dst_t5x.analysis import cells as cells_lib
from dst_t5x.analysis import intervals
from dst_t5x.analysis import paper_tables
from dst_t5x.analysis import setups
from dst_t5x.analysis import tables
from dst_t5x.checkpoints import best

Cell = cells_lib.Cell
_TOLERANCE = 0.01
_HEADER = (
  *('budget', 'parameters', 'method', 'setting', 'free', 'score', '± 95 %'),
  *('runs', 'less the winner', 'low', 'high', 'pairs', 'learning rate'),
)


class Entry(NamedTuple):
  """The best configuration of a method within a budget.

  Attributes:
    cell: its results.
    score: the mean on the shown split.
    difference: the score less the winner's, paired by the random seed; None
      for the winner.
  """

  cell: Cell
  score: intervals.Interval
  difference: intervals.Interval | None


def table(
  task: str, model: str, cells: Sequence[Cell], metric: str, split: str
) -> tables.Table | None:
  """Returns the table of one model and one task.

  Args:
    task: the task.
    model: the model.
    cells: the cells of both.
    metric: the metric to show.
    split: the split of the scores.

  Returns:
    The table; None if no two methods can be compared.
  """
  sizes = [c.chosen[0].parameters for c in cells if c.chosen]
  found = {c.setup.epsilon for c in cells} - {None}
  budgets = {
    epsilon: round(epsilon * max(sizes))
    for epsilon in sorted(epsilon for epsilon in found if epsilon)
    if sizes
  }
  entries = {
    epsilon: at_budget(cells, budget, metric, split)
    for epsilon, budget in budgets.items()
  }
  if all(len(of_budget) < 2 for of_budget in entries.values()):
    return None
  rows = [
    _row(epsilon, budgets[epsilon], entry)
    for epsilon, of_budget in entries.items()
    for entry in of_budget
  ]
  return tables.Table(
    f'winners_{task}_{model}',
    f'Who wins at which budget ({", ".join(filter(None, (model, task)))})',
    _HEADER,
    rows,
    _notes(metric, split, cells),
  )


def at_budget(
  cells: Sequence[Cell], budget: int, metric: str, split: str
) -> list[Entry]:
  """Returns the best configuration of each method, the winner first.

  Args:
    cells: the cells of one model and one task.
    budget: the number of parameters that may differ from the seed.
    metric: the metric.
    split: the split whose scores are shown. The configurations are chosen by
      those of the development split.
  """
  by_method: dict[str, list[Cell]] = {}
  for cell in cells:
    is_within = 0 < cell.free <= (1 + _TOLERANCE) * budget
    if is_within and cell.score(metric, split).values:
      by_method.setdefault(cell.setup.method, []).append(cell)
  by_method.pop(setups.ZERO_SHOT, None)
  chosen = [
    cells_lib.best_on_dev(of_method, metric) for of_method in by_method.values()
  ]
  scores = [cell.by_random_seed(metric, split) for cell in chosen]
  means = [intervals.of_mean([*of_seeds.values()]) for of_seeds in scores]
  sign = 1 if best.is_lower_better(metric) else -1
  order = sorted(range(len(chosen)), key=lambda i: sign * means[i].mean)
  return [
    Entry(
      chosen[i],
      means[i],
      intervals.of_difference(scores[i], scores[order[0]])
      if i != order[0]
      else None,
    )
    for i in order
  ]


def _row(epsilon: float, budget: int, entry: Entry) -> list[tables.Value]:
  setup, score = entry.cell.setup, entry.score
  difference: list[tables.Value] = [None] * 4
  if entry.difference is not None:
    off = entry.difference
    difference = [off.mean, off.low, off.high, off.number]
  return [
    f'ε = {epsilon:g}',
    budget,
    paper_tables.METHODS.get(setup.method, setup.method),
    ', '.join(filter(None, (setup.budget, setup.variant))),
    entry.cell.free,
    score.mean,
    score.half,
    score.number,
    *difference,
    entry.cell.learning_rate,
  ]


def _notes(metric: str, split: str, cells: Sequence[Cell]) -> list[str]:
  order = 'lowest' if best.is_lower_better(metric) else 'highest'
  notes = [
    f'{metric} of the split {split!r}, the {order} first. Of each method the '
    'configuration that is best on the development split, among those of which '
    'at most as many parameters differ from the seed as the budget has, and '
    f'{100 * _TOLERANCE:g} % more.',
    "Means over random seeds with 95 % intervals by Student's t; differences "
    'to the first method of a budget are paired by the random seed.',
  ]
  if split == cells_lib.DEV:
    notes.append('The shown scores chose the configurations, too.')
  unscored = [c for c in cells if c.chosen and not c.has_dev(metric)]
  if unscored:
    notes.append(
      f'{len(unscored)} configurations have no scores on the development '
      'split. A method that has none takes the one with the most parameters.'
    )
  return notes
