"""Runs the other benchmarks on one accelerator, within a time; one JSON file.

  benchmarks/accelerator.sh OUT.json

Each job is a process of its own with a timeout, so that none takes down another
and each has the memory to itself. Jobs come in the order of what their numbers
are worth; the first three take about a minute. After every job OUT.json is
written anew with the rows so far, each with its job, the device and JAX's
version. A job itself is the row `job_s`: how long it took, its `status` (ok,
failed, timed out, skipped, stopped) and the last line of its error. What a job
printed is in OUT.log.

The exit status is 1 if a job failed or was left out, 130 or 143 after Ctrl-C or
SIGTERM, which leave the rows as well. --tiny tries all jobs with tiny sizes, on
a CPU too. Figures:

  python benchmarks/train_step.py --from OUT.json --figure fig5.png
  python benchmarks/serving.py --from OUT.json --figure fig3.png
"""

import argparse
from collections.abc import Iterator, Sequence
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

import tables

from dst_t5x.core import json_text

_HERE = pathlib.Path(__file__).parent
_GRACE = 5.0  # Seconds between SIGTERM and SIGKILL.
_PROBE = """
import jax
from dst_t5x.core import json_text
device = jax.devices()[0]
print(json_text.dumps({'device': device.device_kind, 'jax': jax.__version__,
                       'platform': device.platform}))
"""


class Job(NamedTuple):
  """One benchmark.

  Attributes:
    name: its name in the rows.
    seconds: the most that it may take.
    command: a file of this folder, and its options.
  """

  name: str
  seconds: float
  command: str


_STEP = 'train_step.py --dtype bfloat16 --in-a-row 4 --compile-at-once 4'
_PAPER = f'{_STEP} --rows 128 --epsilon 1e-4 --warm 3 --steps 10'
_PROJECTION = 'projection.py --warm 10 --steps 10'
_LAST_SILOS = '--silos per_module_and_layer'
_ALL = '1e-6 1e-5 1e-4 1e-3 1e-2 1e-1'
# The first three are the goals, for ε up to 1e-4: a projection in 1.5 passes, a
# step in 1.02 of full fine-tuning's, and a swap in a hundredth of a decode.
JOBS = (
  Job(
    'projection_small',
    100,
    f'{_PROJECTION} --work small {_LAST_SILOS} --epsilon 1e-4 --in-a-row 8'
    ' --rivals',
  ),
  Job('step_small', 120, f'{_PAPER} --methods exact'),
  Job('swap_small', 90, 'serving.py --parts swap memory --epsilon 1e-4'),
  Job('step_base', 90, f'{_PAPER} --model t5_1_1_base --stacked'
      ' --methods exact rebuilt_seed lora'),
  Job('rivals_small', 75, f'{_PROJECTION} --work tensor small {_LAST_SILOS}'
      ' --epsilon 1e-4 1e-2 --in-a-row 8'),
  Job('methods_small', 120, f'{_PAPER} --model t5_1_1_small --stacked'
      ' --methods exact rebuilt_seed iterative sort lora --epsilon 1e-4 1e-2'),
  Job('mixed_small', 90, 'serving.py --parts mixed --epsilon 1e-4'
      ' --repeats 7'),
  Job('step_xl', 90, f'{_STEP} --model t5_1_1_xl --rows 32 --warm 2 --steps 6'
      ' --epsilon 1e-4 --methods exact'),
  Job('projection_giga', 60, f'{_PROJECTION} --work giga --silos none'
      ' --epsilon 1e-6 1e-4 1e-1 1e-2 --in-a-row 2'),
  Job('step_decoders', 120, f'{_STEP} --model smollm2_135m llama3_2_1b'
      ' --stacked --rows 16 --epsilon 1e-4 --warm 3 --steps 8'
      ' --methods exact rebuilt_seed lora'),
  Job('projection_epsilons', 90, f'{_PROJECTION} --work small --epsilon {_ALL}'
      ' --in-a-row 8 --rivals'),
  Job('swap_epsilons', 90, f'serving.py --parts swap --epsilon {_ALL}'
      ' --repeats 7'),
  Job('projection_large', 90, f'{_PROJECTION} --work base large {_LAST_SILOS}'
      ' --epsilon 1e-6 1e-4 1e-2 --in-a-row 4 --rivals iterative'),
  Job('step_large', 90, f'{_STEP} --model t5_1_1_large --stacked --rows 64'
      ' --epsilon 1e-4 --warm 2 --steps 6 --methods exact lora'),
)  # fmt: skip

# Options after those of a job, for all that run its file.
_TINY = {
  'projection.py': '--work tiny --silos none --epsilon 1e-2 --rivals iterative'
  ' --warm 1 --steps 1 --in-a-row 2',
  'train_step.py': '--model t5_1_1_tiny --rows 2 --inputs 8 --targets 4'
  ' --methods exact --epsilon 1e-2 --warm 1 --steps 2 --in-a-row 2',
  'serving.py': '--models tiny --epsilon 1e-2 --output-length 2 --repeats 1'
  ' --batch 2 --subsets 1 2',
}


class _Stopped(BaseException):
  """A signal came."""

  def __init__(self, number: int) -> None:
    self.number = number


class Report:
  """The rows so far, and the file that has them."""

  def __init__(self, path: str, about: tables.Row) -> None:
    self.path = pathlib.Path(path)
    self._about = about
    self._rows: list[tables.Row] = []
    self.complete = True

  def add(
    self,
    job: Job,
    rows: Sequence[tables.Row],
    status: str,
    seconds: float,
    error: str | None,
  ) -> None:
    """Adds what a job left, says so, and writes the file."""
    result = {
      'metric': 'job_s',
      'value': seconds,
      'unit': 's',
      'status': status,
      'error': error,
      'command': job.command,
    }
    more = {'job': job.name} | self._about
    self._rows += [{**row, **more} for row in (*rows, result)]
    self.complete &= status == 'ok'
    tables.write_json(str(self.path), self._rows)
    print(f'{job.name}: {status}, {seconds:.1f} s, {len(rows)} rows'
          + (f': {error}' if error else ''), flush=True)  # fmt: skip

  def headlines(self) -> Iterator[str]:
    """Yields the numbers that the goals are about, a line each."""
    for row in self._rows:
      metric, epsilon = row['metric'], row.get('epsilon')
      if metric == 'copy_gb_per_s' and row['job'] == JOBS[0].name:
        yield f'copy: {row["value"]:.4g} GB/s'
      elif metric in ('relative_to_full', 'swap_share') or (
        metric == 'of_copy' and row['phase'] == 'warm'
      ):
        what = [row.get('model') or row['work'], row.get('method')]
        what += [row.get('silos'), epsilon and f'{epsilon:g}']
        name = ' '.join(filter(None, what))
        yield f'{row["job"]}: {name}: {metric} {row["value"]:.4g}'


def run(job: Job, report: Report, seconds: float) -> None:
  """Runs a job for at most some seconds, and reports it whatever happens."""
  script, *options = job.command.split()
  status, error = 'stopped', None
  start = time.monotonic()
  log = report.path.with_suffix('.log')
  with tempfile.TemporaryDirectory() as folder, log.open('ab') as output:
    rows = pathlib.Path(folder, 'rows.json')
    begin = output.tell()
    # A group of its own: what it starts ends with it.
    process = subprocess.Popen(
      [sys.executable, _HERE / script, *options, '--json', rows],
      stdout=output,
      stderr=subprocess.STDOUT,
      start_new_session=True,
    )
    try:
      code = process.wait(seconds)
      status = 'failed' if code else 'ok'
    except subprocess.TimeoutExpired:
      status, error = 'timed out', f'over {seconds:.0f} s'
    finally:
      _end(process)
      if status == 'failed':
        error = _last_error(log, begin) or f'exit status {process.returncode}'
      found = json_text.loads(rows.read_text()) if rows.exists() else []
      report.add(job, found, status, time.monotonic() - start, error)


def _end(process: subprocess.Popen[bytes]) -> None:
  """Ends a process and what it started."""
  for number in (signal.SIGTERM, signal.SIGKILL):
    if process.poll() is not None:
      return
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, number)
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(_GRACE)


def _last_error(log: pathlib.Path, begin: int) -> str | None:
  """Returns the line that says what failed, of the log from a place on."""
  text = log.read_bytes()[begin:].decode(errors='replace')
  lines = [line.strip() for line in text.splitlines() if line.strip()]
  # XLA's message may go on for lines about memory.
  errors = [line for line in lines if 'rror: ' in line.split(' ', 1)[0] + ' ']
  return (errors or lines or [None])[-1]


def _about() -> dict[str, Any]:
  """Returns the device, its platform and JAX's version."""
  # Not in this process, which would keep the device's memory.
  done = subprocess.run(
    [sys.executable, '-c', _PROBE], capture_output=True, text=True
  )
  if done.returncode:
    raise SystemExit(f'error: JAX finds no device: {done.stderr[-2000:]}')
  about: dict[str, Any] = json_text.loads(done.stdout.splitlines()[-1])
  return about


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  names = [job.name for job in JOBS]
  add('json', metavar='OUT.json', help='write the rows here')
  add('--seconds', type=float, default=350, help='the most that all may take')
  add('--tiny', action='store_true', help='try all jobs, with tiny sizes')
  add('--jobs', nargs='+', default=names, choices=names, metavar='JOB',
      help=f'only some of {", ".join(names)}')  # fmt: skip
  return parser


def main() -> int:
  """Runs the jobs; returns the exit status."""
  start = time.monotonic()
  parser = _parser()
  options = parser.parse_args()
  out = pathlib.Path(options.json)
  if not out.parent.is_dir():
    parser.error(f'{out}: there is no folder {out.parent}')
  about = _about()
  if about['platform'] == 'cpu' and not options.tiny:
    parser.error(
      'JAX finds no accelerator: install jax with CUDA, or try --tiny'
    )
  out.with_suffix('.log').unlink(missing_ok=True)
  report = Report(options.json, about)
  print(f'{about["device"]}, JAX {about["jax"]}', flush=True)
  jobs = [job for job in JOBS if job.name in options.jobs]
  try:
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, _stop)
    for job in jobs:
      left = options.seconds - (time.monotonic() - start) - _GRACE
      if left < 1:
        report.add(job, [], 'skipped', 0.0, 'no time was left')
        continue
      if options.tiny:
        tiny = _TINY[job.command.split()[0]]
        job = job._replace(command=f'{job.command} {tiny}', seconds=left)
      run(job, report, min(left, job.seconds))
  except _Stopped as stopped:
    return 128 + stopped.number
  print(*report.headlines(), sep='\n')
  return 0 if report.complete else 1


def _stop(number: int, frame: Any) -> None:
  del frame
  # A second signal does not interrupt the writing of the rows.
  for other in (signal.SIGINT, signal.SIGTERM):
    signal.signal(other, signal.SIG_IGN)
  raise _Stopped(number)


if __name__ == '__main__':
  sys.exit(main())
