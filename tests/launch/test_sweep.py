"""Sweeps of real runs: isolation, resumption, interruption, elsewhere."""

import json
import os
import pathlib
import shlex
import signal
import stat
import subprocess
import sys
import time

import commands
import psutil
import pytest

from dst_t5x.core.errors import UserError
from dst_t5x.launch import grid
from dst_t5x.launch import slurm
from dst_t5x.launch import sweep as sweep_binary
from dst_t5x.launch import worker


def _environment(**variables):
  paths = [commands.TESTS.parent, commands.TESTS]
  return (
    os.environ
    | {'PYTHONPATH': os.pathsep.join(map(str, paths)), 'JAX_PLATFORMS': 'cpu'}
    | variables
  )


def _start(*arguments, **variables):
  return subprocess.Popen(
    [sys.executable, '-m', 'launch.sweep', *map(str, arguments)],
    env=_environment(**variables),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _sweep(*arguments, **variables):
  """Returns exit status, output and errors."""
  return commands.finish(_start(*arguments, **variables))


def _file(tmp_path, seed, text):
  path = tmp_path / 'toy.yaml'
  path.write_text(
    f'model: {commands.TESTS / "toy.gin"}\n'
    f'INITIAL_CHECKPOINT_PATH: {seed}\nBATCH_SIZE: 16\nTRAIN_STEPS: 10\n'
    f'CHECKPOINT_PERIOD: 10\nEVAL_EXAMPLES: 4\n{text}'
  )
  return path


def _wait_for(process, happened):
  deadline = time.monotonic() + commands.TIMEOUT
  while not happened():
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < deadline
    time.sleep(0.05)


def _logged(folder):
  """Whether a run has made steps."""
  file = folder / 'metrics.jsonl'
  return file.exists() and file.stat().st_size > 0


def _states(output):
  rows = json.loads((output / 'runs.json').read_text())
  return {row['name']: row for row in rows}


def test_what_fails_or_crashes_stops_nothing_else(toy_seed, tmp_path):
  path = _file(
    tmp_path,
    toy_seed,
    'method: dst\ngrids:\n'
    '- {EPSILON: [0.1], TRAIN_STEPS: 1000000}\n'
    '- {EPSILON: [0.2], INITIAL_CHECKPOINT_PATH: /nowhere}\n'
    '- {EPSILON: [0.3]}\n',
  )
  output = tmp_path / 'out'
  process = _start(path, f'--output={output}')
  _wait_for(process, lambda: _steps_saved(output / 'toy_dst_epsilon=0.1'))
  [child] = psutil.Process(process.pid).children()
  assert _states(output)['toy_dst_epsilon=0.1']['state'] == 'running'
  sweep_binary.main([str(path), f'--output={output}', '--table'])
  child.kill()
  status, out, _ = commands.finish(process)
  assert status == 1
  found = _states(output)
  assert [row['state'] for row in found.values()] == [
    'failed',
    'failed',
    'finished',
  ]
  first, second, third = found.values()
  assert 'ended by SIGKILL' in first['error']
  assert second['error'].startswith(
    'error: there is no /nowhere: nothing called'
  )
  assert second['error'] in out
  assert 'toy/exact_match' in third['scores']
  # In a process that did other things before, the bits are the same.
  commands.call(
    'train',
    commands.TOY,
    '--gin_file=gin/methods/dst.gin',
    '--gin_file=gin/runs/finetune.gin',
    *commands.flags(
      INITIAL_CHECKPOINT_PATH=toy_seed,
      BATCH_SIZE=16,
      TRAIN_STEPS=10,
      CHECKPOINT_PERIOD=10,
      EVAL_EXAMPLES=4,
      EPSILON=0.3,
      MODEL_DIR=tmp_path / 'alone',
    ),
  )
  run = output / 'toy_dst_epsilon=0.3'
  assert commands.fingerprint(run) == commands.fingerprint(tmp_path / 'alone')
  # Once more: what is finished is left alone, what was killed goes on.
  before = (run / 'report.json').stat().st_mtime_ns
  path = _file(tmp_path, toy_seed, 'method: dst\nEPSILON: [0.1, 0.3]\n')
  step = _steps_saved(output / 'toy_dst_epsilon=0.1')
  status, out, err = _sweep(
    path, f'--output={output}', f'--gin.TRAIN_STEPS={step + 10}'
  )
  assert status == 0, err
  assert (run / 'report.json').stat().st_mtime_ns > before  # More steps.
  log = (output / 'toy_dst_epsilon=0.1' / 'log.txt').read_text()
  assert f'resumed {output}/toy_dst_epsilon=0.1 at step {step}' in log
  status, out, _ = _sweep(
    path, f'--output={output}', f'--gin.TRAIN_STEPS={step + 10}', '--budget'
  )
  assert status == 0
  assert out.splitlines()[1].split()[:5] == ['toy', 'dst', '2', '0', '0']


def _steps_saved(folder):
  steps = [p.name for p in (folder / 'checkpoints').glob('*')]
  return max((int(name) for name in steps if name.isdigit()), default=0)


def test_ctrl_c_stops_all_runs(toy_seed, tmp_path):
  path = _file(tmp_path, toy_seed, 'method: [dst, full]\n')
  output = tmp_path / 'out'
  more = [f'--output={output}', '--gin.TRAIN_STEPS=1000000', '--parallel=2']
  process = _start(path, *more)
  _wait_for(
    process,
    lambda: _logged(output / 'toy_dst') and _logged(output / 'toy_full'),
  )
  children = psutil.Process(process.pid).children()
  assert len(children) == 2
  status, _, err = _sweep(path, *more)
  assert (status, err) == (1, f'error: another sweep is at work in {output}\n')
  process.send_signal(signal.SIGINT)
  status, out, err = commands.finish(process)
  assert status == 130
  assert err.splitlines()[-1] == 'interrupted; the same command goes on'
  assert not any(child.is_running() for child in children)
  assert [row['state'] for row in _states(output).values()] == 2 * ['stopped']
  assert out.splitlines()[-1] == '2 runs: 2 stopped'
  # Killed, the sweep leaves no process behind either.
  process = _start(path, *more, '--only=*full')
  _wait_for(process, lambda: psutil.Process(process.pid).children())
  children = psutil.Process(process.pid).children()
  process.kill()
  commands.finish(process)
  psutil.wait_procs(children, timeout=commands.TIMEOUT)
  assert not any(child.is_running() for child in children)


def test_mistakes_are_found_first(toy_seed, toy_run, tmp_path, capsys):
  path = _file(tmp_path, toy_seed, 'method: [full, dst]\n')
  status, _, err = _sweep(
    path, f'--output={tmp_path}/o', '--gin.LEARNING_RAT=3'
  )
  assert status == 1
  assert err.splitlines()[-1] == (
    'error: toy_full: LEARNING_RAT is not used by this configuration; did you '
    "mean 'LEARNING_RATE'?"
  )
  assert not (tmp_path / 'o' / 'toy_full').exists()
  # The folder of another run.
  (tmp_path / 'o' / 'toy_dst').symlink_to(toy_run)
  status, _, err = _sweep(path, f'--output={tmp_path}/o')
  assert status == 1
  assert err.splitlines()[-1].startswith(
    f'error: toy_dst: the run in MODEL_DIR {tmp_path}/o/toy_dst has '
  )
  assert sweep_binary.main([str(path), '--only=x']) == 1
  assert capsys.readouterr().err == (
    "error: no run is called 'x': see --dry_run\n"
  )


@pytest.mark.parametrize('name', grid.shipped())
def test_the_papers_sweeps_make_sense(name, tmp_path, capsys):
  sweep_binary.main([name, '--dry_run'])
  lines = capsys.readouterr().out.splitlines()
  kinds = {}
  for line in lines:
    kinds.setdefault(' '.join(line.split('--gin.')[:1]), line)
  for line in kinds.values():
    flags = shlex.split(line)[3:]
    assert worker.check_run(flags, str(tmp_path)) == {'error': '', 'work': {}}


_SBATCH = """#!{python}
# Runs the tasks of an array job, once it has returned.
import os, shlex, subprocess, sys
if not os.path.basename(sys.argv[0]) == 'sbatch':
  sys.exit()
lines = open(sys.argv[1]).read().splitlines()
options = dict(
  line.removeprefix('#SBATCH --').split('=', 1)
  for line in lines if line.startswith('#SBATCH --') and '=' in line
)
print(sorted(options.items()), file=open(os.environ['OPTIONS'], 'w'))
first, last = options['array'].split('%')[0].split('-')
command = next(line for line in lines if line.startswith('srun '))
print('Submitted batch job 7', flush=True)
if os.fork():
  sys.exit()
for stream in (0, 1, 2):
  os.dup2(os.open(os.devnull, os.O_RDWR), stream)
for task in range(int(first), int(last) + 1):
  variables = dict(
    SLURM_JOB_ID=str(100 + task), SLURM_ARRAY_JOB_ID='7',
    SLURM_ARRAY_TASK_ID=str(task), SLURM_NTASKS='1', SLURM_PROCID='0',
    SLURM_LOCALID='0', SLURM_JOB_NUM_NODES='1', SLURM_NODEID='0',
    SLURM_JOB_NODELIST='here', SUBMITIT_EXECUTOR='slurm',
  )
  words = shlex.split(command)
  words = words[[i for i, w in enumerate(words) if 'python' in w][0]:]
  subprocess.run(words, env=os.environ | variables)
open(os.environ['OPTIONS'] + '.done', 'w').close()
"""


@pytest.mark.slow
def test_slurm(toy_seed, tmp_path):
  for name in ('sbatch', 'srun', 'sacct'):
    tool = tmp_path / 'bin' / name
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(_SBATCH.format(python=sys.executable))
    tool.chmod(stat.S_IRWXU)
  variables = {
    'PATH': f'{tool.parent}{os.pathsep}{os.environ["PATH"]}',
    'OPTIONS': str(tmp_path / 'options'),
  }
  path = _file(tmp_path, toy_seed, 'method: [full, norms]\n')
  arguments = [path, f'--output={tmp_path}/out', '--on=slurm', '--parallel=3']
  status, out, err = _sweep(
    *arguments, '--', '--time=1-2', '--gpus-per-node=8', **variables
  )
  assert status == 0, err
  assert out.splitlines()[1].split()[:2] == ['toy_full', 'submitted']
  options = (tmp_path / 'options').read_text()
  assert "('time', '1560')" in options
  assert "('gpus-per-node', '8')" in options
  assert "('array', '0-1%2')" in options
  done = tmp_path / 'options.done'
  deadline = time.monotonic() + commands.TIMEOUT
  while not done.exists():
    assert time.monotonic() < deadline
    time.sleep(0.1)
  status, out, _ = _sweep(*arguments, '--table', **variables)
  assert out.splitlines()[-1] == '2 runs: 2 finished'


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ([], r'how long may a run take\? Give -- --time=8:00:00'),
    (['--time=long'], '--time=long: write hours:minutes:seconds'),
    (['partition=x'], 'is not of the form --name=value'),
    (['--time=5'], 'there is no sbatch'),
  ],
)
def test_mistakes_about_slurm(options, message, tmp_path, monkeypatch):
  monkeypatch.setenv('PATH', str(tmp_path))
  with pytest.raises(UserError, match=message):
    slurm.submit({}, options, 1, tmp_path)


@pytest.mark.parametrize(
  ('time', 'minutes'),
  [('30', 30), ('30:59', 30), ('8:00:00', 480), ('1-2', 1560), ('2-0:5', 2885)],
)
def test_slurms_forms_of_time(time, minutes):
  assert slurm._minutes(time) == minutes


def test_commands_for_other_places(tmp_path, capsys):
  path = tmp_path / 'x.yaml'
  path.write_text('model: xl\nmethod: dst\nEPSILON: [1e-4]\n')
  more = [f'--output=gs://b/{tmp_path.name}', '--dry_run']
  for where, options, start in (
    (
      'local',
      [],
      'python -m dst_t5x.train --gin_file=gin/models/t5_1_1_xl.gin',
    ),
    ('slurm', ['--time=8:00'], "sbatch --time=8:00 '--wrap=python -m dst_t5x"),
    ('tpu', ['--zone=z'], 'bash {here}/tpu_pod.sh --zone=z --name=r-xl-dst-'),
    ('gke', ['--zone=z'], 'bash {here}/gke.sh --zone=z --name=r-xl-dst-eps'),
  ):
    tail = ['--', *options] if options else []
    assert not sweep_binary.main([str(path), *more, f'--on={where}', *tail])
    here = pathlib.Path(sweep_binary.__file__).parent
    assert capsys.readouterr().out.startswith(start.format(here=here))
