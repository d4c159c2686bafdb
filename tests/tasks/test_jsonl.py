"""A task of one's own: files of rows, mistakes in them, training on them."""

import json

import commands
import gin
import pytest
import seqio
import tensorflow as tf

from dst_t5x.config import binaries
from dst_t5x.core.errors import UserError
from dst_t5x.data import task_checks
from dst_t5x.runs import evaluating as eval_binary
from dst_t5x.tasks import jsonl

_LENGTHS = {'inputs': 48, 'targets': 48}
_ROWS = [
  ('upper: plum', 'PLUM'),
  ('"quoted", \\ and \t tab', 'Äpfel\n{x}'),
  ('', 'empty inputs'),
  ('separators \u2028 and \x85', 'stay'),
]


@pytest.fixture(autouse=True)
def bytes_vocabulary():
  gin.bind_parameter('vocabulary.chosen.name', 'bytes')


@pytest.fixture
def write(tmp_path):
  def write(content, name='rows.jsonl'):
    path = tmp_path / name
    path.write_bytes(
      content if isinstance(content, bytes) else content.encode()
    )
    return path

  return write


@pytest.fixture
def use(write):
  """Names a file with this content for both splits; returns its path."""

  def use(content, name='rows.jsonl', **settings):
    path = write(content, name)
    for parameter in ('train_file', 'eval_file'):
      gin.bind_parameter(f'jsonl.settings.{parameter}', str(path))
    for parameter, value in settings.items():
      gin.bind_parameter(f'jsonl.settings.{parameter}', value)
    return path

  return use


def _json_lines(rows):
  return ''.join(
    json.dumps({'inputs': inputs, 'id': 1, 'targets': targets}) + '\n'
    for inputs, targets in rows
  )


def _read(split='validation', **options):
  task = seqio.TaskRegistry.get('jsonl')
  dataset = task.get_dataset(None, split=split, shuffle=False, **options)
  return [
    tuple(row[f'{name}_pretokenized'].decode() for name in _LENGTHS)
    for row in dataset.as_numpy_iterator()
  ]


def test_json_lines_are_read_as_they_are(use):
  use(_json_lines(_ROWS))
  assert task_checks.check('jsonl', _LENGTHS, 2).name == 'jsonl'
  assert _read() == _read('train') == _read('test') == _ROWS
  assert seqio.TaskRegistry.get('jsonl').num_input_examples('train') == 4


@pytest.mark.parametrize('header', ['', 'inputs\ttargets\n'])
@pytest.mark.parametrize('end', ['\n', '\r\n'])
def test_tab_separated_lines(use, header, end):
  use(f'{header}a b\tc\n\n d\t \n\te'.replace('\n', end), 'rows.tsv')
  task_checks.check('jsonl', _LENGTHS, 2)
  assert _read() == [('a b', 'c'), (' d', ' '), ('', 'e')]


def test_byte_order_marks_and_empty_lines_are_no_rows(use):
  use(b'\xef\xbb\xbf' + _json_lines(_ROWS[:1]).encode() + b'\n   \n')
  task_checks.check('jsonl', _LENGTHS, 2)
  assert _read() == _ROWS[:1]


def test_carriage_returns_within_a_line_stay(use):
  use('a\rb\t\rc\r\nd\te\n', 'rows.tsv')
  task_checks.check('jsonl', _LENGTHS, 2)
  assert _read() == [('a\rb', '\rc'), ('d', 'e')]


@pytest.mark.parametrize(
  ('first', 'warned'),
  [
    ('source\ttarget', True),
    ('Inputs\tTargets', True),
    ('"question"\t"answer"', True),
    ('src\ttgt', True),
    ('the source\ttarget', False),
    ('a\tb', False),
  ],
)
def test_a_row_that_looks_like_a_header_is_warned_of(
  use, caplog, first, warned
):
  path = use(f'\n{first}\nsource\ttarget\n', 'rows.tsv')
  task_checks.check('jsonl', _LENGTHS, 2)
  lines = [r.getMessage() for r in caplog.records if 'header' in r.getMessage()]
  expected = f'TRAIN_FILE {str(path)!r} begins with the row {first!r}: if it'
  assert [line.startswith(expected) for line in lines] == [True] * warned


def test_a_file_that_changes_later_is_named_by_line(use):
  path = use(_json_lines(_ROWS))
  source = task_checks.check('jsonl', _LENGTHS, 2).source
  rows = source.get_dataset('train', shuffle=False)
  path.write_text('{"inputs": "a"}')
  with pytest.raises(tf.errors.OpError, match=r"jsonl:1 has no 'targets'"):
    list(rows.as_numpy_iterator())


def test_more_rows_than_are_parsed_at_once(use):
  rows = [(f'in {i}', f'out {i}') for i in range(1000)]
  use(_json_lines(rows))
  assert _read() == rows
  task = seqio.TaskRegistry.get('jsonl')
  shuffled = task.source.get_dataset('train', shuffle=True, seed=1)
  order = [row['inputs'].decode() for row in shuffled.as_numpy_iterator()]
  assert order != [inputs for inputs, _ in rows]
  assert sorted(order) == sorted(inputs for inputs, _ in rows)
  shards = [
    len(_read(shard_info=seqio.ShardInfo(index, 3))) for index in range(3)
  ]
  assert shards == [334, 333, 333]


@pytest.mark.parametrize(
  ('content', 'name', 'expected'),
  [
    ('{"inputs": "a", "targets": "b",}', 'x.jsonl', 'line 2 is not JSON (Exp'),
    ('["a", "b"]', 'x.jsonl', 'line 2 is not an object in braces'),
    ('{"inputs": "a"}', 'x.jsonl', "line 2 has no 'targets'"),
    (
      '{"inputs": "a", "target": "b"}',
      'x.jsonl',
      "line 2 has no 'targets'; did you mean 'target'?",
    ),
    (
      '{"inputs": "a", "targets": 5}',
      'x.jsonl',
      "line 2 has 'targets' that is not text in quotes",
    ),
    (
      '{"inputs": "\\ud83d", "targets": ""}',
      'x.jsonl',
      "line 2 has half a character in 'inputs'",
    ),
    (b'\xff', 'x.jsonl', 'line 2 is not UTF-8'),
    (
      '{"inputs": "a", "targets": "b", "x": %s}' % ('[' * 3000 + ']' * 3000),
      'x.jsonl',
      'line 2 nests too deeply',
    ),
    (
      '{"inputs": "a", "targets": "b", "x": %s}' % ('1' * 5000),
      'x.jsonl',
      'line 2 cannot be read (Exceeds the limit',
    ),
    (
      '{"inputs": "a", "targets": "b", "inputs": "c"}',
      'x.jsonl',
      "line 2 has 'inputs' more than once",
    ),
    ('a', 'x.tsv', 'line 2 has 0 tabs instead of one'),
    ('a\tb\tc', 'x.tsv', 'line 2 has 2 tabs instead of one'),
  ],
)
def test_malformed_rows_are_named_by_line(use, content, name, expected):
  good = 'a\tb\n' if name.endswith('tsv') else _json_lines(_ROWS[:1])
  content = content if isinstance(content, bytes) else content.encode()
  path = use(good.encode() + content + b'\n' + good.encode(), name)
  with pytest.raises(UserError) as error:
    task_checks.check('jsonl', _LENGTHS, 2)
  message = str(error.value)
  assert message.startswith(f"TRAIN_FILE '{path}' has 1 malformed row: ")
  assert expected in message
  assert '\n' not in message
  with pytest.raises(UserError, match='EVAL_FILE'):
    task_checks.check('jsonl', _LENGTHS, 2, 'validation')


def test_of_many_malformed_rows_some_are_told(use):
  use('x\n' * 1000)
  with pytest.raises(UserError, match='1000 malformed rows') as error:
    task_checks.check('jsonl', _LENGTHS, 2)
  assert 'line 5 is not JSON' in str(error.value)
  assert str(error.value).endswith(', and 995 more')


@pytest.mark.parametrize(
  ('content', 'name', 'settings', 'expected'),
  [
    ('\n', 'x.jsonl', {}, r'x\.jsonl.* holds no row'),
    ('', 'x.txt', {}, r'x\.txt.* must end in \.jsonl or \.tsv'),
    (
      'a\tb',
      'x.tsv',
      {'metrics': ['exactmatch']},
      "METRICS: .*'exactmatch'; did you mean 'exact_match'",
    ),
    (
      'a\tb',
      'x.tsv',
      {'metrics': ['bleu'], 'language': 'Chinesisch'},
      "no language is called 'Chinesisch'",
    ),
  ],
)
def test_other_mistakes(use, content, name, settings, expected):
  use(content, name, **settings)
  with pytest.raises(UserError, match=expected):
    task_checks.check('jsonl', _LENGTHS, 2)


def test_files_that_are_not_there(tmp_path):
  with pytest.raises(UserError, match=r'needs a file: set --gin\.TRAIN_FILE=…'):
    task_checks.check('jsonl', _LENGTHS, 2)
  gin.bind_parameter('jsonl.settings.train_file', str(tmp_path / 'no.jsonl'))
  with pytest.raises(UserError, match=r'cannot read TRAIN_FILE.*no\.jsonl'):
    task_checks.check('jsonl', _LENGTHS, 2)


def test_a_file_is_looked_at_again_only_if_it_has_changed(use):
  path = use('a\tb\n', 'rows.tsv')
  source = seqio.TaskRegistry.get('jsonl').source
  assert source.num_input_examples('train') == 1
  path.write_text('a\tb\nc\td\n')
  assert source.num_input_examples('train') == 2


def test_metrics(use):
  use('a\tb', 'x.tsv', metrics=['exact_match', 'chrf', 'bleu'])
  texts = ['the cat sat on the mat', 'a dog']
  scores = jsonl.chosen_metrics(texts, [' ' + texts[0], 'a cow'])
  assert scores['exact_match'] == 50.0
  assert 0 < scores['bleu'] < scores['chrf'] < 100
  assert 'tok:13a' in scores['bleu_signature'].textdata
  scores = jsonl.chosen_metrics(texts, texts)
  for name in ('exact_match', 'chrf', 'bleu'):
    assert scores[name] == pytest.approx(100)


@pytest.mark.parametrize('language', ['zh', 'zh-TW', 'Chinese'])
def test_bleu_knows_the_language(use, language):
  use('a\tb', 'x.tsv', metrics=['bleu'], language=language)
  task_checks.check('jsonl', _LENGTHS, 2)
  texts = ['我们今天早上去学校学习。']
  scores = jsonl.chosen_metrics(texts, texts)
  assert scores['bleu'] == pytest.approx(100)
  assert 'tok:zh' in scores['bleu_signature'].textdata


def test_the_gin_file_names_everything(tmp_path):
  binaries.parse(
    [
      '--gin_file=gin/models/t5_1_1_demo.gin',
      '--gin_file=gin/tasks/jsonl.gin',
      '--gin_file=gin/runs/eval.gin',
      f'--gin.TRAIN_FILE={tmp_path / "a.jsonl"}',
      '--gin.EVAL_FILE=b.tsv',
      '--gin.METRICS=["bleu"]',
      '--gin.LANGUAGE=zh',
      '--gin.CHECKPOINT_PATH=x',
      '--gin.EVAL_OUTPUT_DIR=y',
    ],
    eval_binary.evaluate,
  )
  found = jsonl.settings()
  assert found.file('train').path == str(tmp_path / 'a.jsonl')
  assert found.file('validation').path == found.file('test').path == 'b.tsv'
  assert found.metrics == ['bleu']
  assert found.language == 'zh'


@pytest.mark.slow
def test_a_small_model_trains_and_evaluates(write, tmp_path):
  rows = [(f'copy: {i}', str(i)) for i in range(40)]
  train = write(_json_lines(rows), 'train.jsonl')
  validation = write(
    ''.join(f'{a}\t{b}\n' for a, b in rows[:5]), 'validation.tsv'
  )
  commands.call(
    'train',
    *commands.PRETRAIN,
    '--gin_file=gin/tasks/jsonl.gin',
    *commands.flags(
      VOCABULARY='bytes',
      TRAIN_FILE=train,
      EVAL_FILE=validation,
      METRICS=['exact_match', 'chrf'],
      TASK_FEATURE_LENGTHS={'inputs': 16, 'targets': 16},
      MODEL_DIR=tmp_path / 'run',
      TRAIN_STEPS=20,
      KEEP_BEST_BY='jsonl/chrf',
    ),
  )
  best = json.loads((tmp_path / 'run' / 'best.json').read_text())
  assert best['step'] == 20
  (written,) = (tmp_path / 'run' / 'evaluation').glob('jsonl-000020.jsonl')
  assert len(written.read_text().splitlines()) == 5
