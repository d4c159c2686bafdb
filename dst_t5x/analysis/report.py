"""Figures and tables of runs: `python -m dst_t5x.analysis.report FOLDER …`.

FOLDER is the folder of a run, of a sweep, or of several runs. The command
writes `report.html`, which has everything and needs no other file,
`figures/*.png` and `*.svg`, `tables/*.md` and `*.csv`, and `header.txt`,
comments with the results for the head of a sweep's file. Runs of a sweep that
do not exist are shown as missing. The sweep may still be running.
"""

from collections.abc import Sequence
import os
import sys

from absl import logging
from etils import epath

from dst_t5x.analysis import cells as cells_lib
from dst_t5x.analysis import folders as folders_lib
from dst_t5x.analysis import forgetting_figures
from dst_t5x.analysis import header
from dst_t5x.analysis import module_figures
from dst_t5x.analysis import overlap_figures
from dst_t5x.analysis import page
from dst_t5x.analysis import paper_tables
from dst_t5x.analysis import runs as runs_lib
from dst_t5x.analysis import score_figures
from dst_t5x.analysis import setups
from dst_t5x.analysis import style
from dst_t5x.analysis import subsets as subsets_lib
from dst_t5x.analysis import tables
from dst_t5x.analysis import training_figures
from dst_t5x.analysis import winners
from dst_t5x.core import closed_pipe
from dst_t5x.core import command_line
from dst_t5x.core import whole_files
from dst_t5x.core.errors import UserError, first_line, writing

_PAGE = 'report.html'


class Report:
  """All figures and tables of some runs."""

  def __init__(
    self,
    runs: Sequence[runs_lib.Run],
    problems: list[str],
    metric: str = '',
    split: str = '',
  ) -> None:
    """Makes the figures and tables.

    Args:
      runs: the runs that were read.
      problems: a line for each thing that could not be read; this method adds
        to it.
      metric: see `cells.metric_of`.
      split: see `cells.split_of`.

    Raises:
      UserError: there is no such metric.
    """
    self.runs, self.problems = runs, problems
    self.figures: list[style.Figure] = []
    self.tables: list[tables.Table] = []
    self.summary = [_counted(runs)]
    reader = subsets_lib.Reader(self._tell)
    all_cells: list[cells_lib.Cell] = []
    measured: list[header.Measured] = []
    for task in _tasks(runs):
      of_task = [run for run in runs if run.setup.task == task]
      name = cells_lib.metric_of(of_task, task, metric)
      cells = cells_lib.make(of_task, name)
      all_cells += cells
      shown = cells_lib.split_of(cells, name, split)
      measured.append(header.Measured(task, name, shown, cells))
      self._add_task(task, cells, name, shown, reader)
    with style.applied():
      self._add(*overlap_figures.between_runs(all_cells, reader))
    self.tables.append(_all_runs(runs))
    self.header = header.text(runs, measured)

  def _tell(self, line: str) -> None:
    if line not in self.problems:
      self.problems.append(line)

  def _add(
    self, figures: Sequence[style.Figure], made: Sequence[tables.Table]
  ) -> None:
    self.figures += figures
    self.tables += made

  def _add_task(
    self,
    task: str,
    cells: Sequence[cells_lib.Cell],
    metric: str,
    split: str,
    reader: subsets_lib.Reader,
  ) -> None:
    self.summary.append(_about_task(task, cells, metric, split))
    models = list(dict.fromkeys(cell.setup.model for cell in cells))
    for model in models:
      of_model = [cell for cell in cells if cell.setup.model == model]
      where = ', '.join(filter(None, (model, task)))
      maker = paper_tables.Maker(of_model, metric, split, where)
      self.tables += maker.all()
      best = winners.table(task, model, of_model, metric, split)
      self.tables += [best] if best is not None else []
    self.tables.append(_all_cells(task, cells, metric, split))
    scores = score_figures.Scores(task, cells, metric, split)
    with style.applied():
      figures = score_figures.all_figures(scores)
      figures += training_figures.all_figures(scores)
      figures += forgetting_figures.all_figures(scores)
      for made, of_figures in (
        module_figures.shares(task, cells, reader),
        overlap_figures.over_time(task, cells, reader),
      ):
        figures += made
        self.tables += of_figures
    self.figures += sorted(figures, key=lambda figure: figure.title)

  def write(self, folder: epath.Path) -> None:
    """Writes everything; replaces existing files.

    Raises:
      UserError: the files cannot be written.
    """
    with writing(f'the folder {folder}'):
      for name in ('figures', 'tables'):
        (folder / name).mkdir(parents=True, exist_ok=True)
      for figure in self.figures:
        for kind, content in (('png', figure.png), ('svg', figure.svg)):
          name = tables.file_name(figure.name)
          (folder / 'figures' / f'{name}.{kind}').write_bytes(content)
      for table in self.tables:
        path = folder / 'tables' / tables.file_name(table.name)
        whole_files.write_text(f'{path}.md', table.markdown())
        whole_files.write_text(f'{path}.csv', table.csv())
      whole_files.write_text(folder / 'header.txt', self.header)
      # The page comes last: if it exists, all of its files exist.
      whole_files.write_text(folder / _PAGE, self.html())

  def html(self) -> str:
    """Returns the page."""
    return page.make(
      'Dynamic Subset Tuning: runs',
      self.summary,
      self.problems,
      self.figures,
      self.tables,
    )


def _tasks(runs: Sequence[runs_lib.Run]) -> list[str]:
  """Returns the tasks that runs were tuned or evaluated on."""
  return sorted(
    {
      run.setup.task
      for run in runs
      if run.setup.task and run.setup.method != setups.PRETRAINING
    }
  )


def _counted(runs: Sequence[runs_lib.Run]) -> str:
  """Returns a line, for example `12 runs: 3 finished, 9 missing.`."""
  states = [run.state for run in runs]
  counts = [f'{states.count(s)} {s}' for s in sorted(set(states))]
  text = f'{len(runs)} run{"s" * (len(runs) != 1)}: {", ".join(counts)}.'
  if runs_lib.FINISHED not in states:
    text += ' Scores and subsets are shown of finished runs alone.'
  return text


def _about_task(
  task: str, cells: Sequence[cells_lib.Cell], metric: str, split: str
) -> str:
  text = f'{task}: scores are {metric} of the split {split!r}.'
  if split == cells_lib.DEV:
    tested = [c for c in cells if c.score(metric, cells_lib.TEST).values]
    text += ' Learning rates were chosen by the same scores.'
    if tested:
      text += (
        f' {len(tested)} of {len(cells)} settings have test scores, too: '
        '--split=test shows these.'
      )
  return text


def _all_cells(
  task: str, cells: Sequence[cells_lib.Cell], metric: str, split: str
) -> tables.Table:
  """Returns the table of all cells of a task."""
  rows: list[list[tables.Value]] = []
  for cell in cells:
    setup = cell.setup
    tried = ', '.join(f'{r:g}: {mean:.4g}' for r, mean in cell.tried.items())
    rows.append(
      [
        setup.model,
        setup.method,
        setup.budget,
        setup.variant,
        cell.chosen[0].free if cell.chosen else None,
        100 * cell.fraction,
        cell.score(metric, cells_lib.DEV),
        cell.score(metric, cells_lib.TEST),
        cell.learning_rate,
        tried,
        cell.missing,
      ]
    )
  return tables.Table(
    f'settings_{task}',
    f'All settings ({task})',
    ('model', 'method', 'budget', 'variant', 'free', 'share (%)', 'dev', 'test',
     'learning rate', 'tried: dev', 'runs missing'),
    rows,
    [
      f'{metric}: mean ± standard deviation (number of random seeds) at the '
      'learning rate that is best on the development split; figures and tables '
      f'show {split!r}.'
    ],
  )  # fmt: skip


def _all_runs(runs: Sequence[runs_lib.Run]) -> tables.Table:
  """Returns the table of all runs."""
  rows: list[list[tables.Value]] = [
    [
      run.name,
      run.state,
      run.setup.model,
      run.setup.task,
      run.setup.method,
      ', '.join(filter(None, (run.setup.budget, run.setup.variant))),
      run.trial.learning_rate,
      run.trial.random_seed,
      run.step,
      ', '.join(
        f'{name} {value:.4g}'
        for name, value in run.dev.items()
        if not name.startswith('eval/')
      ),
    ]
    for run in runs
  ]
  return tables.Table(
    'runs',
    'All runs',
    ('run', 'state', 'model', 'task', 'method', 'setting', 'learning rate',
     'random seed', 'step', 'scores'),
    rows,
    is_long=True,
  )  # fmt: skip


def make(
  folders: Sequence[str | os.PathLike[str]],
  output: str | os.PathLike[str],
  metric: str = '',
  split: str = '',
  sweep: str = '',
) -> Report:
  """Writes a report of the runs in some folders; returns it.

  Raises:
    UserError: a folder is neither a run's nor a sweep's, or the report cannot
      be written.
  """
  problems: list[str] = []

  def tell(line: str) -> None:
    if line not in problems:
      problems.append(line)

  runs = folders_lib.read(folders, tell, sweep)
  report = Report(runs, problems, metric, split)
  report.write(epath.Path(output).expanduser())
  return report


def _parser() -> command_line.Parser:
  parser = command_line.Parser(
    prog='python -m dst_t5x.analysis.report',
    description=__doc__,
  )
  parser.add_argument('folders', nargs='+', metavar='FOLDER')
  parser.add_argument(
    '--output', metavar='DIR', help='where to (default: FOLDER/report)'
  )
  parser.add_argument(
    '--metric',
    default='',
    help='what scores are: bleu, or wmt22_de_en/bleu (default: KEEP_BEST_BY, '
    'else what is usual for the task)',
  )
  parser.add_argument(
    '--split',
    default='',
    choices=(cells_lib.DEV, cells_lib.TEST),
    help='whose scores to show (default: test if all settings have them)',
  )
  parser.add_argument(
    '--sweep',
    default='',
    metavar='FILE.yaml',
    help='what should be there (default: runs.json, which a sweep writes)',
  )
  return parser


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  options = _parser().parse_args(argv)
  logging.set_verbosity(logging.ERROR)  # Orbax logs a lot.
  output = options.output or os.path.join(options.folders[0], 'report')
  try:
    report = make(
      options.folders, output, options.metric, options.split, options.sweep
    )
  except (UserError, OSError) as error:  # OSError: a folder cannot be accessed.
    print(f'error: {first_line(error)}', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print('interrupted', file=sys.stderr)
    return 130
  for line in report.problems:
    print(f'warning: {line}', file=sys.stderr)
  said = [
    *report.summary,
    f'{len(report.figures)} figures, {len(report.tables)} tables: '
    f'{os.path.join(output, _PAGE)}',
  ]
  try:
    print(*said, sep='\n', flush=True)
  except BrokenPipeError:
    return closed_pipe.discard_output()
  return 0


if __name__ == '__main__':
  sys.exit(main())
