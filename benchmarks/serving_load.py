"""Requests a second of a server that decodes with many subsets.

A part of benchmarks/serving.py. Clients ask the real server over HTTP, one
request after the other, each for a subset at random. Beside it, `dense`: as
many servers as there are subsets, each with all parameters of its own, on the
same processors. Texts are read as bytes, so that no vocabulary is needed.
"""

from collections.abc import Iterator, Sequence
from concurrent import futures
import contextlib
import dataclasses
import http.client
import json
import pathlib
import socket
import tempfile
import threading
import time
from typing import Any

import numpy as np
import seqio
import uvicorn

from dst_t5x import subsets as subset_lib
from dst_t5x.models.t5 import network
from dst_t5x.serving import app as app_lib
from dst_t5x.serving import library as library_lib
from dst_t5x.serving import model as model_lib
from dst_t5x.serving import service as service_lib
from dst_t5x.serving import texts as texts_lib

_TEXT = 'Wie geht es dir heute?'


def measure(bench: Any, epsilon: float) -> None:
  """Adds requests a second by the number of subsets."""
  for number in bench.options.load_subsets:
    subsets = [bench.subset(epsilon) for _ in range(number)]
    with tempfile.TemporaryDirectory() as folder:
      for i, found in enumerate(subsets):
        subset_lib.save(pathlib.Path(folder) / f's{i}.dst', found, {})
      with _serving(bench, bench.seed, folder) as port:
        choices = [(port, f's{i}') for i in range(number)]
        _add(bench, epsilon, 'subsets', number, choices)
    if number <= bench.options.dense:
      _dense(bench, epsilon, subsets)


def _dense(
  bench: Any, epsilon: float, subsets: Sequence[subset_lib.Subset]
) -> None:
  with contextlib.ExitStack() as stack:
    choices = []
    for found in subsets:
      params = subset_lib.apply(found, bench.seed, found.fingerprint)
      folder = stack.enter_context(tempfile.TemporaryDirectory())
      port = stack.enter_context(_serving(bench, params, folder))
      choices.append((port, None))
    _add(bench, epsilon, 'dense', len(subsets), choices)


@contextlib.contextmanager
def _serving(bench: Any, params: Any, folder: str) -> Iterator[int]:
  """Yields the port of a server."""
  model = model_lib.MultiSubsetModel(
    network.Transformer(bench.config),
    lambda: params,
    bench.model.layout.fingerprint,
    max_decode_length=bench.options.output_length,
  )
  limits = library_lib.Limits(share=1.0)
  library = library_lib.Library(folder, model.layout, limits)
  texts = texts_lib.Texts(seqio.ByteVocabulary(), 64)
  _warm_up(model, library, texts.encode(_TEXT))
  service = service_lib.Service(
    model, library, texts, service_lib.Options(deadline=3600.0)
  )
  config = uvicorn.Config(
    app_lib.create_app(service),
    log_level='error',
    timeout_keep_alive=3600,  # A client may long ask the other servers.
  )
  server = uvicorn.Server(config)
  listener = socket.create_server(('127.0.0.1', 0))
  thread = threading.Thread(target=server.run, args=([listener],))
  thread.start()
  try:
    yield listener.getsockname()[1]
  finally:
    server.should_exit = True
    thread.join()
    listener.close()


def _warm_up(
  model: model_lib.MultiSubsetModel,
  library: library_lib.Library,
  tokens: np.ndarray,
) -> None:
  """Compiles what any batch will need; without subsets, with the seed alone."""
  rows = [library.find(name).row(tokens) for name in library.names()[:2]]
  model.warm_up(rows or [model_lib.Row(tokens)])


@dataclasses.dataclass
class _Client:
  """Asks one thing after the other; notes how long each took."""

  choices: Sequence[tuple[int, str | None]]
  requests: int
  number: int

  def run(self) -> list[float]:
    random = np.random.default_rng(self.number)
    connections: dict[int, http.client.HTTPConnection] = {}
    seconds = []
    for _ in range(self.requests):
      port, name = self.choices[random.integers(len(self.choices))]
      if port not in connections:
        connections[port] = http.client.HTTPConnection('127.0.0.1', port)
      start = time.perf_counter()
      connections[port].request(
        'POST',
        '/generate',
        json.dumps({'inputs': [_TEXT], 'subset': name}),
        {'Content-Type': 'application/json'},
      )
      response = connections[port].getresponse()
      content = response.read()
      if response.status != 200:
        raise RuntimeError(content.decode())
      seconds.append(time.perf_counter() - start)
    for connection in connections.values():
      connection.close()
    return seconds


def _load(
  bench: Any, choices: Sequence[tuple[int, str | None]], each: int
) -> tuple[float, list[float]]:
  """Returns how long all clients took, and each of their requests."""
  clients = [_Client(choices, each, i) for i in range(bench.options.clients)]
  start = time.perf_counter()
  with futures.ThreadPoolExecutor(len(clients)) as pool:
    found = list(pool.map(_Client.run, clients))
  seconds = time.perf_counter() - start
  return seconds, [s for of_client in found for s in of_client]


def _add(
  bench: Any,
  epsilon: float,
  way: str,
  number: int,
  choices: Sequence[tuple[int, str | None]],
) -> None:
  each = -(-bench.options.requests // bench.options.clients)
  _load(bench, choices, 2)
  seconds, times = _load(bench, choices, each)
  more = {
    'epsilon': epsilon,
    'subsets': number,
    'way': way,
    'clients': bench.options.clients,
  }
  bench.add('requests_per_s', len(times) / seconds, '1/s', **more)
  bench.add('request_s', float(np.median(times)), 's', **more)
  bench.add('request_p99_s', float(np.quantile(times, 0.99)), 's', **more)
