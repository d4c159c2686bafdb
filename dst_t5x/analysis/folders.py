"""Reads the runs in several folders, and the missing runs of sweeps.

A folder may be a run's (`run.json`), an evaluation's of a seed
(`results.json`), which has the zero-shot score, a sweep's (`runs.json`, which
lists the expected runs), or a folder of these. A damaged file is reported, and
everything else is still read.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
import os
from typing import Any

from etils import epath

from dst_t5x.analysis import planned as planned_lib
from dst_t5x.analysis import runs as runs_lib
from dst_t5x.analysis import setups
from dst_t5x.core.errors import UserError, first_line, nearest

Run = runs_lib.Run
Tell = runs_lib.Tell

_SIZES = {
  76_961_152: 'Small',
  247_577_856: 'Base',
  783_150_080: 'Large',
  2_849_757_184: 'XL',
  11_135_332_352: 'XXL',
}


def read(
  paths: Sequence[str | os.PathLike[str]], tell: Tell, sweep: str = ''
) -> list[Run]:
  """Reads all runs in several folders.

  Args:
    paths: folders of runs, of sweeps, or of several of them.
    tell: called with a line for everything that cannot be read.
    sweep: a sweep's file, which lists the expected runs of a folder without
      `runs.json`.

  Returns:
    The runs in the order of the folders, each once, with names of their models.
    Missing runs of a sweep are included.

  Raises:
    UserError: a folder is missing or has no runs, or the sweep's file is
      invalid.
  """
  rows = _rows_of(sweep) if sweep else {}
  by_path: dict[str, Run] = {}
  for path in paths:
    folder = epath.Path(path).expanduser()
    for run in _read_folder(folder, rows, tell):
      by_path.setdefault(os.path.abspath(run.folder), run)
  return _named(list(by_path.values()), tell)


def _rows_of(sweep: str) -> dict[str, Mapping[str, Any]]:
  """Returns the rows that `runs.json` would have for a sweep's file."""
  from dst_t5x.launch import grid  # This import is rarely needed.

  return {run.name: {'settings': run.settings} for run in grid.read(sweep)}


def _read_folder(
  folder: epath.Path, rows: Mapping[str, Mapping[str, Any]], tell: Tell
) -> list[Run]:
  if not folder.exists():
    parent = folder.parent
    beside = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    raise UserError(
      f'there is no folder {folder}{nearest(folder.name, beside)}'
    )
  if not folder.is_dir():
    raise UserError(f'{folder} is a file: name the folder of a run or a sweep')
  own = [runs_lib.read_one(folder, tell)] if _is_one(folder) else []
  if runs_lib.is_run(folder):
    return own  # Folders below it are part of it.
  planned = _planned(folder, tell) or rows
  children = sorted(p for p in folder.iterdir() if p.is_dir() and _is_one(p))
  if not planned and not children and not own:
    raise UserError(
      f'{folder} is neither a run nor a sweep: it has no run.json, no '
      'runs.json, no results.json of an evaluation, and no folder of a run in '
      'it'
    )
  runs = [_of_sweep(folder / name, row, tell) for name, row in planned.items()]
  tasks = {
    planned_lib.trial(planned[run.name]['settings']).setup.task: run.setup.task
    for run in runs
    if run.trial.rest is not None
  }
  # A sweep names gin files; only runs have the names of their tasks.
  runs = [
    _relabelled(run, task=tasks.get(run.setup.task, run.setup.task))
    if run.trial.rest is None
    else run
    for run in runs
  ]
  others = [child for child in children if child.name not in planned]
  return own + runs + [runs_lib.read_one(child, tell) for child in others]


def _is_one(folder: epath.Path) -> bool:
  """Returns whether a folder is a run's or an evaluation's."""
  return runs_lib.is_run(folder) or runs_lib.is_evaluation(folder)


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
  """Reads a run of a sweep, which may have left no files."""
  settings = row['settings']
  planned = planned_lib.trial(settings)
  if not runs_lib.is_run(folder):
    failed = row.get('state') == runs_lib.FAILED
    state = runs_lib.FAILED if failed else runs_lib.MISSING
    return runs_lib.Run(folder.name, folder, planned, state)
  run = runs_lib.read_one(folder, tell)
  if run.state == runs_lib.DAMAGED:
    return dataclasses.replace(run, trial=planned)
  if run.state == runs_lib.UNFINISHED and row.get('state') == runs_lib.FAILED:
    run = dataclasses.replace(run, state=runs_lib.FAILED)
  wanted = str(settings.get('TRAIN_STEPS', ''))
  is_short = wanted.isdigit() and run.step < int(wanted)
  if is_short and run.state == runs_lib.FINISHED:  # The sweep wants more steps.
    run = dataclasses.replace(run, state=runs_lib.UNFINISHED)
  seconds = row.get('seconds')
  if isinstance(seconds, int | float):
    run = dataclasses.replace(run, seconds=float(seconds))
  return _relabelled(run, model=planned.setup.model)


def _relabelled(run: Run, **changes: Any) -> Run:
  setup = dataclasses.replace(run.trial.setup, **changes)
  trial = dataclasses.replace(run.trial, setup=setup)
  return dataclasses.replace(run, trial=trial)


def _named(runs: Sequence[Run], tell: Tell) -> list[Run]:
  """Returns the runs with names of their models, and one name for each task.

  A model that was pretrained as several seeds counts as several models.
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
  """Returns the runs with evaluations of one seed on two splits joined."""
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
  """Returns a zero-shot evaluation with the model of its seed's runs."""
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
  """Returns the name of a model by its size: `Base`, or `0.887M`."""
  return _SIZES.get(parameters, f'{parameters / 1e6:.3g}M')
