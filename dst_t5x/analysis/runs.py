"""The runs that folders hold, as far as they are there.

A folder is that of a run (`run.json`), of a sweep (`runs.json`, which tells the
runs that should be there), of several runs, or of an evaluation of a seed
(`results.json`), which is its zero-shot score. A file that is damaged is named,
and everything else is still read.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import json
import os
import re
from typing import Any

from etils import epath

from dst_t5x import best
from dst_t5x import metrics_file
from dst_t5x.analysis import setups
from dst_t5x.errors import UserError, first_line, nearest

FINISHED = 'finished'
MISSING = 'missing'
UNFINISHED = 'not finished'
FAILED = 'failed'
DAMAGED = 'damaged'

_RATE = 'speed/steps_per_second'
_SIZES = {
  76_961_152: 'Small',
  247_577_856: 'Base',
  783_150_080: 'Large',
  2_849_757_184: 'XL',
  11_135_332_352: 'XXL',
}
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
    test: the same on the test split, where `eval` was run on it.
    parameters: of the model; 0 if unknown.
    free: how many the method trains.
    fingerprint: of its seed, '' if unknown.
    seed_path: where that was.
    rates: steps per second, a number a report; the first has the compilation.
    modules: module -> free parameters at the last report.
    by: KEEP_BEST_BY, '' if there is none.
    steps: TRAIN_STEPS, if it is known.
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

  @property
  def setup(self) -> setups.Setup:
    """What it tries, but for what is tuned or chance."""
    return self.trial.setup

  @property
  def fraction(self) -> float:
    """The free parameters as a share of the model's."""
    return self.free / self.parameters if self.parameters else 0.0


def read(paths: Sequence[str | os.PathLike[str]], tell: Tell) -> list[Run]:
  """Reads all runs of several folders.

  Args:
    paths: of runs, sweeps, or folders of them.
    tell: is called with a line for everything that cannot be read.

  Returns:
    The runs in the order of the folders, each once, models named; those of a
    sweep that have left nothing too.

  Raises:
    UserError: a folder is missing, or holds none of this.
  """
  found: dict[str, Run] = {}
  for path in paths:
    folder = epath.Path(path).expanduser()
    for run in _read_folder(folder, tell):
      found.setdefault(os.path.abspath(run.folder), run)
  return _named(list(found.values()), tell)


def _read_folder(folder: epath.Path, tell: Tell) -> list[Run]:
  if not folder.exists():
    parent = folder.parent
    beside = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    raise UserError(
      f'there is no folder {folder}{nearest(folder.name, beside)}'
    )
  if not folder.is_dir():
    raise UserError(f'{folder} is a file: name the folder of a run or a sweep')
  if _is_one(folder):
    return [_read_one(folder, tell)]
  planned = _planned(folder, tell)
  children = sorted(p for p in folder.iterdir() if p.is_dir() and _is_one(p))
  if not planned and not children:
    raise UserError(
      f'{folder} is neither a run nor a sweep: it has no run.json, no '
      'runs.json, and no folder of a run in it'
    )
  runs = [_of_sweep(folder / name, row, tell) for name, row in planned.items()]
  tasks = {
    setups.from_sweep(planned[run.name]['settings']).setup.task: run.setup.task
    for run in runs
    if run.trial.rest is not None
  }
  # A sweep names gin files; only runs know what their tasks are called.
  runs = [
    _relabelled(run, task=tasks.get(run.setup.task, run.setup.task))
    if run.trial.rest is None
    else run
    for run in runs
  ]
  return runs + [
    _read_one(child, tell) for child in children if child.name not in planned
  ]


def _is_one(folder: epath.Path) -> bool:
  """Whether a folder is that of a run, or of an evaluation."""
  return (folder / 'run.json').exists() or (folder / 'results.json').exists()


def _planned(folder: epath.Path, tell: Tell) -> dict[str, Mapping[str, Any]]:
  """Returns name -> row of a sweep's table."""
  path = folder / 'runs.json'
  if not path.exists():
    return {}
  try:
    rows = json.loads(path.read_text())
    return {str(row['name']): row for row in rows if row['settings']}
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
    tell(f'{path} is damaged: {first_line(e)}')
    return {}


def _of_sweep(folder: epath.Path, row: Mapping[str, Any], tell: Tell) -> Run:
  """Reads a run of a sweep, which may have left nothing."""
  settings = row['settings']
  planned = setups.from_sweep(settings)
  if not (folder / 'run.json').exists():
    state = FAILED if row.get('state') == FAILED else MISSING
    return Run(folder.name, folder, planned, state)
  run = _read_one(folder, tell)
  if run.state == DAMAGED:
    return dataclasses.replace(run, trial=planned)
  if run.state == UNFINISHED and row.get('state') == FAILED:
    run = dataclasses.replace(run, state=FAILED)
  wanted = str(settings.get('TRAIN_STEPS', ''))
  if wanted.isdigit() and run.step < int(wanted) and run.state == FINISHED:
    run = dataclasses.replace(run, state=UNFINISHED)
  return _relabelled(run, model=planned.setup.model)


def _relabelled(run: Run, **changes: Any) -> Run:
  setup = dataclasses.replace(run.trial.setup, **changes)
  trial = dataclasses.replace(run.trial, setup=setup)
  return dataclasses.replace(run, trial=trial)


def _read_one(folder: epath.Path, tell: Tell) -> Run:
  """Reads the folder of a run, or of an evaluation."""
  if not (folder / 'run.json').exists():
    return _read_evaluation(folder, tell)
  about = _json(folder / 'run.json', tell)
  config = about.get('config')
  if not isinstance(config, dict):
    if about:
      tell(f'{folder / "run.json"} is damaged: it does not say what the run is')
    nothing = setups.Trial(setups.Setup('', '', ''), None, 0)
    return Run(folder.name, folder, nothing, DAMAGED)
  seed = about.get('seed') or {}
  rows = [row for row in metrics_file.read(folder) if 'step' in row]
  report = _json(folder / 'report.json', tell)
  macros = _macros(folder / 'config.gin')
  steps = _whole(macros.get('TRAIN_STEPS', ''))
  is_done = 'results' in report and report.get('step', 0) >= (steps or 0)
  last = rows[-1]['step'] if rows else 0
  return Run(
    folder.name,
    folder,
    setups.from_run(config, model=''),
    FINISHED if is_done else UNFINISHED,
    step=int(report['step'] if is_done else last),
    dev=_dev_scores(folder, report, rows, tell),
    test=_test_scores(folder, macros.get('EVAL_SPLIT', ''), tell),
    parameters=int(report.get('parameters', 0)),
    free=int(report.get('free', 0)),
    fingerprint=str(seed.get('fingerprint', '')),
    seed_path=str(seed.get('path', '')),
    rates=[row[_RATE] for row in rows if _RATE in row],
    modules=_modules(rows),
    by=macros.get('KEEP_BEST_BY', ''),
    steps=steps,
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
  evaluated = [row for row in rows if 'eval/loss' in row]
  of_best = [row for row in evaluated if row['step'] == counts]
  found = of_best[-1] if of_best else report.get('results', {})
  return {name: value for name, value in found.items() if '/' in name}


def _test_scores(
  folder: epath.Path, split: str, tell: Tell
) -> dict[str, float]:
  """Returns what `eval` wrote of another split below a run's folder."""
  found: dict[int, dict[str, float]] = {}
  for path in sorted(folder.glob('*/results.json')):
    results = _json(path, tell)
    if results.get('split', split) != split:
      found[int(results.get('step') or 0)] = _numbers(results)
  if not found:
    return {}
  counts = _json(folder / best.BEST_FILE, lambda line: None).get('step', -1)
  return found.get(int(counts), found[max(found)])


def _numbers(results: Mapping[str, Any]) -> dict[str, float]:
  return {
    name: float(value)
    for name, value in results.items()
    if '/' in name and isinstance(value, int | float)
  }


def _modules(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
  """Returns module -> free parameters of the last report that has them."""
  own = ('total', 'churn', 'fraction', 'file_bytes')
  found: dict[str, float] = {}
  for row in rows:
    of_row = {
      name.removeprefix('free/'): value
      for name, value in row.items()
      if name.startswith('free/') and name.removeprefix('free/') not in own
    }
    found = of_row or found
  return found


def _macros(path: epath.Path) -> dict[str, str]:
  """Returns the macros of a gin file, texts without their quotes."""
  try:
    lines = path.read_text().splitlines()
  except (OSError, UnicodeDecodeError):
    return {}
  matches = (re.fullmatch(r'([A-Z][A-Z0-9_]*) = (.*)', line) for line in lines)
  values = {m[1]: m[2].strip('\'"') for m in matches if m}
  return {name: value for name, value in values.items() if value != 'None'}


def _json(path: epath.Path, tell: Tell) -> dict[str, Any]:
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
  results = _json(folder / 'results.json', tell)
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


def _named(runs: Sequence[Run], tell: Tell) -> list[Run]:
  """Returns the runs with names for their models, and tasks by one name.

  A model that several seeds were pretrained for is as many models.
  """
  told = {r.parameters: r.setup.model for r in runs if r.setup.model}
  runs = [
    run
    if run.setup.model or not run.parameters
    else _relabelled(
      run, model=told.get(run.parameters) or size_name(run.parameters)
    )
    for run in runs
  ]
  seeds: dict[str, dict[str, None]] = {}
  for run in runs:
    if run.fingerprint:
      seeds.setdefault(run.setup.model, {})[run.fingerprint] = None
  for model, several in seeds.items():
    if len(several) > 1:
      tell(
        f'the runs of model {model} have {len(several)} different seeds '
        f'({", ".join(f"{seed[:8]}…" for seed in several)}): they are '
        'reported apart, and their subsets are not compared'
      )
  runs = [
    _relabelled(run, model=f'{run.setup.model} (seed {run.fingerprint[:8]})')
    if run.fingerprint and len(seeds[run.setup.model]) > 1
    else run
    for run in runs
  ]
  return _merged([_with_model_of_seed(run, runs) for run in runs])


def _merged(runs: Sequence[Run]) -> list[Run]:
  """Returns the runs; evaluations of one seed on two splits become one."""
  merged: list[Run] = []
  seen: dict[setups.Setup, int] = {}
  for run in runs:
    if run.setup.method != setups.ZERO_SHOT or run.setup not in seen:
      seen[run.setup] = len(merged)
      merged.append(run)
      continue
    before = merged[seen[run.setup]]
    merged[seen[run.setup]] = dataclasses.replace(
      before,
      dev={**before.dev, **run.dev},
      test={**before.test, **run.test},
    )
  return merged


def _with_model_of_seed(run: Run, runs: Sequence[Run]) -> Run:
  """Returns a zero-shot evaluation with the model of the runs of its seed."""
  if run.setup.method != setups.ZERO_SHOT:
    return run
  others = [r for r in runs if r.fingerprint]
  same = [r for r in others if _same_path(r.seed_path, run.seed_path)]
  models = dict.fromkeys(r.setup.model for r in same or others)
  if len(models) != 1:
    return run
  return _relabelled(run, model=next(iter(models)))


def _same_path(a: str, b: str) -> bool:
  return os.path.normpath(a) == os.path.normpath(b)


def size_name(parameters: int) -> str:
  """Returns what a model of a size is called: `Base`, or `0.887M`."""
  return _SIZES.get(parameters, f'{parameters / 1e6:.3g}M')
