r"""Makes a sweep from the best runs of another one, for example learning rates.

    python -m launch.sweep search.yaml
    python -m launch.choose search.yaml --by=gsm8k/strict_match \
      --gin.RANDOM_SEED=1,2,3,4 --gin.EVAL_SPLIT=test > final.yaml
    python -m launch.sweep final.yaml

A cell is a set of runs that differ only in `--over` (LEARNING_RATE by default)
and RANDOM_SEED. The command chooses one value in each cell by the same rule as
the report (`dst_t5x/checkpoints/selection.py`): the best mean score over random
seeds, which is the lowest for a loss. A value with a failed run is chosen only
if all values have one. The new file has the chosen value and all other settings
of the cell. `--gin.NAME=A,B` adds or replaces settings; several values become
an axis. A comment beside each value lists the means of all values.
"""

from collections.abc import Iterable, Mapping, Sequence
import fnmatch
import pathlib
import sys
from typing import Any, ClassVar, NamedTuple

import yaml

from dst_t5x.checkpoints import selection
from dst_t5x.core import command_line
from dst_t5x.core.errors import UserError, first_line, nearest
from dst_t5x.launch import grid
from dst_t5x.launch import states

_RANDOM_SEED = 'RANDOM_SEED'


class Cell(NamedTuple):
  """Runs that differ only in the searched setting and in the random seed.

  Attributes:
    settings: the settings that they share.
    named_keys: the shared settings that are part of their names.
    scores: value of the searched setting -> random seed -> score.
    failed: the values that have a failed run.
  """

  settings: grid.Settings
  named_keys: frozenset[str]
  scores: dict[str, dict[str, float]]
  failed: set[str]


# A run, its state, and the metrics of its chosen checkpoint.
Ended = tuple[grid.Run, states.State, dict[str, float]]


class _Dumper(yaml.SafeDumper):
  """Writes texts that look like numbers without quotes, for `grid`."""

  yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  argv = list(sys.argv[1:] if argv is None else argv)
  parser = command_line.Parser(
    prog='python -m launch.choose',
    description=__doc__,
    allow_abbrev=False,
  )
  parser.add_argument('sweeps', metavar='SWEEP.yaml', nargs='+')
  parser.add_argument(
    '--by',
    required=True,
    help='metric; higher is better, except for a loss',
  )
  parser.add_argument(
    '--over', default='LEARNING_RATE', help='setting to choose'
  )
  parser.add_argument(
    '--output', help="the sweep's folder (default: runs/SWEEP)"
  )
  parser.add_argument(
    '--only',
    metavar='PATTERN',
    action='append',
    help='runs whose names match this pattern, or one of several: *_dst_*',
  )
  flags = [argument for argument in argv if argument.startswith('--gin.')]
  options = parser.parse_args([a for a in argv if a not in flags])
  try:
    ended_runs = [
      ended
      for sweep in options.sweeps
      for ended in _runs(sweep, options.output)
      if any(fnmatch.fnmatch(ended[0].name, p) for p in options.only or '*')
    ]
    cells = _cells(ended_runs, options.by, options.over)
    print('# Made by: python -m launch.choose', *argv)
    added = dict(map(_setting, flags))
    print(_sweep(cells, options.by, options.over, added), end='')
  except UserError as error:
    print(f'error: {first_line(error)}', file=sys.stderr)
    return 1
  return 0


def _runs(name: str, output: str | None) -> list[Ended]:
  """Returns the runs of a sweep with their states and metrics."""
  output = output or f'runs/{pathlib.PurePath(name).stem}'
  sweep = states.Sweep(grid.read(name), output)
  return [
    (sweep.runs[key], state, sweep.results(key))
    for key, state in sweep.states().items()
  ]


def _setting(flag: str) -> tuple[str, list[str]]:
  name, equals, value = flag.removeprefix('--gin.').partition('=')
  if not equals or not value:
    raise UserError(f'{flag} needs a value: {flag}=…')
  return name, value.split(',')


def _cells(ended_runs: Iterable[Ended], by: str, over: str) -> list[Cell]:
  """Returns the cells, in the order of the sweep.

  Raises:
    UserError: a run has not ended, or no run has the score.
  """
  cells: dict[tuple[tuple[str, str], ...], Cell] = {}
  for run, state, results in ended_runs:
    if state.state not in (states.FINISHED, states.FAILED):
      raise UserError(
        f'{state.name} is {state.state}: finish the sweep first, or pick others'
      )
    is_failed = state.state == states.FAILED
    if not is_failed and by not in results:
      raise UserError(
        f'{state.name} has no {by!r}{nearest(by, results)} (known: '
        f'{sorted(results)})'
      )
    if over not in state.settings:
      raise UserError(f'{state.name} does not set {over}')
    rest = {
      k: v for k, v in state.settings.items() if k not in (over, _RANDOM_SEED)
    }
    cell = Cell(rest, frozenset(run.named_keys), {}, set())
    cell = cells.setdefault(tuple(sorted(rest.items())), cell)
    value = state.settings[over]
    of_value = cell.scores.setdefault(value, {})
    if is_failed:
      cell.failed.add(value)
    else:
      # Runs of different sweeps may have the same random seed.
      random_seed = state.settings.get(_RANDOM_SEED, '')
      of_value[_unused_name(random_seed, of_value)] = results[by]
  if not cells:
    raise UserError('there is no such run')
  return list(cells.values())


def _unused_name(random_seed: str, known: Mapping[str, float]) -> str:
  """Returns a name for a random seed that is not among the known ones."""
  while random_seed in known:
    random_seed += ' again'
  return random_seed


def _sweep(
  cells: Sequence[Cell], by: str, over: str, added: Mapping[str, list[str]]
) -> str:
  """Returns the text of the new sweep.

  Raises:
    UserError: all runs of a cell have failed.
  """
  named_keys = {key for cell in cells for key in cell.named_keys}
  common = {
    key: value
    for key, value in cells[0].settings.items()
    if key not in named_keys | added.keys()
    and all(cell.settings.get(key) == value for cell in cells)
  }
  lines = [_line(key, value) for key, value in common.items()]
  lines += [_line(k, v[0]) for k, v in added.items() if len(v) == 1]
  # Within a cell, runs that share a compiled program follow each other.
  axes = [_line(k, v) for k, v in added.items() if len(v) > 1]
  lines.append('grids:')
  for settings, told_here, scores, failed in cells:
    trials = [selection.Trial(of, v in failed) for v, of in scores.items()]
    choice = selection.choose(trials, by)
    if choice.chosen is None:
      raise UserError(f'no run ended well of those with {settings}')
    own = [
      _line(key, [value] if key in told_here else value)
      for key, value in settings.items()
      if key not in common and key not in added
    ]
    shown = ', '.join(
      f'{value}: {"failed" if value in failed else f"{mean:.4g}"}'
      for value, mean in zip(scores, choice.means, strict=True)
    )
    own.append(f'{_line(over, [list(scores)[choice.chosen]])}  # {shown}')
    own += axes
    lines += [f'{"  " if i else "- "}{line}' for i, line in enumerate(own)]
  return '\n'.join(lines) + '\n'


def _line(key: str, value: str | list[str]) -> str:
  """Returns the line `key: value` of a sweep's file."""
  flow = yaml.dump(
    [value], Dumper=_Dumper, default_flow_style=True, width=10**6
  )
  return f'{key}: {flow.strip()[1:-1]}'


if __name__ == '__main__':
  sys.exit(main())
