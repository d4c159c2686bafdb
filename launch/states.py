"""The states of a sweep's runs, from their folders.

Only the folders decide which runs are done again, so that a sweep that was
killed can continue. `OUTPUT/runs.json` has the table for scripts.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
import dataclasses
import json
import os
import pathlib
from typing import Any

from etils import epath

from dst_t5x.checkpoints import best
from dst_t5x.core import json_text
from dst_t5x.core import metrics_file
from dst_t5x.core import object_stores
from dst_t5x.core import whole_files
from dst_t5x.core.errors import error_of_log
from dst_t5x.launch import grid

FINISHED = 'finished'
RUNNING = 'running'
FAILED = 'failed'
STOPPED = 'stopped'  # Started, not finished; resumes from its checkpoint.
WAITING = 'waiting'
SUBMITTED = 'submitted'

TABLE_FILE = 'runs.json'


@dataclasses.dataclass
class State:
  """The state of one run.

  Attributes:
    name: the run's name.
    settings: the run's settings.
    state: one of the words above.
    step: the last step that its metrics have.
    train_steps: the number of steps in all; None if the sweep does not set it.
    scores: the metrics of its tasks, and of held-out text, at the chosen
      checkpoint.
    seconds: seconds that the last process took.
    error: one line that says why it failed.
    job: the job that it was submitted as.
  """

  name: str
  settings: grid.Settings
  state: str
  step: int = 0
  train_steps: int | None = None
  scores: dict[str, float] = dataclasses.field(default_factory=dict)
  seconds: float | None = None
  error: str = ''
  job: str = ''


class Sweep:
  """The runs of a sweep, and the folder that contains their folders."""

  def __init__(self, runs: Sequence[grid.Run], output: str) -> None:
    """Reads nothing yet.

    Args:
      runs: the runs of one sweep.
      output: the folder of their folders; may be in an object store.
    """
    self.runs = {run.name: run for run in runs}
    self.output = epath.Path(output).expanduser()

  def folder(self, name: str) -> epath.Path:
    """Returns MODEL_DIR of a run."""
    return self.output / name

  @property
  def here(self) -> pathlib.Path:
    """The sweep's folder on this machine; it has at least the logs."""
    if object_stores.is_remote(self.output):
      return pathlib.Path('runs') / self.output.name
    return pathlib.Path(self.output)

  def log(self, name: str) -> pathlib.Path:
    """Returns the file for the output of a run."""
    return self.here / name / 'log.txt'

  def states(
    self,
    names: Iterable[str] | None = None,
    trusted: Container[str] = (SUBMITTED,),
  ) -> dict[str, State]:
    """Returns name -> state of the run.

    Args:
      names: names of runs; all by default.
      trusted: states of `runs.json` that are still valid if the run has neither
        finished nor failed since.
    """
    last_rows = self._last_rows()
    return {
      name: self._state(self.runs[name], last_rows.get(name, {}), trusted)
      for name in (self.runs if names is None else names)
    }

  def write(self, states: Iterable[State]) -> None:
    """Writes `runs.json`."""
    object_stores.make_folder(self.output)
    rows = [dataclasses.asdict(state) for state in states]
    text = json_text.dumps(rows, indent=1) + '\n'
    whole_files.write_text(self.output / TABLE_FILE, text)

  def _last_rows(self) -> dict[str, dict[str, Any]]:
    """Returns name -> the run's last row in `runs.json`."""
    try:
      rows = json.loads((self.output / TABLE_FILE).read_text())
      return {row['name']: row for row in rows}
    except (OSError, ValueError, KeyError, TypeError):
      return {}

  def results(self, name: str) -> dict[str, float]:
    """Returns all metrics of the chosen checkpoint of a finished run."""
    folder = self.folder(name)
    step = (best.read(folder) or {}).get('step')
    last = _json(folder / 'report.json').get('results', {})
    scores = best.results_of(metrics_file.read(folder), step, last)
    return {name: value for name, value in scores.items() if '/' in name}

  def _state(
    self, run: grid.Run, known: Mapping[str, Any], trusted: Container[str]
  ) -> State:
    folder = self.folder(run.name)
    state = State(run.name, run.settings, WAITING, train_steps=run.train_steps)
    state.seconds, state.job = known.get('seconds'), known.get('job', '')
    report = _json(folder / 'report.json')
    rows = metrics_file.read(folder)
    state.step = int(rows[-1]['step']) if rows else 0
    if report and report['step'] >= (run.train_steps or 0):
      state.state, state.step = FINISHED, int(report['step'])
      state.scores = _shown(self.results(run.name))
    elif error := self.error(run.name):
      state.state, state.error = FAILED, error
    elif known.get('state') in trusted:
      state.state = str(known['state'])
    elif (folder / 'run.json').exists():
      state.state = STOPPED
    return state

  def error(self, name: str) -> str:
    """Returns why a run failed, from the last line of its log, or ''."""
    return error_of_log(self.log(name))


def table(states: Sequence[State]) -> str:
  """Returns the states as a table for a terminal."""
  width = max((len(state.name) for state in states), default=0)
  lines = [f'{"run":{width}}  {"state":9}  {"step":>11}']
  for state in states:
    steps = f'{state.step}/{state.train_steps or "?"}'
    about = state.error or '  '.join(
      f'{name} {value:.4g}' for name, value in state.scores.items()
    )
    line = f'{state.name:{width}}  {state.state:9}  {steps:>11}  {about}'
    lines.append(line.rstrip())
  return '\n'.join([*lines, summary(states)])


def summary(states: Sequence[State]) -> str:
  """Returns `12 runs: 3 finished, 9 waiting`."""
  counts = {
    word: sum(state.state == word for state in states)
    for word in (FINISHED, RUNNING, SUBMITTED, STOPPED, FAILED, WAITING)
  }
  counted = ', '.join(f'{n} {word}' for word, n in counts.items() if n)
  return f'{len(states)} runs: {counted}'


def _shown(metrics: dict[str, float]) -> dict[str, float]:
  return {
    name: value
    for name, value in metrics.items()
    if (best.task_of(name) or name.startswith(f'{metrics_file.HELD_OUT}/'))
    and value is not None  # It stands for NaN.
  }


def _json(path: str | os.PathLike[str]) -> dict[str, Any]:
  """Returns the content of a file; {} if it is missing or incomplete."""
  try:
    content = json.loads(epath.Path(path).read_text())
    return content if isinstance(content, dict) else {}
  except (OSError, ValueError):
    return {}
