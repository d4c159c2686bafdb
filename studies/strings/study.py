"""Numbers of the ablation study, from its raw results.

    python studies/strings/study.py

writes docs/study.md, and into the heads of `launch/sweeps/study/*.yaml` what
was measured with them.

`runs.jsonl` is what `python -m launch.records` says of the sweeps,
`operations.jsonl` what `operations.py` reads of their predictions,
`study.md.in` the text, in which {names} stand for what is computed here. No
number of the study's results is written by hand.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import math
import pathlib

import numpy as np
from scipy import stats

HERE = pathlib.Path(__file__).parent
PAGE = HERE.parent.parent / 'docs' / 'study.md'
SWEEPS = HERE.parent.parent / 'launch' / 'sweeps' / 'study'
METHODS = HERE.parent.parent / 'gin' / 'methods'
_HARDWARE = '1 of 2 cores of a shared virtual machine, CPU'
_TASK = 'study_finetune'
SCORE = f'{_TASK}/character_accuracy'
EXACT = f'{_TASK}/exact_match'
LOSS = 'eval/loss'
SMALL, LARGE = '1e-3', '1e-2'
_MISSING = 'missing'
_DISTANCES = {
  'absolute': 'absolute',
  'relative': 'relative',
  'inverse_relative': 'inverse-relative',
}
_METHODS = {
  'dst': 'DST',
  'random': 'random subset',
  'lora': 'LoRA, rank',
  'prompt': 'prompt, length',
  'ia3': '(IA)³',
  'norms': 'layer norms alone',
  'head_only': 'output layer alone',
  'full': 'full fine-tuning',
  'zero-shot': 'zero-shot',
}
_OPERATIONS = {
  'back': 'reverse',
  'both': 'next letter, upper case',
  'code': 'cipher',
}
_SILOS = {
  'none': 'none',
  'per_module': 'module',
  'per_module_and_layer': 'module and layer',
}


@dataclasses.dataclass(frozen=True, order=True)
class Setting:
  """What a cell is about; as in the sweeps' files, defaults filled in."""

  method: str
  budget: str = ''
  silos: str = ''
  distance: str = ''
  normalization: str = ''
  over: str = ''


def setting_of(settings: Mapping[str, str]) -> Setting:
  """Returns what a run's settings say."""
  method = settings['method']
  if method in ('lora', 'prompt'):
    budget = settings['LORA_RANK' if method == 'lora' else 'PROMPT_LENGTH']
    return Setting(method, budget)
  if method == 'full' and settings['LEARNING_RATE'] == '0.0':
    return Setting('zero-shot')
  if 'EPSILON' not in settings:
    return Setting(method)
  return Setting(
    method,
    settings['EPSILON'],
    settings.get('SILOS', 'per_module_and_layer').strip('\'"'),
    '' if method == 'random' else settings.get('DISTANCE', 'inverse_relative'),
    settings.get('NORMALIZATION', ''),
    settings.get('NORMALIZE_OVER', ''),
  )


class Study:
  """All runs, by cell."""

  def __init__(self, lines: Sequence[str]) -> None:
    """Reads the lines of `runs.jsonl`."""
    self.runs = [json.loads(line) for line in lines]
    self._tried: dict[Setting, dict[float, float]] = {}
    self._final: dict[Setting, dict[int, dict]] = {}
    for run in self.runs:
      settings = run['settings']
      if run['state'] != 'finished' or settings['task'] != _TASK:
        continue
      setting, rate = setting_of(settings), float(settings['LEARNING_RATE'])
      if settings.get('EVAL_SPLIT') == 'test':
        of_seeds = self._final.setdefault(setting, {})
        of_seeds[int(settings['RANDOM_SEED'])] = run
      else:
        self._tried.setdefault(setting, {})[rate] = run['scores'][SCORE]

  @property
  def settings(self) -> list[Setting]:
    """All that was tried."""
    return sorted(self._tried.keys() | self._final.keys())

  def values(self, setting: Setting, metric: str = SCORE) -> np.ndarray:
    """Returns the test scores of a cell, float64 [random seeds]."""
    runs = self._final.get(setting, {})
    return np.array([runs[seed]['scores'][metric] for seed in sorted(runs)])

  def seeds(self, setting: Setting) -> set[int]:
    """Returns the random seeds of a cell."""
    return set(self._final.get(setting, {}))

  def runs_of(self, setting: Setting) -> list[dict]:
    """Returns a cell's runs on the test set."""
    return list(self._final.get(setting, {}).values())

  def tried(self, setting: Setting) -> dict[float, float]:
    """Returns learning rate -> score on the development set."""
    return dict(sorted(self._tried.get(setting, {}).items()))

  def best_rate(self, setting: Setting) -> float:
    """Returns the learning rate that was chosen."""
    tried = self.tried(setting)
    return max(tried, key=tried.__getitem__)

  def mean(self, setting: Setting, metric: str = SCORE) -> str:
    """Returns `71.2 ± 0.3 (4)`, mean, standard deviation, number of runs."""
    values = self.values(setting, metric)
    if not len(values):
      return _MISSING
    digits = 3 if metric == LOSS else 1
    spread = (
      f' ± {np.std(values, ddof=1):.{digits}f}' if len(values) > 1 else ''
    )
    return f'{np.mean(values):.{digits}f}{spread} ({len(values)})'

  def difference(self, a: Setting, b: Setting, metric: str = SCORE) -> str:
    """Returns a − b with its 95 % interval, paired by the random seed."""
    common = sorted(self.seeds(a) & self.seeds(b))
    if len(common) < 2:
      return _MISSING
    off = np.array(
      [
        self._final[a][s]['scores'][metric]
        - self._final[b][s]['scores'][metric]
        for s in common
      ]
    )
    error = np.std(off, ddof=1) / math.sqrt(len(off))
    half = stats.t.ppf(0.975, len(off) - 1) * error
    digits = 3 if metric == LOSS else 1
    low, high = np.mean(off) - half, np.mean(off) + half
    return f'{np.mean(off):+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]'


def dst(budget: str, silos: str = 'per_module_and_layer',
        distance: str = 'inverse_relative') -> Setting:  # fmt: skip
  """Returns a cell of DST."""
  return Setting('dst', budget, silos, distance)


def no_churn(budget: str, silos: str) -> Setting:
  """Returns a cell without churn."""
  return Setting('dst_no_churn', budget, silos, 'inverse_relative')


def random(budget: str, silos: str = 'none') -> Setting:
  """Returns a cell of random subsets."""
  return Setting('random', budget, silos)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Returns a table in Markdown."""
  lines = [header, ['---'] * len(header), *rows]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def _chosen(study: Study) -> list[Setting]:
  """Returns the cells of Fig. 1: each method as the paper has it."""
  chosen = [
    s
    for s in study.settings
    if s.method in set(_METHODS) - {'dst', 'random'}
    or s in (dst(s.budget), random(s.budget))
  ]
  order = list(_METHODS)
  chosen.sort(key=lambda s: (order.index(s.method), float(s.budget or 0)))
  return chosen


def _budgets(study: Study) -> str:
  """Fig. 1 and 6 in numbers."""
  rows = []
  for setting in _chosen(study):
    has = bool(study.seeds(setting))
    is_zero = setting.method == 'zero-shot'
    free = 0 if is_zero else study.runs_of(setting)[0]['free'] if has else None
    total = study.runs_of(setting)[0]['parameters'] if has else None
    rows.append(
      (
        f'{_METHODS[setting.method]} {setting.budget}'.strip(),
        _MISSING if free is None else f'{free:,}',
        _MISSING if free is None else f'{100 * free / total:.3g} %',
        study.mean(setting),
        study.mean(setting, EXACT),
        study.mean(setting, LOSS),
      )
    )
  header = ('', 'free', 'share', 'characters', 'exact match', 'loss')
  return table(header, rows)


def _operations(study: Study) -> str:
  """Exact match of each operation."""
  wanted = [
    s for s in _chosen(study) if s.method in ('dst', 'random', 'lora', 'full')
  ]
  rows = []
  for setting in wanted:
    found = [run.get('operations', {}) for run in study.runs_of(setting)]
    scores = [[of.get(name, math.nan) for name in _OPERATIONS] for of in found]
    if scores:
      means = (f'{mean:.1f}' for mean in np.mean(scores, axis=0))
      name = f'{_METHODS[setting.method]} {setting.budget}'.strip()
      rows.append((name, *means))
  return table(('', *_OPERATIONS.values()), rows)


def _table_2(study: Study) -> str:
  rows = [('random', 'none', *(study.mean(random(b)) for b in (SMALL, LARGE)))]
  rows += [
    (
      told,
      silos_told,
      *(study.mean(dst(b, silos, distance)) for b in (SMALL, LARGE)),
    )
    for distance, told in _DISTANCES.items()
    for silos, silos_told in _SILOS.items()
  ]
  return table(('distance', 'silos', f'ε = {SMALL}', f'ε = {LARGE}'), rows)


def _table_3(study: Study) -> str:
  rows = []
  for silos, told in _SILOS.items():
    cells = (dst(b, silos) for b in (SMALL, LARGE))
    rows.append((f'silos: {told}', *map(study.mean, cells)))
  for over in ('per_module', 'per_module_and_layer'):
    for by in ('size', 'mean'):
      cells = (
        dataclasses.replace(dst(b, 'none'), normalization=by, over=over)
        for b in (SMALL, LARGE)
      )
      rows.append((f'by {by}, {_SILOS[over]}', *map(study.mean, cells)))
  return table(('', f'ε = {SMALL}', f'ε = {LARGE}'), rows)


def _table_7(study: Study) -> str:
  rows = [
    (
      told,
      f'ε = {budget}',
      study.mean(no_churn(budget, silos)),
      study.mean(dst(budget, silos)),
      study.difference(dst(budget, silos), no_churn(budget, silos)),
    )
    for budget in (SMALL, LARGE)
    for silos, told in _SILOS.items()
  ]
  return table(
    ('silos', 'budget', 'no churn', 'churn', 'difference, 95 % interval'), rows
  )


def _rates(study: Study) -> str:
  """Fig. 9 in numbers."""
  rows = []
  for setting in _chosen(study):
    tried = study.tried(setting)
    if len(tried) < 2:
      continue
    best = study.best_rate(setting)
    rows.append(
      (
        f'{_METHODS[setting.method]} {setting.budget}'.strip(),
        f'{best:g}' + (' (edge)' if best in (min(tried), max(tried)) else ''),
        ', '.join(f'{rate:g}: {score:.1f}' for rate, score in tried.items()),
      )
    )
  header = ('', 'best rate', 'all: characters, development set')
  return table(header, rows)


def _against_random(study: Study) -> str:
  budgets = sorted(
    (s.budget for s in study.settings if s == random(s.budget)), key=float
  )
  rows = [
    (
      f'ε = {budget}',
      study.mean(dst(budget)),
      study.mean(random(budget)),
      study.difference(dst(budget), random(budget)),
      study.difference(dst(budget), random(budget), LOSS),
    )
    for budget in budgets
  ]
  return table(
    ('', 'DST', 'random', 'difference, 95 % interval', 'of the loss'), rows
  )


def _pooled(study: Study, silos: str, budget: str) -> tuple[float, int]:
  """Returns a standard deviation over distances and churn, and its freedom."""
  squares, freedom = 0.0, 0
  cells = [dst(budget, silos, distance) for distance in _DISTANCES]
  for cell in [*cells, no_churn(budget, silos)]:
    found = study.values(cell)
    if len(found) > 1:
      squares += float(np.var(found, ddof=1)) * (len(found) - 1)
      freedom += len(found) - 1
  return math.sqrt(squares / freedom) if freedom else math.nan, freedom


def _spread(study: Study) -> str:
  """Pooled standard deviations with their intervals, by siloing."""
  rows = []
  for silos, told in _SILOS.items():
    row = [told]
    for budget in (SMALL, LARGE):
      deviation, freedom = _pooled(study, silos, budget)
      if not freedom:
        row.append(_MISSING)
        continue
      low, high = (
        deviation * math.sqrt(freedom / stats.chi2.ppf(p, freedom))
        for p in (0.975, 0.025)
      )
      row.append(f'{deviation:.2f} [{low:.2f}, {high:.2f}], {freedom}')
    rows.append(tuple(row))
  return table(('silos', f'ε = {SMALL}', f'ε = {LARGE}'), rows)


def _over(study: Study, distance: str, silos: str) -> str:
  """Inverse-relative less another distance."""
  return study.difference(dst(SMALL, silos), dst(SMALL, silos, distance))


def _churn(study: Study, silos: str, budget: str = SMALL) -> str:
  return study.difference(dst(budget, silos), no_churn(budget, silos))


def _free(study: Study, setting: Setting) -> str:
  runs = study.runs_of(setting)
  return f'{runs[0]["free"]:,}' if runs else _MISSING


def _share(study: Study, setting: Setting) -> str:
  """Returns the mean share of the subset that is in the token embedding."""
  runs = study.runs_of(setting)
  if not runs:
    return _MISSING
  shares = [run['modules']['token_embedder'] / run['free'] for run in runs]
  return f'{100 * np.mean(shares):.0f} %'


def values(study: Study) -> dict[str, str]:
  """Returns name -> what stands for it in the text."""
  finished = [run for run in study.runs if run['state'] == 'finished']
  seconds = [run['seconds'] for run in finished if run['seconds']]
  return {
    'runs': str(len(finished)),
    'planned': str(len(study.runs)),
    'median_seconds': f'{np.median(seconds):.0f}',
    'parameters': f'{finished[0]["parameters"]:,}',
    'random_small': study.difference(dst(SMALL), random(SMALL)),
    'random_large': study.difference(dst(LARGE), random(LARGE)),
    'churn_layer': _churn(study, 'per_module_and_layer'),
    'churn_module': _churn(study, 'per_module'),
    'churn_none': _churn(study, 'none'),
    'silos': study.difference(dst(SMALL, 'none'), dst(SMALL)),
    'tiny': str(study.runs_of(dst('1e-4'))[0]['free']),
    **{
      f'spread_{name}{size}': f'{_pooled(study, silos, budget)[0]:.1f}'
      for name, silos in zip(('none', 'module', 'layer'), _SILOS, strict=True)
      for size, budget in (('', SMALL), ('_large', LARGE))
    },
    'relative_none': _over(study, 'relative', 'none'),
    'relative_module': _over(study, 'relative', 'per_module'),
    'relative_layer': _over(study, 'relative', 'per_module_and_layer'),
    'absolute_none': _over(study, 'absolute', 'none'),
    'absolute_module': _over(study, 'absolute', 'per_module'),
    'absolute_layer': _over(study, 'absolute', 'per_module_and_layer'),
    'embedding_none': _share(study, dst(SMALL, 'none')),
    'embedding_layer': _share(study, dst(SMALL)),
    'budgets': _budgets(study),
    'against_random': _against_random(study),
    'operations': _operations(study),
    **{
      f'lora_{rank}': study.difference(dst(budget), Setting('lora', rank))
      for rank, budget in (('1', '3.7e-3'), ('8', '3e-2'), ('50', '1.9e-1'))
    },
    **{
      f'lora_{rank}_free': _free(study, Setting('lora', rank))
      for rank in ('1', '50')
    },
    'ia3': study.difference(dst('1.86e-3'), Setting('ia3')),
    'ia3_free': _free(study, Setting('ia3')),
    'norms': study.difference(dst(SMALL), Setting('norms')),
    'norms_none': study.difference(dst(SMALL, 'none'), Setting('norms')),
    'norms_free': _free(study, Setting('norms')),
    'small_free': _free(study, dst(SMALL)),
    'by_size': study.difference(
      dataclasses.replace(
        dst(SMALL, 'none'), normalization='size', over='per_module_and_layer'
      ),
      dst(SMALL, 'none'),
    ),
    'lora_budget': _free(study, dst('3.7e-3')),
    'rate_tenth': f'{study.best_rate(dst("1e-1")):g}',
    'rate_tiny': f'{study.best_rate(dst("1e-4")):g}',
    'most': _free(study, dst('5e-1')),
    'random_tiny': study.difference(dst('1e-4'), random('1e-4')),
    'random_tenth': study.difference(dst('1e-1'), random('1e-1')),
    'churn_layer_large': _churn(study, 'per_module_and_layer', LARGE),
    'churn_module_large': _churn(study, 'per_module', LARGE),
    'churn_none_large': _churn(study, 'none', LARGE),
    'silos_large': study.difference(dst(LARGE, 'none'), dst(LARGE)),
    'table_2': _table_2(study),
    'table_3': _table_3(study),
    'table_7': _table_7(study),
    'rates': _rates(study),
    'spread': _spread(study),
  }


def page() -> str:
  """Returns the text of docs/study.md."""
  text = (HERE / 'study.md.in').read_text()
  return text.format_map(values(load()))


def head(study: Study, sweep: str) -> list[str]:
  """Returns comments: scores, time, hardware, command of a sweep."""
  runs = [run for run in study.runs if run['sweep'] == sweep]
  done = [run for run in runs if run['state'] == 'finished']
  seconds = sum(run['seconds'] or 0 for run in done)
  lines = [
    f'python -m launch.sweep launch/sweeps/study/{sweep}.yaml',
    f'{len(done)} of {len(runs)} runs finished, {seconds / 60:.0f} minutes in '
    f'all; {_HARDWARE}.',
  ]
  cells = dict.fromkeys(
    setting_of(run['settings'])
    for run in done
    if run['settings'].get('EVAL_SPLIT') == 'test'
  )
  return [*_measured(lines), *_scores(study, list(cells))]


def method_head(study: Study, method: str) -> list[str]:
  """Returns comments: what was measured with a method's file."""
  cells = [s for s in _chosen(study) if s.method == method]
  if method == 'dst_no_churn':
    cells = [s for s in study.settings if s.method == method]
  seconds = [run['seconds'] for s in cells for run in study.runs_of(s)]
  return [
    *_measured(
      [
        'python -m launch.sweep launch/sweeps/study/'
        + ('small.yaml' if method == 'dst_no_churn' else 'budgets.yaml'),
        f'2 million parameters, 60 steps, a median of {np.median(seconds):.0f} '
        f's; {_HARDWARE}.',
      ]
    ),
    *_scores(study, cells),
  ]


def _measured(lines: Sequence[str]) -> list[str]:
  return [f'# Measured: {lines[0]}', *(f'#   {line}' for line in lines[1:])]


def _scores(study: Study, cells: Sequence[Setting]) -> list[str]:
  if not cells:
    return []
  lines = ['Characters right on the test set, % (random seeds):']
  for setting in cells:
    about = ' '.join(filter(None, dataclasses.astuple(setting)))
    lines.append(f'  {about}: {study.mean(setting)}')
  return [f'#   {line}' for line in lines]


def with_head(text: str, lines: Sequence[str]) -> str:
  """Returns a file with these comments in its head, not those it had."""
  old = text.splitlines()
  start = next((i for i, x in enumerate(old) if x.startswith('# Measured')), 0)
  end = next(i for i in range(start, len(old)) if not old[i].startswith('#'))
  if not old[start].startswith('# Measured'):
    start = end
  return '\n'.join([*old[:start], *lines, *old[end:]]) + '\n'


def load() -> Study:
  """Returns the study of the committed raw results."""
  study = Study((HERE / 'runs.jsonl').read_text().splitlines())
  operations = {}
  for line in (HERE / 'operations.jsonl').read_text().splitlines():
    row = json.loads(line)
    operations[row['sweep'], row['name']] = row['scores']
  for run in study.runs:
    run['operations'] = operations.get((run['sweep'], run['name']), {})
  return study


def main() -> None:
  """Writes everything."""
  PAGE.write_text(page())
  study = load()
  for sweep in dict.fromkeys(run['sweep'] for run in study.runs):
    path = SWEEPS / f'{sweep}.yaml'
    path.write_text(with_head(path.read_text(), head(study, sweep)))
  for method in dict.fromkeys(setting.method for setting in study.settings):
    path = METHODS / f'{method}.gin'
    if path.exists():  # Zero-shot has none.
      path.write_text(with_head(path.read_text(), method_head(study, method)))


if __name__ == '__main__':
  main()
