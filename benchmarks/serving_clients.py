"""Requests a second and latencies of a decoder-only model, by clients at once.

  python benchmarks/serving_clients.py --model=FOLDER --json clients.json

FOLDER is a model of Hugging Face with its tokenizer. Clients ask over HTTP, one
request after the other, each for a subset at random, for answers of at most
--output-length tokens. Ways to serve:

- `running`: requests join the running batch at the next step.
- `whole`: a batch is decoded as a whole, and who comes later waits for its end.
- `transformers`: `transformers serve` with continuous batching, the model
  without subsets, where it is installed (`--ways transformers`).

Measure each way in a process of its own: the compiled programs of two of them
can exceed Linux's limit of memory maps (vm.max_map_count).

Metrics: `requests_per_s`; `request_s`, the median, and `request_p99_s`;
`first_token_s`, the median until the first token, where answers are streamed.
Ours compiles before; every way first answers as many requests as it is measured
with.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
import contextlib
import dataclasses
import http.client
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import jax
import numpy as np
import subset_file
import tables
import uvicorn

from dst_t5x import subsets as subset_lib
from dst_t5x.checkpoints import seeds
from dst_t5x.core import json_text
from dst_t5x.serving import app as app_lib
from dst_t5x.serving import library as library_lib
from dst_t5x.serving import model as model_lib
from dst_t5x.serving import networks
from dst_t5x.serving import running as running_lib
from dst_t5x.serving import service as service_lib
from dst_t5x.serving import texts as texts_lib

# Of different lengths, and with different answers.
_PROMPTS = (
  'The capital of France is',
  'Q: A farmer has 12 sheep and buys 7 more. How many are there?\nA:',
  'Once upon a time',
  'Translate to German: How are you today?',
)


@dataclasses.dataclass(frozen=True)
class _Way:
  """A server and how it is asked.

  Attributes:
    port: of the server.
    names: what to ask for; one at random each time.
    ask: asks a connection for a name and a prompt; returns the time until the
      first token, or None.
  """

  port: int
  names: Sequence[str]
  ask: Callable[[http.client.HTTPConnection, str, str], float | None]


def _post(
  connection: http.client.HTTPConnection, path: str, body: dict[str, Any]
) -> http.client.HTTPResponse:
  headers = {'Content-Type': 'application/json'}
  connection.request('POST', path, json_text.dumps(body), headers)
  response = connection.getresponse()
  if response.status != 200:
    raise RuntimeError(response.read().decode())
  return response


def _generate(
  connection: http.client.HTTPConnection, name: str, prompt: str
) -> None:
  body = {'inputs': [prompt], 'subset': name}
  _post(connection, '/generate', body).read()


def _streaming(
  length: int,
) -> Callable[[http.client.HTTPConnection, str, str], float]:
  def ask(
    connection: http.client.HTTPConnection, name: str, prompt: str
  ) -> float:
    start = time.perf_counter()
    body = {'model': name, 'prompt': prompt, 'max_tokens': length}
    body |= {'temperature': 0, 'stream': True}
    response = _post(connection, '/v1/completions', body)
    response.readline()
    first = time.perf_counter() - start
    response.read()
    return first

  return ask


@contextlib.contextmanager
def _ours(
  options: argparse.Namespace, seed: seeds.Seed, folder: str, way: str
) -> Iterator[_Way]:
  """Serves with this package, in this process."""
  network = networks.of_seed(seed, None)
  model = model_lib.MultiSubsetModel(
    network,
    lambda: seed.params,
    seed.fingerprint,
    max_decode_length=options.output_length,
    # Without it, there is no running batch.
    input_length=options.input_length if way == 'running' else None,
    max_batch=options.max_batch,
  )
  library = library_lib.Library(
    folder, model.layout, library_lib.Limits(share=1.0)
  )
  vocabulary = networks.vocabulary(None, options.model, is_configured=False)
  texts = texts_lib.Texts(vocabulary, options.input_length)
  _warm_up(model, library, texts, options.max_batch)
  service = service_lib.Service(
    model,
    library,
    texts,
    service_lib.Options(deadline=3600.0, max_batch=options.max_batch),
  )
  config = uvicorn.Config(app_lib.create_app(service), log_level='error')
  server = uvicorn.Server(config)
  with socket.create_server(('127.0.0.1', 0)) as listener:
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    ask = _streaming(options.output_length) if way == 'running' else _generate
    try:
      yield _Way(listener.getsockname()[1], library.names(), ask)
    finally:
      server.should_exit = True
      thread.join()


def _warm_up(
  model: model_lib.MultiSubsetModel,
  library: library_lib.Library,
  texts: texts_lib.Texts,
  max_batch: int,
) -> None:
  """Compiles what any batch will need."""
  running = running_lib.make(model, max_batch)
  warm_up = model.warm_up if running is None else running.warm_up
  subsets = [library.find(name) for name in library.names()[:2]]
  for prompt in _PROMPTS:
    warm_up([known.row(texts.encode(prompt)) for known in subsets])


@contextlib.contextmanager
def _transformers(options: argparse.Namespace) -> Iterator[_Way]:
  """Serves with `transformers serve`, in a process of its own."""
  with socket.create_server(('127.0.0.1', 0)) as listener:
    port = listener.getsockname()[1]
  command = [
    str(pathlib.Path(sys.executable).parent / 'transformers'),
    'serve',
    options.model,
    '--host=127.0.0.1',
    f'--port={port}',
    '--continuous-batching',
    '--dtype=float32',
  ]
  process = subprocess.Popen(command, stdout=sys.stderr)
  try:
    _wait(process, port)
    yield _Way(port, [options.model], _streaming(options.output_length))
  finally:
    process.terminate()
    process.wait()


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
  """Waits until a server answers."""
  while True:
    if process.poll() is not None:
      raise RuntimeError(f'transformers serve ended with {process.returncode}')
    with contextlib.suppress(OSError):
      connection = http.client.HTTPConnection('127.0.0.1', port)
      connection.request('GET', '/health')
      if connection.getresponse().status == 200:
        return
    time.sleep(0.5)


def _client(way: _Way, number: int, requests: int) -> list[Any]:
  """Asks one thing after the other; returns (first token, end) of each."""
  random = np.random.default_rng(number)
  connection = http.client.HTTPConnection('127.0.0.1', way.port)
  found = []
  for _ in range(requests):
    name = way.names[random.integers(len(way.names))]
    prompt = _PROMPTS[random.integers(len(_PROMPTS))]
    start = time.perf_counter()
    first = way.ask(connection, name, prompt)
    found.append((first, time.perf_counter() - start))
  connection.close()
  return found


def _load(way: _Way, clients: int, each: int) -> tuple[float, list[Any]]:
  """Returns how long all clients took, and each of their requests."""
  start = time.perf_counter()
  with futures.ThreadPoolExecutor(clients) as pool:
    found = list(pool.map(lambda i: _client(way, i, each), range(clients)))
  seconds = time.perf_counter() - start
  return seconds, [request for of_client in found for request in of_client]


def _measure(
  way: _Way, name: str, options: argparse.Namespace
) -> Iterator[tables.Row]:
  """Yields the rows of one way."""
  for clients in options.clients:
    each = -(-options.requests // clients)
    _load(way, clients, each)
    seconds, times = _load(way, clients, each)
    ends = [end for _, end in times]
    found = {
      'requests_per_s': (len(times) / seconds, '1/s'),
      'request_s': (float(np.median(ends)), 's'),
      'request_p99_s': (float(np.quantile(ends, 0.99)), 's'),
    }
    if times[0][0] is not None:
      firsts = [first for first, _ in times]
      found['first_token_s'] = float(np.median(firsts)), 's'
    for metric, (value, unit) in found.items():
      yield {
        'work': pathlib.PurePath(options.model).name,
        'way': name,
        'clients': clients,
        'subsets': len(way.names),
        'output_length': options.output_length,
        'metric': metric,
        'value': value,
        'unit': unit,
        'device': jax.devices()[0].device_kind,
      }


@contextlib.contextmanager
def _subsets(options: argparse.Namespace, seed: seeds.Seed) -> Iterator[str]:
  """Yields a folder of random subsets."""
  random = np.random.default_rng(0)
  with tempfile.TemporaryDirectory() as folder:
    for i in range(options.subsets):
      found = subset_file.random_subset(seed.params, options.epsilon, random)
      found = dataclasses.replace(found, fingerprint=seed.fingerprint)
      subset_lib.save(pathlib.Path(folder) / f's{i}.dst', found, {})
    yield folder


def _options(arguments: Sequence[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--model', required=True, help='a folder')
  parser.add_argument('--json', help='file for the rows')
  parser.add_argument('--ways', nargs='+', default=['running'],
                      choices=['running', 'whole', 'transformers'])  # fmt: skip
  parser.add_argument('--clients', nargs='+', type=int, default=[1, 8, 32])
  parser.add_argument('--requests', type=int, default=64, help='of all clients')
  parser.add_argument('--subsets', type=int, default=8)
  parser.add_argument('--epsilon', type=float, default=1e-4)
  parser.add_argument('--max-batch', type=int, default=32)
  parser.add_argument('--input-length', type=int, default=64)
  parser.add_argument('--output-length', type=int, default=64)
  return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
  """Measures, prints and writes."""
  options = _options(arguments)
  seed = seeds.load_seed(options.model)
  rows: list[tables.Row] = []
  with _subsets(options, seed) as folder:
    for name in options.ways:
      serving = (
        _transformers(options)
        if name == 'transformers'
        else _ours(options, seed, folder, name)
      )
      with serving as way:
        for row in _measure(way, name, options):
          rows.append(row)
          print(json_text.dumps(row), flush=True)
          tables.write_json(options.json, rows)


if __name__ == '__main__':
  main(sys.argv[1:])
