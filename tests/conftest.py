"""What all tests share: JAX on the CPU, quiet TensorFlow, the shared data."""

import os
import pathlib
import platform
import tempfile

from absl import logging
import commands
import gin
import pytest

# Before anything imports JAX or TensorFlow: both read these only once. Other
# accelerators may be present, but exact comparisons are made for the CPU.
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
os.environ.setdefault('CUDA_VISIBLE_DEVICES', '')

_REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


def pytest_configure(config):
  """What one test compiles, others need not, nor the next run.

  So, too, the processes they start, and xdist's workers, which inherit the
  folder. `pytest --cache-clear` empties it; without pytest's cache
  (`-p no:cacheprovider`) the next run compiles again.
  """
  if 'PYTEST_XDIST_WORKER' not in os.environ:
    os.environ |= {
      'JAX_COMPILATION_CACHE_DIR': _folder_for_programs(config),
      # To add a program takes longer the more there are: no trifles.
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
      'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '-1',
      # With a largest size, JAX locks: nobody reads what is half written.
      'JAX_COMPILATION_CACHE_MAX_SIZE': str(2**27),
    }


def _folder_for_programs(config):
  if not hasattr(config, 'cache'):
    folder = tempfile.TemporaryDirectory(prefix='dst_t5x-')
    config.add_cleanup(folder.cleanup)
    return folder.name
  # The programs are of this machine's kind.
  return str(config.cache.mkdir(f'compiled-{platform.node()}'))


@pytest.fixture(autouse=True)
def nothing_is_left():
  """What a test binds or silences, even if it fails, is so for it alone."""
  logger = logging.get_absl_logger()
  level = logger.level
  yield
  gin.clear_config()
  logger.setLevel(level)


@pytest.fixture(scope='session')
def repository() -> pathlib.Path:
  """The root folder of the checkout."""
  return _REPOSITORY


@pytest.fixture(scope='session')
def shared_data() -> pathlib.Path:
  """The folder of shared data: `DST_SHARED`, else `../shared/data`."""
  folder = pathlib.Path(
    os.environ.get('DST_SHARED', _REPOSITORY.parent / 'shared' / 'data')
  )
  if not folder.is_dir():
    pytest.skip(f'no shared data at {folder}; set DST_SHARED to its folder')
  return folder


@pytest.fixture(scope='session')
def toy_seed(tmp_path_factory) -> pathlib.Path:
  """A run that pretrained the toy model; treat it as read-only."""
  folder = tmp_path_factory.mktemp('toy') / 'seed'
  commands.call(
    'train',
    *commands.PRETRAIN,
    *commands.flags(MODEL_DIR=folder, TRAIN_STEPS=60, EVAL_EXAMPLES=4),
  )
  return folder


@pytest.fixture(scope='session')
def toy_run(toy_seed, tmp_path_factory) -> pathlib.Path:
  """An uninterrupted run of DST from `toy_seed`; treat it as read-only."""
  folder = tmp_path_factory.mktemp('toy') / 'run'
  commands.run(
    'train',
    *commands.dst(toy_seed),
    *commands.flags(MODEL_DIR=folder, TRAIN_STEPS=40, KEEP=2),
    # Equal bits must not hang on the shared cache.
    environment={'JAX_ENABLE_COMPILATION_CACHE': 'false'},
  )
  return folder
