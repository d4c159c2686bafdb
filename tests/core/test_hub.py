"""`hf://`: the real `huggingface_hub`, its cache, and a server beside it."""

import http.server
import json
import threading

import decoder_only
from huggingface_hub import constants
import pytest

from dst_t5x.checkpoints import hf_checkpoint
from dst_t5x.checkpoints import seeds
from dst_t5x.core import errors
from dst_t5x.core import hub
from dst_t5x.data import vocabulary

_COMMIT = 'c0ffee' + '0' * 34
_NAME = 'hf://some-lab/tiny.model'


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """A cache of the Hub's with one model."""
  monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
  folder = tmp_path / 'hub' / 'models--some-lab--tiny.model'
  (folder / 'refs').mkdir(parents=True)
  (folder / 'refs' / 'main').write_text(_COMMIT)
  (folder / 'refs' / 'v1').write_text(_COMMIT)
  model, params, _ = decoder_only.pair('smollm2')
  hf_checkpoint.save(
    folder / 'snapshots' / _COMMIT,
    params,
    model,
    companions={'tokenizer.json': b'{}', 'tokenizer_config.json': b'{}'},
  )
  return folder


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
  ],
)
def test_what_is_not_there_is_refused_without_a_network(
  cache, offline, path, message
):
  with pytest.raises(errors.UserError, match=message) as caught:
    seeds.load_seed(path)
  assert '\n' not in str(caught.value)
  assert str(caught.value).startswith(path)


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
  ],
)
def test_what_the_hub_refuses_is_one_line(cache, server, path, message):
  with pytest.raises(errors.UserError, match=message) as caught:
    hub.snapshot(path)
  assert '\n' not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_one_line(cache, monkeypatch):
  monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
  with pytest.raises(errors.UserError, match='cannot be reached') as caught:
    hub.snapshot('hf://lab/other')
  assert '\n' not in str(caught.value)
  # What is in the cache is taken.
  assert hub.snapshot(_NAME)[1] == f'{_NAME}@{_COMMIT}'
