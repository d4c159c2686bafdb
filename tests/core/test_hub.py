"""`hf://`: the real `huggingface_hub`, its cache, and a server beside it."""

import http.server
import json
import shutil
import threading

import decoder_only
import hub_cache
import huggingface_hub
from huggingface_hub import constants
import numpy as np
import pytest
import subsets as subset_tools

from dst_t5x import subsets
from dst_t5x.checkpoints import hf_checkpoint
from dst_t5x.checkpoints import seeds
from dst_t5x.core import errors
from dst_t5x.core import hub
from dst_t5x.data import vocabulary
from dst_t5x.subsets import torch as torch_subsets

_COMMIT = hub_cache.COMMIT
_NAME = 'hf://some-lab/tiny.model'


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """A cache of the Hub's with one model."""
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
  folder = hub_cache.repository(tmp_path / 'hub', 'some-lab/tiny.model')
  model, params, _ = decoder_only.pair('smollm2')
  hf_checkpoint.save(
    folder,
    params,
    model,
    companions={'tokenizer.json': b'{}', 'tokenizer_config.json': b'{}'},
  )
  return folder.parent.parent


@pytest.fixture
def offline(monkeypatch):
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)


@pytest.mark.parametrize('revision', ['', '@main', '@v1', f'@{_COMMIT}'])
def test_a_model_of_the_cache_is_a_seed_without_a_network(
  cache, offline, revision
):
  seed = seeds.load_seed(_NAME + revision)
  local = seeds.load_seed(cache / 'snapshots' / _COMMIT)
  assert seed.fingerprint == local.fingerprint
  reference = seed.reference
  assert reference['path'] == f'{_NAME}@{_COMMIT}'
  assert reference['name'] == f'some-lab/tiny.model@{_COMMIT}'
  assert reference['format'] == 'hf'
  again = seeds.seed_of(reference, 'a run', None)
  assert again.fingerprint == seed.fingerprint
  assert set(seed.companions()) == {'tokenizer.json', 'tokenizer_config.json'}


def test_its_tokenizer_is_a_vocabulary(cache, offline):
  found = vocabulary.chosen(_NAME)
  assert found.folder == cache / 'snapshots' / _COMMIT


@pytest.mark.parametrize(
  ('path', 'message'),
  [
    ('hf://some-lab/other', 'not in the cache of the Hub'),
    (f'{_NAME}@v2', 'not in the cache of the Hub'),
    ('hf://alone', 'must be hf://organisation/name'),
    ('hf://a/b/c', 'must be hf://organisation/name'),
    ('hf://a/b@', 'must be hf://organisation/name'),
    ('hf://a/b@../../x', 'must be hf://organisation/name'),
    ('hf://../b', 'must be hf://organisation/name'),
    ('hf://a/b/../x.dst', 'must be hf://organisation/name'),
    ('hf://a/b/c/x.dst', 'must be hf://organisation/name'),
    ('hf://a/b/.dst', 'must be hf://organisation/name'),
    (f'{_NAME}/a.dst', r'there is no subset a\.dst'),
    (f'{_NAME}@v2/a.dst', 'not in the cache of the Hub'),
  ],
)
def test_what_is_not_there_is_refused_without_a_network(
  cache, offline, path, message
):
  with pytest.raises(errors.UserError, match=message) as caught:
    seeds.load_seed(path)
  assert '\n' not in str(caught.value)
  assert str(caught.value).startswith(path)


@pytest.fixture
def tuned(cache):
  """A repository on the Hub with two subsets of the model; their parameters."""
  seed = seeds.load_seed(cache / 'snapshots' / _COMMIT)
  files = hub_cache.repository(cache.parent, 'some-lab/subsets')
  (files / 'history').mkdir(parents=True)
  params = {}
  for i, name in enumerate(('gsm8k.dst', 'epsilon=1e-3.dst')):
    random = np.random.default_rng(i)
    found, params[name] = subset_tools.random_subset(seed.params, 0.01, random)
    about = {'seed': {'path': f'{_NAME}@{_COMMIT}'}, 'step': 7}
    subsets.save(files / name, found, about)
  shutil.copy(files / 'gsm8k.dst', files / 'history' / '0.dst')
  return params


_SUBSETS = 'hf://some-lab/subsets'


@pytest.mark.parametrize('revision', ['', '@main', '@v1', f'@{_COMMIT}'])
@pytest.mark.parametrize('file', ['gsm8k.dst', 'epsilon=1e-3.dst'])
def test_a_subset_of_the_cache_is_a_seed_without_a_network(
  tuned, offline, revision, file
):
  path = f'{_SUBSETS}{revision}/{file}'
  seed = seeds.load_seed(path)
  subset_tools.assert_same(seed.params, tuned[file])
  assert (seed.format, seed.step) == ('dst', 7)
  assert seed.reference['path'] == f'{_SUBSETS}@{_COMMIT}/{file}'
  assert set(seed.companions()) == {'tokenizer.json', 'tokenizer_config.json'}
  again = seeds.seed_of(seed.reference, 'a run', None)
  assert again.fingerprint == seed.fingerprint
  # The base as the user names it.
  again = seeds.load_seed(path, seed_path=_NAME)
  assert again.fingerprint == seed.fingerprint
  assert subsets.load(path)[0].size == torch_subsets.load(path).size > 0


def test_the_only_subset_of_a_repository(cache, tuned, offline):
  assert hub.subsets(_SUBSETS) == [
    f'{_SUBSETS}@{_COMMIT}/{name}' for name in sorted(tuned)
  ]
  with pytest.raises(errors.UserError, match='has 2 subsets: name one, hf'):
    seeds.load_seed(_SUBSETS)
  folder = cache.parent / 'models--some-lab--subsets' / 'snapshots' / _COMMIT
  (folder / 'epsilon=1e-3.dst').unlink()
  seed = seeds.load_seed(_SUBSETS)
  assert seed.path == f'{_SUBSETS}@{_COMMIT}/gsm8k.dst'
  # What cannot be named is not there.
  (folder / 'gsm8k.dst').rename(folder / '-a\n.dst')
  with pytest.raises(errors.UserError, match=r'there is no subset \*\.dst'):
    seeds.load_seed(_SUBSETS)


def test_a_subset_downloads_no_seed_unasked(cache, tuned, offline, monkeypatch):
  shutil.rmtree(cache)
  asked, real = [], huggingface_hub.snapshot_download

  def download(name, **options):
    if not options.get('local_files_only'):
      asked.append(name)
    return real(name, **options)

  monkeypatch.setattr(huggingface_hub, 'snapshot_download', download)
  with pytest.raises(errors.UserError, match='not downloaded unasked') as error:
    seeds.load_seed(f'{_SUBSETS}/gsm8k.dst')
  assert '\n' not in str(error.value)
  command = f'`hf download some-lab/tiny.model --revision={_COMMIT}`'
  assert command in str(error.value)
  assert asked
  assert set(asked) == {'some-lab/subsets'}


@pytest.mark.parametrize(
  'stated', ['hf://a', 'hf://a/b\nc', 'hf://../../b', 'hf://a/b@\x1b[2J', 7]
)
def test_odd_places_of_a_seed(tuned, offline, tmp_path, stated):
  found, _ = subsets.load(f'{_SUBSETS}/gsm8k.dst')
  subsets.save(tmp_path / 'odd.dst', found, {'seed': {'path': stated}})
  with pytest.raises(errors.UserError, match='its seed') as error:
    seeds.load_seed(tmp_path / 'odd.dst')
  assert str(error.value).isprintable()


class _Hub(http.server.BaseHTTPRequestHandler):
  """Answers as the Hub does."""

  def do_GET(self) -> None:
    for name, (status, code) in {
      'missing': (404, 'RepoNotFound'),
      'gated': (403, 'GatedRepo'),
      'private': (401, 'RepoNotFound'),
      'old': (404, 'RevisionNotFound'),
    }.items():
      if f'/{name}' in self.path:
        self.send_response(status)
        self.send_header('X-Error-Code', code)
        self.send_header('X-Error-Message', code)
        self.end_headers()
        self.wfile.write(json.dumps({'error': code}).encode())

  def do_HEAD(self) -> None:
    self.do_GET()

  def log_message(self, *args) -> None:
    pass


@pytest.fixture
def server(monkeypatch):
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), _Hub) as running:
    url = f'http://127.0.0.1:{running.server_port}'
    monkeypatch.setattr(constants, 'ENDPOINT', url)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield
    running.shutdown()


@pytest.mark.parametrize(
  ('path', 'message'),
  [
    ('hf://lab/missing', 'is not on the Hub, or is private'),
    ('hf://lab/private', 'is not on the Hub, or is private'),
    ('hf://lab/gated', 'is gated: accept its terms on .*lab/gated'),
    ('hf://lab/old@v9', 'has no revision v9'),
    ('hf://lab/gated/a.dst', 'is gated: accept its terms on .*lab/gated'),
  ],
)
def test_what_the_hub_refuses_is_one_line(cache, server, path, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    seeds.load_seed(path)
  assert '\n' not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_one_line(cache, monkeypatch):
  monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
  with pytest.raises(errors.UserError, match='cannot be reached') as caught:
    hub.snapshot('hf://lab/other')
  assert '\n' not in str(caught.value)
  # What is in the cache is taken.
  assert hub.snapshot(_NAME)[1] == f'{_NAME}@{_COMMIT}'
  with pytest.raises(errors.UserError, match='a subset, not a model'):
    hub.snapshot('hf://lab/other/a.dst')
