"""`python -m dst_t5x.serve` as a separate process."""

import contextlib
import json
import shutil
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request

import commands
import numpy as np
import pytest
import subsets

from dst_t5x import subsets as subset_lib
from dst_t5x.checkpoints import seeds

NAMES = ('capitals', 'noise')


@pytest.fixture(scope='module')
def folder(toy_seed, tmp_path_factory):
  """Two subsets of the toy model."""
  seed = seeds.load_seed(toy_seed).params
  folder = tmp_path_factory.mktemp('subsets')
  for i, name in enumerate(NAMES):
    found, _ = subsets.random_subset(
      seed, 0.002 * (i + 1), np.random.default_rng(i)
    )
    subset_lib.save(folder / f'{name}.dst', found, {'task': name})
  return folder


def _options(seed, folder, *more):
  return (f'--seed={seed}', f'--subsets={folder}', '--vocabulary=bytes',
          '--port=0', '--output-length=16', *more)  # fmt: skip


@contextlib.contextmanager
def _started(*options):
  """Yields a server's process and its address."""
  process = commands.start('serve', *options)
  try:
    line = process.stdout.readline()
    if not line.startswith('serving on http://'):
      raise AssertionError(commands.finish(process))
    yield process, line.split()[-1]
  finally:
    process.kill()
    process.communicate()


def _call(url, content=None, method=None):
  """Returns the status and the content of a response."""
  data = None if content is None else json.dumps(content).encode()
  request = urllib.request.Request(
    url, data, {'Content-Type': 'application/json'}, method=method
  )
  try:
    with urllib.request.urlopen(request, timeout=commands.TIMEOUT) as response:
      return response.status, json.loads(response.read())
  except urllib.error.HTTPError as e:
    return e.code, json.loads(e.read())


@pytest.fixture(scope='module')
def server(toy_seed, folder):
  """The address of a server; tests add no subsets to it."""
  with _started(*_options(toy_seed, folder)) as (_, url):
    yield url


def test_it_answers_as_infer_does(server, toy_seed, folder, tmp_path):
  inputs = ['abc', 'hgfe', 'a']
  path = tmp_path / 'inputs.txt'
  path.write_text('\n'.join(inputs) + '\n')
  for name in (None, 'capitals', 'noise'):
    checkpoint = folder / f'{name}.dst' if name else toy_seed
    output = tmp_path / str(name)
    flags = commands.flags(
      CHECKPOINT_PATH=checkpoint,
      INFER_OUTPUT_DIR=output,
      INPUT_FILE=path,
      **({'INITIAL_CHECKPOINT_PATH': toy_seed} if name else {}),
    )
    infer = commands.TOY, '--gin_file=gin/runs/infer.gin'
    commands.call('infer', *infer, *flags)
    lines = (output / 'predictions.jsonl').read_text().splitlines()
    expected = [json.loads(line)['prediction'] for line in lines]
    request = {'inputs': inputs, 'subset': name}
    status, content = _call(f'{server}generate', request)
    assert status == 200
    assert [o['text'] for o in content['outputs']] == expected


@pytest.mark.parametrize(
  ('number', 'status'), [(signal.SIGTERM, 0), (signal.SIGINT, 130)]
)
def test_it_ends_when_all_are_served(toy_seed, folder, number, status):
  options = _options(toy_seed, folder, '--max-wait=1.5')
  with _started(*options) as (process, url):
    found = []
    request = {'inputs': ['abc'], 'subset': 'noise'}
    ask = threading.Thread(
      target=lambda: found.append(_call(f'{url}generate', request))
    )
    ask.start()
    time.sleep(0.7)  # It waits for others to join it.
    process.send_signal(number)
    ask.join()
    assert found[0][0] == 200
    assert process.wait(commands.TIMEOUT) == status
    with pytest.raises(urllib.error.URLError):
      _call(f'{url}health')


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    (
      ('--seed=/nowhere/x', '--subsets={}', '--vocabulary=bytes'),
      'there is no /nowhere/x',
    ),
    (('--seed={}', '--subsets={}', '--warm-up=513'), '--warm-up'),
    (('--seed={}', '--subsets={}', '--max-wait=60'), '--max-wait'),
    (('--seed={}', '--subsets={}', '--token-file=/nowhere'), '--token-file'),
    (('--seed={}', '--subsets={}', '--vocabulary=/nowhere'), 'vocabulary'),
    (('--seed={}', '--subsets={}/f', '--vocabulary=bytes'), 'nothing to load'),
    (('--seed={}', '--subsets={}', '--host=no.such.host.'), 'no.such.host'),
  ],
)  # fmt: skip
def test_what_makes_no_sense(tmp_path, capsys, options, message):
  from dst_t5x.serving import server as serve

  arguments = [option.format(tmp_path) for option in options]
  assert serve.main(arguments) == 1
  error = capsys.readouterr().err.strip().splitlines()[-1]
  assert error.startswith('error: ')
  assert message in error


def test_it_does_what_its_description_says(toy_seed, tmp_path):
  """Schemathesis makes valid and invalid requests from the description."""
  program = shutil.which('schemathesis')
  if not program:
    pytest.skip('no program schemathesis')
  # No 500 is described; 504 is, when a deadline passes.
  checks = (
    'status_code_conformance',
    'content_type_conformance',
    'response_schema_conformance',
    'unsupported_method',
    'ignored_auth',
  )
  token = tmp_path / 'token'
  token.write_text('a token\n')
  options = _options(toy_seed, tmp_path / 'subsets', f'--token-file={token}')
  with _started(*options) as (_, url):
    done = subprocess.run(
      [program, 'run', f'{url}openapi.json', '--max-examples=40', '--seed=1',
       '--header=Authorization: Bearer a token', '--no-color',
       f'--checks={",".join(checks)}'],
      cwd=tmp_path,
      capture_output=True,
      text=True,
      timeout=commands.TIMEOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
