"""What commands print under the locales of others."""

import os
import subprocess
import sys

import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
import subsets

from dst_t5x import subsets as subset
from dst_t5x.core import output_encoding

_C = {'LC_ALL': 'C', 'PYTHONUTF8': '0', 'PYTHONCOERCECLOCALE': '0'}
_LOCALES = [
  {'PYTHONIOENCODING': 'ascii'},
  {'PYTHONIOENCODING': 'latin-1'},
  _C,
]


def _run(repository, environment, *arguments):
  clean = {k: v for k, v in os.environ.items() if not k.startswith('PYTHON')}
  done = subprocess.run(
    [sys.executable, '-m', *map(str, arguments)],
    capture_output=True,
    env=clean | {'PYTHONPATH': str(repository)} | environment,
    check=False,
    timeout=240,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout.decode(environment.get('PYTHONIOENCODING', 'ascii'))


@pytest.mark.parametrize('environment', _LOCALES)
@pytest.mark.parametrize('module', ['dst_t5x.score', 'launch.sweep'])
def test_help_is_printed_under_any_locale(repository, environment, module):
  assert _run(repository, environment, module, '--help').startswith('usage: ')


@pytest.mark.slow
@pytest.mark.parametrize('environment', _LOCALES)
def test_help_of_a_binary(repository, environment):
  found = _run(repository, environment, 'dst_t5x.train', '--help')
  assert '--gin_file=...' in found
  assert 'EPSILON' in found


@pytest.mark.parametrize('environment', _LOCALES)
def test_tables_are_printed_under_any_locale(repository, environment, tmp_path):
  path = tmp_path / 'a.dst'
  seed = subsets.seed_tree()
  found, _ = subsets.random_subset(seed, 0.5, np.random.default_rng(0))
  subset.save(path, found, {'seed': {'path': 'ε'}})
  assert '###' in _run(repository, environment, 'dst_t5x.subset', 'info', path)


def test_characters_are_spelt():
  spelt = 'ε … █░ 5−3 a–b — 2·3 ≥ θ 你 \udc80'.encode(
    'ascii', 'dst_t5x.output_encoding'
  )
  assert (
    spelt.decode() == r'epsilon ... #- 5-3 a-b - 2*3 >= theta \u4f60 \udc80'
  )


@hypothesis.settings(deadline=None)
@hypothesis.given(
  st.text(st.characters()), st.sampled_from(['ascii', 'latin-1', 'cp437'])
)
def test_whatever_can_be_encoded_stays(text, encoding):
  expected = ''.join(
    char if _fits(char, encoding) else output_encoding._ascii(char)
    for char in text
  )
  assert (
    text.encode(encoding, 'dst_t5x.output_encoding').decode(encoding)
    == expected
  )


def _fits(char, encoding):
  try:
    char.encode(encoding)
  except UnicodeEncodeError:
    return False
  return True


def test_importing_the_package_leaves_streams_alone(repository):
  code = 'import dst_t5x, sys; sys.exit(sys.stdout.errors != "strict")'
  subprocess.run(
    [sys.executable, '-c', code],
    env=os.environ
    | {'PYTHONPATH': str(repository), 'PYTHONIOENCODING': 'utf8'},
    check=True,
  )
