"""A tiny model that serves subsets, for the tests of `dst_t5x.serving`."""

import contextlib
import functools
import socket
import threading

import jax
import networks
import numpy as np
import seqio
import subsets
import uvicorn

from dst_t5x.models import decoding
from dst_t5x.serving import batches
from dst_t5x.serving import library as library_lib
from dst_t5x.serving import model as model_lib
from dst_t5x.serving import service as service_lib
from dst_t5x.serving import texts as texts_lib
from dst_t5x.subsets import fingerprint as fingerprint_lib

LENGTH = 6
BYTES = {'vocab_size': 264}  # A model of all 259 ids of bytes.


@functools.cache
def network(**changes):
  """Returns the network; its functions are compiled once for all tests."""
  layers = {'num_encoder_layers': 1, 'num_decoder_layers': 1}
  return networks.tiny(**layers, **changes)


@functools.cache
def seed(**changes):
  """Returns its parameters, on the host; nobody writes into them."""
  return networks.random_params(network(**changes))


@functools.cache
def fingerprint(**changes):
  return fingerprint_lib.fingerprint(seed(**changes))


def model(changes=None, **options):
  """Returns a model that serves."""
  changes = changes or {}
  return model_lib.MultiSubsetModel(
    network(**changes),
    lambda: seed(**changes),
    fingerprint(**changes),
    **{'max_decode_length': LENGTH, 'mix_up_to': 1.0, **options},
  )


def service(folder, limits=None, **options):
  """Returns what serves the subsets of a folder, for texts of 31 bytes."""
  served = model(BYTES)
  library = library_lib.Library(
    str(folder), served.layout, limits or library_lib.Limits(share=0.5)
  )
  texts = texts_lib.Texts(seqio.ByteVocabulary(), 32)
  return service_lib.Service(
    served, library, texts, service_lib.Options(**options)
  )


@contextlib.contextmanager
def listening(app, host='127.0.0.1'):
  """Serves an application over a socket; yields its port."""
  config = uvicorn.Config(app, log_config=None)
  server = uvicorn.Server(config)
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  with socket.create_server((host, 0), family=family) as listener:
    thread = threading.Thread(
      target=server.run, kwargs={'sockets': [listener]}, daemon=True
    )
    thread.start()
    try:
      yield listener.getsockname()[1]
    finally:
      server.should_exit = True
      thread.join()


def subset(share, number, changes=None):
  """Returns a subset of a share of each tensor, and the tuned parameters."""
  random = np.random.default_rng(number)
  return subsets.random_subset(seed(**(changes or {})), share, random)


def tokens(number, length=5):
  """Returns an input."""
  random = np.random.default_rng(number)
  return random.integers(2, networks.VOCAB, length, dtype=np.int32)


@functools.cache
def _decode(net, decoder, length):
  return jax.jit(lambda p, t: decoder(net, p, t, length))


def alone(params, row, decoder=model_lib.GREEDY, net=None, length=LENGTH):
  """Returns what a dense model says: tokens and score."""
  net = net or network()
  prompt = net.prompt_of_inputs(row)
  # Few lengths compile.
  missing = -len(prompt) % batches.LEAST_LENGTH
  prompt = np.pad(prompt, (0, missing), constant_values=net.pad_id)[None]
  tokens, scores = _decode(net, decoder, length)(params, prompt)
  return decoding.continuations(net, np.asarray(tokens))[0], float(scores[0])


def answer(text, params):
  """Returns what a dense model of bytes says, as text."""
  vocabulary = seqio.ByteVocabulary()
  row = np.array([*vocabulary.encode(text), 1], np.int32)
  found, _ = alone(params, row, net=network(**BYTES))
  return vocabulary.decode(found.tolist())


def assert_seed(served, expected=None):
  """The seed's bits are on the device."""
  subsets.assert_same(served.revert(), seed() if expected is None else expected)


@contextlib.contextmanager
def compilations():
  """Yields a list to which each compilation adds its seconds."""
  found = []

  def listen(event, duration, **_):
    if event == '/jax/core/compile/backend_compile_duration':
      found.append(duration)

  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield found
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)
