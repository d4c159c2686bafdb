"""Requests that are malformed or cut, or whose client disconnects."""

import contextlib
import json
import logging
import re
import socket
import struct
import threading
import time

from fastapi import testclient
from hypothesis import HealthCheck
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import pytest
import seqio
import serving

from dst_t5x.core.errors import UserError
from dst_t5x.serving import app as app_lib
from dst_t5x.serving import server
from dst_t5x.serving import texts as texts_lib

JSON = {'Content-Type': 'application/json'}


@contextlib.contextmanager
def _served(folder, host='127.0.0.1', token=None, hosts=None, **options):
  """Yields a service and the address of its socket."""
  service = serving.service(folder, **options)
  app = app_lib.create_app(service, token, hosts)
  with serving.listening(app, host) as port:
    yield service, (host, port)


@contextlib.contextmanager
def _client(folder, token=None, hosts=None, **options):
  """Yields a client in this process."""
  app = app_lib.create_app(serving.service(folder, **options), token, hosts)
  with testclient.TestClient(app) as client:
    yield client


def _head(address, method='POST', path='/generate', **fields):
  """Returns the head of a request."""
  lines = [f'{method} {path} HTTP/1.1', f'Host: {address[0]}']
  fields = {'Content-Type': 'application/json', **fields}
  lines += [f'{name}: {value}' for name, value in fields.items()]
  return '\r\n'.join([*lines, '', '']).encode()


def _generate(address, *inputs):
  """Returns the bytes of a request."""
  body = json.dumps({'inputs': inputs}).encode()
  return _head(address, **{'Content-Length': len(body)}) + body


def _leave(connection, how):
  """Closes a connection, normally or with a reset."""
  if how == 'reset':
    linger = struct.pack('ii', 1, 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
  if how == 'shut':
    connection.shutdown(socket.SHUT_WR)
  else:
    connection.close()


def _until(condition):
  """Waits until a condition holds that another thread makes true."""
  end = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.005)


def _ended(service):
  """Returns (path, status) -> number of requests that ended so."""
  found = re.findall(
    r'dst_requests_total\{path="(.*)",status="(.*)"\} (.*)',
    service.metrics.text().decode(),
  )
  return {(path, int(status)): float(n) for path, status, n in found}


@pytest.mark.parametrize('how', ['closed', 'reset', 'shut'])
def test_nothing_is_decoded_for_clients_that_have_gone(tmp_path, how):
  begun, go_on, rows = threading.Event(), threading.Event(), []
  with _served(tmp_path, max_batch=16) as (service, address):
    model = service.scheduler._model
    decode = model.decode

    def slow(batch, decoder):
      begun.set()
      go_on.wait(60)
      rows.append(len(batch))
      return decode(batch, decoder)

    model.decode = slow
    gone = [socket.create_connection(address) for _ in range(3)]
    for connection in gone:
      connection.sendall(_generate(address, *['a'] * 64))
    # All but the batch that is being decoded.
    _until(lambda: begun.is_set() and len(service.scheduler) == 3 * 64 - 16)
    for connection in gone:
      _leave(connection, how)
    _until(lambda: _ended(service) == {('/generate', 499): 3})
    with socket.create_connection(address) as connection:
      connection.sendall(_generate(address, 'b'))
      _until(lambda: len(service.scheduler) == 1)
      go_on.set()
      assert connection.recv(99).startswith(b'HTTP/1.1 200 ')
    for connection in gone:
      connection.close()
  assert rows == [16, 1]


def test_who_waits_gets_an_answer_on_the_same_connection(tmp_path):
  with (
    _served(tmp_path) as (service, address),
    socket.create_connection(address) as connection,
  ):
    for number in range(3):
      connection.sendall(_generate(address, 'a'))
      answer = b''
      while not answer.endswith(b'}'):
        answer += connection.recv(9999)
      assert answer.startswith(b'HTTP/1.1 200 '), number
    assert _ended(service) == {('/generate', 200): 3}


@pytest.mark.parametrize('how', ['closed', 'reset', 'shut'])
@pytest.mark.parametrize('is_chunked', [False, True])
@pytest.mark.parametrize('body', [b'', b'{"inputs": ["a"'])
@pytest.mark.parametrize(
  ('method', 'path', 'route'),
  [
    ('POST', '/generate', '/generate'),
    ('PUT', '/subsets/s', '/subsets/{name}'),
  ],
)
def test_a_request_that_is_cut(
  tmp_path, caplog, method, path, route, body, is_chunked, how
):
  length = {'Content-Length': 100}
  if is_chunked:
    length = {'Transfer-Encoding': 'chunked'}
    body = body and b'%x\r\n%b\r\n' % (len(body), body)
  with _served(tmp_path) as (service, address):
    connection = socket.create_connection(address)
    connection.sendall(_head(address, method, path, **length) + body)
    time.sleep(0.05)  # It is begun.
    _leave(connection, how)
    _until(lambda: _ended(service))
    assert _ended(service) == {(route, 499): 1}
    connection.close()
  assert not list(tmp_path.glob('*.dst*'))
  assert not [r for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_failure_is_logged_once(tmp_path, caplog):
  with _served(tmp_path) as (service, address):
    service.scheduler._model.decode = None
    with socket.create_connection(address) as connection:
      connection.sendall(_generate(address, 'a'))
      assert connection.recv(99).startswith(b'HTTP/1.1 500 ')
    assert _ended(service) == {('/generate', 500): 1}
  traces = [record for record in caplog.records if record.exc_info]
  assert len(traces) == 1


# Any text that JSON can hold, which is more than UTF-8 can.
_TEXT = st.text(max_size=9) | st.text('a\ud800\udfff\n\x00', max_size=9)
_ANY = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | _TEXT,
  lambda some: (
    st.lists(some, max_size=3) | st.dictionaries(_TEXT, some, max_size=2)
  ),
  max_leaves=5,
)
_REQUESTS = st.fixed_dictionaries(
  {'inputs': st.lists(_TEXT, min_size=1, max_size=2) | _ANY},
  optional={
    'subset': st.sampled_from(['s', 'sha256:' + 64 * '0']) | _ANY,
    'subset_file': _ANY,
    'decoder': st.sampled_from(['greedy', 'best']),
    'deadline': _ANY | st.just(1e9),
    '\ud800\n': _ANY,
  },
)


def test_any_request_is_answered_or_refused_in_one_line(tmp_path):
  with _client(tmp_path) as client:

    @settings(
      max_examples=300,
      deadline=None,
      derandomize=True,
      suppress_health_check=list(HealthCheck),
    )
    @given(_REQUESTS | _ANY)
    def check(request):
      response = client.post(
        '/generate', content=json.dumps(request), headers=JSON
      )
      assert response.status_code in (200, 404, 422), response.text
      if response.status_code != 200:
        assert len(response.json()['error'].splitlines()) == 1

    check()


@pytest.mark.parametrize(
  'body',
  [
    b'',
    b'\xff',
    b'{"inputs": ',
    b'[' * 10**5,
    b'{"deadline": ' + b'1' * 5000 + b'}',
  ],
)
def test_what_is_no_json(tmp_path, body):
  with _client(tmp_path) as client:
    response = client.post('/generate', content=body, headers=JSON)
    assert response.status_code in (400, 422)
    assert len(response.json()['error'].splitlines()) == 1


@pytest.mark.parametrize('text', ['\ud800', 'a\udfffb', '\udc00\ud800'])
def test_what_is_no_text(tmp_path, text):
  with _client(tmp_path) as client:
    for request in ({'inputs': [text]}, {'inputs': ['a', text]}):
      content = json.dumps(request)
      response = client.post('/generate', content=content, headers=JSON)
      assert response.status_code == 422
      assert 'surrogate' in response.json()['error']
    # Both halves of a pair are a character.
    content = b'{"inputs": ["\\ud83d\\ude00"]}'
    response = client.post('/generate', content=content, headers=JSON)
    assert response.status_code == 200


class _Watched(seqio.ByteVocabulary):
  """A vocabulary that records the longest text it has encoded."""

  longest = 0

  def _encode(self, text):
    self.longest = max(self.longest, len(text))
    return super()._encode(text)


@pytest.mark.parametrize('length', [31, 32, 64 * 32, 64 * 32 + 1, 10**6])
def test_long_inputs_are_refused_before_any_work(length):
  vocabulary = _Watched()
  texts = texts_lib.Texts(vocabulary, 32)
  if length < 32:
    assert len(texts.encode('a' * length)) == length + 1
  else:
    with pytest.raises(UserError, match='more than the'):
      texts.encode('a' * length)
  assert vocabulary.longest == (length if length <= 64 * 32 else 0)


@pytest.mark.parametrize(
  ('header', 'status'),
  [
    ('application/json', 200),
    ('Application/JSON; charset=utf-8', 200),
    ('application/x-www-form-urlencoded', 415),  # As `curl -d` says.
    ('text/plain', 415),
    ('multipart/form-data; boundary=x', 415),
    ('', 415),
    (None, 415),
  ],
)
def test_a_body_must_say_that_it_is_json(tmp_path, header, status):
  """A request from a page of another site does not reach the model."""
  headers = {} if header is None else {'Content-Type': header}
  headers['Origin'] = 'https://elsewhere.example'
  with _client(tmp_path) as client:
    content = b'{"inputs": ["a"]}'
    response = client.post('/generate', content=content, headers=headers)
    assert response.status_code == status
    if status == 415:
      error = 'send the header Content-Type: application/json'
      assert response.json() == {'error': error}


@pytest.mark.parametrize(
  ('host', 'status'),
  [
    ('localhost', 200),
    ('LOCALHOST:8000', 200),
    ('127.0.0.1:8000', 200),
    ('[::1]:8000', 200),
    ('[::1]', 200),
    ('x.org', 400),
    ('localhost.x.org:80', 400),
    ('[::2]:8000', 400),
    ('[::1', 400),
    ('', 400),
  ],
)
def test_other_hosts_are_refused(tmp_path, host, status):
  with _client(tmp_path, hosts=server.LOOPBACK) as client:
    response = client.get('/health', headers={'Host': host})
    assert response.status_code == status
    if status == 400:
      assert 'another host' in response.json()['error']


def test_it_answers_at_its_own_address_of_ipv6(tmp_path):
  if not socket.has_ipv6:
    pytest.skip('no IPv6')
  try:
    socket.create_server(('::1', 0), family=socket.AF_INET6).close()
  except OSError:
    pytest.skip('no IPv6')
  with (
    _served(tmp_path, '::1', hosts=server.LOOPBACK) as (_, (host, port)),
    socket.create_connection((host, port)) as connection,
  ):
    address = f'[{host}]:{port}', port
    connection.sendall(_head(address, 'GET', '/health'))
    assert connection.recv(99).startswith(b'HTTP/1.1 200 ')


@pytest.mark.parametrize(
  ('text', 'token'),
  [
    ('secret', 'secret'),
    (' secret\n', 'secret'),
    ('secret\r\n', 'secret'),
    ('höchst geheim\n', 'höchst geheim'),
  ],
)
@pytest.mark.parametrize('in_file', [False, True])
def test_a_token_and_what_is_around_it(
  tmp_path, monkeypatch, text, token, in_file
):
  assert _token(tmp_path, monkeypatch, text, in_file) == token
  with _client(tmp_path, token=token) as client:
    right = {'Authorization': f'Bearer {token}'.encode()}
    assert client.get('/subsets', headers=right).status_code == 200
    assert client.get('/subsets').status_code == 401


@pytest.mark.parametrize('text', ['', ' ', '\n', 'a\nb', 'a\tb', 'a\x7fb'])
@pytest.mark.parametrize('in_file', [False, True])
def test_what_is_no_token(tmp_path, monkeypatch, text, in_file):
  name = '--token-file' if in_file else 'DST_SERVE_TOKEN'
  with pytest.raises(UserError, match=name):
    _token(tmp_path, monkeypatch, text, in_file)


def _token(folder, monkeypatch, text, in_file):
  """Returns the token that the server reads from a file or the environment."""
  if not in_file:
    monkeypatch.setenv(server.TOKEN_VARIABLE, text)
    return server._token(None)
  monkeypatch.setenv(server.TOKEN_VARIABLE, 'another')
  path = folder / 'token'
  path.write_bytes(text.encode())
  return server._token(str(path))


def test_no_token(monkeypatch):
  monkeypatch.delenv(server.TOKEN_VARIABLE, raising=False)
  assert server._token(None) is None
