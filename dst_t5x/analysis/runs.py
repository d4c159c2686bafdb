"""What a run has left in its folder, or an evaluation of a seed in its own."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
import re
from typing import Any

from etils import epath

from dst_t5x.analysis import setups
from dst_t5x.checkpoints import best
from dst_t5x.core import metrics_file
from dst_t5x.core.errors import first_line

FINISHED = 'finished'
MISSING = 'missing'
UNFINISHED = 'not finished'
FAILED = 'failed'
DAMAGED = 'damaged'

Tell = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Run:
  """What one run left.

  Attributes:
    name: of its folder.
    folder: MODEL_DIR; of an evaluation, EVAL_OUTPUT_DIR.
    trial: what it tries.
    state: `finished`, or why there is nothing to report.
    step: steps that are done.
    dev: metric -> value on the split that it evaluated while training, at the
      checkpoint that counts (see `best`).
    test: the same on the test split, where `eval` was run on it, or where
      EVAL_SPLIT says that it was what training evaluated.
    parameters: of the model; 0 if unknown.
    free: how many the method trains.
    fingerprint: of its seed, '' if unknown.
    seed_path: where that was.
    rates: steps per second, a number a report; the first has the compilation.
    modules: module -> free parameters at the last report.
    by: KEEP_BEST_BY, '' if there is none.
    steps: TRAIN_STEPS, if it is known.
    devices: what it ran on, '' if unknown.
    seconds: what a sweep says it took, None if unknown.
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
    """What it tries, but for what is tuned or chance."""
    return self.trial.setup

  @property
  def fraction(self) -> float:
    """The free parameters as a share of the model's."""
    return self.free / self.parameters if self.parameters else 0.0


def is_run(folder: epath.Path) -> bool:
  """Whether a folder is a MODEL_DIR."""
  return (folder / 'run.json').exists()


def is_evaluation(folder: epath.Path) -> bool:
  """Whether a folder's `results.json` is that of an evaluation.

  Other programs have files of that name, too, the demonstration among them. One
  that cannot be read may be an evaluation's.
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
    folder: MODEL_DIR, or EVAL_OUTPUT_DIR.
    tell: is called with a line for each file that is damaged.
  """
  if not is_run(folder):
    return _read_evaluation(folder, tell)
  nothing = setups.Trial(setups.Setup('', '', ''), None, 0)
  damaged = Run(folder.name, folder, nothing, DAMAGED)
  try:
    about = json.loads((folder / 'run.json').read_text())
    trial = setups.from_run(about['config'], model='')
  except (AttributeError, KeyError, OSError, TypeError, ValueError) as e:
    tell(f'{folder / "run.json"} is damaged: {first_line(e)}')
    return damaged
  try:
    return _read_run(folder, trial, about.get('seed') or {}, tell)
  except (AttributeError, KeyError, TypeError, ValueError) as e:
    tell(f'{folder} is damaged: {first_line(e)}')
    return dataclasses.replace(damaged, trial=trial)


def _read_run(
  folder: epath.Path, trial: setups.Trial, seed: Mapping[str, Any], tell: Tell
) -> Run:
  """Reads what a run left besides `run.json`."""
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
  """Returns the metrics of the checkpoint that counts."""
  try:
    counts = (best.read(folder) or {}).get('step')
  except (OSError, ValueError, AttributeError) as e:
    tell(f'{folder / best.BEST_FILE} is damaged: {first_line(e)}')
    counts = None
  return _numbers(best.results_of(rows, counts, report.get('results', {})))


def _test_scores(
  folder: epath.Path, split: str, tell: Tell
) -> dict[str, float]:
  """Returns what `eval` wrote of the test split below a run's folder.

  Args:
    folder: MODEL_DIR.
    split: that was evaluated while training.
    tell: is called with a line for each file that is damaged.
  """
  found: dict[int, dict[str, float]] = {}
  for path in sorted(folder.glob('*/results.json')):
    results = read_json(path, tell)
    evaluated = str(results.get('split', ''))
    if evaluated.startswith('test') and evaluated != split:
      found[int(results.get('step') or 0)] = _numbers(results)
  if not found:
    return {}
  counts = read_json(folder / best.BEST_FILE, lambda line: None).get('step', -1)
  return found.get(int(counts), found[max(found)])


def _numbers(results: Mapping[str, Any]) -> dict[str, float]:
  return {
    name: float(value)
    for name, value in results.items()
    if '/' in name and isinstance(value, int | float)
  }


def macros(path: epath.Path) -> dict[str, str]:
  """Returns the macros of a gin file, texts without their quotes."""
  try:
    lines = path.read_text().splitlines()
  except (OSError, UnicodeDecodeError):
    return {}
  matches = (re.fullmatch(r'([A-Z][A-Z0-9_]*) = (.*)', line) for line in lines)
  values = {m[1]: m[2].strip('\'"') for m in matches if m}
  return {name: value for name, value in values.items() if value != 'None'}


def read_json(path: epath.Path, tell: Tell) -> dict[str, Any]:
  """Returns what a file holds; nothing if it is missing, or damaged."""
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
  tasks = [name.partition('/')[0] for name in scores]
  task = next((task for task in tasks if task != 'eval'), '')
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
