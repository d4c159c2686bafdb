"""Object stores on this machine that speak the real protocols over HTTP.

For gs:// gcp-storage-emulator, for s3:// moto; their clients are the real ones,
told by variables where to go.
"""

import contextlib
import functools
import http
import logging
import os
import socket
from unittest import mock

import pytest

from dst_t5x.core import object_stores  # noqa: F401

BUCKET = 'bucket'


def _forget_clients():
  """What a client remembers of a server that is gone."""
  from etils.epath import backend
  import fsspec

  backend._FileSystemSpecBackend._get_filesystem.cache_clear()
  for scheme in ('gcs', 's3'):
    fsspec.get_filesystem_class(scheme).clear_instance_cache()


@contextlib.contextmanager
def _reached_by(variables):
  with mock.patch.dict(os.environ, variables):
    _forget_clients()
    yield
  _forget_clients()


def at(scheme, url):
  """Leads the clients of a store to an address."""
  known = {'gs': google_variables, 's3': amazon_variables}
  return _reached_by(known[scheme](url))


def _list(handler, request, response, storage):
  """Lists as the emulator does, and heeds what TensorStore asks by as well."""
  start, end = (
    request.query.get(name, [''])[0] for name in ('startOffset', 'endOffset')
  )
  list_all = storage.get_file_list

  def list_some(*arguments, **more):
    files, prefixes = list_all(*arguments, **more)
    within = (f for f in files if f['name'] >= start)
    return [f for f in within if not end or f['name'] < end], prefixes

  with mock.patch.object(storage, 'get_file_list', list_some):
    handler(request, response, storage)


def _generation(request, storage):
  """Returns that of the object asked for; '0' where there is none."""
  # One uploaded in parts is named in its body; nobody sets conditions for it.
  name = request.params.get('object_id') or request.query.get('name', [''])[0]
  objects = storage.objects.get(request.params['bucket_name'], {})
  return objects.get(name, {}).get('generation', '0')


def _conditional(handler, request, response, storage):
  """Adds what the emulator lacks of the protocol: generations as conditions.

  TensorStore takes one writer's manifest for another's without them.
  """
  now = _generation(request, storage)
  wanted = request.query.get('ifGenerationMatch', [now])[0]
  known = request.query.get('ifGenerationNotMatch', [None])[0]
  if now != wanted:
    response.status = http.HTTPStatus.PRECONDITION_FAILED
  elif now == known:
    response.status = http.HTTPStatus.NOT_MODIFIED
  else:
    handler(request, response, storage)
  response['x-goog-generation'] = _generation(request, storage)


def _completed(handlers, objects):
  """Returns an emulator's handlers with what they lack."""
  of_one = (objects.get, objects.download, objects.insert, objects.delete)
  lacking = {objects.ls: _list} | dict.fromkeys(of_one, _conditional)

  def complete(handler):
    more = lacking.get(handler)
    return functools.partial(more, handler) if more else handler

  return tuple(
    (path, {method: complete(of_it) for method, of_it in methods.items()})
    for path, methods in handlers
  )


@contextlib.contextmanager
def google():
  """Runs a store with one bucket; yields its address."""
  server = pytest.importorskip('gcp_storage_emulator.server')
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  # It logs what clients ask for and is not there.
  logging.getLogger('gcp_storage_emulator').setLevel(logging.CRITICAL)
  running = server.create_server(
    '127.0.0.1', port, in_memory=True, default_bucket=BUCKET
  )
  handlers = _completed(server.HANDLERS, server.objects)
  running.start()
  try:
    with (
      mock.patch.object(server, 'HANDLERS', handlers),
      at('gs', f'http://127.0.0.1:{port}'),
    ):
      yield f'gs://{BUCKET}'
  finally:
    running.stop()


def google_variables(url):
  """Returns what leads the clients of Google's store elsewhere."""
  return {
    'STORAGE_EMULATOR_HOST': url,
    'TENSORSTORE_GCS_HTTP_URL': url,
    'GOOGLE_CLOUD_PROJECT': 'project',
    'NO_GCE_CHECK': 'true',
  }


@contextlib.contextmanager
def amazon():
  """Runs a store with one bucket; yields its address."""
  moto = pytest.importorskip('moto.server')
  pytest.importorskip('s3fs')
  import boto3

  logging.getLogger('werkzeug').setLevel(logging.ERROR)
  server = moto.ThreadedMotoServer('127.0.0.1', port=0, verbose=False)
  server.start()
  host, port = server.get_host_and_port()
  try:
    with at('s3', f'http://{host}:{port}'):
      boto3.client('s3').create_bucket(Bucket=BUCKET)
      yield f's3://{BUCKET}'
  finally:
    server.stop()


def amazon_variables(url):
  """Returns what leads the clients of Amazon's store elsewhere."""
  return {
    'AWS_ENDPOINT_URL': url,
    'AWS_ACCESS_KEY_ID': 'key',
    'AWS_SECRET_ACCESS_KEY': 'secret',
    'AWS_DEFAULT_REGION': 'us-east-1',
  }
