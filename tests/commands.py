"""Runs the binaries on the toy task."""

import importlib
import json
import os
import pathlib
import subprocess
import sys

import forked

TESTS = pathlib.Path(__file__).resolve().parent
TOY = f'--gin_file={TESTS / "toy.gin"}'
PRETRAIN = [
  TOY,
  '--gin_file=gin/runs/pretrain.gin',
  '--gin.BATCH_SIZE=16',
  '--gin.LEARNING_RATE_WARMUP_STEPS=10',
]
# Command -> the module and the function that do its work.
_BINARIES = {
  'eval': ('runs.evaluating', 'evaluate'),
  'estimate': ('planning.estimate', 'estimate'),
  'infer': ('runs.inference', 'infer'),
  'prepare_batches': ('runs.batch_sets', 'prepare'),
  'prepare_data': ('data.preparation', 'prepare_data'),
  'show_task': ('data.task_report', 'show_task'),
  'train': ('runs.training', 'train'),
}
TIMEOUT = 240  # Seconds; some twenty times what an idle machine takes.


def call(module, *arguments):
  """Runs a binary in this process: TensorFlow need not be imported again."""
  # Not above: conftest imports this module before it sets JAX up.
  from dst_t5x.config import binaries

  binaries.parse(list(map(str, arguments)), binary(module))()


def binary(module):
  """Returns what gin configures for `python -m dst_t5x.<module>`."""
  room, name = _BINARIES[module]
  return getattr(importlib.import_module(f'dst_t5x.{room}'), name)


def start(module, *arguments, environment=None, prefix=()):
  """Starts `python -m dst_t5x.<module>`, perhaps through another program."""
  variables = forked.environment(**(environment or {}))
  name, words = f'dst_t5x.{module}', list(map(str, arguments))
  if not prefix and forked.can_run_with(variables):
    return forked.Process(name, words, variables)
  return subprocess.Popen(
    [*prefix, sys.executable, '-m', name, *words],
    env=variables,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def finish(process, timeout=TIMEOUT):
  """Waits for a process; returns exit status, output and errors."""
  try:
    out, err = process.communicate(timeout=timeout)
  except subprocess.TimeoutExpired as e:
    process.kill()
    out, err = process.communicate()
    raise AssertionError(f'still running after {timeout} s: {err}') from e
  return process.returncode, out, err


def run(module, *arguments, environment=None):
  """Runs a binary that must succeed, as a process; returns its output."""
  status, out, err = finish(start(module, *arguments, environment=environment))
  assert status == 0, err
  return out


def xla_flags(*more):
  """Returns XLA_FLAGS with more flags than this process has."""
  return ' '.join(filter(None, [os.environ.get('XLA_FLAGS'), *more]))


def rows_on_eight_devices(script, timeout=300):
  """Returns the rows of JSON that one of our scripts prints on 8 devices."""
  done = subprocess.run(
    [sys.executable, TESTS / script],
    env=os.environ
    | {
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': xla_flags('--xla_force_host_platform_device_count=8'),
      'PYTHONPATH': str(TESTS.parent),
    },
    capture_output=True,
    text=True,
    timeout=timeout,
  )
  assert done.returncode == 0, done.stderr
  return [json.loads(line) for line in done.stdout.splitlines()]


def flags(**bindings):
  """Returns `--gin.NAME=VALUE` for each keyword."""
  texts = {
    name: str(value) if isinstance(value, pathlib.Path) else value
    for name, value in bindings.items()
  }
  return [f'--gin.{name}={value!r}' for name, value in texts.items()]


def finetune(seed, method):
  """Returns the arguments of a short run from a seed, with dropout."""
  return [
    TOY,
    f'--gin_file=gin/methods/{method}.gin',
    '--gin_file=gin/runs/finetune.gin',
    *flags(
      INITIAL_CHECKPOINT_PATH=seed,
      BATCH_SIZE=16,
      DROPOUT_RATE=0.1,
      EVAL_PERIOD=20,
      CHECKPOINT_PERIOD=10,
    ),
  ]


def dst(seed):
  """Returns the arguments of a short run of DST."""
  return [*finetune(seed, 'dst'), '--gin.EPSILON=0.01']


def checkpoint(folder):
  """Returns a run's checkpoints, for reading."""
  from dst_t5x.checkpoints import run_folder

  return run_folder.RunFolder(folder, read_only=True)


def fingerprint(folder):
  """Returns what `python -m dst_t5x.fingerprint` prints: step and hash."""
  from dst_t5x.checkpoints import seeds

  seed = seeds.load_seed(folder)
  return seed.step, seed.fingerprint
