"""Runs that are killed, interrupted or repeated end as if they were not."""

import json
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import uuid

import commands
import pytest

from dst_t5x import subsets

STEPS = 40


def _wait_for(process, happened):
  """Waits until a condition holds or the process ends."""
  deadline = time.monotonic() + commands.TIMEOUT
  while process.poll() is None and not happened():
    assert time.monotonic() < deadline
    time.sleep(0.002)


def _interrupt(arguments, happened, how=signal.SIGKILL):
  """Starts a run and sends it a signal; returns exit status and errors."""
  process = commands.start('train', *arguments)
  _wait_for(process, happened)
  process.send_signal(how)
  status, _, err = commands.finish(process)
  return status, err


def _saving(folder):
  """Returns whether a checkpoint is being written now."""
  return any('tmp' in p.name for p in (folder / 'checkpoints').glob('*'))


def _logged(folder, step):
  file = folder / 'metrics.jsonl'
  return file.exists() and f'"step": {step},' in file.read_text()


def _python(program):
  return subprocess.run(
    [sys.executable, '-c', textwrap.dedent(program)],
    capture_output=True,
    text=True,
    timeout=commands.TIMEOUT,
  )


def test_ctrl_c_in_a_destructor_is_not_lost():
  done = _python("""
    import signal, time
    from dst_t5x.runtime import interrupts

    class Hit:
      def __del__(self):
        signal.raise_signal(signal.SIGINT)
        print('not reached')

    interrupts.listen()
    for _ in range(2):
      try:
        Hit()  # It is gone at once, and Python drops what that raises.
        time.sleep(10)
        print('lost')
      except KeyboardInterrupt:
        print('interrupted')
  """)
  assert done.stdout.split() == ['interrupted'] * 2
  assert done.returncode == 0
  assert not done.stderr


def test_ctrl_c_while_xla_compiles():
  done = _python("""
    import signal, threading
    import jax
    import jax.numpy as jnp
    from dst_t5x.config import binaries as config

    def compile(argv):
      def function(x):
        for i in range(1000):
          x = jnp.sin(x @ x) + jnp.sort(x, axis=i % 2)
        return x

      jax.config.update('jax_enable_compilation_cache', False)
      lowered = jax.jit(function).lower(jnp.ones((64, 64)))
      main = threading.main_thread().ident
      threading.Timer(0.5, signal.pthread_kill, [main, signal.SIGINT]).start()
      lowered.compile()
      print('compiled')

    config.command(compile)
  """)
  assert not done.stdout
  assert done.stderr == 'interrupted\n'
  assert done.returncode == 130


def test_what_fails_because_of_ctrl_c_is_no_error_of_its_own():
  done = _python("""
    import contextlib, signal
    from dst_t5x.config import binaries as config

    @contextlib.contextmanager
    def careless():
      try:
        yield
      finally:
        assert False, 'Concurrent access?'

    def work(argv):
      with careless():
        signal.raise_signal(signal.SIGINT)

    config.command(work)
  """)
  assert done.stderr == 'interrupted\n'
  assert done.returncode == 130


def _assert_same(folder, other):
  assert commands.fingerprint(folder) == commands.fingerprint(other)
  assert _metrics(folder) == _metrics(other)


def _metrics(folder):
  """Returns the rows of metrics without values that depend on the clock."""
  rows = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
  return [
    {k: v for k, v in row.items() if not k.startswith(('speed/', 'free/churn'))}
    for row in rows
    if row['step'] % 10 == 0
  ]


def test_a_killed_run_ends_as_an_uninterrupted_one(toy_seed, toy_run, tmp_path):
  folder = tmp_path / 'killed'
  arguments = [
    *commands.dst(toy_seed),
    *commands.flags(MODEL_DIR=folder, TRAIN_STEPS=STEPS, KEEP=2),
  ]
  checkpoints = folder / 'checkpoints'
  for happened in (
    lambda: _saving(folder),  # Nothing is whole yet.
    lambda: (checkpoints / '20').exists() and _saving(folder),
  ):
    status, err = _interrupt(arguments, happened)
    assert status == -signal.SIGKILL, err
  commands.call('train', *arguments)
  assert (folder / 'last.dst').read_bytes() == (
    toy_run / 'last.dst'
  ).read_bytes()
  _assert_same(folder, toy_run)


def test_full_finetuning_goes_on_after_signals(toy_seed, tmp_path):
  def arguments(folder):
    plan = commands.flags(MODEL_DIR=folder, TRAIN_STEPS=30)
    return [*commands.finetune(toy_seed, 'full'), *plan]

  whole, folder = tmp_path / 'whole', tmp_path / 'interrupted'
  commands.call('train', *arguments(whole))
  checkpoints = folder / 'checkpoints'
  # Long before the end, which is only a blink away.
  status, err = _interrupt(
    arguments(folder), lambda: _logged(folder, 10), signal.SIGINT
  )
  assert status == 130, err
  assert err.splitlines()[-1] == 'interrupted'
  assert 'Traceback' not in err
  status, err = _interrupt(
    arguments(folder),
    lambda: (checkpoints / '20').exists() or _saving(folder),
  )
  assert status == -signal.SIGKILL, err
  commands.call('train', *arguments(folder))
  _assert_same(folder, whole)
  assert not (folder / 'last.dst').exists()


def test_a_run_that_is_told_to_end_saves_before(toy_seed, toy_run, tmp_path):
  folder = tmp_path / 'run'
  arguments = [
    *commands.dst(toy_seed),
    *commands.flags(MODEL_DIR=folder, KEEP=2, CHECKPOINT_PERIOD=1000),
  ]
  status, err = _interrupt(
    [*arguments, *commands.flags(TRAIN_STEPS=100_000)],
    lambda: _logged(folder, 10),
    signal.SIGTERM,
  )
  assert status == 128 + signal.SIGTERM, err
  [step] = commands.checkpoint(folder).steps
  assert 10 < step < STEPS
  assert err.splitlines()[-1] == (
    f'stopped after step {step}, by SIGTERM: checkpoint {step} is whole; the '
    'same command goes on from there'
  )
  commands.call('train', *arguments, *commands.flags(TRAIN_STEPS=STEPS))
  ours, theirs = (f / 'last.dst' for f in (folder, toy_run))
  assert ours.read_bytes() == theirs.read_bytes()


def test_a_finished_run_writes_a_missing_subset_file_again(
  toy_seed, toy_run, tmp_path
):
  folder = tmp_path / 'run'
  shutil.copytree(toy_run, folder)
  wanted = (folder / 'last.dst').read_bytes()
  metrics = (folder / 'metrics.jsonl').read_bytes()
  arguments = [
    *commands.dst(toy_seed),
    *commands.flags(MODEL_DIR=folder, TRAIN_STEPS=STEPS, KEEP=2),
  ]
  # What a kill after the last checkpoint leaves behind.
  (folder / 'last.dst').unlink()
  part = folder / f'.{uuid.uuid4().hex}.part'
  part.write_bytes(wanted[:50])
  status, _, err = commands.finish(commands.start('train', *arguments))
  assert status == 0, err
  assert 'nothing left to train' in err
  assert (folder / 'last.dst').read_bytes() == wanted
  assert (folder / 'metrics.jsonl').read_bytes() == metrics
  assert not part.exists()


@pytest.mark.slow
def test_a_pipeline_that_cannot_be_saved_is_read_again(
  toy_seed, toy_run, tmp_path
):
  folder = tmp_path / 'generator'
  arguments = [
    *commands.dst(toy_seed),
    *commands.flags(
      MODEL_DIR=folder,
      TRAIN_STEPS=STEPS,
      MIXTURE_OR_TASK_NAME='toy_generator_fragile',
      EVAL_PERIOD=10,
    ),
  ]
  # It ends with an error while TensorFlow's generator is still there.
  broken = {'TOY_BREAKS': 'now'}
  process = commands.start('train', *arguments, environment=broken)
  status, _, err = commands.finish(process)
  assert status == 1
  assert err.count('to resume, all batches are read again') == 1
  assert 'finalizing GeneratorDataset' not in err
  assert (folder / 'checkpoints' / '10').exists()
  commands.call('train', *arguments)
  # The same rows in the same order as those of the task `toy`.
  last, _ = subsets.load(folder / 'last.dst')
  wanted, _ = subsets.load(toy_run / 'last.dst')
  assert last.size == wanted.size
  for name, values in wanted.values.items():
    assert last.values[name].tobytes() == values.tobytes()


def test_only_one_process_trains_in_a_folder(toy_seed, tmp_path):
  folder = tmp_path / 'run'
  arguments = [*commands.dst(toy_seed), *commands.flags(MODEL_DIR=folder)]
  first = commands.start('train', *arguments)
  try:
    _wait_for(first, lambda: (folder / 'run.json').exists())
    before = (folder / 'run.json').stat().st_mtime_ns
    status, _, err = commands.finish(commands.start('train', *arguments))
    assert status == 1
    assert err.splitlines()[-1].startswith('error: another process trains in')
    assert (folder / 'run.json').stat().st_mtime_ns == before
  finally:
    first.kill()
    commands.finish(first)


def test_an_older_checkpoint_half_deleted_does_not_matter(
  toy_seed, toy_run, tmp_path
):
  folder = tmp_path / 'run'
  shutil.copytree(toy_run, folder)
  files = [p for p in (folder / 'checkpoints/30').rglob('*') if p.is_file()]
  for file in files[: len(files) // 2]:
    file.unlink()
  commands.call(
    'train',
    *commands.dst(toy_seed),
    *commands.flags(MODEL_DIR=folder, TRAIN_STEPS=STEPS + 1, KEEP=1),
  )
  kept = [p.name for p in (folder / 'checkpoints').iterdir()]
  assert kept == [str(STEPS + 1)]


@pytest.mark.slow
def test_what_the_projection_remembers_is_resumed(toy_seed, tmp_path):
  ends = []
  for name, stops in {'whole': [12], 'in two': [7, 12]}.items():
    for steps in stops:
      commands.call(
        'train',
        *commands.dst(toy_seed),
        *commands.flags(
          MODEL_DIR=tmp_path / name,
          TRAIN_STEPS=steps,
          EVAL_EXAMPLES=4,
          LEARNING_RATE=0.3,
          CHURN=False,
          KEEP_SEED=False,
          SILOS='none',
          NORMALIZATION='mean',
        ),
      )
    ends.append(commands.fingerprint(tmp_path / name))
  assert ends[0] == ends[1]
  assert ends[0] != (12, commands.fingerprint(toy_seed)[1])
