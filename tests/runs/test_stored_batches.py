"""Runs from stored batches are those from live ones, bit for bit."""

import json
import subprocess
import sys

import commands
import forked
import numpy as np
import pytest
import safetensors
import toy_task  # noqa: F401

from dst_t5x.core import json_text
from dst_t5x.core.errors import UserError, first_line
from dst_t5x.data import batch_files
from dst_t5x.engine import stored
from dst_t5x.runs import batch_sets

_STEPS = 6
_NETWORK = ('MIXTURE_OR_TASK_NAME', 'TASK_FEATURE_LENGTHS', 'toy_task')
_DATA = {
  'MIXTURE_OR_TASK_NAME': 'toy_plain',
  'TASK_FEATURE_LENGTHS': {'inputs': 16, 'targets': 16},
  'BATCH_SIZE': 4,
}
_RUN = {
  'TRAIN_STEPS': _STEPS,
  'EVAL_BATCH_SIZE': 8,
  'EVAL_PERIOD': 3,
  'CHECKPOINT_PERIOD': 2,
  'LOG_PERIOD': 1,
  'DROPOUT_RATE': 0.1,
}
# Name -> gin files of a network and of a method, settings of data and run.
_CASES = {
  't5': ('toy', 'dst', {}, {'EPSILON': 0.01}),
  'decoder_only': (
    'decoder_only',
    'dst',
    {'DATA_SHARDS': 2},
    {'EPSILON': 0.01, 'MICROBATCHES': 2},
  ),
  'prompts': (
    'toy',
    'prompt',
    {'HELD_OUT_TASK': 'prose', 'PACK': False},
    {'PROMPT_LENGTH': 3},
  ),
}


@pytest.fixture(scope='module')
def network_file(tmp_path_factory):
  """Returns a function: a toy's gin file without its task, as a flag."""
  folder = tmp_path_factory.mktemp('networks')

  def write(name):
    lines = (commands.TESTS / f'{name}.gin').read_text().splitlines()
    kept = [line for line in lines if not any(x in line for x in _NETWORK)]
    file = folder / f'{name}_network.gin'
    file.write_text('\n'.join(kept) + '\n')
    return f'--gin_file={file}'

  return write


@pytest.fixture(scope='module', params=_CASES)
def case(request, network_file, toy_seed, tmp_path_factory):
  """What a case's runs have in common, and its stored batches."""
  network, method, data, run = _CASES[request.param]
  folder = tmp_path_factory.mktemp(request.param)
  files = [network_file(network), f'--gin_file=gin/methods/{method}.gin']
  seed = toy_seed if network == 'toy' else _pretrained(network, folder / 'seed')
  made = Case(files, _DATA | data, _RUN | run, seed, folder / 'batches')
  made.prepare()
  return made


def _pretrained(network, folder):
  commands.call(
    'train',
    f'--gin_file={commands.TESTS / f"{network}.gin"}',
    '--gin_file=gin/runs/pretrain.gin',
    *commands.flags(
      MODEL_DIR=folder, TRAIN_STEPS=1, EVAL_EXAMPLES=1, BATCH_SIZE=4
    ),
  )
  return folder


class Case:
  """A configuration that reads live or stored batches."""

  def __init__(self, files, data, run, seed, batches):
    self.files, self.data, self.run = files, data, run
    self.seed, self.batches = seed, batches

  def prepare(self, folder=None, **more):
    settings = {'VOCABULARY': 'bytes'} | self.data | self.run | more
    flags = commands.flags(**settings)
    commands.call(
      'prepare_batches',
      *batch_sets.to_flags(
        [
          *(*self.files, '--gin_file=gin/runs/finetune.gin', *flags),
          *('--batches', str(folder or self.batches)),
        ]
      ),
    )

  def arguments(self, source, folder, **more):
    """Returns the flags of training from one source."""
    files = {
      'live': 'gin/runs/finetune.gin',
      'stored': 'gin/runs/from_batches.gin',
    }
    settings = {
      'live': {'VOCABULARY': 'bytes', **self.data},
      'stored': {'BATCHES': self.batches},
    }
    return [
      *(*self.files, f'--gin_file={files[source]}'),
      *commands.flags(
        MODEL_DIR=folder,
        INITIAL_CHECKPOINT_PATH=self.seed,
        **(settings[source] | self.run | more),
      ),
    ]

  def train(self, source, folder, **more):
    commands.call('train', *self.arguments(source, folder, **more))


def _content(folder):
  """Returns what a run leaves, but times and TensorBoard's files."""
  rows = map(json.loads, (folder / 'metrics.jsonl').read_text().splitlines())
  files = {
    name: (folder / name).read_bytes()
    for name in ('run.json', 'held_out.json', 'last.dst')
    if (folder / name).exists()
  }
  adapter = folder / 'last_adapter' / 'adapter_model.safetensors'
  if adapter.exists():  # The order of its metadata is random.
    with safetensors.safe_open(adapter, 'np') as opened:
      names = opened.keys()
      files |= {name: opened.get_tensor(name).tobytes() for name in names}
      files['metadata'] = opened.metadata()
  assert len(files) >= 2
  metrics = [
    {name: x for name, x in row.items() if not name.startswith('speed/')}
    for row in rows
  ]
  return files, metrics


@pytest.fixture(scope='module')
def live(case, tmp_path_factory):
  """The uninterrupted run from live batches."""
  folder = tmp_path_factory.mktemp('live') / 'run'
  case.train('live', folder)
  return folder


def test_a_run_from_stored_batches_is_the_same(case, live, tmp_path):
  case.train('stored', tmp_path / 'run')
  assert _content(tmp_path / 'run') == _content(live)


@pytest.mark.parametrize('case', ['decoder_only'], indirect=True)
def test_a_run_goes_on_with_the_other_kind_of_batches(case, live, tmp_path):
  folder = tmp_path / 'run'
  for source, steps in (('live', 2), ('stored', 4), ('live', _STEPS)):
    case.train(source, folder, TRAIN_STEPS=steps)
  assert _content(folder)[0] == _content(live)[0]


def test_without_tensorflow_and_seqio(network_file, toy_seed, tmp_path):
  """Train, eval: in a process of their own, which cannot import them."""
  files = [network_file('toy'), '--gin_file=gin/methods/dst.gin']
  data = _DATA | {'HELD_OUT_TASK': 'prose', 'HELD_OUT_EXAMPLES': 4}
  run = _RUN | {'TRAIN_STEPS': 4, 'EPSILON': 0.01}
  case = Case(files, data, run, toy_seed, tmp_path / 'batches')
  case.prepare()
  there, result = tmp_path / 'stored', tmp_path / 'eval'
  case.train('live', tmp_path / 'live')
  evaluate = [
    *(*files, '--gin_file=gin/runs/from_batches.gin'),
    *commands.flags(
      BATCHES=case.batches,
      CHECKPOINT_PATH=there,
      EVAL_OUTPUT_DIR=result,
      EVAL_BATCH_SIZE=8,
    ),
  ]
  calls = [['train', *case.arguments('stored', there)], ['eval', *evaluate]]
  done = subprocess.run(
    [
      *(sys.executable, commands.TESTS / 'without_tensorflow.py'),
      json_text.dumps(calls),
    ],
    env=forked.environment(),
    capture_output=True,
    text=True,
    timeout=commands.TIMEOUT,
  )
  assert done.returncode == 0, done.stderr
  assert _content(there) == _content(tmp_path / 'live')
  results = json.loads((result / 'results.json').read_text())
  last = json.loads((there / 'report.json').read_text())['results']
  for name in ('eval/loss', 'held_out/loss'):
    assert results[name] == last[name]


@pytest.fixture(scope='module')
def small(network_file, toy_seed, tmp_path_factory):
  """Batches of a task that has metrics."""
  data = _DATA | {'MIXTURE_OR_TASK_NAME': 'toy', 'EVAL_EXAMPLES': 9}
  folder = tmp_path_factory.mktemp('small')
  files = [network_file('toy'), '--gin_file=gin/methods/dst.gin']
  case = Case(files, data, _RUN | {'EPSILON': 0.01}, toy_seed, folder / 'set')
  case.prepare()
  return case


def test_predictions_are_written_to_be_scored(small, tmp_path):
  plan = {'TRAIN_STEPS': 2}
  for source in ('live', 'stored'):
    small.train(source, tmp_path / source, **plan)
  name = 'evaluation/toy-000002.jsonl'
  ours, theirs = (
    [
      json.loads(line)
      for line in (tmp_path / source / name).read_text().splitlines()
    ]
    for source in ('stored', 'live')
  )
  assert len(ours) == 9
  for row, other in zip(ours, theirs, strict=True):
    assert row['prediction'] == other['prediction']
    assert row['inputs'].upper() == row['targets']


def _refusal(arguments):
  with pytest.raises(UserError) as caught:
    commands.call('train', *arguments)
  return first_line(caught.value)


@pytest.mark.parametrize(
  ('setting', 'value'),
  [
    ('BATCH_SIZE', 8),
    ('DATA_SHARDS', 2),
    ('EVAL_EXAMPLES', 3),
    ('EVAL_SPLIT', 'test'),
    ('HELD_OUT_TASK', 'prose'),
    ('MIXTURE_OR_TASK_NAME', 'jsonl'),
    ('PACK', False),
    ('RANDOM_SEED', 1),
    ('TASK_FEATURE_LENGTHS', {'inputs': 16, 'targets': 8}),
  ],
)
def test_other_settings_are_refused(small, setting, value, tmp_path):
  arguments = small.arguments('stored', tmp_path / 'run', **{setting: value})
  said = _refusal(arguments)
  there = stored.Stored(small.batches).settings[setting]
  assert f'were made with {setting} = {there!r}, not {value!r}' in said
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  ('bindings', 'message'),
  [
    ({'TRAIN_STEPS': 7}, 'are of 6 steps, and TRAIN_STEPS = 7: set --gin.TRAI'),
    ({'VOCABULARY': 'x'}, "made with vocabulary.name = 'bytes', not 'x'"),
    (
      {'T5Config.vocab_size': 200},
      '259 ids, but vocab_size of the',
    ),
    ({'KEEP_BEST_BY': 'toy/exact_match'}, "no metric 'toy/exact_match'"),
    (
      {'BATCHES': 'nowhere'},
      'BATCHES nowhere has no batches.json: make',
    ),
  ],
)
def test_mistakes_are_told_before_any_work(
  small, bindings, message, toy_seed, tmp_path
):
  arguments = small.arguments('stored', tmp_path / 'run', **bindings)
  said = _refusal(arguments)
  assert message in said
  assert not (tmp_path / 'run').exists()


def test_another_method_needs_other_rows(small, tmp_path):
  files = [small.files[0], '--gin_file=gin/methods/prompt.gin']
  case = Case(files, small.data, _RUN, small.seed, small.batches)
  arguments = case.arguments('stored', tmp_path, PROMPT_LENGTH=3)
  said = _refusal(arguments)
  assert 'prepare batches with the same model and method' in said


def test_damage_is_told(small, tmp_path):
  def rows(folder):
    return list(stored.Stored(folder).part('training').rows())

  small.prepare(folder := tmp_path / 'set')
  assert len(rows(folder)) == _STEPS
  file = folder / 'training-00000.safetensors'
  content = file.read_bytes()
  file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
  with pytest.raises(UserError, match='safetensors is damaged: its SHA-256'):
    rows(folder)
  file.write_bytes(content[:-1])
  with pytest.raises(UserError, match=r'damaged: it has \d+ bytes, not \d+;'):
    small.prepare(folder)
  file.unlink()
  with pytest.raises(UserError, match='safetensors is missing; prepare'):
    rows(folder)
  about = folder / batch_files.FILE
  text = about.read_text()
  for old, new, said in (
    ('"BATCH_SIZE": 4', '"BATCH_SIZE": 2', 'its settings changed'),
    ('"format": 1', '"format": 2', 'has format 2, and this version'),
    ('{', '', 'batches.json'),
  ):
    about.write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=said):
      stored.Stored(folder)


def test_whole_batches_stay_and_others_are_not_replaced(small):
  about = small.batches / batch_files.FILE
  before = about.stat().st_mtime_ns
  small.prepare()
  assert about.stat().st_mtime_ns == before
  with pytest.raises(UserError, match='BATCH_SIZE = 4, not 8: choose'):
    small.prepare(BATCH_SIZE=8)


def test_integers_are_stored_small_and_read_as_they_were(tmp_path):
  from etils import epath

  writer = batch_files.Writer(epath.Path(tmp_path), 'part', 'hash')
  rows = {
    'ids': np.array([[0, 40_000]], np.int32),
    'signed': np.array([[-1, 3]], np.int64),
    'weights': np.array([[0.5, 1]], np.float32),
  }
  writer.add(rows)
  writer.add(rows)
  part = batch_files.Part(epath.Path(tmp_path), writer.finish())
  found = list(part.rows(1))
  assert len(part) == 2
  assert len(found) == 1
  for name, array in rows.items():
    np.testing.assert_array_equal(found[0][name], array[0])
    assert found[0][name].dtype == array.dtype
