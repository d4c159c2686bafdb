"""Serves many subsets on one seed: `python -m dst_t5x.serve --help`.

    python -m dst_t5x.serve --seed=SEED --subsets=DIR

SEED is anything that `python -m dst_t5x.convert` reads. DIR holds files
`<name>.dst`; it can also be `hf://organisation/name[@revision][/file.dst]`, on
the Hugging Face Hub. A seed that does not state its network, such as a run or a
T5X checkpoint of a decoder-only model, needs the model's gin file:
`--gin_file=…`.
"""

import argparse
from collections.abc import Sequence
import logging
import os
import pathlib
import signal
import socket
import sys
from typing import Any

from dst_t5x.runtime import quiet_tensorflow  # noqa: F401

# isort: split
from absl import logging as absl_logging
import numpy as np

from dst_t5x.checkpoints import seeds
from dst_t5x.core import command_line
from dst_t5x.core.errors import UserError
from dst_t5x.runtime import interrupts
from dst_t5x.serving import subset_folders

TOKEN_VARIABLE = 'DST_SERVE_TOKEN'
LOOPBACK = ('localhost', '127.0.0.1', '::1')


def main(arguments: Sequence[str]) -> int:
  """Runs the command and returns its exit status."""
  flags = [a for a in arguments if a.startswith('--gin.')]
  options = _parser().parse_args([a for a in arguments if a not in flags])
  options.gin = [*(f'--gin_file={file}' for file in options.gin_file), *flags]
  absl_logging.set_verbosity(absl_logging.INFO)
  try:
    _check(options)
    token = _token(options.token_file)
    with (
      _listening(options.host, options.port) as listener,
      subset_folders.opened(options.subsets) as folder,
    ):
      options.subsets = folder
      return _serve(options, token, listener)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  except KeyboardInterrupt:
    interrupts.set_exit_status()
    return interrupts.STATUS


def _serve(
  options: argparse.Namespace, token: str | None, listener: socket.socket
) -> int:
  """Serves until a signal ends it; returns the exit status."""
  try:
    import uvicorn

    from dst_t5x.serving import app as app_lib
  except ImportError as e:
    raise UserError(
      f'serving needs {e.name}: pip install "dst_t5x[serve]"'
    ) from e
  service = make_service(options)
  host, port = listener.getsockname()[:2]
  is_local = host in ('127.0.0.1', '::1')
  app = app_lib.create_app(service, token, list(LOOPBACK) if is_local else None)
  if not is_local and not token:
    absl_logging.warning(
      'Everyone who reaches %s can use this server: set --token-file', host
    )
  config = uvicorn.Config(
    app,
    log_level=logging.WARNING,
    timeout_graceful_shutdown=options.drain_seconds,
    server_header=False,
  )
  server = uvicorn.Server(config)
  ended_by: list[int] = []
  # On a signal, uvicorn drains, ends, and then raises the signal again.
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: ended_by.append(number))
  shown = f'[{host}]' if ':' in host else host
  print(f'serving on http://{shown}:{port}/', flush=True)
  server.run(sockets=[listener])
  return interrupts.STATUS if signal.SIGINT in ended_by else 0


def make_service(options: argparse.Namespace) -> Any:
  """Loads the seed and returns the service that the options describe.

  Raises:
    UserError: the seed, the vocabulary or the folder cannot be used.
  """
  from dst_t5x.serving import library as library_lib
  from dst_t5x.serving import model as model_lib
  from dst_t5x.serving import networks
  from dst_t5x.serving import service as service_lib
  from dst_t5x.serving import texts as texts_lib

  network = networks.of_gin(options.gin)
  vocabulary = networks.vocabulary(
    options.vocabulary, options.seed, is_configured=network is not None
  )
  texts = texts_lib.Texts(vocabulary, options.input_length)
  seed = _load_seed(options.seed)
  network = networks.of_seed(seed, network)
  texts.check_fits(network)
  first: list[Any] = [seed.params]
  fingerprint = seed.fingerprint
  del seed

  def load() -> Any:
    # The host keeps no copy; the seed is read again if it is needed.
    return first.pop() if first else _load_seed(options.seed).params

  model = model_lib.MultiSubsetModel(
    network,
    load,
    fingerprint,
    max_decode_length=options.output_length,
    input_length=options.input_length,
    device_bytes=options.device_bytes,
    mix_up_to=options.mix_up_to,
    max_batch=options.max_batch,
  )
  library = library_lib.Library(options.subsets, model.layout, _limits(options))
  absl_logging.info('%d subsets in %s', len(library.names()), options.subsets)
  _warm_up(model, library, options.warm_up)
  return service_lib.Service(
    model,
    library,
    texts,
    service_lib.Options(
      beams=options.beams,
      deadline=options.deadline,
      max_queue=options.max_queue,
      max_batch=options.max_batch,
      max_wait=options.max_wait,
      name=options.model_name or pathlib.PurePath(options.seed).name,
    ),
  )


def _limits(options: argparse.Namespace) -> Any:
  from dst_t5x.serving import library as library_lib

  return library_lib.Limits(
    upload_bytes=options.upload_bytes,
    share=options.max_share,
    disk_bytes=options.disk_bytes,
    sent_bytes=options.sent_bytes,
    host_bytes=options.host_bytes,
  )


def _warm_up(model: Any, library: Any, lengths: Sequence[int]) -> None:
  """Compiles for the given input lengths before the first request."""
  from dst_t5x.serving import model as model_lib
  from dst_t5x.serving import running as running_lib
  from dst_t5x.subsets import on_device

  running = running_lib.make(model, model.max_batch)
  warm_up = model.warm_up if running is None else running.warm_up
  classes: dict[int, str] = {}
  for name in library.names() if lengths else ():
    try:
      size = library.facts(name).size
    except UserError as e:
      absl_logging.warning('%s', e)
      continue
    classes.setdefault(on_device.capacity_class(size), name)
  if running is None:
    model.decode([model_lib.Row(np.ones(1, np.int32))])
  for length in lengths:
    seed = model_lib.Row(np.ones(length, np.int32))
    for name in classes.values():
      warm_up([library.find(name).row(seed.tokens), seed])


def _load_seed(path: str) -> seeds.Seed:
  seed = seeds.load_seed(path)
  if seed.adapter.added:
    raise UserError(
      f'{path} has an adapter: merge it first, with `python -m dst_t5x.convert'
      ' … --format=t5x`'
    )
  return seed


def _listening(host: str, port: int) -> socket.socket:
  """Returns a listening socket.

  It is opened before the seed is loaded, so that a taken port fails at once.

  Raises:
    UserError: the address cannot be used.
  """
  try:
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=2048)
  except OSError as e:
    raise UserError(
      f'cannot listen on {host}, port {port}: {e}; choose others with --host'
      ' and --port'
    ) from e


def _token(path: str | None) -> str | None:
  """Returns the token from the file, or else from the environment variable.

  Raises:
    UserError: the file cannot be read, or its text cannot be a token.
  """
  source, text = f'--token-file {path}', os.environ.get(TOKEN_VARIABLE)
  if path:
    try:
      text = pathlib.Path(path).read_text(encoding='utf-8-sig')
    except (OSError, UnicodeDecodeError) as e:
      raise UserError(f'cannot read --token-file: {e}') from e
  elif text is None:
    return None
  else:
    source = TOKEN_VARIABLE
  token = text.strip()
  if not token:
    raise UserError(f'{source} is empty: it protects nothing; fill or drop it')
  if not token.isprintable():
    raise UserError(f'{source} is not one line of printable characters')
  return token


def _check(options: argparse.Namespace) -> None:
  """Raises UserError if options contradict each other."""
  for length in options.warm_up:
    if length > options.input_length:
      raise UserError(f'--warm-up: no input has {length} pieces')
  if options.max_wait >= options.deadline:
    raise UserError('--max-wait must be below --deadline')


def _parser() -> command_line.Parser:
  parser = command_line.Parser(
    prog='python -m dst_t5x.serve', description=__doc__
  )

  def add(name: str, default: Any, text: str, kind: Any = str) -> None:
    shown = '' if default is None else f' (default: {default})'
    parser.add_argument(
      name,
      default=default,
      type=kind,
      metavar=name.rpartition('-')[2].upper(),
      help=text + shown,
    )

  count, ratio = command_line.whole(1), command_line.number(1)
  year = command_line.YEAR
  parser.add_argument('--seed', metavar='DIR', required=True, help='the model')
  parser.add_argument(
    '--subsets',
    metavar='DIR',
    required=True,
    help='of <name>.dst files, or hf://…',
  )
  parser.add_argument(
    '--gin_file',
    metavar='FILE',
    action='append',
    default=[],
    help="the model's, where SEED does not state its network; also"
    ' --gin.NAME=VALUE',
  )
  add('--vocabulary', None,
      'SentencePiece model, folder with tokenizer.json, or `bytes`; default:'
      " gin's, the seed's own, or T5's")  # fmt: skip
  add('--model-name', None, "the seed's name in /v1; default: its folder's")
  add('--host', '127.0.0.1', 'address')
  port = command_line.whole(0, 2**16 - 1)
  add('--port', 8000, 'port; 0 chooses a free one', port)
  add('--token-file', None, f'file of the token, else ${TOKEN_VARIABLE}')
  add('--input-length', 512, 'pieces of an input; longer ones are refused',
      count)  # fmt: skip
  add('--output-length', 128, 'most pieces to decode', count)
  parser.add_argument(
    '--warm-up',
    nargs='+',
    type=count,
    default=[],
    metavar='LENGTH',
    help='before serving, compile for inputs of these lengths, all batch sizes'
    ' and the size classes of the present subsets',
  )
  add('--beams', 4, 'beams of a beam search', count)
  add('--max-batch', 16, 'most inputs in a batch', count)
  seconds = command_line.number(year, with_zero=True)
  add('--max-wait', 0.002, 'seconds that an input waits for others', seconds)
  add('--max-queue', 256, 'inputs that may wait; more are refused', count)
  seconds = command_line.number(year)
  add('--deadline', 60.0, 'seconds until a request is given up', seconds)
  add('--drain-seconds', 30, 'seconds to finish requests when the server ends',
      command_line.whole(1, year))  # fmt: skip
  add('--mix-up-to', 1e-3, 'largest ε that is mixed in a batch with others',
      command_line.number(1, with_zero=True))  # fmt: skip
  add('--max-share', 0.1, 'largest ε that is accepted', ratio)
  add('--upload-bytes', 64 * 2**20, 'most bytes of a subset file', count)
  add('--device-bytes', 2**30, 'most bytes of subsets on the device', count)
  add('--host-bytes', 2**30, 'most bytes of subsets in memory', count)
  add('--disk-bytes', 10 * 2**30, 'most bytes of files with names', count)
  add('--sent-bytes', 2**30, 'most bytes of files sent with requests', count)
  return parser
