"""The paper's Tables 2, 3, 6 and 7, with our scores beside the paper's.

`paper.json` has the paper's scores. They are for other models and tasks, so
only the order of the rows can be compared.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import json
import math
import pathlib
from typing import Any

from dst_t5x.analysis import cells as cells_lib
from dst_t5x.analysis import setups
from dst_t5x.analysis import tables
from dst_t5x.checkpoints import best
from dst_t5x.core import metrics_file

Cell = cells_lib.Cell
SILOS = {
  'none': 'none',
  'per_module': 'module',
  'per_module_and_layer': 'module and layer',
}
METHODS = {
  setups.ZERO_SHOT: 'zero-shot',
  'full': 'full fine-tuning',
  'prompt': 'prompt tuning',
  'lora': 'LoRA',
  'rslora': 'rsLoRA',
  'dora': 'DoRA',
  'pissa': 'PiSSA',
  'vera': 'VeRA',
  'ia3': '(IA)³',
  'norms': 'layer norms alone',
  'head_only': 'output layer alone',
  'random': 'random subset',
  'shira_random': 'SHiRA, random',
  'shira_magnitude': 'SHiRA, magnitude',
  'super_tuning': 'Super-Tuning',
  'pafi': 'PaFi',
  'shira_snip': 'SHiRA, SNIP',
  'fish': 'FISH mask',
  'child_tuning': 'Child-Tuning',
  'lt_sft': 'LT-SFT',
  'prune_after': 'pruned after tuning',
  'spiel': 'SpIEL',
  'id3': 'ID3',
  'gasdu': 'GaSDU',
  'nano_adam': 'NanoAdam',
  'lift': 'LIFT',
  'dst': 'DST',
}


@functools.cache
def paper() -> Mapping[str, Any]:
  """Returns the paper's scores."""
  path = pathlib.Path(__file__).with_name('paper.json')
  return json.loads(path.read_text(encoding='utf-8'))


class Maker:
  """Makes the tables of one model and one task."""

  def __init__(
    self, cells: Sequence[Cell], metric: str, split: str, where: str
  ) -> None:
    """Stores the cells.

    Args:
      cells: the cells of one model and one task.
      metric: the metric to show.
      split: the split of the scores.
      where: model and task, for titles and names.
    """
    self._cells = cells
    self._metric, self._split, self._where = metric, split, where
    self._subsets = [c for c in cells if c.setup.method in setups.SUBSETS]

  def all(self) -> list[tables.Table]:
    """Returns the tables for which there are scores."""
    made = [self.table_2(), self.table_3(), self.table_6(), self.table_7()]
    return [table for table in made if table is not None]

  def _value(self, cell: Cell | None) -> tables.Value:
    """Returns the score of a cell, or the note that it is missing."""
    if cell is None:
      return None
    score = cell.score(self._metric, self._split)
    if score.values:
      return score
    return 'missing' if cell.missing else f'no {self._split} score'

  def _find(self, knob: float, **wanted: Any) -> Cell | None:
    """Returns the cell of a subset method with a budget and some properties."""
    plain = {'normalization': '', 'churn': True, 'more': ''} | wanted
    for cell in self._subsets:
      setup = cell.setup
      if math.isclose(setup.knob, knob) and all(
        getattr(setup, name) == value for name, value in plain.items()
      ):
        return cell
    return None

  def _budgets(
    self, rows: Sequence[Callable[[float], Cell | None]]
  ) -> list[float]:
    """Returns the budgets for which DST has more than one row."""
    knobs = sorted({cell.setup.knob for cell in self._subsets})
    by_knob = {knob: [row(knob) for row in rows] for knob in knobs}
    return [
      knob
      for knob, cells in by_knob.items()
      if sum(cell is not None and cell.setup.method == 'dst' for cell in cells)
      > 1
    ]

  def _notes(self, *more: str) -> list[str]:
    chosen = (
      'The learning rate of each cell is the best by its mean on the '
      'development split.'
    )
    if self._split == cells_lib.DEV:
      chosen += ' So are the scores of this split, which flatters all of them.'
    lost = sum(cell.missing for cell in self._cells)
    if lost:
      of = sum(cell.expected for cell in self._cells)
      more = (*more, f'{lost} of {of} runs of this model and task are missing.')
    return [
      f'Ours: {self._where}, {self._metric} of the split '
      f'{self._split!r}: mean ± standard deviation (number of random seeds). '
      f'{chosen}',
      f'Paper: {paper()["source"]}.',
      *more,
    ]

  def _name(self, number: int) -> str:
    return f'table_{number}_{self._where.replace(", ", "_")}'

  def table_2(self) -> tables.Table | None:
    """Returns the table of distances and silos."""
    of_paper = paper()['table_2']
    scores = {
      (row['silos'], row['distance']): row['scores'] for row in of_paper['rows']
    }
    keys = list(scores)
    for cell in self._subsets:
      key = cell.setup.silos, cell.setup.distance
      if key not in keys and not cell.setup.normalization:
        keys.append(key)
    order = list(SILOS)
    keys.sort(
      key=lambda key: order.index(key[0]) if key[0] in order else len(order)
    )
    finders = [
      functools.partial(self._find, silos=silos, distance=distance)
      for silos, distance in keys
    ]
    return self._by_budget(
      2,
      'distances and silos',
      ('silos', 'distance'),
      [(SILOS.get(s, s), d.replace('_', '-')) for s, d in keys],
      finders,
      [scores.get(key, [None, None]) for key in keys],
    )

  def table_3(self) -> tables.Table | None:
    """Returns the table of normalizations, with silos for comparison."""
    rows = paper()['table_3']['rows']
    finders, names = [], []
    for row in rows:
      over, kind = row['over'], row['normalization']
      wanted = (
        {'silos': 'none', 'normalization': kind, 'normalize_over': over}
        if kind
        else {'silos': over}
      )
      wanted['distance'] = 'inverse_relative'
      finders.append(functools.partial(self._find, **wanted))
      names.append((f'{kind} normalization' if kind else 'silos', SILOS[over]))
    if not any(c.setup.normalization for c in self._subsets):
      return None
    return self._by_budget(
      3,
      'normalizations instead of silos',
      ('method', 'per'),
      names,
      finders,
      [row['scores'] for row in rows],
    )

  def _by_budget(
    self,
    number: int,
    what: str,
    names: Sequence[str],
    labels: Sequence[Sequence[str]],
    finders: Sequence[Callable[[float], Cell | None]],
    scores: Sequence[Sequence[float | None]],
  ) -> tables.Table | None:
    """Returns a table with a column for each of our budgets and the paper's."""
    knobs = self._budgets(finders)
    if not knobs:
      return None
    budgets = paper()[f'table_{number}']['budgets']
    header = [
      *names,
      *(f'ε = {knob:g}' for knob in knobs),
      *(f'paper, {budget}' for budget in budgets),
    ]
    rows = [
      [*label, *(self._value(find(knob)) for knob in knobs), *of_paper]
      for label, find, of_paper in zip(labels, finders, scores, strict=True)
    ]
    return tables.Table(
      self._name(number),
      f'Table {number}: {what} ({self._where})',
      header,
      rows,
      self._notes(
        f'The paper: {paper()[f"table_{number}"]["what"]}; its larger ε '
        'cannot be read in our copy.',
        f'{tables.NOTHING}: was not to be run.',
      ),
    )

  def table_6(self) -> tables.Table | None:
    """Returns the table of all methods, with every metric of the task."""
    shown = [
      c for c in self._cells if c.setup.is_default or not self._has_default(c)
    ]
    shown.sort(key=lambda c: (_order(c.setup.method), c.setup.knob))
    if len({c.setup.method for c in shown}) < 2:
      return None
    of_paper = paper()['table_6']
    left = {(r['method'], r['knob']): r['scores'] for r in of_paper['rows']}
    metrics = self._metrics()
    rows: list[list[tables.Value]] = []
    for cell in shown:
      setup = cell.setup
      key = setup.method, setup.knob or None
      rows.append(
        [
          METHODS.get(setup.method, setup.method),
          ', '.join(filter(None, (setup.budget, setup.variant))),
          *self._budget_of(cell),
          *(self._values(cell, metric) for metric in metrics),
          cell.learning_rate,
          *left.pop(key, [None, None]),
        ]
      )
    nothing = [None] * (3 + len(metrics))
    rows += [
      [METHODS[method], _knob(method, knob), *nothing, *scores]
      for (method, knob), scores in left.items()
    ]
    header = ['method', 'setting', 'free', 'share (%)', *metrics]
    header += ['learning rate', *(f'paper, {c}' for c in of_paper['columns'])]
    return tables.Table(
      self._name(6),
      f'Table 6: all methods ({self._where})',
      header,
      rows,
      self._notes(f'The paper: {of_paper["what"]}.'),
    )

  def _has_default(self, cell: Cell) -> bool:
    """Whether the method has the settings of the paper's main experiments."""
    return any(
      other.setup.is_default
      for other in self._cells
      if other.setup.method == cell.setup.method
    )

  def _metrics(self) -> list[str]:
    """Returns the task's metrics, beginning with the shown one."""
    known = [
      name
      for cell in self._cells
      for run in cell.chosen
      for name in (run.test if self._split == cells_lib.TEST else run.dev)
      if best.task_of(name) or name == metrics_file.FORGETTING
    ]
    return list(dict.fromkeys([self._metric, *known]))[:6]

  def _values(self, cell: Cell, metric: str) -> tables.Value:
    if metric == self._metric or not cell.chosen:
      return self._value(cell)
    return cell.score(metric, self._split)

  def _budget_of(self, cell: Cell) -> tuple[tables.Value, tables.Value]:
    if not cell.chosen or cell.setup.method == setups.ZERO_SHOT:
      return None, None
    return cell.chosen[0].free, 100 * cell.fraction

  def table_7(self) -> tables.Table | None:
    """Returns the table of the effect of churn."""
    if all(cell.setup.churn for cell in self._subsets):
      return None
    of_paper = paper()['table_7']
    rows: list[list[tables.Value]] = []
    for knob in sorted({c.setup.knob for c in self._subsets}):
      for silos, name in SILOS.items():
        find = functools.partial(
          self._find, knob, silos=silos, distance='inverse_relative'
        )
        both = find(churn=False), find(churn=True)
        if None not in both:
          values = [self._value(cell) for cell in both]
          rows.append([f'{knob:g}', name, *values, _gain(*values)])
    for row in of_paper['rows']:
      budget = f'paper, {of_paper["budgets"][row["budget"]]}'
      scores = row['scores']
      gain = scores[1] - scores[0]
      rows.append([budget, SILOS[row['silos']], *scores, gain])
    return tables.Table(
      self._name(7),
      f'Table 7: churn ({self._where})',
      ('ε', 'silos', 'no churn', 'with churn', 'gain'),
      rows,
      self._notes(f'The paper: {of_paper["what"]}.'),
    )


def _gain(before: tables.Value, after: tables.Value) -> tables.Value:
  """Returns the difference of two means, with the standard error if known."""
  if not isinstance(before, cells_lib.Score):
    return None
  if not isinstance(after, cells_lib.Score):
    return None
  difference = after.mean - before.mean
  errors = [s.spread**2 / len(s.values) for s in (before, after)]
  if any(math.isnan(error) for error in errors):
    return f'{difference:+.2f}'
  return f'{difference:+.2f} (standard error {math.sqrt(sum(errors)):.2f})'


def _knob(method: str, knob: float | str | None) -> str:
  """Returns the text of a method's setting in the paper."""
  if knob is None or isinstance(knob, str):
    return knob or ''
  return setups.Setup('', '', method, knob).budget


def _order(method: str) -> int:
  names = list(METHODS)
  return names.index(method) if method in names else len(names)
