"""What all tests share: JAX on the CPU, quiet TensorFlow, the shared data."""

import fcntl
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
# Most of what tests compile runs a few times: LLVM need not make it fast.
if 'xla_backend_optimization_level' not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = commands.xla_flags(
    '--xla_backend_optimization_level=0'
  )

_REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
  """A run in which most tests are skipped has not tested a stack."""
  parser.addoption(
    '--passed-at-least',
    type=int,
    default=0,
    metavar='N',
    help='fail if fewer tests than this pass',
  )


def pytest_sessionfinish(session, exitstatus):
  """Fails a run with too few passed tests; xdist's controller counts."""
  reporter = session.config.pluginmanager.get_plugin('terminalreporter')
  least = session.config.getoption('--passed-at-least')
  if 'PYTEST_XDIST_WORKER' in os.environ or reporter is None:
    return
  passed = len(reporter.stats.get('passed', ()))
  if exitstatus == pytest.ExitCode.OK and passed < least:
    session.exitstatus = pytest.ExitCode.TESTS_FAILED
    reporter.write_line(f'error: {passed} tests passed, not {least} or more')


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


@pytest.fixture(autouse=True, scope='module')
def few_programs():
  """Forgets compiled programs before they are too many for a process.

  XLA maps memory for each kernel, Linux allows 65,530 maps, and a compilation
  that gets no more aborts.
  """
  yield
  maps = pathlib.Path('/proc/self/maps')
  if maps.exists() and maps.read_bytes().count(b'\n') > 15_000:
    import jax

    jax.clear_caches()


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
  return _made_once(
    tmp_path_factory,
    'seed',
    lambda folder: commands.call(
      'train',
      *commands.PRETRAIN,
      *commands.flags(MODEL_DIR=folder, TRAIN_STEPS=60, EVAL_EXAMPLES=4),
    ),
  )


@pytest.fixture(scope='session')
def toy_run(toy_seed, tmp_path_factory) -> pathlib.Path:
  """An uninterrupted run of DST from `toy_seed`; treat it as read-only."""
  return _made_once(
    tmp_path_factory,
    'run',
    lambda folder: commands.run(
      'train',
      *commands.dst(toy_seed),
      *commands.flags(MODEL_DIR=folder, TRAIN_STEPS=40, KEEP=2),
      # Equal bits must not depend on the shared cache.
      environment={'JAX_ENABLE_COMPILATION_CACHE': 'false'},
    ),
  )


def _made_once(tmp_path_factory, name, make):
  """Returns a folder that one of xdist's workers makes for all of them."""
  root = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    root = root.parent  # Each worker has a folder in it.
  folder = root / f'toy_{name}' / name
  folder.parent.mkdir(exist_ok=True)
  made = folder.with_name('made')
  with folder.with_name('lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not made.exists():
      make(folder)
      made.touch()
  return folder
