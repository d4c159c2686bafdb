"""Runs, seeds and vocabularies in object stores, over HTTP."""

import http.server
import json
import signal
import sys
import threading
import time

import commands
from etils import epath
from fixtures_data import vocabulary_file  # noqa: F401
import numpy as np
import pytest
import stores
import test_processes
import tiny_t5

from dst_t5x.checkpoints import hf_checkpoint
from dst_t5x.checkpoints import seeds
from dst_t5x.checkpoints import t5x_checkpoint
from dst_t5x.core import metrics_file
from dst_t5x.core.errors import UserError
from dst_t5x.data import task_vocabulary
from dst_t5x.data import vocabulary

STEPS = 40


@pytest.fixture(scope='module', params=[stores.google, stores.amazon])
def store(request):
  """The address of a bucket."""
  with request.param() as address:
    yield address


@pytest.fixture(scope='module')
def seed(store, toy_seed):
  """A seed in the store."""
  for file in toy_seed.rglob('*'):
    if file.is_file():
      target = epath.Path(f'{store}/seed') / str(file.relative_to(toy_seed))
      target.write_bytes(file.read_bytes())
  return f'{store}/seed'


def _steps(folder):
  """Returns step -> whether its checkpoint is whole."""
  checkpoints = epath.Path(folder) / 'checkpoints'
  if not checkpoints.exists():
    return {}
  return {
    int(p.name): (p / 'commit_success.txt').exists()
    for p in checkpoints.iterdir()
    if p.name.isdigit()
  }


def _losses(folder):
  return [
    (row['step'], row['train/loss'], row.get('eval/loss'))
    for row in metrics_file.read(folder)
    if row['step'] % 10 == 0 and 'train/loss' in row
  ]


@pytest.mark.slow
def test_a_killed_run_ends_as_an_uninterrupted_one_on_a_disk(
  store, toy_seed, toy_run
):
  folder = epath.Path(f'{store}/killed')
  arguments = [
    *commands.dst(toy_seed),
    *commands.flags(MODEL_DIR=str(folder), TRAIN_STEPS=STEPS, KEEP=2),
  ]
  process = commands.start('train', *arguments)
  deadline = time.monotonic() + commands.TIMEOUT
  # While the second checkpoint is being written.
  while process.poll() is None and set(_steps(folder)) != {10, 20}:
    assert time.monotonic() < deadline
    time.sleep(0.01)
  process.send_signal(signal.SIGKILL)
  status, _, err = commands.finish(process)
  assert status == -signal.SIGKILL, err
  assert _steps(folder)[10], err
  commands.call('train', *arguments)
  wanted = (toy_run / 'last.dst').read_bytes()
  assert (folder / 'last.dst').read_bytes() == wanted
  assert commands.fingerprint(folder) == commands.fingerprint(toy_run)
  assert _losses(folder) == _losses(toy_run)
  # What is kept, and nothing else.
  assert _steps(folder) == {30: True, 40: True}
  there = {p.name for p in folder.iterdir() if 'tfevents' not in p.name}
  on_disk = {p.name for p in toy_run.iterdir() if 'tfevents' not in p.name}
  assert there == on_disk - {'.lock'}
  assert list(folder.glob('events.out.tfevents.*'))
  for file in (toy_run / 'evaluation').glob('toy-0*'):
    ours = folder / 'evaluation' / file.name
    assert ours.read_bytes() == file.read_bytes()
  # A step that was repeated is there twice.
  evaluated = (folder / 'evaluation/toy-metrics.jsonl').read_text()
  steps = [json.loads(line)['step'] for line in evaluated.splitlines()]
  assert set(steps) == {20, 40}


def test_evaluation_and_inference(store, seed):
  folder = epath.Path(f'{store}/results')
  shared = [commands.TOY, *commands.flags(CHECKPOINT_PATH=seed)]
  commands.call(
    'eval',
    *shared,
    '--gin_file=gin/runs/eval.gin',
    *commands.flags(EVAL_OUTPUT_DIR=str(folder), EVAL_EXAMPLES=4),
  )
  assert json.loads((folder / 'results.json').read_text())['step'] == 60
  assert len(list(folder.glob('toy-*.jsonl'))) == 2
  inputs = epath.Path(f'{store}/inputs.txt')
  inputs.write_text('a b\nc\n')
  commands.call(
    'infer',
    *shared,
    '--gin_file=gin/runs/infer.gin',
    *commands.flags(INFER_OUTPUT_DIR=str(folder), INPUT_FILE=str(inputs)),
  )
  lines = (folder / 'predictions.jsonl').read_text().splitlines()
  assert [json.loads(line)['inputs'] for line in lines] == ['a b', 'c']


@pytest.mark.slow
def test_two_processes_write_one_run(store, toy_seed, tmp_path):
  on_disk, in_store = tmp_path / 'run', epath.Path(f'{store}/two')
  for folder in (on_disk, str(in_store)):
    arguments = test_processes._arguments(toy_seed, folder, steps=10)
    test_processes._train(2, *arguments)
  wanted = (on_disk / 'last.dst').read_bytes()
  assert (in_store / 'last.dst').read_bytes() == wanted
  assert _steps(in_store) == {10: True}
  assert len(list(in_store.glob('events.out.tfevents.*'))) == 1


def test_seeds(store, seed, toy_seed):
  assert commands.fingerprint(seed) == commands.fingerprint(toy_seed)
  params = tiny_t5.random_params()
  native = t5x_checkpoint.save(f'{store}/t5x', params, step=12)
  hf_checkpoint.save(f'{store}/hf', params, tiny_t5.NETWORK)
  for path, kind, step in ((native, 't5x', 12), (f'{store}/hf', 'hf', 0)):
    found = seeds.load_seed(path)
    assert (found.format, found.step) == (kind, step)
    tiny_t5.assert_same_bits(found.params, params)
  with pytest.raises(UserError, match='exists already'):
    hf_checkpoint.save(f'{store}/hf', params, tiny_t5.NETWORK)


def test_a_write_that_fails_leaves_nothing(store, monkeypatch):
  def fail(*_):
    raise OSError('no more')

  monkeypatch.setattr(t5x_checkpoint, '_write_tensors', fail)
  with pytest.raises(UserError, match=r'cannot write .*no more'):
    t5x_checkpoint.save(f'{store}/failed', tiny_t5.random_params(), step=1)
  assert not epath.Path(f'{store}/failed').exists()


def test_a_vocabulary(store, vocabulary_file):  # noqa: F811
  path = f'{store}/sentencepiece.model'
  epath.Path(path).write_bytes(vocabulary_file.read_bytes())
  there, here = vocabulary._make(path), vocabulary._make(str(vocabulary_file))
  task_vocabulary.check(there)
  assert there.vocab_size == here.vocab_size == 32100
  assert there.encode('a <extra_id_0> b') == here.encode('a <extra_id_0> b')
  np.testing.assert_array_equal(there.encode_tf('abc'), here.encode_tf('abc'))
  with pytest.raises(UserError, match=r'there is no bucket .*or nothing'):
    task_vocabulary.check(vocabulary._make(f'{store}/none.model'))


def _preflight(seed, folder):
  commands.call(
    'train',
    *commands.dst(seed),
    *commands.flags(MODEL_DIR=folder),
    '--gin.training.train.only_check=True',
  )


def test_preflight_leaves_no_trace(store, seed, capsys):
  _preflight(seed, f'{store}/new')
  assert f'{store}/new can be written to' in capsys.readouterr().out
  assert not epath.Path(f'{store}/new').exists()


def test_a_missing_bucket_is_not_made(store, seed, toy_seed):
  scheme = store.partition('://')[0]
  for _ in range(2):
    with pytest.raises(UserError, match=r"\A.*there is no bucket 'bucke'"):
      _preflight(toy_seed, f'{scheme}://bucke/run')
  for path in ('bucke', 'bucke/seed', 'bucke/a/b'):
    with pytest.raises(UserError, match=rf'no {scheme}://{path}, or no such'):
      seeds.load_seed(f'{scheme}://{path}')
  with pytest.raises(UserError, match=r"no such bucket; did you mean 'seed'"):
    seeds.load_seed(f'{store}/sed')


class _Denying(http.server.BaseHTTPRequestHandler):
  """Answers every request as object stores do without permission."""

  def do_GET(self):
    self.rfile.read(int(self.headers.get('Content-Length', 0)))
    body = b'{"error": {"code": 403, "message": "Access Denied"}}'
    if 'Authorization' in self.headers:  # Signed, as S3 wants it.
      body = b'<Error><Code>AccessDenied</Code><Message>no</Message></Error>'
    self.send_response(403)
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    if self.command != 'HEAD':
      self.wfile.write(body)

  do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

  def log_message(self, *_):
    """Says nothing."""


@pytest.mark.parametrize('scheme', ['gs', 's3'])
def test_no_permission(scheme, toy_seed):
  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), _Denying)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    with (
      stores.at(scheme, f'http://127.0.0.1:{server.server_port}'),
      pytest.raises(UserError, match=r"\A.*denied by bucket 'b'"),
    ):
      _preflight(toy_seed, f'{scheme}://b/run')
  finally:
    server.shutdown()
    server.server_close()


def test_no_credentials(toy_seed, monkeypatch):
  with stores.amazon() as address:
    monkeypatch.delenv('AWS_ACCESS_KEY_ID')
    monkeypatch.delenv('AWS_SECRET_ACCESS_KEY')
    monkeypatch.setenv('AWS_EC2_METADATA_DISABLED', 'true')
    with pytest.raises(UserError, match=r'\A.*no credentials: `aws configure`'):
      _preflight(toy_seed, f'{address}/run')


@pytest.mark.parametrize(
  ('path', 'library', 'remedy'),
  [
    ('gs://b/run', 'gcsfs', 'needs gcsfs: pip install gcsfs'),
    ('s3://b/run', 's3fs', r"needs s3fs: pip install 'dst_t5x\[s3\]'"),
    ('az://b/run', None, 'az:// is not known, only gs:// and s3://'),
  ],
)
def test_what_is_not_installed(path, library, remedy, toy_seed, monkeypatch):
  if library:
    monkeypatch.setitem(sys.modules, library, None)
    # fsspec's, which it puts a mapping of the same name before.
    registry = sys.modules['fsspec.registry']._registry
    for name in ('gcs', 'gs', 's3'):
      monkeypatch.delitem(registry, name, raising=False)
  with pytest.raises(UserError, match=remedy):
    _preflight(toy_seed, path)
  with pytest.raises(UserError, match=remedy):
    seeds.load_seed(path)
