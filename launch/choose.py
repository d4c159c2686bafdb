r"""Makes a sweep of the best of another's runs: learning rates, say.

    python -m launch.sweep search.yaml
    python -m launch.choose search.yaml --by=gsm8k/strict_match \
      --gin.RANDOM_SEED=1,2,3,4 --gin.EVAL_SPLIT=test > final.yaml
    python -m launch.sweep final.yaml

Runs that differ in nothing but `--over` (LEARNING_RATE by default) and
RANDOM_SEED are a cell. Of each cell the value is taken whose mean score over
random seeds is the highest, and stands in the new file with all other settings
of the cell; `--gin.NAME=A,B` adds or replaces settings, several as an axis. A
comment beside each value has all scores that it was chosen by.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
import pathlib
import statistics
import sys

import yaml

from dst_t5x.errors import UserError, first_line, nearest
from launch import grid
from launch import states

_SEED = 'RANDOM_SEED'
# The settings of a cell, and value of what is searched -> scores.
Cell = tuple[grid.Settings, dict[str, list[float]]]


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  argv = list(sys.argv[1:] if argv is None else argv)
  parser = argparse.ArgumentParser(
    prog='python -m launch.choose',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument('sweeps', metavar='SWEEP.yaml', nargs='+')
  parser.add_argument(
    '--by', required=True, help='metric, the higher the better'
  )
  parser.add_argument('--over', default='LEARNING_RATE', help='what is chosen')
  parser.add_argument(
    '--output', help="the sweep's folder (default: runs/SWEEP)"
  )
  flags = [argument for argument in argv if argument.startswith('--gin.')]
  options = parser.parse_args([a for a in argv if a not in flags])
  try:
    found = [
      state
      for sweep in options.sweeps
      for state in _states(sweep, options.output)
    ]
    cells = _cells(found, options.by, options.over)
    print('# Made by: python -m launch.choose', *argv)
    print(_sweep(cells, options.over, dict(map(_setting, flags))), end='')
  except UserError as error:
    print(f'error: {first_line(error)}', file=sys.stderr)
    return 1
  return 0


def _states(sweep: str, output: str | None) -> Iterable[states.State]:
  output = output or f'runs/{pathlib.PurePath(sweep).stem}'
  return states.Sweep(grid.read(sweep), output).states().values()


def _setting(flag: str) -> tuple[str, list[str]]:
  name, equals, value = flag.removeprefix('--gin.').partition('=')
  if not equals or not value:
    raise UserError(f'{flag} needs a value: {flag}=…')
  return name, value.split(',')


def _cells(found: Iterable[states.State], by: str, over: str) -> list[Cell]:
  """Returns the cells, in the order of the sweep.

  Raises:
    UserError: a run has not finished, or nothing has such a score.
  """
  cells: dict[tuple[tuple[str, str], ...], Cell] = {}
  for state in found:
    if state.state != states.FINISHED:
      raise UserError(
        f'{state.name} is {state.state}: finish the sweep first, or pick others'
      )
    if by not in state.scores:
      raise UserError(
        f'{state.name} has no {by!r}{nearest(by, state.scores)} (known: '
        f'{sorted(state.scores)})'
      )
    if over not in state.settings:
      raise UserError(f'{state.name} does not set {over}')
    rest = {k: v for k, v in state.settings.items() if k not in (over, _SEED)}
    _, scores = cells.setdefault(tuple(sorted(rest.items())), (rest, {}))
    scores.setdefault(state.settings[over], []).append(state.scores[by])
  return list(cells.values())


def _sweep(
  cells: Sequence[Cell], over: str, added: Mapping[str, list[str]]
) -> str:
  """Returns the text of the new sweep."""
  kept = [
    {k: v for k, v in rest.items() if k not in added} for rest, _ in cells
  ]
  common = {
    key: value
    for key, value in kept[0].items()
    if all(settings.get(key) == value for settings in kept)
  }
  lines = [_line(key, value) for key, value in common.items()]
  lines += [_line(k, v if len(v) > 1 else v[0]) for k, v in added.items()]
  lines.append('grids:')
  for settings, (_, scores) in zip(kept, cells, strict=True):
    means = {value: statistics.fmean(of) for value, of in scores.items()}
    own = [
      _line(key, value if key in grid.FILES else [value])
      for key, value in settings.items()
      if key not in common
    ]
    shown = ', '.join(f'{value}: {mean:.4g}' for value, mean in means.items())
    own.append(f'{_line(over, [max(means, key=means.__getitem__)])}  # {shown}')
    lines += [f'{"  " if i else "- "}{line}' for i, line in enumerate(own)]
  return '\n'.join(lines) + '\n'


def _line(key: str, value: str | list[str]) -> str:
  """Returns `key: value` of a sweep's file."""
  flow = yaml.safe_dump([value], default_flow_style=True, width=10**6)
  return f'{key}: {flow.strip()[1:-1]}'


if __name__ == '__main__':
  sys.exit(main())
