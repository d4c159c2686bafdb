"""T5X's binaries on the toy task, in this process or a separate one."""

import contextlib
import importlib
import os
import pathlib
import subprocess
import sys

import commands
import gin

TESTS = pathlib.Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
TOY = f'--gin_file={TESTS / "toy.gin"}'
FUNCTIONS = {'train': 'train', 'eval': 'evaluate', 'infer': 'infer'}


def call(name, *flags):
  """Does in this process what `python -m t5x.<name>` does."""
  module = importlib.import_module(f't5x.{name}')
  function = getattr(module, FUNCTIONS[name])
  with parsed(name, *flags):
    configured = gin.get_configurable(function)
    return configured(shard_id=0) if name == 'infer' else configured()


@contextlib.contextmanager
def parsed(name, *flags):
  """The gin configuration of a binary, as T5X parses it."""
  from t5x import gin_utils

  module = importlib.import_module(f't5x.{name}')
  main, sys.modules['__main__'] = sys.modules['__main__'], module
  try:
    files = [f.partition('=')[2] for f in flags if f.startswith('--gin_file=')]
    bindings = [
      f.removeprefix('--gin.') for f in flags if f.startswith('--gin.')
    ]
    gin_utils.parse_gin_flags([os.fspath(ROOT)], files, bindings)
    yield module
  finally:
    sys.modules['__main__'] = main
    gin.clear_config()


def start(log, name, *flags):
  """Starts `python -m t5x.<name>` with its output in the file `log`."""
  paths = [ROOT, TESTS, os.environ.get('PYTHONPATH', '')]
  with open(log, 'w', encoding='utf-8') as output:
    return subprocess.Popen(
      [sys.executable, '-m', f't5x.{name}', *map(str, flags)],
      cwd=ROOT,
      env=os.environ | {'PYTHONPATH': os.pathsep.join(map(str, paths))},
      stdout=output,
      stderr=output,
    )


def finetune(seed, method, folder, **bindings):
  """Returns the flags of a short run from a seed, with dropout."""
  return [
    TOY,
    f'--gin_file=gin/methods/{method}.gin',
    '--gin_file=gin/t5x/finetune.gin',
    *commands.flags(
      **{
        'INITIAL_CHECKPOINT_PATH': seed,
        'MODEL_DIR': folder,
        'TRAIN_STEPS': 20,
        'BATCH_SIZE': 16,
        'DROPOUT_RATE': 0.1,
        'EVAL_PERIOD': 20,
        'EVAL_STEPS': 1,
        'EVAL_EXAMPLES': 4,
        'EVAL_BATCH_SIZE': 4,
        'CHECKPOINT_PERIOD': 10,
        'KEEP': 3,
        **({'EPSILON': 0.01} if method in ('dst', 'random') else {}),
        **bindings,
      }
    ),
  ]
