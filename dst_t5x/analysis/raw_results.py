"""The raw results of sweeps by cell, for studies that are written as a page.

`python -m dst_t5x.launch.records` writes them, one line of JSON a run.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping
import json
import math
from typing import Any, Generic, TypeVar

import numpy as np

from dst_t5x.analysis import intervals
from dst_t5x.checkpoints import best

Cell = TypeVar('Cell', bound=Hashable)
MISSING = 'missing'


class Results(Generic[Cell]):
  """Runs by cell: those on the test set, and those that searched a rate.

  Runs of a cell differ in their learning rate and their random seed. Those with
  `EVAL_SPLIT=test` are its results. The others chose its learning rate.

  Attributes:
    runs: the records of all runs.
  """

  def __init__(
    self,
    lines: Iterable[str],
    cell_of: Callable[[Mapping[str, str]], Cell | None],
    score: str,
  ) -> None:
    """Reads the lines.

    Args:
      lines: the lines of the file.
      cell_of: settings of a run -> its cell; None if the run is not counted.
      score: the metric that chose the learning rates.
    """
    self.runs: list[dict[str, Any]] = [json.loads(line) for line in lines]
    self._score = score
    self._tried: dict[Cell, list[dict[str, Any]]] = {}
    self._final: dict[Cell, dict[int, dict[str, Any]]] = {}
    for run in self.runs:
      settings = run['settings']
      cell = cell_of(settings)
      if run['state'] != 'finished' or cell is None:
        continue
      if settings.get('EVAL_SPLIT') == 'test':
        of_seeds = self._final.setdefault(cell, {})
        of_seeds[int(settings['RANDOM_SEED'])] = run
      else:
        self._tried.setdefault(cell, []).append(run)

  @property
  def cells(self) -> set[Cell]:
    """All cells that have a run."""
    return self._tried.keys() | self._final.keys()

  def runs_of(self, cell: Cell) -> list[dict[str, Any]]:
    """Returns a cell's runs on the test set."""
    return list(self._final.get(cell, {}).values())

  def by_random_seed(self, cell: Cell, metric: str = '') -> dict[int, float]:
    """Returns random seed -> test score of a cell."""
    name, runs = metric or self._score, self._final.get(cell, {})
    return {seed: runs[seed]['scores'][name] for seed in sorted(runs)}

  def values(self, cell: Cell, metric: str = '') -> np.ndarray:
    """Returns the test scores of a cell, float64 [random seeds]."""
    return np.array([*self.by_random_seed(cell, metric).values()])

  def tried(self, cell: Cell) -> dict[float, float]:
    """Returns learning rate -> best score on the development set."""
    found: dict[float, float] = {}
    for run in self._tried.get(cell, []):
      rate = float(run['settings']['LEARNING_RATE'])
      score = run['scores'][self._score]
      found[rate] = max(found.get(rate, -math.inf), score)
    return dict(sorted(found.items()))

  def best_rate(self, cell: Cell) -> float:
    """Returns the learning rate that was chosen."""
    tried = self.tried(cell)
    return max(tried, key=tried.__getitem__)

  def mean(self, cell: Cell, metric: str = '') -> str:
    """Returns `71.2 ± 0.3 (4)`, mean, standard deviation, number of runs."""
    values, digits = self.values(cell, metric), self._digits(metric)
    if not len(values):
      return MISSING
    spread = (
      f' ± {np.std(values, ddof=1):.{digits}f}' if len(values) > 1 else ''
    )
    return f'{np.mean(values):.{digits}f}{spread} ({len(values)})'

  def difference(self, a: Cell, b: Cell, metric: str = '') -> str:
    """Returns a − b with its 95 % interval, paired by the random seed."""
    off = intervals.of_difference(
      *(self.by_random_seed(cell, metric) for cell in (a, b))
    )
    return off.signed(self._digits(metric)) if off.number > 1 else MISSING

  def rates(self, cell: Cell) -> tuple[str, str]:
    """Returns `0.3`, and all tried rates with their scores."""
    tried = self.tried(cell)
    if not tried:
      return MISSING, MISSING
    best_rate = self.best_rate(cell)
    edge = ' (edge)' if best_rate in (min(tried), max(tried)) else ''
    scores = ', '.join(f'{rate:g}: {x:.1f}' for rate, x in tried.items())
    return f'{best_rate:g}{edge}', scores

  def _digits(self, metric: str) -> int:
    return 3 if best.is_lower_better(metric or self._score) else 1


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
  """Returns a table in Markdown."""
  names = list(header)
  lines = [names, ['---'] * len(names), *rows]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)
