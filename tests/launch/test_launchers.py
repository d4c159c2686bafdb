"""The scripts that train elsewhere, with stand-ins for gcloud, xpk and srun."""

import os
import pathlib
import shutil
import signal
import stat
import subprocess
import sys
import time

import commands
import pytest

_LAUNCH = commands.TESTS.parent / 'launch'
_FLAGS = ["--gin.PROMPT_LABELS=['a b', \"it's\"]", "--gin.MODEL_DIR='gs://b/r'"]
_SLICE = ['--name=dst', '--zone=us-central2-b', '--type=v4-16', '--poll=0']


@pytest.fixture
def cloud(tmp_path):
  """The stand-in's folder; its tools come first on PATH."""
  tool = tmp_path / 'tools' / 'gcloud'
  tool.parent.mkdir()
  tool.write_text(
    f'#!/bin/bash\nexec {sys.executable} {commands.TESTS}/fake_gcloud.py "$@"\n'
  )
  tool.chmod(stat.S_IRWXU)
  (tmp_path / 'calls').touch()
  return tmp_path


def _start(script, *arguments, folder=None):
  path = f'{folder / "tools"}{os.pathsep}' if folder else ''
  variables = {'PATH': path + os.environ['PATH'], 'FAKE': str(folder)}
  return subprocess.Popen(
    ['bash', _LAUNCH / script, *arguments],
    env=os.environ | variables,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )


def _run(script, *arguments, folder=None):
  return commands.finish(_start(script, *arguments, folder=folder))


def _verbs(cloud):
  """The calls that change something, without what repeats."""
  lines = (cloud / 'calls').read_text().splitlines()
  verbs = [line.split()[3] for line in lines]
  return [verb for verb in verbs if verb in ('create', 'scp', 'delete')]


def _wait_for(happened):
  deadline = time.monotonic() + commands.TIMEOUT
  while not happened():
    assert time.monotonic() < deadline
    time.sleep(0.02)


def test_shellcheck_is_clean():
  tool = shutil.which(
    'shellcheck', path=str(pathlib.Path(sys.executable).parent)
  )
  scripts = [*_LAUNCH.glob('*.sh'), *_LAUNCH.glob('*.sbatch')]
  assert len(scripts) == 4
  done = subprocess.run([tool, *scripts], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


def test_a_slice_is_made_used_and_deleted(cloud):
  (cloud / 'training').write_text(f'cp args {cloud}/args; echo step 10; exit 0')
  status, out, err = _run('tpu_pod.sh', *_SLICE, '--', *_FLAGS, folder=cloud)
  assert status == 0, err
  assert 'step 10' in out
  assert 'dst is ACTIVE' in err
  assert _verbs(cloud) == ['create', 'scp', 'delete']
  # Quoted through two shells, the flags arrive as they were given.
  assert (cloud / 'args').read_text().splitlines() == [
    '-m',
    'dst_t5x.train',
    *_FLAGS,
  ]


def test_all_that_training_needs_is_sent(cloud):
  sent = cloud / 'sent'
  (cloud / 'training').write_text(f'cp -r . {sent}; exit 0')
  status, _, err = _run('tpu_pod.sh', *_SLICE, '--', *_FLAGS, folder=cloud)
  assert status == 0, err
  for folder in ('dst_t5x', 'dst_t5x/gin', 'gin'):
    for file in (commands.TESTS.parent / folder).rglob('*.*'):
      if '__pycache__' not in file.parts:
        copy = sent / file.relative_to(commands.TESTS.parent)
        assert copy.read_bytes() == file.read_bytes()
  # The environment is the host's own.
  assert [path.name for path in sent.glob('.*')] == ['.venv']
  assert not (sent / 'runs').exists()


def test_training_that_fails_is_not_repeated(cloud):
  (cloud / 'training').write_text('echo error: no seed; exit 3')
  status, out, err = _run(
    'tpu_pod.sh', *_SLICE, '--keep', '--', *_FLAGS, folder=cloud
  )
  assert status == 1
  assert 'error: no seed' in out
  assert err.splitlines()[-1] == (
    'error: training ended with exit status 3; see MODEL_DIR'
  )
  assert _verbs(cloud) == ['create', 'scp']
  assert _run('tpu_pod.sh', *_SLICE, '--delete', folder=cloud)[0] == 0
  assert _verbs(cloud) == ['create', 'scp', 'delete']


def _kill_training(cloud):
  for host in ('host0', 'host1'):
    pid = int((cloud / host / 'dst_t5x' / 'pid').read_text())
    os.killpg(pid, signal.SIGKILL)


def _is_training(cloud):
  return all(
    (cloud / host / 'dst_t5x' / 'pid').exists()
    and (cloud / host / 'dst_t5x' / 'args').exists()
    for host in ('host0', 'host1')
  )


@pytest.mark.parametrize('what', ['preempted', 'restarted'])
def test_training_goes_on_after_a_loss(cloud, what):
  (cloud / 'training').write_text('sleep 1000')
  process = _start('tpu_pod.sh', *_SLICE, '--', *_FLAGS, folder=cloud)
  _wait_for(lambda: _is_training(cloud))
  # Whoever watches may go, and come again.
  os.killpg(process.pid, signal.SIGINT)
  status, _, err = commands.finish(process)
  assert status == 130
  assert '--delete ends it' in err
  process = _start('tpu_pod.sh', *_SLICE, '--', *_FLAGS, folder=cloud)
  (cloud / 'training').write_text('exit 0')
  if what == 'preempted':
    (cloud / 'state').write_text('SUSPENDED')
  _kill_training(cloud)
  status, _, err = commands.finish(process)
  assert status == 0, err
  assert 'once more' in err
  again = ['delete', 'create', 'scp'] if what == 'preempted' else ['scp']
  assert _verbs(cloud) == ['create', 'scp', *again, 'delete']


def test_training_goes_on_where_it_was_told_to_stop(cloud):
  (cloud / 'training').write_text(
    '[ ! -e ../stopped ] || exit 0; touch ../stopped; exit 143'
  )
  status, _, err = _run('tpu_pod.sh', *_SLICE, '--', *_FLAGS, folder=cloud)
  assert status == 0, err
  assert 'has lost its training: once more' in err
  assert _verbs(cloud) == ['create', 'scp', 'scp', 'delete']


def test_a_dry_run_prints_every_command():
  status, out, err = _run(
    'tpu_pod.sh', *_SLICE, '--spot', '--project=p', '--dry_run', '--', *_FLAGS
  )
  assert (status, err) == (0, '')
  lines = out.splitlines()
  assert lines[0] == (
    'gcloud compute tpus queued-resources create dst --node-id=dst '
    '--accelerator-type=v4-16 --runtime-version=tpu-ubuntu2204-base --spot '
    '--zone=us-central2-b --project=p'
  )
  verbs = [line.split()[4] for line in lines if line.startswith('gcloud')]
  assert verbs == [
    'create', 'describe', 'scp', 'ssh', 'ssh', 'ssh', 'ssh', 'delete',
  ]  # fmt: skip


def test_gke_hands_over_the_command(cloud):
  tool = cloud / 'tools' / 'xpk'
  tool.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {cloud}/args\n')
  tool.chmod(stat.S_IRWXU)
  place = ['--cluster=c', '--zone=z', '--type=v5p-8']
  status, _, err = _run(
    'gke.sh', '--name=dst', *place, '--', *_FLAGS, folder=cloud
  )
  assert status == 0, err
  arguments = (cloud / 'args').read_text().splitlines()
  assert arguments[:4] == ['workload', 'create', '--workload', 'dst']
  # The container's shell gives training the flags as they were given.
  shell = 'pip() { :; }; python() { printf "%s\\n" "$@"; }; ' + arguments[-1]
  done = subprocess.run(['bash', '-c', shell], capture_output=True, text=True)
  assert done.stdout.splitlines() == ['-m', 'dst_t5x.train', *_FLAGS]


def test_slurm_script_prints_and_runs(cloud):
  status, out, _ = _run('slurm.sbatch', '--dry_run', *_FLAGS)
  assert status == 0
  tool = cloud / 'tools' / 'srun'
  tool.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
  tool.chmod(stat.S_IRWXU)
  status, ran, _ = _run('slurm.sbatch', *_FLAGS, folder=cloud)
  assert ran.splitlines()[1:] == ['python', '-m', 'dst_t5x.train', *_FLAGS]
  done = subprocess.run(
    ['bash', '-c', out.replace('srun ', 'printf "%s\\n" ', 1)],
    capture_output=True,
    text=True,
  )
  assert done.stdout == ran


@pytest.mark.parametrize(
  ('script', 'arguments', 'message'),
  [
    ('tpu_pod.sh', [], 'set --name=…'),
    ('tpu_pod.sh', ['--nam=x'], 'unknown option --nam=x'),
    ('tpu_pod.sh', ['--name=X', '--zone=z'], '--name=X: small letters'),
    ('tpu_pod.sh', ['--name=x', '--zone=z'], 'set --type=…'),
    ('tpu_pod.sh', [*_SLICE, '--dry_run'], "training's flags are missing"),
    (
      'tpu_pod.sh',
      [*_SLICE, '--dry_run', '--', '--gin.MODEL_DIR=/tmp/x'],
      'set --gin.MODEL_DIR="\'gs://…\'"',
    ),
    ('gke.sh', ['--name=x'], 'set --cluster=…'),
    ('slurm.sbatch', [], 'give the flags'),
  ],
)
def test_mistakes_have_one_line(script, arguments, message):
  status, out, err = _run(script, *arguments)
  assert (status, out) == (1, '')
  assert err.startswith(f'error: {message}')
  assert err.count('\n') == 1
