"""The server's subsets: each client gets answers of its own subset."""

import base64
import contextlib
import json
import logging
import os
import resource
import shutil
import tempfile
import threading

from fastapi import testclient
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import stateful
from hypothesis import strategies as st
import numpy as np
import pytest
import serving
import test_serving_app as over_http
from test_serving_app import make  # noqa: F401

from dst_t5x import subsets as subset_lib
from dst_t5x.core.errors import UserError
from dst_t5x.serving import app as app_lib
from dst_t5x.serving import contents
from dst_t5x.serving import library as library_lib
from dst_t5x.subsets import content
from dst_t5x.subsets import file

SIZES = over_http.SIZES
TEXTS = over_http.TEXTS


def _tuned(number):
  """Returns the subset of a number; all their files have the same size."""
  found, _ = over_http._subset(1)
  values = {path: its * (1 + number) for path, its in found.values.items()}
  return subset_lib.Subset(
    found.tensors, found.positions, values, found.fingerprint
  )


FILES = [subset_lib.to_bytes(_tuned(i), {'step': i}) for i in range(4)]
SIZE = len(FILES[0])
LIMITS = library_lib.Limits(share=0.5)


def _expected(number, texts=TEXTS):
  seed = serving.seed(**SIZES)
  params = subset_lib.apply(_tuned(number), seed, serving.fingerprint(**SIZES))
  return over_http._expected(texts, params)


def _digest(number):
  return contents.of(FILES[number]).digest


def _library(folder, limits=LIMITS):
  return library_lib.Library(str(folder), serving.model(SIZES).layout, limits)


def _sent(number):
  return {'subset_file': base64.b64encode(FILES[number]).decode()}


def _generate(client, **request):
  response = client.post('/generate', json={'inputs': TEXTS, **request})
  assert response.status_code == 200, response.text
  return [output['text'] for output in response.json()['outputs']]


def test_the_files_differ_in_content_alone():
  assert {len(blob) for blob in FILES} == {SIZE}
  assert len({tuple(_expected(i)) for i in range(4)}) == 4


# One client's answer never depends on another one.


def test_nobody_can_put_or_delete_what_others_sent(make, tmp_path):  # noqa: F811
  client = make(LIMITS)
  name = f'sha256:{_digest(0)}'
  assert client.put(f'/subsets/{name}', content=FILES[1]).status_code == 404
  assert list(tmp_path.rglob('*.dst')) == []
  assert _generate(client, **_sent(0)) == _expected(0)
  assert client.delete(f'/subsets/{name}').status_code == 404
  assert client.put(f'/subsets/{name}', content=FILES[1]).status_code == 404
  assert _generate(client, subset=name) == _expected(0)
  assert client.get(f'/subsets/{name}').json()['about'] == {'step': 0}


@pytest.mark.parametrize('wrong', [b'', b'x' * SIZE, FILES[1], FILES[0][:-1]])
def test_a_sent_file_that_was_changed_on_the_disk(make, tmp_path, wrong):  # noqa: F811
  path = tmp_path / '.sent' / f'{_digest(0)}.dst'
  path.parent.mkdir()
  path.write_bytes(wrong)
  client = make(library_lib.Limits(share=0.5, host_bytes=1))
  error = over_http._generate(
    client, 404, inputs=TEXTS, subset=f'sha256:{_digest(0)}'
  )
  assert 'send the subset again' in error
  path.write_bytes(wrong)
  assert _generate(client, **_sent(0)) == _expected(0)
  assert _generate(client, subset=f'sha256:{_digest(0)}') == _expected(0)


def test_one_request_is_answered_with_one_version(make):  # noqa: F811
  """A subset is replaced between two inputs of a request."""
  client = make(LIMITS)
  client.put('/subsets/s', content=FILES[0])
  texts = client.service.texts
  encode, number = texts.encode, 0

  def replace_and_encode(text):
    nonlocal number
    number = 1 - number
    client.service.library.add('s', FILES[number])
    return encode(text)

  texts.encode = replace_and_encode
  for _ in range(3):
    version = number
    found = _generate(client, inputs=['ab'] * 5, subset='s')
    assert found == _expected(version, ['ab']) * 5


def test_room_for_one_sent_file_and_two_clients(make):  # noqa: F811
  """Nobody has to send a subset again right after sending it."""
  client = make(
    library_lib.Limits(share=0.5, sent_bytes=SIZE, host_bytes=1), max_wait=0
  )
  found = {0: [], 1: []}

  def ask(number):
    for _ in range(15):
      request = {'inputs': ['ab'], **_sent(number)}
      response = client.post('/generate', json=request)
      found[number].append((response.status_code, response.json()))

  threads = [threading.Thread(target=ask, args=(i,)) for i in found]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  for number, answers in found.items():
    expected = _expected(number, ['ab'])
    assert [status for status, _ in answers] == [200] * 15
    for _, answer in answers:
      assert [output['text'] for output in answer['outputs']] == expected


def test_equal_content_is_placed_once(make):  # noqa: F811
  client = make(LIMITS)
  for name in 'ab':
    client.put(f'/subsets/{name}', content=FILES[2])
  for _ in range(3):
    assert _generate(client, **_sent(2)) == _expected(2)
    for name in ('a', 'b', f'sha256:{_digest(2)}'):
      assert _generate(client, subset=name) == _expected(2)
  counts = client.service.metrics._model.counts
  assert counts['device_misses'] == 1
  assert counts['device_hits'] > 10


def test_what_is_used_is_kept_longest(tmp_path):
  limits = library_lib.Limits(share=0.5, sent_bytes=2 * SIZE)
  library = _library(tmp_path, limits)
  names = [library_lib.SENT_PREFIX + _digest(i) for i in range(3)]
  for number in (0, 1):
    library.send(FILES[number])
  library.find(names[0])  # From memory; that counts, too.
  library.send(FILES[2])
  kept = {path.stem for path in (tmp_path / '.sent').glob('*')}
  assert kept == {_digest(0), _digest(2)}
  # For one that will never have room, others do not make it.
  small = _library(tmp_path, library_lib.Limits(share=0.5, sent_bytes=SIZE - 1))
  assert small.send(FILES[3]).facts.digest == _digest(3)
  assert {path.stem for path in (tmp_path / '.sent').glob('*')} == kept


class Requests(stateful.RuleBasedStateMachine):
  """Two servers on one folder, and a user who copies files into it."""

  def __init__(self):
    super().__init__()
    self.folder = tempfile.mkdtemp()
    limits = library_lib.Limits(share=0.5, sent_bytes=2 * SIZE, host_bytes=1)
    self.servers = [_library(self.folder), _library(self.folder, limits)]
    self.named = {}

  server = st.integers(0, 1)
  name = st.sampled_from(('a', 'b'))
  number = st.integers(0, 3)

  @stateful.rule(server=server, name=name, number=number)
  def put(self, server, name, number):
    self.servers[server].add(name, FILES[number])
    self.named[name] = number

  @stateful.rule(name=name, number=number)
  def copy(self, name, number):
    """As `cp -p` does: size, inode and times of modification stay."""
    path = f'{self.folder}/{name}.dst'
    times = (1, 1)
    if name in self.named:
      times = os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns
    with open(path, 'wb') as f:
      f.write(FILES[number])
    os.utime(path, ns=times)
    self.named[name] = number

  @stateful.rule(server=server, name=name)
  def delete(self, server, name):
    wanted = contextlib.nullcontext()
    if name not in self.named:
      wanted = pytest.raises(library_lib.NotFoundError)
    with wanted:
      self.servers[server].delete(name)
    self.named.pop(name, None)

  @stateful.rule(server=server, number=number)
  def send(self, server, number):
    known = self.servers[server].send(FILES[number])
    assert known.facts.digest == _digest(number)

  @stateful.rule(number=number, other=number)
  def spoil(self, number, other):
    path = f'{self.folder}/.sent/{_digest(number)}.dst'
    if os.path.exists(path):
      with open(path, 'wb') as f:
        f.write(FILES[other])

  @stateful.rule(server=server, name=name)
  def ask(self, server, name):
    library = self.servers[server]
    if name not in self.named:
      with pytest.raises(library_lib.NotFoundError):
        library.find(name)
      return
    number = self.named[name]
    known = library.find(name)
    assert known.facts == library.facts(name)
    assert known.facts.digest == _digest(number)
    self._assert_is(known, number)

  @stateful.rule(server=server, number=number)
  def ask_for_sent(self, server, number):
    name = f'sha256:{_digest(number)}'
    with contextlib.suppress(library_lib.NotFoundError):
      self._assert_is(self.servers[server].find(name), number)

  def _assert_is(self, known, number):
    assert known.facts.about == {'step': number}
    for path, values in _tuned(number).values.items():
      np.testing.assert_array_equal(known.subset.values[path], values)

  @stateful.invariant()
  def nothing_else_is_there(self):
    for server in self.servers:
      assert server.names() == sorted(self.named)
    found = os.listdir(self.folder)
    assert sorted(found) == ['.sent', *(f'{n}.dst' for n in sorted(self.named))]

  def teardown(self):
    shutil.rmtree(self.folder)


TestRequests = Requests.TestCase
TestRequests.settings = settings(
  max_examples=30,
  stateful_step_count=25,
  deadline=None,
  suppress_health_check=list(HealthCheck),
  derandomize=True,
)


def test_a_file_that_has_just_changed_is_read_again(tmp_path):
  """The clock of the file system may not have moved since it was read."""
  path, digests = tmp_path / 'a', contents.Digests()
  path.write_bytes(b'1')
  assert digests.read(path) == contents.of(b'1')
  assert digests.get(path.stat()) is None


# One odd file does not spoil what others see.


def _with_about(text):
  """Returns a subset file with the given metadata, or without any."""
  blob = file.pack(content.to_arrays(_tuned(0)), {})
  end = 8 + int.from_bytes(blob[:8], 'little')
  header = json.loads(blob[8:end])
  header['__metadata__']['about'] = text
  new = json.dumps(header).encode()
  new += b' ' * (-len(new) % 8)
  body = len(new).to_bytes(8, 'little') + new + blob[end:-32]
  return body + bytes.fromhex(contents.of(body).digest)


JSON = st.recursive(
  st.none()
  | st.booleans()
  | st.integers()
  | st.floats(allow_nan=False, allow_infinity=False)
  | st.text()
  | st.sampled_from(('\ud800', '\udfff', 'x' * 5000, '\n', 10**400)),
  lambda inner: (
    st.lists(inner) | st.dictionaries(st.sampled_from('ab\ud801'), inner)
  ),
  max_leaves=20,
)
KEYS = ('task', 'step', 'epsilon', 'silos', 'distance', 'scores')


@pytest.fixture(scope='module')
def served(tmp_path_factory):
  """A server for many examples."""
  service = serving.service(tmp_path_factory.mktemp('served'), LIMITS)
  app = app_lib.create_app(service)
  with testclient.TestClient(app, raise_server_exceptions=False) as client:
    assert client.put('/subsets/good', content=FILES[1]).status_code == 201
    yield client


def _assert_list_is_whole(client, odd):
  """Asserts that the list has the good subset; returns the entry of `odd`."""
  response = client.get('/subsets')
  assert response.status_code == 200, response.text
  listing = response.json()
  found = {its['name']: its for its in listing['subsets']}
  assert found['good']['about'] == {'step': 1}
  return found.get(odd) or listing['damaged'].get(odd)


@settings(
  max_examples=60,
  deadline=None,
  derandomize=True,
  suppress_health_check=list(HealthCheck),
)
@given(about=st.dictionaries(st.sampled_from(KEYS), JSON))
def test_any_metadata(served, about):
  seed = {'fingerprint': serving.fingerprint(**SIZES)}
  blob = _with_about(json.dumps({**about, 'seed': seed}))
  response = served.put('/subsets/odd', content=blob)
  assert response.status_code == 201, response.text
  assert _assert_list_is_whole(served, 'odd') == response.json()
  assert served.get('/subsets/odd').json() == response.json()
  assert served.delete('/subsets/odd').status_code == 204


@pytest.mark.parametrize('number', ['NaN', 'Infinity', '-Infinity', '1e999'])
def test_metadata_that_are_no_json(served, number):
  seed = f'{{"fingerprint": "{serving.fingerprint(**SIZES)}"}}'
  blob = _with_about(f'{{"seed": {seed}, "scores": {{"a": {number}}}}}')
  response = served.put('/subsets/odd', content=blob)
  assert response.status_code == 422
  assert 'odd' in response.json()['error']
  assert _assert_list_is_whole(served, 'odd') is None


@pytest.mark.parametrize('nesting', [2, 3, 400, 5000])
def test_nested_metadata(served, nesting):
  seed = f'{{"fingerprint": "{serving.fingerprint(**SIZES)}"}}'
  nested = '[' * nesting + ']' * nesting
  about = f'{{"seed": {seed}, "step": 3, "scores": {{"a": {nested}}}}}'
  blob = _with_about(about)
  response = served.put('/subsets/odd', content=blob)
  assert response.status_code in (201, 422)
  said = _assert_list_is_whole(served, 'odd')
  if response.status_code == 201:
    assert said['about'] == {'step': 3}
    assert _generate(served, subset='odd') == _expected(0)
  served.delete('/subsets/odd')


def test_the_facts_that_runs_write(served):
  about = {
    'task': 'gsm8k',
    'step': 10,
    'epsilon': 1e-4,
    'silos': None,
    'distance': 'relative',
    'scores': {'toy/exact_match': 12.5, 'loss': None},
  }
  blob = subset_lib.to_bytes(_tuned(0), {**about, 'version': '1'})
  found = served.put('/subsets/odd', content=blob).json()['about']
  assert found == about
  served.delete('/subsets/odd')


def _dangling(path):
  path.symlink_to(path.with_name('nowhere'))


def _loop(path):
  path.symlink_to(path)


def _huge(path):
  with path.open('wb') as f:
    f.truncate(2**34)


@pytest.mark.parametrize(
  ('odd', 'message', 'status'),
  [
    (_dangling, 'is a link to a file that is not there', 422),
    (_loop, 'cannot be read: ', 422),
    (os.mkfifo, 'is no file', 422),
    (_huge, 'odd has 17,179,869,184 bytes, more than', 413),
  ],
)
def test_odd_files(make, tmp_path, odd, message, status):  # noqa: F811
  client = make(LIMITS)
  odd(tmp_path / 'odd.dst')
  assert client.put('/subsets/good', content=FILES[1]).status_code == (
    507 if odd is _huge else 201  # It takes room.
  )
  (tmp_path / 'good.dst').write_bytes(FILES[1])
  assert message in _assert_list_is_whole(client, 'odd')
  error = over_http._generate(client, status, inputs=['a'], subset='odd')
  assert message in error
  assert client.delete('/subsets/odd').status_code == 204
  assert not os.path.lexists(tmp_path / 'odd.dst')
  response = client.delete('/subsets/odd')
  assert response.status_code == 404
  assert "mean 'odd'" not in response.text
  odd(tmp_path / 'odd.dst')
  assert client.put('/subsets/odd', content=FILES[2]).status_code == 201
  assert _generate(client, subset='odd') == _expected(2)
  assert _assert_list_is_whole(client, 'odd')['about'] == {'step': 2}


def test_a_folder_is_no_subset(make, tmp_path):  # noqa: F811
  client = make(LIMITS)
  (tmp_path / 'odd.dst').mkdir()
  client.put('/subsets/good', content=FILES[1])
  assert _assert_list_is_whole(client, 'odd') is None
  for method in ('get', 'delete'):
    response = client.request(method, '/subsets/odd')
    assert response.status_code == 404
    assert "mean 'odd'" not in response.text
  response = client.put('/subsets/odd', content=FILES[1])
  assert response.status_code == 422
  assert 'odd.dst is a folder: choose another name' in response.text
  assert os.listdir(tmp_path / 'odd.dst') == []


# What is on the disk.


@contextlib.contextmanager
def _full_disk():
  """Limits the size of files, as if the disk were full."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  logging.disable()  # What is logged goes into pytest's files.
  resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    logging.disable(logging.NOTSET)


def test_a_full_disk(make, tmp_path):  # noqa: F811
  client = make(LIMITS)
  assert client.put('/subsets/a', content=FILES[0]).status_code == 201
  assert _generate(client, subset='a') == _expected(0)
  with _full_disk():
    for name in 'ab':
      response = client.put(f'/subsets/{name}', content=FILES[1])
      assert response.status_code == 507
      assert response.json() == {
        'error': f'the server cannot keep {name}: File too large'
      }
    # What is sent is answered even so, and can be sent again.
    assert _generate(client, **_sent(2)) == _expected(2)
    assert _generate(client, **_sent(2)) == _expected(2)
  found = [p.name for p in tmp_path.rglob('*') if p.is_file()]
  assert found == ['a.dst']
  assert _generate(client, subset='a') == _expected(0)
  assert client.put('/subsets/b', content=FILES[1]).status_code == 201


def test_leftovers_are_swept_when_a_server_starts(tmp_path):
  (tmp_path / '.sent').mkdir()
  for folder in (tmp_path, tmp_path / '.sent'):
    (folder / f'.{"0" * 32}.part').touch()
  _library(tmp_path)
  assert [p for p in tmp_path.rglob('*') if p.is_file()] == []


def test_a_list_reads_only_what_changed(tmp_path, monkeypatch):
  """With little memory too; damaged files are also read only once."""
  # Else the test would have to wait until the files are old enough.
  monkeypatch.setattr(contents, 'SETTLED_SECONDS', -1e9)
  read = []

  class Counted(contents.Digests):
    def read(self, path):
      read.append(path.stem)
      return super().read(path)

  monkeypatch.setattr(contents, 'Digests', Counted)
  library = _library(tmp_path, library_lib.Limits(share=0.5, host_bytes=1))
  for i in range(20):
    blob = FILES[i % 4] if i % 5 else b'damaged'
    (tmp_path / f'{i}.dst').write_bytes(blob)

  def listed():
    read.clear()
    for name in library.names():
      if int(name) % 5:
        assert library.facts(name).about == {'step': int(name) % 4}
      else:
        with pytest.raises(UserError, match=f'^{name}: it is no subset file$'):
          library.facts(name)
    return sorted(read)

  assert listed() == sorted(library.names())
  assert listed() == []
  library.add('3', subset_lib.to_bytes(_tuned(3), {'step': 3, 'x': 'y'}))
  assert listed() == ['3']
