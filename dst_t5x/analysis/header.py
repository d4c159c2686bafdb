"""Comments for the head of a sweep's file: the results of the sweep."""

from collections.abc import Sequence
import dataclasses
import textwrap

from dst_t5x.analysis import cells as cells_lib
from dst_t5x.analysis import paper_tables
from dst_t5x.analysis import runs as runs_lib

_WIDTH = 80


@dataclasses.dataclass(frozen=True)
class Measured:
  """The scores of one task.

  Attributes:
    task: the task.
    metric: the metric.
    split: the split.
    cells: the cells of all models.
  """

  task: str
  metric: str
  split: str
  cells: Sequence[cells_lib.Cell]


def text(runs: Sequence[runs_lib.Run], measured: Sequence[Measured]) -> str:
  """Returns lines of comments: scores, time, hardware.

  Args:
    runs: all runs.
    measured: their scores by task.
  """
  lines = ['# Measured (mean ± standard deviation, number of random seeds):']
  for of_task in measured:
    lines.append(f'#   {of_task.metric}, split {of_task.split}')
    for cell in of_task.cells:
      lines += _cell(cell, of_task)
  finished = [run for run in runs if run.state == runs_lib.FINISHED]
  lines += _wrapped(f'# {len(finished)} of {len(runs)} runs; {_took(finished)}')
  return ''.join(f'{line}\n' for line in lines)


def _cell(cell: cells_lib.Cell, of_task: Measured) -> list[str]:
  setup = cell.setup
  name = paper_tables.METHODS.get(setup.method, setup.method)
  about = [setup.model, name, setup.budget, setup.variant]
  score = cell.score(of_task.metric, of_task.split)
  said = f'{", ".join(filter(None, about))}: {str(score) or "missing"}'
  if score.values and cell.learning_rate is not None:
    said += f', learning rate {cell.learning_rate:g}'
  return _wrapped(f'#   {said}')


def _took(runs: Sequence[runs_lib.Run]) -> str:
  """Returns the time and the hardware of runs, as far as they are known."""
  devices = dict.fromkeys(run.devices for run in runs if run.devices)
  hardware = ' and '.join(devices) or 'hardware unknown'
  seconds = [run.seconds for run in runs if run.seconds is not None]
  if not seconds:
    return f'{hardware}, time unknown'
  told = '' if len(seconds) == len(runs) else f' ({len(seconds)} runs)'
  return f'{hardware}, {sum(seconds) / 3600:.2f} hours of runs{told}'


def _wrapped(line: str) -> list[str]:
  return textwrap.wrap(
    line, _WIDTH, subsequent_indent='#     ', break_on_hyphens=False
  )
