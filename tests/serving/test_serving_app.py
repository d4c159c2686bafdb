"""The server over HTTP, in this process; test_serve.py has a separate one."""

import base64
import threading
import time

from fastapi import testclient
import numpy as np
import pytest
import serving
import subsets

from dst_t5x import subsets as subset_lib
from dst_t5x.serving import app as app_lib
from dst_t5x.serving import library as library_lib

SIZES = serving.BYTES
TEXTS = ['ab', 'a longer text', '']


def _subset(number, share=0.02):
  seed = serving.seed(**SIZES)
  random = np.random.default_rng(number)
  found, tuned = subsets.random_subset(seed, share, random)
  assert found.fingerprint == serving.fingerprint(**SIZES)
  return found, tuned


def _file(number, share=0.02, about=None):
  return subset_lib.to_bytes(_subset(number, share)[0], about or {})


@pytest.fixture
def make(tmp_path):
  """Returns a function that starts a server; ends all servers afterwards."""
  clients = []

  def start(limits=None, token=None, hosts=None, **options):
    service = serving.service(tmp_path, limits, **options)
    app = app_lib.create_app(service, token, hosts)
    client = testclient.TestClient(app, raise_server_exceptions=False)
    client.__enter__()
    clients.append(client)
    client.service = service
    return client

  yield start
  for client in clients:
    client.__exit__(None, None, None)


def _expected(texts, params):
  return [serving.answer(text, params) for text in texts]


def _generate(client, status=200, **request):
  response = client.post('/generate', json=request)
  assert response.status_code == status, response.text
  content = response.json()
  if status == 200:
    return [output['text'] for output in content['outputs']]
  assert '\n' not in content['error']
  return content['error']


def test_subsets_by_name_and_the_seed(make):
  client = make()
  assert _generate(client, inputs=TEXTS) == _expected(
    TEXTS, serving.seed(**SIZES)
  )
  for number in (1, 2):
    blob = _file(number, about={'task': str(number), 'secret': 'x'})
    response = client.put(f'/subsets/s{number}', content=blob)
    assert response.status_code == 201, response.text
  listing = client.get('/subsets').json()
  assert [s['name'] for s in listing['subsets']] == ['s1', 's2']
  assert listing['seed'] == serving.fingerprint(**SIZES)
  last = listing['subsets'][1]
  assert (last['size'], last['bytes']) == (_subset(2)[0].size, len(blob))
  assert last['about'] == {'task': '2'}
  for number in (1, 2, 1):
    answers = _generate(client, inputs=TEXTS, subset=f's{number}')
    assert answers == _expected(TEXTS, _subset(number)[1])
  assert client.delete('/subsets/s1').status_code == 204
  assert client.delete('/subsets/s1').status_code == 404
  error = _generate(client, 404, inputs=['a'], subset='s1')
  assert error == "there is no subset 's1'; did you mean 's2'?"


def test_a_subset_sent_with_the_request(make):
  client = make()
  blob = _file(3)
  sent = base64.b64encode(blob).decode()
  response = client.post(
    '/generate', json={'inputs': TEXTS, 'subset_file': sent}
  ).json()
  expected = _expected(TEXTS, _subset(3)[1])
  assert [o['text'] for o in response['outputs']] == expected
  name = response['subset']
  assert name.startswith('sha256:')
  # It need not be sent again, and is not listed.
  assert _generate(client, inputs=TEXTS, subset=name) == expected
  assert client.get('/subsets').json()['subsets'] == []
  error = _generate(client, 404, inputs=['a'], subset='sha256:' + 64 * '0')
  assert 'send the subset again' in error


def test_a_replaced_file_is_another_subset(make, tmp_path):
  client = make()
  for number in (1, 2):
    client.put('/subsets/s', content=_file(number))
    expected = _expected(TEXTS, _subset(number)[1])
    assert _generate(client, inputs=TEXTS, subset='s') == expected
  (tmp_path / 's.dst').unlink()
  subset_lib.save(tmp_path / 's.dst', _subset(3)[0], {})
  expected = _expected(TEXTS, _subset(3)[1])
  assert _generate(client, inputs=TEXTS, subset='s') == expected


def test_requests_at_once_are_mixed(make):
  client = make(max_wait=0.5, max_batch=4)
  for number in range(4):
    client.put(f'/subsets/s{number}', content=_file(number))
  found = {}

  def ask(number):
    found[number] = _generate(client, inputs=TEXTS[:1], subset=f's{number}')

  threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  for number in range(4):
    assert found[number] == _expected(TEXTS[:1], _subset(number)[1])
  text = client.get('/metrics').text
  assert 'dst_batch_subsets_sum 4.0' in text
  assert 'dst_swaps_total 0.0' in text
  assert 'dst_requests_total{path="/generate",status="200"} 4.0' in text
  assert 'dst_queue_length 0.0' in text


def _damaged(kind):
  """Returns damaged or foreign files that a client could send."""
  good = _file(1)
  if kind == 'nothing':
    return b''
  if kind == 'text':
    return b'{"inputs": ["a"]}'
  if kind == 'cut':
    return good[:-7]
  if kind == 'flipped':
    return good[:-50] + bytes([good[-50] ^ 1]) + good[-49:]
  if kind == 'another seed':
    other = serving.subset(0.02, 1)[0]
    return subset_lib.to_bytes(other, {})
  return _file(1, 0.9)


@pytest.mark.parametrize(
  ('kind', 'status', 'message'),
  [
    ('nothing', 422, 'no subset file'),
    ('text', 422, 'no subset file'),
    ('cut', 422, 'damaged'),
    ('flipped', 422, 'damaged'),
    ('another seed', 422, 'float32'),
    ('too large', 413, 'values, more than'),
  ],
)
def test_bad_uploads(make, tmp_path, kind, status, message):
  client = make()
  client.put('/subsets/good', content=_file(2))
  response = client.put('/subsets/bad', content=_damaged(kind))
  assert response.status_code == status
  assert message in response.json()['error']
  sent = base64.b64encode(_damaged(kind)).decode()
  error = _generate(client, status, inputs=['a'], subset_file=sent)
  assert message in error
  assert [p.name for p in tmp_path.rglob('*.dst*')] == ['good.dst']
  expected = _expected(TEXTS, _subset(2)[1])
  assert _generate(client, inputs=TEXTS, subset='good') == expected


def test_a_damaged_file_in_the_folder(make, tmp_path):
  client = make()
  (tmp_path / 'broken.dst').write_bytes(_damaged('flipped'))
  client.put('/subsets/good', content=_file(2))
  listing = client.get('/subsets').json()
  assert [s['name'] for s in listing['subsets']] == ['good']
  assert 'damaged' in listing['damaged']['broken']
  assert 'damaged' in _generate(client, 422, inputs=['a'], subset='broken')


@pytest.mark.parametrize(
  'name', ['..%2Fx', '.hidden', 'a b', 'x' * 101, 'sha256:abc', '-a']
)
def test_names_that_are_none(make, tmp_path, name):
  client = make()
  response = client.put(f'/subsets/{name}', content=_file(1))
  assert response.status_code == 404
  assert 'error' in response.json()
  assert list(tmp_path.rglob('*.dst')) == []
  assert list(tmp_path.parent.glob('*.dst')) == []


def test_limits_of_size(make, tmp_path):
  size = len(_file(1))
  limits = library_lib.Limits(
    upload_bytes=size, disk_bytes=2 * size, sent_bytes=2 * size, share=0.5
  )
  client = make(limits)
  response = client.put('/subsets/big', content=_file(1, 0.1))
  assert (response.status_code, 'bytes' in response.text) == (413, True)
  # Larger than any request may be: not even read.
  response = client.put('/subsets/big', content=bytes(2**22))
  assert response.status_code == 413
  response = client.put(
    '/subsets/big', content=(bytes(2**16) for _ in range(64))
  )
  assert response.status_code == 413
  assert 'more than' in response.json()['error']
  for name, status in (('a', 201), ('b', 201), ('c', 507), ('a', 201)):
    response = client.put(f'/subsets/{name}', content=_file(1))
    assert response.status_code == status, name
  names = []
  for number in range(4):
    sent = base64.b64encode(_file(number, 0.01)).decode()
    request = {'inputs': ['a'], 'subset_file': sent}
    names.append(client.post('/generate', json=request).json()['subset'])
    time.sleep(0.01)
  kept = {p.stem for p in (tmp_path / '.sent').glob('*.dst')}
  assert kept < {name.removeprefix('sha256:') for name in names}
  assert names[-1].removeprefix('sha256:') in kept
  assert sorted(p.stem for p in tmp_path.glob('*.dst')) == ['a', 'b']


def test_wrong_requests(make):
  client = make()
  for request, message in (
    ({}, 'inputs'),
    ({'inputs': []}, 'inputs'),
    ({'inputs': 'a'}, 'inputs'),
    ({'inputs': ['a'], 'subsets': 'b'}, 'subsets'),
    ({'inputs': ['a'], 'decoder': 'best'}, 'decoder'),
    ({'inputs': ['a'], 'deadline': -1}, 'deadline'),
    ({'inputs': ['a'], 'subset_file': 'abc'}, 'subset_file'),
    ({'inputs': ['a'], 'subset_file': 'YQ==', 'subset': 'b'}, 'not both'),
    ({'inputs': ['a' * 50]}, '51 pieces'),
  ):
    assert message in _generate(client, 422, **request), request
  response = client.post(
    '/generate',
    content=b'{"inputs": ',
    headers={'Content-Type': 'application/json'},
  )
  assert response.status_code == 422
  assert client.get('/nothing').status_code == 404
  assert client.get('/generate').status_code == 405
  assert client.get('/nothing').json() == {'error': 'Not Found'}


def test_a_full_queue_and_a_deadline(make):
  client = make(max_queue=2, max_wait=0)
  stop, begun = threading.Event(), threading.Event()
  model = client.service.scheduler._model
  decode = model.decode

  def slow(rows, decoder):
    begun.set()
    stop.wait(20)
    return decode(rows, decoder)

  model.decode = slow
  found = []
  ask = lambda: found.append(_generate(client, inputs=['a']))  # noqa: E731
  first = threading.Thread(target=ask)
  first.start()
  begun.wait(20)
  error = _generate(client, 504, inputs=['b'], deadline=0.05)
  assert 'deadline' in error
  second = threading.Thread(
    target=lambda: found.append(_generate(client, inputs=['a', 'b']))
  )
  second.start()
  for _ in range(1000):  # Until both of its inputs wait.
    if len(client.service.scheduler) == 2:
      break
    time.sleep(0.01)
  response = client.post('/generate', json={'inputs': ['c']})
  assert response.status_code == 429
  assert response.headers['retry-after'] == '1'
  assert 'waiting' in response.json()['error']
  stop.set()
  first.join()
  second.join()
  seed = serving.seed(**SIZES)
  assert sorted(found, key=len) == [
    _expected(['a'], seed),
    _expected(['a', 'b'], seed),
  ]


def test_draining(make):
  client = make()
  assert client.get('/health').json()['status'] == 'ok'
  client.service.scheduler.close()
  assert client.get('/health').status_code == 503
  response = client.post('/generate', json={'inputs': ['a']})
  assert response.status_code == 503
  assert 'ending' in response.json()['error']


def test_a_failure_is_only_its_own(make):
  """One request of a mixed batch fails; the others get their answers."""
  client = make(max_wait=0.5, max_batch=3)
  for number in range(3):
    client.put(f'/subsets/s{number}', content=_file(number))
  layout = client.service.scheduler._model.layout
  place = layout.place
  bad = _subset(1)[0]

  def faulty(subset, params):
    if subset.size == bad.size and all(
      np.array_equal(subset.values[p], bad.values[p]) for p in bad.values
    ):
      raise RuntimeError('out of memory')
    return place(subset, params)

  layout.place = faulty
  found = {}

  def ask(number):
    request = {'inputs': ['ab'], 'subset': f's{number}'}
    found[number] = client.post('/generate', json=request)

  threads = [threading.Thread(target=ask, args=(i,)) for i in range(3)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert found[1].status_code == 500
  assert found[1].json() == {'error': 'the server failed; its log says more'}
  for number in (0, 2):
    texts = [o['text'] for o in found[number].json()['outputs']]
    assert texts == _expected(['ab'], _subset(number)[1])


def test_a_token(make):
  client = make(token='höchst geheim')
  paths = (('get', '/subsets'), ('get', '/metrics'), ('post', '/generate'),
           ('put', '/subsets/a'), ('delete', '/subsets/a'))  # fmt: skip
  for method, path in paths:
    for shown in ({}, {'Authorization': 'Bearer wrong'},
                  {'Authorization': 'Basic eA=='}):  # fmt: skip
      response = client.request(method, path, headers=shown)
      assert response.status_code == 401, (method, path)
      assert response.headers['www-authenticate'] == 'Bearer'
  assert client.get('/health').status_code == 200
  right = {'Authorization': 'Bearer höchst geheim'.encode()}
  assert client.get('/subsets', headers=right).status_code == 200


def test_the_description(make):
  described = make().get('/openapi.json').json()
  assert set(described['paths']) == {
    '/generate', '/subsets', '/subsets/{name}', '/health', '/metrics',
    '/v1/models', '/v1/models/{name}', '/v1/completions',
    '/v1/chat/completions',
  }  # fmt: skip
  answers = described['paths']['/generate']['post']['responses']
  assert {'200', '401', '404', '413', '422', '429', '503', '504'} <= set(
    answers
  )
