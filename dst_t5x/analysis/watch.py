"""Shows a run on a terminal: `python -m dst_t5x.analysis.watch RUN_DIR`.

The command reads the run's folder, wherever the run is executed. It shows step,
speed, loss, scores, free parameters, churn, overlap and the remaining time. A
terminal shows a table that is updated; a pipe gets a line for each report. The
command waits for a run that has not begun, and ends when the run ends.
"""

from collections.abc import Mapping, Sequence
import contextlib
import dataclasses
import sys
import time
from typing import Any

from absl import logging
from etils import epath
import tqdm

from dst_t5x.analysis import runs as runs_lib
from dst_t5x.checkpoints import best
from dst_t5x.core import closed_pipe
from dst_t5x.core import command_line
from dst_t5x.core import metrics_file
from dst_t5x.core.errors import UserError, error_of_log, first_line

_QUIET = 300.0  # After this many seconds without a report, its age is shown.
_BAR = 30


@dataclasses.dataclass(frozen=True)
class Snapshot:
  """The state of a run.

  Attributes:
    name: the folder's name.
    step: the step of the last report.
    steps: TRAIN_STEPS; None if unknown.
    training: the last report of training.
    scores: the last evaluation, without its step.
    saved: overlaps at the last checkpoint.
    best: content of `best.json`; {} if there is none.
    is_finished: whether all is done.
    error: the line that it ended with, for a run of a sweep.
    age: seconds since the last report; None if unknown.
  """

  name: str
  step: int = 0
  steps: int | None = None
  training: Mapping[str, float] = dataclasses.field(default_factory=dict)
  scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
  saved: Mapping[str, float] = dataclasses.field(default_factory=dict)
  best: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  is_finished: bool = False
  error: str = ''
  age: float | None = None


def snapshot(folder: epath.Path) -> Snapshot | None:
  """Returns the state of a run; None if it has not begun.

  Raises:
    UserError: the folder is a sweep's, or is a file.
  """
  if not folder.exists():
    return None
  if not folder.is_dir():
    raise UserError(f'{folder} is a file: name the folder of a run')
  if not (folder / 'run.json').exists():
    inside = sorted(path.parent.name for path in folder.glob('*/run.json'))
    if inside:
      raise UserError(
        f'{folder} has {len(inside)} runs in it: name one of them, such as '
        f'{folder / inside[-1]}; `python -m dst_t5x.analysis.report` shows all'
      )
    return None
  rows = [row for row in metrics_file.read(folder) if 'step' in row]
  macros = runs_lib.macros(folder / 'config.gin')
  report = runs_lib.read_json(folder / 'report.json', lambda line: None)
  steps = int(macros['TRAIN_STEPS']) if 'TRAIN_STEPS' in macros else None
  return Snapshot(
    folder.name,
    int(rows[-1]['step']) if rows else 0,
    steps,
    _last(rows, 'train/loss'),
    _last(rows, 'eval/loss'),
    _last(rows, 'overlap/last_saved'),
    runs_lib.read_json(folder / best.BEST_FILE, lambda line: None),
    report.get('step', -1) >= (steps or 0),
    error_of_log(folder / 'log.txt'),
    _age(folder),
  )


def _last(
  rows: Sequence[Mapping[str, float]], name: str
) -> Mapping[str, float]:
  return next((row for row in reversed(rows) if name in row), {})


def _age(folder: epath.Path) -> float | None:
  try:
    changed = (folder / metrics_file.METRICS_FILE).stat().mtime
  except OSError:
    return None
  return max(0.0, time.time() - float(changed))


def fields(now: Snapshot) -> dict[str, str]:
  """Returns name -> text, in the order in which they are shown."""
  training = now.training
  texts = {'step': f'{now.step:,}'}
  if now.steps:
    texts['step'] += f' of {now.steps:,} ({now.step / now.steps:.0%})'
  rate = training.get(metrics_file.RATE)
  if rate and not now.is_finished:
    texts['speed'] = f'{rate:.3g} steps/s'
    if now.steps:
      seconds = max(0, now.steps - now.step) / rate
      texts['left'] = f'{tqdm.tqdm.format_interval(seconds)} of training'
  if 'train/loss' in training:
    texts['loss'] = f'{training["train/loss"]:.4g}'
  scores = _scores(now)
  if scores:
    texts['score'] = f'{scores} at step {int(now.scores["step"]):,}'
  if now.best:
    texts['best'] = (
      f'{_short(now.best["by"])} {now.best["value"]:.4g} at step '
      f'{now.best["step"]:,}'
    )
  texts |= _subset(now)
  refused = training.get('train/refused_steps')
  if refused:
    texts['refused steps'] = f'{refused:.0f}'
  if now.age is not None and now.age > _QUIET and not now.is_finished:
    quiet = tqdm.tqdm.format_interval(now.age)
    texts['last report'] = f'{quiet} ago: is it still running?'
  return texts


def _scores(now: Snapshot) -> str:
  tasks = {n: v for n, v in now.scores.items() if '/' in n}
  own = {n: v for n, v in tasks.items() if best.task_of(n)}
  return '  '.join(
    f'{_short(name)} {value:.4g}' for name, value in (own or tasks).items()
  )


def _short(name: str) -> str:
  return name.rpartition('/')[2]


def _subset(now: Snapshot) -> dict[str, str]:
  """Returns name -> text, about the free parameters."""
  texts = {}
  training = now.training
  if 'free/total' in training:
    free = training['free/total']
    share = training.get('free/fraction')
    texts['free'] = f'{free:,.0f}' + (f' ({share:.3%})' if share else '')
  if 'free/churn' in training:
    texts['churn'] = f'{training["free/churn"]:.1%} since the report before'
  overlaps = [
    f'{now.saved[f"overlap/{name}"]:.1%} of the {text}'
    for name, text in (('first', 'first saved'), ('last_saved', 'one before'))
    if f'overlap/{name}' in now.saved
  ]
  if overlaps:
    texts['overlap'] = f'{", ".join(overlaps)}, at step {now.saved["step"]:,}'
  return texts


def verdict(now: Snapshot) -> str:
  """Returns how a run ended; '' if it has not."""
  if now.is_finished:
    return f'{now.name} is finished'
  return f'{now.name} ended: {now.error}' if now.error else ''


class Plain:
  """Output as one line for each report."""

  def __init__(self) -> None:
    """Shows nothing yet."""
    self._shown = ''

  def show(self, now: Snapshot) -> None:
    """Prints a line, unless it is the same as the line before."""
    texts = fields(now)
    texts.pop('last report', None)  # This differs each time.
    line = ' | '.join(f'{name} {text}' for name, text in texts.items())
    if line != self._shown:
      print(line, flush=True)
      self._shown = line

  def wait(self, folder: epath.Path) -> None:
    """Reports that a run has not begun."""
    if not self._shown:
      self._shown = f'waiting for a run in {folder}'
      print(self._shown, flush=True)

  def close(self) -> None:
    """Does nothing."""


class Terminal:
  """Output as a table that is updated in place."""

  def __init__(self) -> None:
    """Shows an empty table.

    Raises:
      ImportError: rich is not installed.
    """
    from rich import live

    self._live = live.Live(refresh_per_second=4)
    self._live.start()

  def show(self, now: Snapshot) -> None:
    """Draws the table again."""
    from rich import table
    from rich import text

    grid = table.Table.grid(padding=(0, 2))
    grid.add_row('', text.Text(now.name, style='bold'))
    if now.steps:
      done = min(_BAR, _BAR * now.step // now.steps)
      grid.add_row('', text.Text('█' * done + '░' * (_BAR - done)))
    for name, value in fields(now).items():
      grid.add_row(text.Text(name, style='dim'), text.Text(value))
    self._live.update(grid, refresh=True)

  def wait(self, folder: epath.Path) -> None:
    """Reports that a run has not begun."""
    from rich import text

    waiting = text.Text(f'waiting for a run in {folder}; Ctrl-C ends')
    self._live.update(waiting, refresh=True)

  def close(self) -> None:
    """Leaves the table as it is."""
    self._live.stop()


def _display() -> Plain | Terminal:
  if sys.stdout.isatty():
    with contextlib.suppress(ImportError):
      return Terminal()
  return Plain()


def watch(folder: epath.Path, every: float, is_once: bool = False) -> int:
  """Shows a run until it ends; returns the exit status.

  Args:
    folder: MODEL_DIR.
    every: seconds between two updates.
    is_once: whether to show it only once.

  Raises:
    UserError: the folder is a sweep's or a file; or there is no run yet and
      `is_once` is set.
  """
  now = snapshot(folder)
  if now is None and is_once:
    raise UserError(f'there is no run in {folder} yet')
  display = Plain() if is_once else _display()
  try:
    while True:
      if now is None:
        display.wait(folder)
      else:
        display.show(now)
        if is_once or verdict(now):
          break
      time.sleep(every)
      now = snapshot(folder)
  finally:
    display.close()
  if verdict(now):
    print(verdict(now))
  return 1 if now.error and not now.is_finished else 0


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  parser = command_line.Parser(
    prog='python -m dst_t5x.analysis.watch',
    description=__doc__,
  )
  parser.add_argument('folder', metavar='RUN_DIR')
  parser.add_argument(
    '--every',
    type=command_line.number(command_line.YEAR),
    default=2.0,
    metavar='SECONDS',
    help='default: 2',
  )
  parser.add_argument('--once', action='store_true', help='one look, no more')
  options = parser.parse_args(argv)
  # The last line may be incomplete at any moment.
  logging.set_verbosity(logging.ERROR)
  folder = epath.Path(options.folder).expanduser()
  try:
    return watch(folder, options.every, options.once)
  except UserError as error:
    print(f'error: {first_line(error)}', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    return 130
  except BrokenPipeError:
    return closed_pipe.discard_output()


if __name__ == '__main__':
  sys.exit(main())
