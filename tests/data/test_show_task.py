"""What show_task says of a task, and how a command line may name one."""

import json

import commands
from fixtures_data import vocabulary_file  # noqa: F401
import gin
import pytest
import seqio
import tensorflow as tf

from dst_t5x.config import task_names
from dst_t5x.core.errors import UserError
from dst_t5x.data import task_report
from dst_t5x.data import task_vocabulary
from dst_t5x.tasks import jsonl  # noqa: F401

_LENGTHS = {'inputs': 8, 'targets': 8}
_RUN = 'gin/runs/show_task.gin'


@pytest.fixture
def rows(tmp_path):
  """Names a file with rows for the task; returns its path."""
  path = tmp_path / 'rows.jsonl'

  def write(*rows):
    path.write_text(
      ''.join(json.dumps({'inputs': a, 'targets': b}) + '\n' for a, b in rows)
    )
    gin.bind_parameter('jsonl.settings.train_file', str(path))
    return path

  return write


@pytest.fixture
def use_bytes():
  gin.bind_parameter('vocabulary.chosen.name', 'bytes')


def _measure(**options):
  task = seqio.TaskRegistry.get('jsonl')
  return task_report.measure(task, 'train', _LENGTHS, 1, **options)


def test_lengths_are_counted_with_eos_and_before_anything_is_cut(
  rows, use_bytes
):
  rows(*[('x' * i, 'y') for i in range(1, 101)])
  report = _measure()
  inputs, targets = report.features['inputs'], report.features['targets']
  assert report.examples == 100
  assert inputs.percentiles() == [51, 91, 96, 100, 101]
  assert targets.percentiles() == [2] * 5
  assert inputs.cut == 93
  assert inputs.shares() == [0.93, 0, 0]
  assert len(report.first) == 1
  assert report.first[0]['inputs_pretokenized'] == b'x'
  (warning,) = report.warnings()
  assert warning == (
    'TASK_FEATURE_LENGTHS cuts 93.00% of the inputs, which have up to 101'
    ' pieces'
  )


@pytest.mark.parametrize(('cut', 'warned'), [(1, False), (2, True)])
def test_half_a_per_cent_may_be_cut(rows, use_bytes, cut, warned):
  rows(*[('x' * 9, 'y')] * cut, *[('x', 'y')] * (200 - cut))
  assert bool(_measure().warnings()) is warned


def test_what_the_vocabulary_lacks_or_changes(rows, vocabulary_file):  # noqa: F811
  rows(
    ('known', 'known'),
    ('known', '<b> ~'),  # Unknown, and so changed.
    ('two  spaces', 'line\nbreak'),  # Changed; the newline becomes a space.
    ('known', 'known'),
  )
  report = _measure()
  assert report.features['inputs'].shares() == [0, 0, 0.25]
  assert report.features['targets'].shares()[1:] == [0.25, 0.5]


def test_bytes_lose_nothing(rows, use_bytes):
  rows(('two  spaces', '<b> ~ \n ½ 語'))
  for feature in _measure().features.values():
    assert (feature.unknown, feature.changed) == (0, 0)


def test_some_examples_only(rows, use_bytes):
  rows(*[('a', 'b')] * 50)
  assert _measure(measure_examples=7).examples == 7


def test_pieces_have_names(vocabulary_file):  # noqa: F811
  pieces = task_vocabulary.TaskVocabulary()
  ids = [*pieces.encode('It is <'), 1, 0, 32_099]
  assert task_report.to_pieces(pieces, ids[:-1]) == [
    *('▁It', '▁is', '▁', '<unk>', '</s>', '<pad>'),
  ]
  assert task_report.to_pieces(seqio.ByteVocabulary(), [100, 198, 1]) == [
    *('a', '<198>', '<1>'),
  ]


def test_everything_is_printed(rows, use_bytes, capsys, caplog):
  path = rows(('copy: a text of twenty letters', 'done'))
  (report,) = task_report.show_task('jsonl', _LENGTHS)
  assert report.split == 'train'
  text = capsys.readouterr().out
  assert 'jsonl, train: 1 examples' in text
  assert '  warning: TASK_FEATURE_LENGTHS cuts 100.00% of the inputs' in text
  assert '    inputs   copy: a text of twenty letters\n' in text
  assert '    targets  done\n             d o n e <1>' in text
  # No EVAL_FILE: the other splits are named, and no more.
  assert caplog.text.count('set --gin.EVAL_FILE=…') == 2
  path.write_text('oops')
  caplog.clear()
  with pytest.raises(UserError, match='malformed row: line 1 is not JSON'):
    task_report.show_task('jsonl', _LENGTHS)
  assert not caplog.text  # Where nothing is to be seen one line is enough.


def test_a_mixture_shows_its_rates(rows, use_bytes, capsys):
  rows(('a', 'b'))
  task = seqio.TaskRegistry.get('jsonl')
  seqio.MixtureRegistry.add('toy_shown', [(task.name, 3.0)])
  try:
    reports = task_report.show_task('toy_shown', _LENGTHS)
  finally:
    seqio.MixtureRegistry.remove('toy_shown')
  assert [report.task for report in reports] == ['jsonl']
  text = capsys.readouterr().out
  assert text.startswith('toy_shown: 1 tasks, trained on in proportion to')
  assert '100.00%' in text.splitlines()[1]


def test_mistakes(rows, use_bytes):
  rows(('a', 'b'))
  with pytest.raises(UserError, match="'jsonk'; did you mean 'jsonl'"):
    task_report.show_task('jsonk', _LENGTHS)
  with pytest.raises(UserError, match="length for 'targets'"):
    task_report.show_task('jsonl', {'inputs': 3})
  with pytest.raises(UserError, match='SHOW_EXAMPLES must be a whole'):
    task_report.show_task('jsonl', _LENGTHS, show_examples=-1)


def test_an_empty_split_and_a_broken_one(use_bytes):
  def read(split, shuffle_files, seed=None):
    del shuffle_files, seed
    texts = tf.constant([] if split == 'train' else ['missing'], tf.string)
    return tf.data.Dataset.from_tensor_slices(
      {'inputs': texts, 'targets': texts}
    ).map(lambda row: row | {'inputs': tf.io.read_file(row['inputs'])})

  task = seqio.Task(
    'toy_broken_split',
    source=seqio.FunctionDataSource(read, splits=['train', 'test']),
    preprocessors=[seqio.preprocessors.tokenize],
    output_features=task_vocabulary.output_features(),
  )
  with pytest.raises(UserError, match=r'train split of .* has no example'):
    task_report.measure(task, 'train', _LENGTHS, 1)
  with pytest.raises(UserError, match='cannot read the test split'):
    task_report.measure(task, 'test', _LENGTHS, 1)


def test_percentiles_are_lengths_of_examples():
  report = task_report.FeatureReport(8, lengths=[1, 2])
  assert report.percentiles() == [1, 2, 2, 2, 2]


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    (['gsm8k'], ['--gin_file=gin/tasks/gsm8k.gin']),
    (['gsm8k_notes'], ['--gin_file=gin/tasks/gsm8k_notes.gin']),
    (
      ['super_glue_rte', '--gin.A=1'],
      [
        '--gin_file=gin/tasks/super_glue.gin',
        "--gin.MIXTURE_OR_TASK_NAME='super_glue_rte'",
        '--gin.A=1',
      ],
    ),
    (['--gin_file=my.gin'], ['--gin_file=my.gin']),
  ],
)
def test_a_task_stands_for_its_gin_file(arguments, expected):
  assert task_names.to_flags(arguments, _RUN) == [
    f'--gin_file={_RUN}',
    *expected,
  ]


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['gsm8'], "no task 'gsm8'; did you mean 'gsm8k'"),
    (['gsm8k', 'jsonl'], 'one task at a time, not gsm8k and jsonl'),
    (['--gin.A=1'], 'name a task: demo_finetune, .*gsm8k'),
  ],
)
def test_task_names_that_make_no_sense(arguments, message):
  with pytest.raises(UserError, match=message) as error:
    task_names.to_flags(arguments, _RUN)
  assert '\n' not in str(error.value)


def test_the_command_line(tmp_path):
  path = tmp_path / 'rows.tsv'
  path.write_text('a\tb\n')
  out = commands.run(
    'show_task',
    '--gin_file=gin/models/t5_1_1_demo.gin',
    'jsonl',
    f'--gin.TRAIN_FILE={path}',
    f'--gin.EVAL_FILE={path}',
    '--gin.SHOW_EXAMPLES=1',
  )
  assert out.count(': 1 examples') == 3
  assert 'a <1>' in out
