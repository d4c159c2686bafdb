"""What was measured with a file, for the comments in its head."""

from collections.abc import Sequence
import dataclasses

import numpy as np
import study_results as results
from study_results import Setting
from study_results import Study
import study_tables as tables

_HARDWARE = '1 of 2 cores of a shared virtual machine, CPU'


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
    results.setting_of(run['settings'])
    for run in done
    if run['settings'].get('EVAL_SPLIT') == 'test'
  )
  return [*_measured(lines), *_scores(study, list(cells))]


def method_head(study: Study, method: str) -> list[str]:
  """Returns comments: what was measured with a method's file."""
  cells = [s for s in tables.chosen(study) if s.method == method] or [
    s for s in sorted(study.cells) if s.method == method
  ]
  runs = [run for cell in cells for run in study.runs_of(cell)]
  sweeps = dict.fromkeys(run['sweep'] for run in runs)
  files = ' and '.join(f'launch/sweeps/study/{sweep}.yaml' for sweep in sweeps)
  seconds = np.median([run['seconds'] for run in runs])
  lines = [
    f'python -m launch.sweep {files}',
    f'2 million parameters, 60 steps, a median of {seconds:.0f} s; '
    f'{_HARDWARE}.',
  ]
  return [*_measured(lines), *_scores(study, cells)]


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
