"""The tables of the ablation study, in Markdown."""

import math

import numpy as np
from scipy import stats
import study_results as results
from study_results import BUDGETS
from study_results import LOSS
from study_results import MISSING
from study_results import Setting
from study_results import Study

from dst_t5x.analysis import paper_tables
from dst_t5x.analysis import setups
from dst_t5x.analysis.raw_results import table

SILOS = paper_tables.SILOS
DISTANCES = {
  'absolute': 'absolute',
  'relative': 'relative',
  'inverse_relative': 'inverse-relative',
}
_ORDER = (
  *('dst', 'random', 'lora', 'prompt', 'ia3', 'norms', 'head_only', 'full'),
  setups.ZERO_SHOT,
)
_OF_BUDGET = {'lora': ', rank', 'prompt': ', length'}
_OPERATIONS = {
  'back': 'reverse',
  'both': 'next letter, upper case',
  'code': 'cipher',
}
_AT_BUDGETS = tuple(f'ε = {budget}' for budget in BUDGETS)


def chosen(study: Study) -> list[Setting]:
  """Returns the cells of Fig. 1: each method as the paper has it."""
  subsets = (results.dst, results.random)
  cells = [
    s
    for s in sorted(study.cells)
    if s in [of_budget(s.budget) for of_budget in subsets]
    or s.method in set(_ORDER) - {'dst', 'random'}
  ]
  return sorted(
    cells, key=lambda s: (_ORDER.index(s.method), float(s.budget or 0))
  )


def _name(setting: Setting) -> str:
  """Returns `LoRA, rank 8`."""
  about = paper_tables.METHODS[setting.method]
  about += _OF_BUDGET.get(setting.method, '')
  return f'{about} {setting.budget}'.strip()


def free(study: Study, setting: Setting) -> int | None:
  """Returns how many parameters are free in a cell; None if it was not run."""
  runs = study.runs_of(setting)
  if not runs:
    return None
  return 0 if setting.method == setups.ZERO_SHOT else runs[0]['free']


def budgets(study: Study) -> str:
  """Fig. 1 and 6 in numbers."""
  rows = []
  for setting in chosen(study):
    count, size = free(study, setting), (MISSING, MISSING)
    if count is not None:
      total = study.runs_of(setting)[0]['parameters']
      size = (f'{count:,}', f'{100 * count / total:.3g} %')
    scores = (study.mean(setting, m) for m in results.METRICS)
    rows.append((_name(setting), *size, *scores))
  header = ('', 'free', 'share', 'characters', 'exact match', 'loss')
  return table(header, rows)


def operations(study: Study) -> str:
  """Exact match of each operation."""
  rows = []
  for setting in chosen(study):
    found = [run.get('operations', {}) for run in study.runs_of(setting)]
    scores = [[of.get(name, math.nan) for name in _OPERATIONS] for of in found]
    if scores and setting.method in ('dst', 'random', 'lora', 'full'):
      means = (f'{mean:.1f}' for mean in np.mean(scores, axis=0))
      rows.append((_name(setting), *means))
  return table(('', *_OPERATIONS.values()), rows)


def table_2(study: Study) -> str:
  """Distances and silos."""
  of_random = (study.mean(results.random(b)) for b in BUDGETS)
  rows = [('random', 'none', *of_random)]
  for distance, told in DISTANCES.items():
    for silos, silos_told in SILOS.items():
      cells = (results.dst(b, silos, distance) for b in BUDGETS)
      rows.append((told, silos_told, *map(study.mean, cells)))
  return table(('distance', 'silos', *_AT_BUDGETS), rows)


def table_3(study: Study) -> str:
  """Silos and normalization."""
  rows = []
  for silos, told in SILOS.items():
    cells = (results.dst(b, silos) for b in BUDGETS)
    rows.append((f'silos: {told}', *map(study.mean, cells)))
  for over in ('per_module', 'per_module_and_layer'):
    for by in ('size', 'mean'):
      cells = (results.normalized(b, by, over) for b in BUDGETS)
      rows.append((f'by {by}, {SILOS[over]}', *map(study.mean, cells)))
  return table(('', *_AT_BUDGETS), rows)


def table_7(study: Study) -> str:
  """Churn."""
  rows = []
  for budget in BUDGETS:
    for silos, told in SILOS.items():
      without = results.no_churn(budget, silos)
      churn = results.dst(budget, silos)
      means = map(study.mean, (without, churn))
      difference = study.difference(churn, without)
      rows.append((told, f'ε = {budget}', *means, difference))
  return table(
    ('silos', 'budget', 'no churn', 'churn', 'difference, 95 % interval'), rows
  )


def rates(study: Study) -> str:
  """Fig. 9 in numbers."""
  rows = []
  for setting in chosen(study):
    if len(study.tried(setting)) > 1:
      rows.append((_name(setting), *study.rates(setting)))
  header = ('', 'best rate', 'all: characters, development set')
  return table(header, rows)


def against_random(study: Study) -> str:
  """DST and random subsets of equal size."""
  rows = []
  for other in chosen(study):
    if other.method == 'random':
      dst = results.dst(other.budget)
      means = map(study.mean, (dst, other))
      off = (study.difference(dst, other, m) for m in (results.SCORE, LOSS))
      rows.append((f'ε = {other.budget}', *means, *off))
  return table(
    ('', 'DST', 'random', 'difference, 95 % interval', 'of the loss'), rows
  )


def pooled(study: Study, silos: str, budget: str) -> tuple[float, int]:
  """Returns a standard deviation over distances and churn, and its freedom."""
  squares, freedom = 0.0, 0
  cells = [results.dst(budget, silos, distance) for distance in DISTANCES]
  for cell in [*cells, results.no_churn(budget, silos)]:
    found = study.values(cell)
    if len(found) > 1:
      squares += float(np.var(found, ddof=1)) * (len(found) - 1)
      freedom += len(found) - 1
  return math.sqrt(squares / freedom) if freedom else math.nan, freedom


def spread(study: Study) -> str:
  """Pooled standard deviations with their intervals, by siloing."""
  rows = []
  for silos, told in SILOS.items():
    cells = (_deviation(*pooled(study, silos, b)) for b in BUDGETS)
    rows.append((told, *cells))
  return table(('silos', *_AT_BUDGETS), rows)


def _deviation(deviation: float, freedom: int) -> str:
  """Returns `1.23 [0.98, 1.65], 12`, with its 95 % interval and freedom."""
  if not freedom:
    return MISSING
  low, high = (
    deviation * math.sqrt(freedom / stats.chi2.ppf(p, freedom))
    for p in (0.975, 0.025)
  )
  return f'{deviation:.2f} [{low:.2f}, {high:.2f}], {freedom}'
