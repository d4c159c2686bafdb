"""Runs a sweep: `python -m launch.sweep SWEEP.yaml --parallel=2`.

The same command again skips the finished runs and resumes the others.
`launch/grid.py` and `launch/gin_grid.py` describe a sweep's file.
"""

import argparse
from collections.abc import Iterator, Sequence
from concurrent import futures
import contextlib
import fcntl
import fnmatch
import os
import pathlib
import signal
import subprocess
import sys
import threading
from typing import Any

from dst_t5x.core import closed_pipe
from dst_t5x.core import command_line
from dst_t5x.core.errors import UserError, first_line
from dst_t5x.launch import device_hours
from dst_t5x.launch import grid
from dst_t5x.launch import local
from dst_t5x.launch import remote
from dst_t5x.launch import slurm
from dst_t5x.launch import states

_WHERE = ('local', 'slurm', 'tpu', 'gke')
_MOST_AT_A_TIME = 1000  # The default size limit of an array of jobs in Slurm.


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit status."""
  argv = list(sys.argv[1:] if argv is None else argv)
  options, flags, launcher = _parse(argv)
  try:
    return _sweep(options, flags, launcher)
  except UserError as error:
    print(f'error: {first_line(error)}', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    print('interrupted; the same command goes on', file=sys.stderr)
    return 130
  except BrokenPipeError:
    return closed_pipe.discard_output()


def _parse(
  argv: Sequence[str],
) -> tuple[argparse.Namespace, list[str], list[str]]:
  """Returns our options, gin's flags, and options for the launcher."""
  argv = list(argv)
  launcher: list[str] = []
  if '--' in argv:
    at = argv.index('--')
    argv, launcher = argv[:at], argv[at + 1 :]
  flags = [argument for argument in argv if grid.is_override(argument)]
  parser = command_line.Parser(
    prog='python -m launch.sweep',
    description=__doc__,
    allow_abbrev=False,
    epilog='--gin.NAME=VALUE, --model=NAME, --task=… and --method=… override '
    'the file.\n\nsweeps of the package:\n  ' + '\n  '.join(grid.shipped()),
  )
  parser.add_argument('sweep', metavar='SWEEP.gin|.yaml')
  parser.add_argument(
    '--output', help="folder of the runs' folders (default: runs/SWEEP)"
  )
  parser.add_argument(
    '--on',
    choices=_WHERE,
    default='local',
    help='where to run; options of sbatch, launch/tpu_pod.sh or launch/gke.sh '
    'follow after `--`',
  )
  parser.add_argument(
    '--parallel',
    type=command_line.whole(1, _MOST_AT_A_TIME),
    default=1,
    metavar='N',
    help='runs at the same time',
  )
  parser.add_argument(
    '--only', metavar='PATTERN', help='runs whose names match: *_dst_*'
  )
  parser.add_argument(
    '--budget',
    action='store_true',
    help='only print runs, steps and device-hours',
  )
  parser.add_argument(
    '--topology',
    default='cpu',
    help='for --budget: v4:4x4x4, v5e:2x2, h200:8 (default: cpu, this one)',
  )
  parser.add_argument(
    '--dry_run', action='store_true', help='only print the commands'
  )
  parser.add_argument(
    '--table', action='store_true', help='only print the states of the runs'
  )
  rest = [argument for argument in argv if not grid.is_override(argument)]
  options = parser.parse_args(rest)
  if launcher and options.on == 'local':
    parser.error('options after `--` need --on=slurm, tpu or gke')
  return options, flags, launcher


def _sweep(
  options: argparse.Namespace, flags: list[str], launcher: list[str]
) -> int:
  """Carries out the options; returns the exit status."""
  runs = grid.read(options.sweep, flags)
  if options.only:
    runs = [run for run in runs if fnmatch.fnmatch(run.name, options.only)]
    if not runs:
      raise UserError(f'no run is called {options.only!r}: see --dry_run')
  output = options.output or f'runs/{pathlib.PurePath(options.sweep).stem}'
  sweep = states.Sweep(runs, output)
  if options.table:
    return _show(sweep, _is_at_work(sweep))
  if options.dry_run:
    for name, run in sweep.runs.items():
      print(remote.command(options.on, name, _flags(sweep, run), launcher))
    return 0
  with (
    _only_sweep(sweep),
    local.Pool(options.parallel, _environment(sweep)) as pool,
  ):
    known = _check(pool, sweep, with_work=options.budget)
    if options.budget:
      print(device_hours.report(sweep.states(), known, options.topology))
      return 0
    if options.on == 'local':
      return _run_here(pool, sweep)
    pool.stop()
    if options.on == 'slurm':
      return _submit(sweep, launcher, options.parallel)
    return _run_there(sweep, options.on, launcher, options.parallel)


def _flags(sweep: states.Sweep, run: grid.Run) -> list[str]:
  return run.flags(sweep.folder(run.name))


def _environment(sweep: states.Sweep) -> dict[str, str]:
  """Returns the workers' variables; workers share compiled programs."""
  # The worker has to find `launch` and `dst_t5x` in the caller's folder too.
  path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
  variables = {'PYTHONPATH': path}
  if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    cache = os.path.abspath(sweep.here / '.compiled')
    variables['JAX_COMPILATION_CACHE_DIR'] = cache
  return variables


def _check(
  pool: local.Pool, sweep: states.Sweep, with_work: bool
) -> dict[str, dict[str, Any]]:
  """Checks all configurations; returns name -> `planning.work` if requested.

  Raises:
    UserError: a configuration is invalid, or its folder is another run's.
  """
  print(f'checking {len(sweep.runs)} runs', file=sys.stderr)
  worker = pool.worker()
  known = {}
  for name, run in sweep.runs.items():
    try:
      answer = worker.call(
        'check',
        flags=_flags(sweep, run),
        folder=os.fspath(sweep.folder(name)),
        with_work=with_work,
      )
    except local.WorkerDied as e:
      raise UserError(f'{name}: {e}') from None
    if answer['error']:
      raise UserError(f'{name}: {answer["error"]}')
    known[name] = answer['work']
  return known


@contextlib.contextmanager
def _only_sweep(sweep: states.Sweep) -> Iterator[None]:
  """Keeps a second sweep from using the folder.

  Raises:
    UserError: another sweep uses it, or it cannot be written to.
  """
  try:
    sweep.here.mkdir(parents=True, exist_ok=True)
    with (sweep.here / '.sweep.lock').open('w') as lock:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      yield
  except BlockingIOError:
    raise UserError(f'another sweep is at work in {sweep.here}') from None


def _is_at_work(sweep: states.Sweep) -> bool:
  """Returns whether a sweep is running in the folder."""
  try:
    with _only_sweep(sweep):
      return False
  except UserError:
    return True


def _show(sweep: states.Sweep, is_at_work: bool = False) -> int:
  """Prints the table; returns the exit status."""
  trusted = [states.SUBMITTED, *([states.RUNNING] if is_at_work else [])]
  run_states = sweep.states(trusted=trusted)
  for name, state in run_states.items():
    if state.job and not slurm.is_alive(state.job, _submitit_folder(sweep)):
      run_states |= sweep.states([name], trusted=[])
  print(states.table(list(run_states.values())))
  return 0


def _submitit_folder(sweep: states.Sweep) -> pathlib.Path:
  return sweep.here / '.submitit'


class _Progress:
  """Reports the progress of the runs and updates `runs.json`."""

  def __init__(self, sweep: states.Sweep, total: int) -> None:
    self._sweep = sweep
    self._states = sweep.states()
    self._total, self._done = total, 0
    self._lock = threading.Lock()

  def started(self, name: str) -> None:
    """Reports that a run begins."""
    with self._lock:
      self._states[name].state = states.RUNNING
      self._sweep.write(self._states.values())

  def ended(self, name: str, answer: dict[str, Any]) -> None:
    """Reports that a run has ended, with or without an error."""
    with self._lock:
      if answer.get('died'):  # The process could not write this itself.
        with self._sweep.log(name).open('a') as log:
          log.write(f'\nerror: {answer["error"]}\n')
      state = self._sweep.states([name])[name]
      state.seconds = answer.get('seconds')
      state.state = answer.get('state', state.state)
      self._states[name] = state
      self._sweep.write(self._states.values())
      self._done += 1
      took = '' if state.seconds is None else f', {state.seconds:.0f} s'
      about = f': {state.error}' if state.error else ''
      print(
        f'[{self._done}/{self._total}] {name} {state.state}{took}{about}',
        flush=True,
      )


def _run_here(pool: local.Pool, sweep: states.Sweep) -> int:
  """Runs what is not finished; returns the exit status."""
  run_states = sweep.states()
  todo = [
    n for n, state in run_states.items() if state.state != states.FINISHED
  ]
  print(
    f'{states.summary(list(run_states.values()))}; logs: {sweep.log("RUN")}'
  )
  progress = _Progress(sweep, len(todo))
  jobs = [
    (
      name,
      {
        'flags': _flags(sweep, sweep.runs[name]),
        'log': os.fspath(sweep.log(name)),
      },
    )
    for name in todo
  ]
  with _terminable():
    try:
      pool.run(jobs, progress.started, progress.ended)
    finally:
      run_states = sweep.states()
      sweep.write(run_states.values())
      print(states.table(list(run_states.values())))
  failed = any(state.state != states.FINISHED for state in run_states.values())
  return 1 if failed else 0


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
  """Makes SIGTERM act like Ctrl-C."""

  def interrupt(*unused: Any) -> None:
    raise KeyboardInterrupt

  before = signal.signal(signal.SIGTERM, interrupt)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


def _submit(sweep: states.Sweep, launcher: list[str], parallel: int) -> int:
  """Submits to Slurm the runs that are neither finished nor queued."""
  folder = _submitit_folder(sweep)
  run_states = sweep.states()
  todo = [
    name
    for name, state in run_states.items()
    if state.state != states.FINISHED
    and not (state.job and slurm.is_alive(state.job, folder))
  ]
  jobs = {
    name: slurm.Training(
      _flags(sweep, sweep.runs[name]), os.path.abspath(sweep.log(name))
    )
    for name in todo
  }
  if jobs:
    submitted = slurm.submit(jobs, launcher, parallel, folder)
    for name, job in submitted.items():
      run_states[name].state, run_states[name].job = states.SUBMITTED, job
  sweep.write(run_states.values())
  print(states.table(list(run_states.values())))
  return 0


def _run_there(
  sweep: states.Sweep, where: str, launcher: list[str], parallel: int
) -> int:
  """Starts unfinished runs through a script, several at a time."""
  remote.check(where, launcher)
  run_states = sweep.states()
  todo = [
    n for n, state in run_states.items() if state.state != states.FINISHED
  ]
  progress = _Progress(sweep, len(todo))

  def launch(name: str) -> None:
    progress.started(name)
    flags = _flags(sweep, sweep.runs[name])
    command = remote.arguments(where, name, flags, launcher)
    log = sweep.log(name)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open('a') as file:
      status = subprocess.call(command, stdout=file, stderr=file)
    if status and not sweep.error(name):
      with log.open('a') as file:
        file.write(f'error: {command[1]} ended with exit status {status}\n')
    submitted = where == 'gke' and not status
    progress.ended(name, {'state': states.SUBMITTED} if submitted else {})

  print(
    f'{states.summary(list(run_states.values()))}; logs: {sweep.log("RUN")}'
  )
  with futures.ThreadPoolExecutor(parallel) as pool:
    waiting = [pool.submit(launch, name) for name in todo]
    try:
      for one in waiting:
        one.result()
    except KeyboardInterrupt:  # The scripts have received it too.
      pool.shutdown(cancel_futures=True)
      raise
  return _show(sweep)


if __name__ == '__main__':
  sys.exit(main())
