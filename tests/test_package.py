"""The package as others install it: the wheel, and what it may import."""

import email
import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

import dst_t5x
from dst_t5x.config import gin_files

_METHOD_FILES = [
  'method.distances',
  'method.silos',
  'method.budgets',
  'method.thresholds',
  'method.projection',
  'subsets',
]
_TOO_HEAVY = ['flax', 'gin', 'optax', 'orbax', 'seqio', 'tensorflow']


def _build(kind, source, folder):
  """Builds through the standard hook (PEP 517), without a network."""
  folder.mkdir()
  code = (
    'from setuptools import build_meta; '
    f'print(build_meta.build_{kind}({str(folder)!r}))'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=source, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  return folder / done.stdout.splitlines()[-1]


@pytest.fixture(scope='module')
def built(repository, tmp_path_factory):
  """A folder with `sdist`, `wheel`, and the wheel's contents in `unpacked`."""
  root = tmp_path_factory.mktemp('built')
  # Building leaves traces beside setup.py: not in the checkout, please.
  (root / 'source').mkdir()
  for name in ('setup.py', 'pyproject.toml', 'README.md', 'LICENSE'):
    shutil.copy(repository / name, root / 'source')
  for name in ('dst_t5x', 'gin', 'launch', 'tasks'):
    shutil.copytree(repository / name, root / 'source' / name, symlinks=True)
  (root / 'sdist').symlink_to(_build('sdist', root / 'source', root / 'a'))
  (root / 'wheel').symlink_to(_build('wheel', root / 'source', root / 'b'))
  with zipfile.ZipFile(root / 'wheel') as wheel:
    wheel.extractall(root / 'unpacked')
  return root


def _run(built, *arguments):
  """Runs Python with the unpacked wheel, from a folder of its own."""
  (built / 'elsewhere').mkdir(exist_ok=True)
  return subprocess.run(
    [sys.executable, *arguments],
    cwd=built / 'elsewhere',
    env=os.environ | {'PYTHONPATH': str(built / 'unpacked')},
    capture_output=True,
    text=True,
    timeout=300,
  )


def _names(wheel):
  with zipfile.ZipFile(wheel) as archive:
    return sorted(n for n in archive.namelist() if not n.endswith('/RECORD'))


def test_wheel_holds_the_whole_package_and_nothing_else(built, repository):
  expected = {
    'dst_t5x/analysis/paper.json',
    'dst_t5x/py.typed',
    'dst_t5x/serving/page.html',
  }
  for folder, pattern in (
    ('dst_t5x', '**/*.py'),
    ('gin', '**/*.gin'),
    ('tasks', '**/*.py'),
    ('launch', '*.py'),
    ('launch', '*.s*'),
    ('launch', 'sweeps/*.gin'),
    ('launch', 'sweeps/**/*.yaml'),
  ):
    prefix = '' if folder == 'dst_t5x' else 'dst_t5x/'
    for path in (repository / folder).glob(pattern):
      expected.add(prefix + path.relative_to(repository).as_posix())
  found = {n for n in _names(built / 'wheel') if '.dist-info/' not in n}
  assert found == expected
  assert any(name.startswith('dst_t5x/gin/') for name in found)
  assert 'dst_t5x/tasks/gsm8k.py' in found


def test_wheel_from_the_sdist_is_the_same(built, tmp_path):
  with tarfile.open(built / 'sdist') as archive:
    archive.extractall(tmp_path, filter='data')
  (source,) = tmp_path.iterdir()
  wheel = _build('wheel', source, tmp_path / 'wheel')
  assert _names(wheel) == _names(built / 'wheel')


def test_metadata(built, repository):
  (path,) = (built / 'unpacked').glob('*.dist-info/METADATA')
  metadata = email.message_from_string(path.read_text(encoding='utf-8'))
  assert metadata['Version'] == dst_t5x.__version__
  assert set(metadata['Requires-Python'].split(',')) == {'>=3.11', '<3.14'}
  assert metadata['License-Expression'] == 'Apache-2.0'
  readme = (repository / 'README.md').read_text(encoding='utf-8')
  assert metadata.get_payload().strip() == readme.strip()
  requirements = metadata.get_all('Requires-Dist')
  # Everything comes from the package registry, but for genuine T5X.
  sources = [line for line in requirements if '@' in line]
  assert len(sources) == 3
  assert all(line.endswith('extra == "t5x"') for line in sources)
  assert [line for line in requirements if line.startswith('jax<')]


def test_gin_files_are_found_in_the_wheel_from_another_folder(built):
  code = (
    'import dst_t5x; from dst_t5x.config import gin_files; '
    'print(dst_t5x.__file__); '
    'print(*gin_files.shipped()); '
    "print(gin_files.find('gin/models/t5_1_1_tiny.gin'))"
  )
  done = _run(built, '-c', code)
  assert done.returncode == 0, done.stderr
  package = (built / 'unpacked' / 'dst_t5x').resolve()
  init, shipped, tiny = done.stdout.splitlines()
  assert pathlib.Path(init).resolve() == package / '__init__.py'
  assert shipped.split() == gin_files.shipped()
  assert pathlib.Path(tiny).resolve() == package / 'gin/models/t5_1_1_tiny.gin'


@pytest.mark.slow
def test_the_binary_runs_from_the_wheel(built):
  done = _run(built, '-m', 'dst_t5x.train', '--help')
  assert done.returncode == 0, done.stderr
  assert 'usage: python -m dst_t5x.train' in done.stdout
  for name in gin_files.shipped():
    assert f'  {name}' in done.stdout.splitlines()
  done = _run(
    built, '-m', 'dst_t5x.train', '--gin_file=gin/models/t5_1_1_tny.gin'
  )
  assert done.returncode == 1
  assert done.stderr.splitlines()[-1] == (
    "error: there is no gin file 'gin/models/t5_1_1_tny.gin'; did you mean "
    "'gin/models/t5_1_1_tiny.gin'?"
  )


@pytest.mark.parametrize('name', _METHOD_FILES)
def test_the_method_needs_jax_and_numpy_only(name, repository):
  code = (
    f'import sys, dst_t5x.{name}; '
    f'print(*[m for m in {_TOO_HEAVY} if m in sys.modules])'
  )
  done = subprocess.run(
    [sys.executable, '-c', code], cwd=repository, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout.split() == []


# Those for T5X import it: see tests/t5x/test_gin.py.
_OURS = [n for n in gin_files.shipped() if not n.startswith('gin/t5x/')]


@pytest.mark.parametrize('name', _OURS)
def test_gin_file_parses(name):
  origins = {}
  gin_files.read_file(name, origins)
  assert origins
  assert {origin.author for origin in origins.values()} == {
    gin_files.Author.PACKAGE
  }
  assert gin_files.macro_lines(name) is not None


def test_launchers_need_no_jax(built):
  code = (
    'import sys; from dst_t5x.launch import sweep; sweep.main(sys.argv[1:]); '
    'print(*{"jax", "flax", "tensorflow"}.intersection(sys.modules))'
  )
  sweep = 'launch/sweeps/table_7.yaml'
  done = _run(built, '-c', code, sweep, '--dry_run')
  assert done.returncode == 0, done.stderr
  *commands, modules = done.stdout.splitlines()
  assert len(commands) == 36
  assert commands[0].startswith('python -m dst_t5x.train --gin_file=gin/models')
  assert modules == ''


def test_tensorflow_datasets_is_the_one_asked_for():
  # seqio-nightly drags in tfds-nightly, whose files have the same names.
  import tensorflow_datasets

  assert tensorflow_datasets.__version__ == importlib.metadata.version(
    'tensorflow-datasets'
  )


@pytest.mark.parametrize(
  'module', ['runtime.quiet_tensorflow', 'tasks', 'runs.inference']
)
def test_tensorflow_is_loaded_without_a_word(repository, module):
  code = (
    f'import dst_t5x.{module}\n'
    'import seqio, sys, tensorflow\n'
    'tensorflow.constant(1)\n'
    "print('heard', file=sys.stderr)"
  )
  environment = dict(os.environ)
  environment.pop('TF_CPP_MIN_LOG_LEVEL', None)
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=repository,
    env=environment,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert done.stderr == 'heard\n'


def test_the_tests_need_no_cache_of_pytest(repository):
  done = subprocess.run(
    [
      *(sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', '-q'),
      *(
        '--collect-only',
        str(repository / 'tests' / 'core' / 'test_output_encoding.py'),
      ),
    ],
    capture_output=True,
    check=False,
    cwd=repository,
    env={k: v for k, v in os.environ.items() if 'PYTEST' not in k},
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
