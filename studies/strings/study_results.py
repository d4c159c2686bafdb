"""The raw results of the ablation study, by cell."""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import math
import pathlib

import numpy as np
from scipy import stats

from dst_t5x.analysis import setups

HERE = pathlib.Path(__file__).parent
_TASK = 'study_finetune'
SCORE = f'{_TASK}/character_accuracy'
EXACT = f'{_TASK}/exact_match'
LOSS = 'eval/loss'
METRICS = SCORE, EXACT, LOSS
BUDGETS = SMALL, LARGE = '1e-3', '1e-2'
MISSING = 'missing'


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
    return Setting(setups.ZERO_SHOT)
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
      return MISSING
    digits = 3 if metric == LOSS else 1
    spread = (
      f' ± {np.std(values, ddof=1):.{digits}f}' if len(values) > 1 else ''
    )
    return f'{np.mean(values):.{digits}f}{spread} ({len(values)})'

  def difference(self, a: Setting, b: Setting, metric: str = SCORE) -> str:
    """Returns a − b with its 95 % interval, paired by the random seed."""
    common = sorted(self.seeds(a) & self.seeds(b))
    if len(common) < 2:
      return MISSING
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


def dst(
  budget: str,
  silos: str = 'per_module_and_layer',
  distance: str = 'inverse_relative',
) -> Setting:
  """Returns a cell of DST."""
  return Setting('dst', budget, silos, distance)


def no_churn(budget: str, silos: str) -> Setting:
  """Returns a cell without churn."""
  return Setting('dst_no_churn', budget, silos, 'inverse_relative')


def random(budget: str, silos: str = 'none') -> Setting:
  """Returns a cell of random subsets."""
  return Setting('random', budget, silos)


def normalized(budget: str, by: str, over: str) -> Setting:
  """Returns a cell of DST without silos, with normalized distances."""
  without = dst(budget, 'none')
  return dataclasses.replace(without, normalization=by, over=over)


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
