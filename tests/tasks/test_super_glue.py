"""SuperGLUE: row by row what the t5 package makes of it, and its scores."""

from collections import Counter
import json

import commands
from fixtures_data import tfds_data_dir  # noqa: F401
from fixtures_data import vocabulary_file  # noqa: F401
from fixtures_super_glue import FOLDERS
from fixtures_super_glue import super_glue_data_dir  # noqa: F401
import numpy as np
import pytest
import seqio

from dst_t5x.core.errors import UserError
from dst_t5x.data import task_checks
from dst_t5x.data import vocabulary
from dst_t5x.engine import task_scores
from dst_t5x.tasks import super_glue

_OURS = {
  theirs: f'super_glue_{name}' for theirs, (name, _) in super_glue.TASKS.items()
}
# No rows of the diagnostics are at hand.
_READ = [name for name in super_glue.TASKS if '_ax' not in name]
_SCORED = [
  *('boolq', 'cb', 'copa', 'multirc', 'record', 'rte', 'wic', 'wsc'),
]


@pytest.fixture(scope='module')
def data_dir(super_glue_data_dir, vocabulary_file):  # noqa: F811
  del vocabulary_file  # Named by an environment variable.
  return super_glue_data_dir


def _their_task(name):
  """t5's task over the vocabulary file that is at hand."""
  task = seqio.TaskRegistry.get(name)
  features = {
    key: seqio.Feature(
      vocabulary.chosen(), add_eos=feature.add_eos, required=feature.required
    )
    for key, feature in task.output_features.items()
  }
  return task.replace(output_features=features)


def _examples(task, split):
  return list(
    task.get_dataset(
      {'inputs': 512, 'targets': 62},
      split=split,
      shuffle=False,
      try_in_mem_cache=False,
    ).as_numpy_iterator()
  )


def _plain(row):
  """Returns an example as nested dicts and lists, which compare quickly."""
  return {
    name: _plain(value) if isinstance(value, dict) else np.array(value).tolist()
    for name, value in row.items()
  }


@pytest.mark.parametrize('theirs', _READ)
def test_examples_and_targets_are_those_of_t5(data_dir, theirs):
  task = seqio.TaskRegistry.get(_OURS[theirs])
  their_task = _their_task(theirs)
  assert set(task.splits) == set(their_task.splits)
  for split in task.splits:
    rows, expected = _examples(task, split), _examples(their_task, split)
    assert len(rows) == len(expected) > 0
    for row, other in zip(rows, expected, strict=True):
      assert _plain(row) == _plain(other)
      text = row['targets_pretokenized'].decode()
      target = task.postprocess_fn(text, example=row, is_target=True)
      assert target == their_task.postprocess_fn(
        text, example=other, is_target=True
      )


def test_the_mixture_is_that_of_t5():
  ours = seqio.MixtureRegistry.get('super_glue')
  theirs = seqio.MixtureRegistry.get('super_glue_v102_proportional')
  rates = {task.name: ours.get_rate(task) for task in ours.tasks}
  assert rates == {
    _OURS[task.name]: theirs.get_rate(task) for task in theirs.tasks
  }
  for task in theirs.tasks:
    mine = seqio.TaskRegistry.get(_OURS[task.name])
    assert mine.metric_fns == task.metric_fns
    assert mine.preprocessors == task.preprocessors
    assert mine.postprocessor == task.postprocessor


class _Validation:
  """The validation rows of a task, and what answers to them score."""

  def __init__(self, name):
    self.task = seqio.TaskRegistry.get(f'super_glue_{name}')
    self.rows = _examples(self.task, 'validation')
    self.texts = [row['targets_pretokenized'].decode() for row in self.rows]

  def score(self, predictions):
    process = self.task.postprocess_fn
    pairs = [
      (
        process(text, example=row, is_target=True),
        process(prediction, example=row, is_target=False),
      )
      for text, row, prediction in zip(
        self.texts, self.rows, predictions, strict=True
      )
    ]
    metrics = {}
    for metric in self.task.metric_fns:
      metrics |= metric(*map(list, zip(*pairs, strict=True)))
    return metrics


@pytest.mark.parametrize('name', _SCORED)
def test_a_perfect_prediction_scores_100(data_dir, name):
  found = _Validation(name)
  answers = found.texts
  if name == 'wsc':  # Texts are candidates, of which only some are referents.
    answers = [
      text if row['label'] else 'someone else'
      for text, row in zip(found.texts, found.rows, strict=True)
    ]
  scores = found.score(answers)
  assert scores
  assert set(scores.values()) == {100.0}


def _validation_rows(shared_data, name):
  folder = FOLDERS.get(name) or FOLDERS['wsc.fixed']
  path = shared_data / 'super_glue' / folder / 'val.jsonl'
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
  ('name', 'answer', 'expected'),
  [
    ('cb', 'contradiction', 50.0),
    ('copa', 'choice1', 55.0),
    ('rte', 'entailment', 52.7),
    ('wic', 'True', 50.0),
    ('wsc', 'nobody', 63.5),
    ('boolq', 'True', None),  # These rows are not the whole set.
  ],
)
def test_the_majority_answer_scores_its_share(
  data_dir, shared_data, name, answer, expected
):
  labels = Counter(row['label'] for row in _validation_rows(shared_data, name))
  share = 100 * max(labels.values()) / labels.total()
  if expected is not None:
    assert share == pytest.approx(expected, abs=0.05)
  found = _Validation(name)
  assert found.score([answer] * labels.total())['accuracy'] == pytest.approx(
    share
  )


def test_scores_of_tasks_with_two_metrics(data_dir, shared_data):
  cb = _Validation('cb')
  # F1 of the majority is 2 · 1/2 · 1 / (1/2 + 1) = 2/3, of the other two 0.
  scores = cb.score(['contradiction'] * len(cb.rows))
  assert scores['mean_3class_f1'] == pytest.approx(100 * 2 / 9)
  answers = [
    [answer['label'] for answer in question['answers']]
    for row in _validation_rows(shared_data, 'multirc')
    for question in row['passage']['questions']
  ]
  flat = [label for labels in answers for label in labels]
  multirc = _Validation('multirc')
  assert len(multirc.rows) == len(flat)
  precision = sum(flat) / len(flat)
  scores = multirc.score(['True'] * len(flat))
  assert scores['f1'] == pytest.approx(100 * 2 * precision / (precision + 1))
  assert scores['exact_match'] == pytest.approx(
    100 * np.mean([all(labels) for labels in answers])
  )
  record = _Validation('record')
  queries = len({(row['idx/passage'], row['idx/query']) for row in record.rows})
  assert queries < len(record.rows)  # One row for each accepted answer.
  first = [row['answers'][-1].decode() for row in record.rows]
  assert record.score(first) == {'em': 100.0, 'f1': 100.0}


def test_the_diagnostics_are_needed_for_the_test_split_alone(data_dir):
  # To train and to validate is tested below, without them.
  with pytest.raises(UserError, match=r'super_glue_axb.* is not prepared'):
    task_checks.check('super_glue', {'inputs': 64, 'targets': 16}, 4, 'test')


@pytest.mark.slow
def test_tiny_model_trains_and_evaluates(data_dir, tmp_path):
  commands.run(
    'train',
    '--gin_file=gin/models/t5_1_1_tiny.gin',
    '--gin_file=gin/tasks/super_glue.gin',
    '--gin_file=gin/runs/pretrain.gin',
    *commands.flags(
      TASK_FEATURE_LENGTHS={'inputs': 32, 'targets': 16},
      MODEL_DIR=tmp_path,
      TRAIN_STEPS=20,
      BATCH_SIZE=2,
      EVAL_EXAMPLES=4,
      EVAL_BATCH_SIZE=4,
      KEEP_BEST_BY='super_glue/average',
    ),
    environment={'TFDS_DATA_DIR': str(data_dir)},
  )
  (row,) = [
    row
    for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()
    if 'eval/loss' in (row := json.loads(line))
  ]
  scores = {}
  for name, value in row.items():
    task, _, metric = name.partition('/')
    if task.startswith('super_glue_'):
      scores.setdefault(task.removeprefix('super_glue_'), {})[metric] = value
  assert sorted(scores) == sorted(_SCORED)
  assert row['super_glue/average'] == pytest.approx(task_scores.average(scores))
  best = json.loads((tmp_path / 'best.json').read_text())
  assert best['step'] == 20
  assert best['value'] == row['super_glue/average']
  assert sorted(best['best_of_each_task']) == [
    f'super_glue_{name}' for name in sorted(_SCORED)
  ]
