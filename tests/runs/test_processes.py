"""Several real processes train together, over the loopback interface."""

import fcntl
import json
import shutil
import signal
import socket
import time

import commands
import numpy as np
import pytest

from dst_t5x import subsets

STEPS = 20
HOST = socket.gethostname()


def _start(module, count, *arguments, of_one=None):
  """Starts a binary as several processes.

  Args:
    module: a module of the package.
    count: the number of processes.
    *arguments: the arguments of all processes.
    of_one: process -> further arguments of that process.
  """
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  return [
    commands.start(
      module,
      *arguments,
      *(of_one or {}).get(process, []),
      environment={
        'COORDINATOR_ADDRESS': f'127.0.0.1:{port}',
        'NUM_PROCESSES': str(count),
        'PROCESS_ID': str(process),
        'JOIN_TIMEOUT': str(commands.TIMEOUT),
      },
    )
    for process in range(count)
  ]


def _finish(processes):
  """Waits for all processes; returns their exit status and errors."""
  timeout = commands.TIMEOUT * len(processes)  # They share the cores.
  try:
    ended = [commands.finish(process, timeout) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [status for status, _, _ in ended], [err for _, _, err in ended]


def _train(count, *arguments):
  statuses, errors = _finish(_start('train', count, *arguments))
  assert statuses == [0] * count, errors
  return errors


def _arguments(seed, folder, steps=STEPS, **more):
  return [
    *commands.dst(seed),
    *commands.flags(MODEL_DIR=folder, TRAIN_STEPS=steps, KEEP=2, **more),
  ]


def _rows(folder):
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def _assert_same_up_to_roundings(folder, other):
  for row, theirs in zip(_rows(folder), _rows(other), strict=True):
    assert row['step'] == theirs['step']
    for name in {'train/loss', 'train/accuracy', 'eval/loss'} & row.keys():
      assert row[name] == pytest.approx(theirs[name], rel=1e-5)
    assert row.get('free/total') == theirs.get('free/total')
  ours, _ = subsets.load(folder / 'last.dst')
  wanted, _ = subsets.load(other / 'last.dst')
  assert ours.size == wanted.size == 393
  common = sum(
    len(np.intersect1d(positions, wanted.positions.get(path, [])))
    for path, positions in ours.positions.items()
  )
  assert common >= 0.98 * ours.size


@pytest.fixture(scope='module')
def one(toy_seed, tmp_path_factory):
  """A run of one process."""
  folder = tmp_path_factory.mktemp('one') / 'run'
  commands.call('train', *_arguments(toy_seed, folder))
  return folder


@pytest.fixture(scope='module')
def two(toy_seed, tmp_path_factory):
  """The same run of two processes, and their output."""
  folder = tmp_path_factory.mktemp('two') / 'run'
  return folder, _train(2, *_arguments(toy_seed, folder))


def test_two_processes_train_as_one(one, two):
  _assert_same_up_to_roundings(two[0], one)


@pytest.mark.slow
def test_two_processes_measure_forgetting_as_one(toy_seed, tmp_path):
  results = []
  settings = {'HELD_OUT_TASK': 'prose', 'VOCABULARY': 'bytes'}
  for count in (1, 2):
    folder = tmp_path / str(count)
    _train(count, *_arguments(toy_seed, folder, 2, **settings))
    results.append(_rows(folder)[-1])
  for name in ('held_out/loss', 'held_out/forgetting'):
    assert results[1][name] == pytest.approx(results[0][name], abs=1e-5)
  assert results[0]['held_out/forgetting'] != 0


def test_what_is_written_is_written_once(one, two):
  folder, (first, second) = two
  assert 'subset: 393 parameters' in first
  assert f'2 processes, found by COORDINATOR_ADDRESS: {HOST}, {HOST}' in first
  assert 'subset: ' not in second
  assert 'step 10 of 20' not in second
  assert len(list(folder.glob('events.out.tfevents.*'))) == 1
  assert [row['step'] for row in _rows(folder)] == [10, 20, 20, 20]
  checkpoints = folder / 'checkpoints'
  assert sorted(p.name for p in checkpoints.iterdir()) == ['10', '20']
  names = {p.name for p in one.iterdir() if 'tfevents' not in p.name}
  assert {p.name for p in folder.iterdir() if 'events' not in p.name} == names
  whole = commands.checkpoint(folder).parameters(STEPS)
  assert subsets.from_arrays(whole).size == 393


def test_each_example_is_evaluated_once(one, two):
  def predictions(folder):
    [file] = (folder / 'evaluation').glob('toy-0*.jsonl')
    rows = map(json.loads, file.read_text().splitlines())
    return [row['input']['inputs_pretokenized'] for row in rows]

  assert len(predictions(two[0])) == 20
  assert predictions(two[0]) == predictions(one)


def _until(process, happened):
  deadline = time.monotonic() + commands.TIMEOUT
  while process.poll() is None and not happened():
    assert time.monotonic() < deadline
    time.sleep(0.01)
  assert process.poll() is None, process.communicate()


@pytest.mark.slow
def test_a_killed_process_ends_all_and_the_restart_is_exact(
  toy_seed, two, tmp_path
):
  folder = tmp_path / 'run'
  # Without a seed on the devices it is the same run, to the bit.
  arguments = _arguments(toy_seed, folder, KEEP_SEED=False)
  processes = _start('train', 2, *arguments)
  _until(processes[1], (folder / 'checkpoints' / '10').exists)
  start = time.monotonic()
  processes[1].kill()
  statuses, errors = _finish(processes)
  assert time.monotonic() - start < 60
  assert statuses == [1, -signal.SIGKILL], errors
  last = errors[0].splitlines()[-1]
  assert last.startswith(f'error: process 1 ({HOST}) has not been heard of')
  assert not (folder / 'last.dst').exists()
  _train(2, *arguments)
  ours, theirs = (f / 'last.dst' for f in (folder, two[0]))
  assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
def test_without_the_first_process_the_others_end_too(toy_seed, tmp_path):
  folder = tmp_path / 'run'
  processes = _start('train', 2, *_arguments(toy_seed, folder))
  _until(processes[1], (folder / 'run.json').exists)
  start = time.monotonic()
  processes[0].kill()
  statuses, errors = _finish(processes)
  assert time.monotonic() - start < 60
  assert statuses[0] == -signal.SIGKILL
  assert statuses[1] not in (0, None), errors
  # Most often it is JAX that says it: its connection is to that process.
  assert 'leader task was preempted/died' in errors[1] or (
    f'process 0 ({HOST}) cannot be reached any more' in errors[1]
  )


@pytest.mark.slow
def test_all_save_when_one_is_told_to_end(toy_seed, two, tmp_path):
  folder = tmp_path / 'run'
  arguments = _arguments(toy_seed, folder, 100_000, CHECKPOINT_PERIOD=1000)
  processes = _start('train', 2, *arguments)
  file = folder / 'metrics.jsonl'
  _until(processes[1], lambda: file.exists() and _rows(folder))
  processes[1].terminate()
  statuses, errors = _finish(processes)
  assert statuses == [128 + signal.SIGTERM] * 2, errors
  [step] = commands.checkpoint(folder).steps
  for err in errors:
    assert f'stopped after step {step}, by SIGTERM' in err.splitlines()[-1]
  assert step < STEPS
  _train(2, *_arguments(toy_seed, folder, CHECKPOINT_PERIOD=1000))
  ours, theirs = (f / 'last.dst' for f in (folder, two[0]))
  assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.slow
def test_an_interrupt_of_one_is_one_of_all(toy_seed, tmp_path):
  folder = tmp_path / 'run'
  processes = _start('train', 2, *_arguments(toy_seed, folder))
  _until(processes[1], (folder / 'run.json').exists)
  processes[1].send_signal(signal.SIGINT)
  statuses, errors = _finish(processes)
  assert statuses == [130, 130], errors
  assert errors[0].splitlines()[-1] == f'interrupted, in process 1 ({HOST})'
  assert errors[1].splitlines()[-1] == 'interrupted'
  assert not any('Traceback' in err for err in errors)


def test_what_is_wrong_on_one_host_ends_all(toy_seed, tmp_path):
  processes = _start(
    'preflight',
    2,
    *_arguments(toy_seed, tmp_path / 'run'),
    of_one={1: commands.flags(INITIAL_CHECKPOINT_PATH=tmp_path / 'none')},
  )
  statuses, errors = _finish(processes)
  assert statuses == [1, 1], errors
  for err in errors:
    line = err.splitlines()[-1]
    assert line.startswith('error: ')
    assert 'initial_checkpoint_path' in line
    assert f'process 1 ({HOST})' in line
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_folder_in_which_others_train(toy_seed, tmp_path):
  with (tmp_path / '.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    processes = _start('train', 2, *_arguments(toy_seed, tmp_path))
    statuses, errors = _finish(processes)
  assert statuses == [1, 1], errors
  for err in errors:
    last = err.splitlines()[-1]
    assert last.startswith('error: another process trains in MODEL_DIR')
  assert errors[1].splitlines()[-1].endswith(f', in process 0 ({HOST})')
  assert not (tmp_path / 'run.json').exists()


@pytest.mark.slow
def test_a_folder_that_is_not_shared(toy_seed, tmp_path):
  processes = _start(
    'train',
    2,
    *_arguments(toy_seed, tmp_path / 'run'),
    of_one={1: commands.flags(MODEL_DIR=tmp_path / 'other')},
  )
  statuses, errors = _finish(processes)
  assert statuses == [1, 1], errors
  assert all('is not the same folder as in process' in err for err in errors)
  assert not list(tmp_path.glob('*/checkpoints'))


@pytest.fixture(scope='module')
def four(toy_seed, tmp_path_factory):
  """Half a run of four processes, with all mesh axes and with data shards."""
  folder = tmp_path_factory.mktemp('four') / 'run'
  mesh = {'FSDP': 2, 'MODEL_PARALLELISM': 2}
  _train(
    4,
    *_arguments(toy_seed, folder, STEPS // 2, DATA_SHARDS=4, EVAL_EXAMPLES=4),
    *commands.flags(**mesh),
  )
  return folder


@pytest.fixture(scope='module')
def one_with_divided_data(toy_seed, tmp_path_factory):
  """The whole run by one process."""
  folder = tmp_path_factory.mktemp('divided') / 'run'
  for steps in STEPS // 2, STEPS:
    commands.call(
      'train',
      *_arguments(toy_seed, folder, steps, DATA_SHARDS=4, EVAL_EXAMPLES=4),
    )
  return folder


@pytest.mark.slow
@pytest.mark.parametrize('count', [1, 2])
def test_saved_by_four_processes_resumed_by_fewer(
  toy_seed, four, one_with_divided_data, tmp_path, count
):
  folder = tmp_path / 'run'
  shutil.copytree(four, folder)
  arguments = _arguments(toy_seed, folder, DATA_SHARDS=4, EVAL_EXAMPLES=4)
  if count == 1:
    commands.call('train', *arguments)
  else:
    _train(count, *arguments)
  _assert_same_up_to_roundings(folder, one_with_divided_data)
