"""Raw results of sweeps, one line of JSON a run, small enough to commit.

    python -m launch.records runs/search runs/final > studies/mine/runs.jsonl

A line has the sweep, the run's name, settings and state, the scores of the
chosen checkpoint, also on held-out text (`held_out/forgetting`), the loss of
the last evaluation, the free parameters in all and by module (from the last
report), steps per second (the median of all reports but the first, which
includes compilation), seconds, and devices. Runs that have not finished have a
line too.
"""

from collections.abc import Iterator, Sequence
import json
import pathlib
import statistics
import sys
from typing import Any

from dst_t5x.core import command_line
from dst_t5x.core import json_text
from dst_t5x.core import metrics_file
from dst_t5x.core.errors import UserError, first_line
from dst_t5x.launch import states

_OF_REPORT = ('free', 'parameters', 'file_bytes', 'devices')


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  parser = command_line.Parser(
    prog='python -m launch.records',
    description=__doc__,
    allow_abbrev=False,
  )
  parser.add_argument('folders', metavar='FOLDER', nargs='+', help='of sweeps')
  options = parser.parse_args(argv)
  try:
    for folder in options.folders:
      for record in records(pathlib.Path(folder)):
        print(json_text.dumps(record))
  except UserError as error:
    print(f'error: {first_line(error)}', file=sys.stderr)
    return 1
  return 0


def records(folder: pathlib.Path) -> Iterator[dict[str, Any]]:
  """Yields the record of each run of a sweep.

  Args:
    folder: the sweep's folder.

  Raises:
    UserError: the folder is not a sweep's.
  """
  try:
    rows = json.loads((folder / states.TABLE_FILE).read_text())
  except (OSError, ValueError) as e:
    raise UserError(f'{folder} is no folder of a sweep: {e}') from e
  for row in rows:
    of_run = {'sweep': folder.name} | {
      key: row[key] for key in ('name', 'settings', 'state', 'step', 'seconds')
    }
    if row['state'] == states.FINISHED:
      of_run |= _results(folder / row['name'], row['scores'])
    else:
      of_run['error'] = row['error']
    yield of_run


def _results(folder: pathlib.Path, scores: dict[str, float]) -> dict[str, Any]:
  report = json.loads((folder / 'report.json').read_text())
  rows = metrics_file.read(folder)
  rates = metrics_file.rates(rows)
  modules = metrics_file.modules(rows)
  loss = {'eval/loss': report['results']['eval/loss']}
  return {
    'scores': scores | loss,
    **{key: report[key] for key in _OF_REPORT if key in report},
    'steps_per_second': statistics.median(rates[1:] or rates),
    'modules': {name: int(free) for name, free in modules.items() if free},
  }


if __name__ == '__main__':
  sys.exit(main())
