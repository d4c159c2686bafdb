"""The raw results of the ablation study, by cell."""

from collections.abc import Mapping
import dataclasses
import json
import pathlib

from dst_t5x.analysis import raw_results
from dst_t5x.analysis import setups

HERE = pathlib.Path(__file__).parent
_TASK = 'study_finetune'
SCORE = f'{_TASK}/character_accuracy'
EXACT = f'{_TASK}/exact_match'
LOSS = 'eval/loss'
METRICS = SCORE, EXACT, LOSS
BUDGETS = SMALL, LARGE = '1e-3', '1e-2'
MISSING = raw_results.MISSING


@dataclasses.dataclass(frozen=True, order=True)
class Setting:
  """What a cell is about; as in the sweeps' files, defaults filled in."""

  method: str
  budget: str = ''
  silos: str = ''
  distance: str = ''
  normalization: str = ''
  over: str = ''


def setting_of(settings: Mapping[str, str]) -> Setting | None:
  """Returns what a run's settings say; None for another task."""
  if settings['task'] != _TASK:
    return None
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


Study = raw_results.Results[Setting]


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
  lines = (HERE / 'runs.jsonl').read_text().splitlines()
  study = Study(lines, setting_of, SCORE)
  operations = {}
  for line in (HERE / 'operations.jsonl').read_text().splitlines():
    row = json.loads(line)
    operations[row['sweep'], row['name']] = row['scores']
  for run in study.runs:
    run['operations'] = operations.get((run['sweep'], run['name']), {})
  return study
