"""The path of the seed in a file: it is followed only where that is safe."""

import http.server
import json
import threading

import numpy as np
import pytest
import refusals
import safetensors.numpy
import stores
import subsets
import tiny_t5

from dst_t5x import subsets as subset_lib
from dst_t5x.checkpoints import seeds
from dst_t5x.checkpoints import t5x_checkpoint
from dst_t5x.core.errors import UserError

UNASKED = 'is not looked for in an object store unasked: set INITIAL_CHECKPOINT'


@pytest.fixture(scope='module')
def seed(tmp_path_factory):
  """A seed, its path, and a subset of it."""
  params = tiny_t5.random_params()
  folder = t5x_checkpoint.save(tmp_path_factory.mktemp('seed'), params, 3)
  found, _ = subsets.random_subset(params, 0.01, np.random.default_rng(0))
  return str(folder), found


def _write(path, seed, stated, **more):
  """Writes an untrusted file; returns its path."""
  reference = {'fingerprint': seed[1].fingerprint, 'path': stated, **more}
  subset_lib.save(path, seed[1], {'seed': reference})
  return str(path)


@pytest.fixture
def requests():
  """The requests that any object store received."""
  found = []

  class Refusing(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      found.append(self.path)
      self.send_response(404)
      self.send_header('Content-Length', '0')
      self.end_headers()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, *_):
      """Says nothing."""

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Refusing)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  url = f'http://127.0.0.1:{server.server_port}'
  try:
    with stores.at('s3', url), stores.at('gs', url):
      yield found
  finally:
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
  'stated',
  [
    's3://bucket/seed',
    'gs://bucket/seed',
    's3://bucket/seed.dst',
    'S3://bucket/seed',
    'simplecache::s3://bucket/seed',
    'http://127.0.0.1/seed',
    # As epath and normalization have it, these are in stores, too.
    '/s3/bucket/seed',
    '/gs/bucket/seed',
    '/tmp/../s3/bucket/seed',
    '../' * 40 + 's3/bucket/seed',
  ],
)
def test_a_store_is_not_asked_for_a_file(tmp_path, seed, requests, stated):
  path = _write(tmp_path / 'a.dst', seed, stated)
  with pytest.raises(UserError, match=UNASKED):
    seeds.load_seed(path)
  adapter = tmp_path / 'adapter'
  adapter.mkdir()
  config = {'base_model_name_or_path': stated, 'peft_type': 'LORA'}
  (adapter / 'adapter_config.json').write_text(json.dumps(config))
  tensors = {'base_model.model.shared.lora_A.weight': np.zeros((1, 2))}
  safetensors.numpy.save_file(tensors, adapter / 'adapter_model.safetensors')
  with pytest.raises(UserError, match=UNASKED):
    seeds.load_seed(adapter)
  assert requests == []
  # The seed that the user names is taken.
  assert seeds.load_seed(path, seed_path=seed[0]).format == 'dst'


def test_a_store_is_asked_for_the_user(tmp_path, seed, requests):
  path = _write(tmp_path / 'a.dst', seed, 's3://bucket/seed')
  with pytest.raises(UserError, match='cannot be loaded'):
    seeds.load_seed(path, seed_path='s3://bucket/seed')
  assert requests


def test_a_store_is_asked_for_a_file_that_is_in_it(seed):
  with stores.amazon() as store:
    t5x_checkpoint.save(f'{store}/seed', tiny_t5.random_params(), 3)
    path = _write(f'{store}/a.dst', seed, f'{store}/seed')
    assert seeds.load_seed(path).format == 'dst'
    for other in (f'{store}2/seed', 'gs://bucket/seed'):
      path = _write(f'{store}/b.dst', seed, other)
      with pytest.raises(UserError, match=UNASKED):
        seeds.load_seed(path)


@pytest.mark.parametrize('stated', [None, 7, 1.5, True, [], {}, '', 'a\0b.dst'])
def test_what_is_no_path(tmp_path, seed, stated):
  path = _write(tmp_path / 'a.dst', seed, stated)
  with pytest.raises(UserError, match=r'a\.dst says .*, which is no path: set'):
    seeds.load_seed(path)
  assert seeds.load_seed(path, seed_path=seed[0]).format == 'dst'


@pytest.mark.parametrize('step', [None, 'x', [1], 10**30])
def test_a_reference_of_the_wrong_types(tmp_path, seed, step):
  for kind in ('run', ['run'], None):
    path = _write(tmp_path / 'a.dst', seed, seed[0], format=kind, step=step)
    line = refusals.refusal(seeds.load_seed, path)
    assert (line is None) == (kind != ['run'])
    assert line is None or 'format must be' in line


@pytest.mark.parametrize('names', ['a', 'ab', 'abc'])
def test_a_file_that_is_its_own_seed(tmp_path, seed, names):
  for name, other in zip(names, names[1:] + names[0], strict=True):
    path = _write(
      tmp_path / f'{name}.dst', seed, str(tmp_path / f'{other}.dst')
    )
  with pytest.raises(UserError, match='is its own seed, directly or through'):
    seeds.load_seed(path)
  # Nothing of it is remembered.
  assert seeds.load_seed(path, seed_path=seed[0]).format == 'dst'
