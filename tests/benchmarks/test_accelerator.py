"""The script that runs the benchmarks on an accelerator, on the CPU."""

import importlib
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import commands
import pytest

_BENCHMARKS = commands.TESTS.parent / 'benchmarks'
_SCRIPT = _BENCHMARKS / 'accelerator.sh'
# What an image with JAX does not have.
_ABSENT = ('clu', 'seqio', 't5', 'tensorflow', 'tensorflow_datasets')


@pytest.fixture
def load(monkeypatch):
  """Imports a benchmark; tests have modules of the same names."""
  monkeypatch.syspath_prepend(_BENCHMARKS)

  def load(file):
    name = f'benchmark_{pathlib.Path(file).stem}'
    spec = importlib.util.spec_from_file_location(name, _BENCHMARKS / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

  return load


@pytest.fixture
def image(tmp_path):
  """The environment of a machine without what an accelerator's lacks."""
  for name in _ABSENT:
    (tmp_path / f'{name}.py').write_text(
      f'raise ModuleNotFoundError("No module named {name!r}")'
    )
  return os.environ | {'PYTHON': sys.executable, 'PYTHONPATH': str(tmp_path)}


def _start(out, *arguments, environment):
  return subprocess.Popen(
    [_SCRIPT, out, '--tiny', *arguments],
    env=environment,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )


def _statuses(rows):
  return {r['job']: r['status'] for r in rows if r['metric'] == 'job_s'}


def test_shellcheck_is_clean():
  tool = shutil.which(
    'shellcheck', path=str(pathlib.Path(sys.executable).parent)
  )
  done = subprocess.run([tool, _SCRIPT], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


def test_all_jobs_have_options_that_their_benchmarks_know(load):
  accelerator = load('accelerator.py')
  parsers = {name: load(name)._parser() for name in accelerator._TINY}
  assert len({job.name for job in accelerator.JOBS}) == len(accelerator.JOBS)
  for job in accelerator.JOBS:
    script, *options = job.command.split()
    parsers[script].parse_args(options)
    tiny = accelerator._TINY[script].split()
    parsers[script].parse_args([*options, *tiny, '--json', 'x'])


def test_the_sizes_of_works_are_those_of_gin_models(load):
  works = load('works.py')
  for name in works.NAMES:
    assert works.make(name).network.vocab_size > 32000
  xl = works.network_of('t5_1_1_xl').config
  assert (xl.emb_dim, xl.dtype, xl.remat) == (2048, 'bfloat16', True)
  llama = works.network_of('llama3_2_1b', dtype='float32').config
  assert (llama.rope.factor, llama.dtype) == (32.0, 'float32')


def test_a_job_that_fails_or_hangs_leaves_the_others_rows(load, tmp_path):
  accelerator = load('accelerator.py')
  report = accelerator.Report(tmp_path / 'out.json', {'device': 'x'})
  good = accelerator.Job('good', 9, 'projection.py')
  report.add(good, [{'metric': 'seconds', 'value': 1.0}], 'ok', 1.0, None)
  assert report.complete
  bad = accelerator.Job('bad', 99, 'projection.py --work nothing')
  accelerator.run(bad, report, commands.TIMEOUT)
  hangs = accelerator.Job('hangs', 0.1, 'projection.py --work giga')
  accelerator.run(hangs, report, hangs.seconds)
  assert not report.complete
  rows = json.loads((tmp_path / 'out.json').read_text())
  assert _statuses(rows) == {
    'good': 'ok',
    'bad': 'failed',
    'hangs': 'timed out',
  }
  assert rows[0] == {
    'metric': 'seconds', 'value': 1.0, 'job': 'good', 'device': 'x',
  }  # fmt: skip
  assert "invalid choice: 'nothing'" in rows[2]['error']


def test_without_time_jobs_are_left_out_and_the_status_says_so(tmp_path, image):
  out = tmp_path / 'out.json'
  process = _start(
    out, '--seconds=1', '--jobs', 'step_small', environment=image
  )
  status, _, err = commands.finish(process)
  assert status == 1, err
  assert _statuses(json.loads(out.read_text())) == {'step_small': 'skipped'}


def test_a_folder_that_does_not_exist_is_refused(tmp_path, image):
  process = _start(tmp_path / 'no' / 'out.json', environment=image)
  status, _, err = commands.finish(process)
  assert status == 2
  assert f'there is no folder {tmp_path / "no"}' in err


@pytest.mark.slow
def test_jobs_leave_rows_without_tensorflow(tmp_path, image):
  out = tmp_path / 'out.json'
  names = ['projection_small', 'step_small', 'swap_small', 'mixed_small']
  process = _start(out, '--seconds=900', '--jobs', *names, environment=image)
  status, printed, err = commands.finish(process, timeout=900)
  log = out.with_suffix('.log').read_text()
  assert status == 0, printed + err + log
  rows = json.loads(out.read_text())
  assert _statuses(rows) == dict.fromkeys(names, 'ok')
  assert {r['device'] for r in rows} == {'cpu'}
  assert {'jax', 'platform', 'metric', 'value', 'unit'} <= set(rows[0])
  metrics = {(r['job'], r['metric']) for r in rows}
  assert metrics >= {
    ('projection_small', 'copy_gb_per_s'),
    ('projection_small', 'gb_per_s'),
    ('step_small', 'relative_to_full'),
    ('swap_small', 'swap_share'),
    ('mixed_small', 'mixed_batch_ratio'),
  }
  for script in ('train_step.py', 'serving.py'):
    figure = tmp_path / f'{script}.png'
    subprocess.run(
      [sys.executable, _BENCHMARKS / script, '--from', out, '--figure', figure],
      env=os.environ | {'PYTHONPATH': str(_BENCHMARKS.parent)},
      check=True,
    )
    assert figure.read_bytes().startswith(b'\x89PNG')


def test_sigterm_leaves_the_rows(tmp_path, image):
  out = tmp_path / 'out.json'
  process = _start(out, '--jobs', 'step_small', environment=image)
  deadline = time.monotonic() + commands.TIMEOUT
  while not out.with_suffix('.log').exists():
    assert time.monotonic() < deadline
    time.sleep(0.05)
  time.sleep(0.5)  # The job's process starts right after its log.
  process.send_signal(signal.SIGTERM)
  status, _, err = commands.finish(process)
  assert status == 128 + signal.SIGTERM, err
  assert _statuses(json.loads(out.read_text())) == {'step_small': 'stopped'}
