"""Runs of a sweep on a Slurm cluster: an array of jobs, through submitit."""

from collections.abc import Mapping, Sequence
import dataclasses
import pathlib
import re
import shutil
from typing import Any

from dst_t5x.core.errors import UserError

# Slurm's states of a job that has not ended.
_ALIVE = (
  'PENDING',
  'RUNNING',
  'REQUEUED',
  'COMPLETING',
  'SUSPENDED',
  'UNKNOWN',
)
# Timeouts allowed for a job; each time it resumes from the last checkpoint.
_TIMEOUTS = 100


@dataclasses.dataclass(frozen=True)
class Training:
  """The work of a job; submitit pickles it.

  Attributes:
    flags: arguments of `python -m dst_t5x.train`.
    log: file for its output.
  """

  flags: Sequence[str]
  log: str

  def __call__(self) -> dict[str, Any]:
    """Trains; returns the result of `worker.train_run`."""
    from dst_t5x.launch import worker

    return worker.train_run(self.flags, self.log)

  def checkpoint(self) -> Any:
    """Requeues the job; submitit calls this at a timeout or a preemption."""
    import submitit

    return submitit.helpers.DelayedSubmission(self)


def submit(
  jobs: Mapping[str, Training],
  options: Sequence[str],
  parallel: int,
  folder: pathlib.Path,
) -> dict[str, str]:
  """Submits an array of jobs; returns name -> job.

  Args:
    jobs: name -> work.
    options: options of sbatch, such as `--partition=gpu`; `--time` is required.
    parallel: number of jobs that may run at the same time.
    folder: folder for submitit's files, on a disk that all nodes share.

  Raises:
    UserError: an option is missing or invalid, or sbatch refuses it.
  """
  parameters = _parameters(options)
  minutes = _minutes(parameters.pop('time'))
  submitit = _submitit()
  if not shutil.which('sbatch'):
    raise UserError('there is no sbatch: run this where Slurm is')
  executor = submitit.SlurmExecutor(folder, max_num_timeout=_TIMEOUTS)
  executor.update_parameters(
    job_name='dst_t5x',
    time=minutes,
    array_parallelism=parallel,
    additional_parameters=parameters,
  )
  try:
    with executor.batch():
      submitted = [executor.submit(job) for job in jobs.values()]
  except submitit.core.utils.FailedJobError as e:
    raise UserError(f'sbatch refuses: {str(e).splitlines()[-1]}') from None
  return {name: job.job_id for name, job in zip(jobs, submitted, strict=True)}


def is_alive(job: str, folder: pathlib.Path) -> bool:
  """Returns whether a job is queued or running, according to sacct."""
  return _submitit().SlurmJob(folder, job).state in _ALIVE


def _submitit() -> Any:
  try:
    import submitit
  except ModuleNotFoundError:
    raise UserError(
      "there is no submitit: pip install 'dst_t5x[slurm]'"
    ) from None
  return submitit


def _parameters(options: Sequence[str]) -> dict[str, Any]:
  """Returns sbatch's options under submitit's names.

  Raises:
    UserError: an option does not have the form --name=value.
  """
  parameters: dict[str, Any] = {}
  for option in options:
    name, equals, value = option.partition('=')
    if not name.startswith('--') or name == '--':
      raise UserError(f'{option!r} is not of the form --name=value')
    key = name.removeprefix('--').replace('-', '_')
    parameters[key] = value if equals else True
  if 'time' not in parameters:
    raise UserError('how long may a run take? Give -- --time=8:00:00')
  return parameters


def _minutes(time: str) -> int:
  """Returns the minutes of a time in one of sbatch's forms.

  Raises:
    UserError: it is neither [days-]hours:minutes:seconds nor minutes.
  """
  match = re.fullmatch(r'(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?', str(time))
  if not match:
    raise UserError(f'--time={time}: write hours:minutes:seconds')
  days, *rest = (int(group) if group else None for group in match.groups())
  parts = [n for n in rest if n is not None]
  if days is not None:  # days-hours[:minutes[:seconds]]
    hours, minutes, *_ = [*parts, 0, 0]
  elif len(parts) == 3:
    hours, minutes, _ = parts
  else:  # minutes[:seconds]
    hours, minutes = 0, parts[0]
  return ((days or 0) * 24 + hours) * 60 + minutes
