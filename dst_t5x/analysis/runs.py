"""Reads the folder of a run, or of an evaluation of a seed."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import re
from typing import Any

from etils import epath

from dst_t5x.analysis import setups
from dst_t5x.checkpoints import best
from dst_t5x.checkpoints import formats
from dst_t5x.core import json_object
from dst_t5x.core import metrics_file
from dst_t5x.core.errors import UserError, first_line

FINISHED = 'finished'
MISSING = 'missing'
UNFINISHED = 'not finished'
FAILED = 'failed'
DAMAGED = 'damaged'

Tell = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Run:
  """The results of one run.

  Attributes:
    name: the name of its folder.
    folder: MODEL_DIR; for an evaluation, EVAL_OUTPUT_DIR.
    trial: the run's settings.
    state: `finished`, or why there are no results.
    step: steps that are done.
    dev: metric -> value at the chosen checkpoint (see `best`), on the split
      that was evaluated during training.
    test: metric -> value on the test split, from `eval`, or from training if
      EVAL_SPLIT is the test split.
    parameters: parameters of the model; 0 if unknown.
    free: free parameters of the method.
    fingerprint: the seed's fingerprint; '' if unknown.
    seed_path: the seed's path.
    rates: steps per second of each report; the first includes compilation.
    modules: module -> free parameters at the last report.
    by: KEEP_BEST_BY; '' if there is none.
    steps: TRAIN_STEPS; None if unknown.
    devices: the devices that it ran on; '' if unknown.
    seconds: the duration according to the sweep; None if unknown.
  """

  name: str
  folder: epath.Path
  trial: setups.Trial
  state: str
  step: int = 0
  dev: Mapping[str, float] = dataclasses.field(default_factory=dict)
  test: Mapping[str, float] = dataclasses.field(default_factory=dict)
  parameters: int = 0
  free: int = 0
  fingerprint: str = ''
  seed_path: str = ''
  rates: Sequence[float] = ()
  modules: Mapping[str, float] = dataclasses.field(default_factory=dict)
  by: str = ''
  steps: int | None = None
  devices: str = ''
  seconds: float | None = None

  @property
  def setup(self) -> setups.Setup:
    """The trial's settings, except tuned ones and random seeds."""
    return self.trial.setup

  @property
  def fraction(self) -> float:
    """The share of the model's parameters that is free."""
    return self.free / self.parameters if self.parameters else 0.0


def is_run(folder: epath.Path) -> bool:
  """Returns whether a folder is a MODEL_DIR."""
  return (folder / 'run.json').exists()


def is_evaluation(folder: epath.Path) -> bool:
  """Returns whether a folder's `results.json` is an evaluation's.

  Other programs, such as the demonstration, also write files of that name. A
  file that cannot be read may be an evaluation's.
  """
  try:
    content = json.loads((folder / 'results.json').read_text())
  except FileNotFoundError:
    return False
  except (OSError, ValueError):
    return True
  return isinstance(content, dict) and 'checkpoint' in content


def read_one(folder: epath.Path, tell: Tell) -> Run:
  """Reads the folder of a run, or of an evaluation of a seed (zero-shot).

  Args:
    folder: MODEL_DIR or EVAL_OUTPUT_DIR.
    tell: called with a line for each damaged file.
  """
  if not is_run(folder):
    return _read_evaluation(folder, tell)
  nothing = setups.Trial(setups.Setup('', '', ''), None, 0)
  damaged = Run(folder.name, folder, nothing, DAMAGED)
  try:
    about = json.loads((folder / 'run.json').read_text())
    formats.check(json_object.JsonObject(about, str(folder / 'run.json')))
    trial = setups.from_run(about, model='')
  except (AttributeError, KeyError, OSError, TypeError, ValueError) as e:
    tell(f'{folder / "run.json"} is damaged: {first_line(e)}')
    return damaged
  except UserError as e:
    tell(first_line(e))
    return damaged
  try:
    return _read_run(folder, trial, about.get('seed') or {}, tell)
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    tell(f'{folder} is damaged: {first_line(e)}')
    return dataclasses.replace(damaged, trial=trial)


def _read_run(
  folder: epath.Path, trial: setups.Trial, seed: Mapping[str, Any], tell: Tell
) -> Run:
  """Reads the files of a run besides `run.json`."""
  rows = [
    row
    for row in metrics_file.read(folder)
    if isinstance(row, dict) and 'step' in row
  ]
  report = read_json(folder / 'report.json', tell)
  said = macros(folder / 'config.gin')
  steps = _whole(said.get('TRAIN_STEPS', ''))
  is_done = 'results' in report and report.get('step', 0) >= (steps or 0)
  last = rows[-1]['step'] if rows else 0
  own = _dev_scores(folder, report, rows, tell)
  split = said.get('EVAL_SPLIT', '')
  return Run(
    folder.name,
    folder,
    trial,
    FINISHED if is_done else UNFINISHED,
    step=int(report['step'] if is_done else last),
    dev={} if split == 'test' else own,
    test=own if split == 'test' else _test_scores(folder, split, tell),
    parameters=int(report.get('parameters', 0)),
    free=int(report.get('free', 0)),
    fingerprint=str(seed.get('fingerprint', '')),
    seed_path=str(seed.get('path', '')),
    rates=metrics_file.rates(rows),
    modules=metrics_file.modules(rows),
    by=said.get('KEEP_BEST_BY', ''),
    steps=steps,
    devices=str(report.get('devices', '')),
  )


def _whole(text: str) -> int | None:
  return int(text) if text.isdigit() else None


def _dev_scores(
  folder: epath.Path,
  report: Mapping[str, Any],
  rows: Sequence[Mapping[str, float]],
  tell: Tell,
) -> dict[str, float]:
  """Returns the metrics of the chosen checkpoint."""
  try:
    counts = (best.read(folder) or {}).get('step')
  except (OSError, ValueError, AttributeError) as e:
    tell(f'{folder / best.BEST_FILE} is damaged: {first_line(e)}')
    counts = None
  return _numbers(best.results_of(rows, counts, report.get('results', {})))


def _test_scores(
  folder: epath.Path, split: str, tell: Tell
) -> dict[str, float]:
  """Returns the results of `eval` on the test split, below a run's folder.

  Args:
    folder: MODEL_DIR.
    split: the split that was evaluated during training.
    tell: called with a line for each damaged file.
  """
  by_step: dict[int, dict[str, float]] = {}
  for path in sorted(folder.glob('*/results.json')):
    results = read_json(path, tell)
    evaluated = str(results.get('split', ''))
    if evaluated.startswith('test') and evaluated != split:
      by_step[int(results.get('step') or 0)] = _numbers(results)
  if not by_step:
    return {}
  counts = read_json(folder / best.BEST_FILE, lambda line: None).get('step', -1)
  return by_step.get(int(counts), by_step[max(by_step)])


def _numbers(results: Mapping[str, Any]) -> dict[str, float]:
  return {
    name: float(value)
    for name, value in results.items()
    if '/' in name and isinstance(value, int | float)
  }


def macros(path: epath.Path) -> dict[str, str]:
  """Returns the macros of a gin file, with texts without quotes."""
  try:
    lines = path.read_text().splitlines()
  except (OSError, UnicodeDecodeError):
    return {}
  matches = (re.fullmatch(r'([A-Z][A-Z0-9_]*) = (.*)', line) for line in lines)
  values = {m[1]: m[2].strip('\'"') for m in matches if m}
  return {name: value for name, value in values.items() if value != 'None'}


def read_json(path: epath.Path, tell: Tell) -> dict[str, Any]:
  """Returns the content of a file; {} if it is missing or damaged."""
  try:
    content = json.loads(path.read_text())
    if isinstance(content, dict):
      return content
    tell(f'{path} is damaged: it holds no object')
  except FileNotFoundError:
    pass
  except (OSError, ValueError) as e:
    tell(f'{path} is damaged: {first_line(e)}')
  return {}


def _read_evaluation(folder: epath.Path, tell: Tell) -> Run:
  """Reads the zero-shot score of a seed."""
  results = read_json(folder / 'results.json', tell)
  scores = _numbers(results)
  task = next(filter(None, map(best.task_of, scores)), '')
  average = next((n for n in scores if n.endswith('/average')), '')
  task = average.partition('/')[0] or task
  setup = setups.Setup('', task, setups.ZERO_SHOT)
  is_test = results.get('split') == 'test'
  return Run(
    folder.name,
    folder,
    setups.Trial(setup, None, 0),
    FINISHED if scores else DAMAGED,
    dev={} if is_test else scores,
    test=scores if is_test else {},
    seed_path=str(results.get('checkpoint', '')),
  )
