"""TriviaQA: seqio's published recipe, and t5's own exact match."""

import json

import commands
from fixtures_data import tfds_data_dir  # noqa: F401
from fixtures_data import vocabulary_file  # noqa: F401
from fixtures_trivia_qa import read_rows
from fixtures_trivia_qa import trivia_qa_data_dir  # noqa: F401
import pytest
import seqio
from t5.evaluation import qa_utils

from dst_t5x.data import task_checks
from dst_t5x.tasks import trivia_qa

_LENGTHS = {'inputs': 128, 'targets': 48}
_PERCENT_CUT = 0.5
_TRAIN_ROWS = 8837


@pytest.fixture(scope='module')
def task(trivia_qa_data_dir, vocabulary_file):  # noqa: F811
  return task_checks.check('trivia_qa_closed_book', _LENGTHS, 8)


@pytest.fixture(scope='module')
def rows(task):
  """Every example of each split, uncut."""
  return {split: _examples(task, split) for split in task.splits}


def _examples(task, split):
  dataset = task.get_dataset(
    None, split=split, shuffle=False, try_in_mem_cache=False
  )
  return list(dataset.as_numpy_iterator())


def _by_question(examples):
  return {
    example['inputs_pretokenized'].decode(): (
      example['targets_pretokenized'].decode(),
      [answer.decode() for answer in example['answers']],
    )
    for example in examples
  }


def _recipe(rows):
  """What seqio's README makes of rows, which TFDS strips of spaces."""
  return {
    f'trivia_qa question: {question}': (
      answers[0].strip(),
      [answer.strip() for answer in answers],
    )
    for question, answers in rows
  }


def test_test_split_is_the_recipe_row_by_row(rows, shared_data):
  expected = _recipe(read_rows(shared_data, 'validation'))
  assert len(rows['test']) == 1000
  assert _by_question(rows['test']) == expected


def test_a_tenth_of_the_training_rows_is_held_back(rows, shared_data):
  assert len(rows['train']) == round(0.9 * _TRAIN_ROWS)
  assert len(rows['train']) + len(rows['validation']) == _TRAIN_ROWS
  found = _by_question([*rows['train'], *rows['validation']])
  assert found == _recipe(read_rows(shared_data, 'train'))


def test_the_full_task_trains_on_all_rows(task):
  full = seqio.TaskRegistry.get('trivia_qa_closed_book_full')
  assert full.num_input_examples('train') == _TRAIN_ROWS
  assert full.num_input_examples('validation') == 1000
  assert task.num_input_examples('test') == 1000


def test_targets_end_with_eos_and_inputs_do_not(rows):
  for examples in rows.values():
    for example in examples:
      assert example['targets'][-1] == 1
      assert 1 not in example['inputs']


def test_few_are_cut_at_the_lengths_of_the_gin_file(rows, repository):
  text = (repository / 'gin/tasks/trivia_qa_closed_book.gin').read_text()
  assert f'TASK_FEATURE_LENGTHS = {_LENGTHS}' in text
  for examples in rows.values():
    for name, length in _LENGTHS.items():
      cut = sum(len(example[name]) > length for example in examples)
      assert 100 * cut / len(examples) <= _PERCENT_CUT


def _score(task, examples, predictions):
  targets = [
    task.postprocess_fn('', example=example, is_target=True)
    for example in examples
  ]
  outputs = [task.postprocess_fn(text) for text in predictions]
  (metric,) = task.metric_fns
  return metric(targets=targets, predictions=outputs)


def test_any_accepted_answer_counts_however_it_is_spelt(task, rows):
  examples = rows['test']
  last = [example['answers'][-1].decode() for example in examples]
  assert _score(task, examples, last)['em'] == 100
  noisy = [f'The  {answer.upper()}!' for answer in last]
  right = [
    qa_utils.normalize_trivia_qa(a) == qa_utils.normalize_trivia_qa(b)
    for a, b in zip(last, noisy, strict=True)
  ]
  assert sum(right) > 950
  assert _score(task, examples, noisy)['em'] >= 100 * sum(right) / len(right)
  assert _score(task, examples, ['no such answer'] * 1000)['em'] == 0


def test_score_is_the_one_of_t5_on_mixed_predictions(task, rows):
  examples = rows['test']
  predictions = [
    example['answers'][0].decode() if i % 3 else 'something else'
    for i, example in enumerate(examples)
  ]
  accepted = [
    {qa_utils.normalize_trivia_qa(answer.decode()) for answer in row['answers']}
    for row in examples
  ]
  right = [
    qa_utils.normalize_trivia_qa(text) in answers
    for text, answers in zip(predictions, accepted, strict=True)
  ]
  found = _score(task, examples, predictions)
  assert found['em'] == pytest.approx(100 * sum(right) / len(right))
  assert 60 < found['em'] < 70


def test_evaluator_gives_every_accepted_answer_to_the_metric(task):
  evaluator = seqio.Evaluator(
    task.name,
    feature_converter=seqio.EncDecFeatureConverter(pack=False),
    eval_split='test',
    sequence_length=_LENGTHS,
    num_examples=64,
  )
  pieces = task.output_features['targets'].vocabulary

  def last_answers(dataset, model_feature_shapes=None):
    del dataset, model_feature_shapes
    answers = [
      example['answers'][-1].decode()
      for example in evaluator.cached_task_datasets[
        task.name
      ].as_numpy_iterator()
    ]
    tokens = [pieces.encode(text)[:48] for text in answers]
    return [(i, ids + [0] * (48 - len(ids))) for i, ids in enumerate(tokens)]

  metrics, _ = evaluator.evaluate(
    compute_metrics=True, predict_fn=last_answers, score_fn=None
  )
  # Not all pieces are known: a few answers change on their way.
  assert metrics.result()[task.name]['em'] > 90


@pytest.mark.slow
def test_tiny_model_trains_and_evaluates(
  trivia_qa_data_dir,  # noqa: F811
  vocabulary_file,  # noqa: F811
  tmp_path,
):
  del vocabulary_file  # Named by an environment variable.
  commands.run(
    'train',
    '--gin_file=gin/models/t5_1_1_tiny.gin',
    '--gin_file=gin/tasks/trivia_qa_closed_book.gin',
    '--gin_file=gin/runs/pretrain.gin',
    *commands.flags(
      TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 16},
      MODEL_DIR=tmp_path,
      TRAIN_STEPS=20,
      BATCH_SIZE=2,
      EVAL_EXAMPLES=5,
      EVAL_BATCH_SIZE=4,
      KEEP_BEST_BY='trivia_qa_closed_book/em',
    ),
    environment={'TFDS_DATA_DIR': str(trivia_qa_data_dir)},
  )
  folder = tmp_path / 'evaluation'
  scores = json.loads((folder / f'{trivia_qa.NAME}-metrics.jsonl').read_text())
  assert 0 <= scores['em'] <= 100
  predictions = folder / f'{trivia_qa.NAME}-000020.jsonl'
  assert len(predictions.read_text().splitlines()) == 5
  last = (tmp_path / 'metrics.jsonl').read_text().splitlines()[-1]
  assert json.loads(last)['trivia_qa_closed_book/em'] == scores['em']
