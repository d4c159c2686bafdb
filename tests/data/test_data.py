"""Batches: their order, resuming, evaluation, and the checks before work."""

import os
import subprocess
import sys
import threading
import time

import commands
from fixtures_data import gsm8k_task  # noqa: F401
from fixtures_data import tfds_data_dir  # noqa: F401
from fixtures_data import vocabulary_file  # noqa: F401
import numpy as np
import pytest
import seqio
import tensorflow as tf
import tiny_t5

from dst_t5x.core.errors import UserError
from dst_t5x.data import data_position
from dst_t5x.data import pipeline
from dst_t5x.data import task_checks

_LENGTHS = {'inputs': 24, 'targets': 16}
_UNPACKED = seqio.EncDecFeatureConverter(pack=False)
_FEATURE = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)


def _add_task(name, rows, features=('inputs', 'targets'), preprocessors=()):
  def read(split, shuffle_files, seed=0):
    del split, shuffle_files, seed
    texts = [f'{name} {i}' for i in range(rows)]
    return tf.data.Dataset.from_tensor_slices(
      {feature: tf.constant(texts, tf.string) for feature in features}
    )

  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(read, splits=['train', 'validation']),
    preprocessors=[
      *preprocessors,
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos,
    ],
    output_features=dict.fromkeys(features, _FEATURE),
    metric_fns=[],
  )


@pytest.fixture(scope='module', autouse=True)
def tasks():
  _add_task('toy_data', 300)
  _add_task('toy_other', 37)
  _add_task('toy_two', 2)
  _add_task('toy_empty', 0)
  _add_task('toy_targets', 5, features=['targets'])
  broken = seqio.map_over_dataset(
    lambda example: {
      name: tf.io.read_file(tf.strings.join(['missing/', text]))
      for name, text in example.items()
    }
  )
  _add_task('toy_broken', 5, preprocessors=[broken])
  seqio.MixtureRegistry.add(
    'toy_mixture', [('toy_data', 2.0), ('toy_other', 1.0)]
  )
  yield
  seqio.MixtureRegistry.remove('toy_mixture')
  for name in 'data', 'other', 'two', 'empty', 'targets', 'broken':
    seqio.TaskRegistry.remove(f'toy_{name}')


def _iterate(
  name, lengths=_LENGTHS, batch_size=8, random_seed=1, pack=True, **options
):
  task = seqio.get_mixture_or_task(name)
  converter = seqio.EncDecFeatureConverter(pack=pack)
  return pipeline.TrainIterator(
    task, lengths, batch_size, converter, random_seed=random_seed, **options
  )


def _take(count, name, **options):
  with _iterate(name, **options) as items:
    return [next(items) for _ in range(count)]


@pytest.mark.parametrize('pack', [False, True])
@pytest.mark.parametrize('prefix', [(), (5, 6)])
def test_rows_of_t5_are_as_announced_though_examples_are_longer(pack, prefix):
  lengths = {'inputs': 4, 'targets': 3}
  task, network = seqio.get_mixture_or_task('toy_data'), tiny_t5.NETWORK
  converter = network.feature_converter(pack, prefix)
  with pipeline.TrainIterator(
    task, lengths, 8, converter, random_seed=1
  ) as items:
    batch = next(items).batch
  announced = network.batch_shapes(
    {**lengths, 'inputs': 4 + len(prefix)}, 8, pack
  )
  assert {name: x.shape for name, x in batch.items()} == announced


def _assert_equal(items, others):
  assert [item.step for item in items] == [item.step for item in others]
  for item, other in zip(items, others, strict=True):
    assert item.batch.keys() == other.batch.keys()
    for name in item.batch:
      np.testing.assert_array_equal(item.batch[name], other.batch[name])


def _texts(batch):
  """The example numbers in an unpacked batch, of rows that are not padding."""
  vocabulary = seqio.ByteVocabulary()
  rows = batch['decoder_target_tokens']
  return [vocabulary.decode(row.tolist()) for row in rows if row.any()]


@pytest.mark.parametrize('pack', [True, False])
@pytest.mark.parametrize('name', ['toy_data', 'toy_mixture'])
def test_resumed_batches_are_those_of_the_uninterrupted_run(name, pack):
  wanted = (1, 14)
  whole = _take(20, name, pack=pack, save_after=lambda step: step in wanted)
  saved = [item.step for item in whole if item.position is not None]
  assert saved == list(wanted)
  for step in wanted:
    position = whole[step - 1].position
    rest = _take(20 - step, name, pack=pack, step=step, position=position)
    _assert_equal(rest, whole[step:])


@pytest.mark.parametrize('name', ['toy_data', 'toy_mixture'])
def test_divided_data_makes_the_same_batches_however_many_read_it(name):
  whole = _take(6, name, num_shards=4, save_after=lambda step: step == 2)
  # Two processes, the first of which needs rows of three shards.
  here = np.arange(8) < 5
  parts = [
    _take(6, name, num_shards=4, rows=rows, save_after=lambda step: step == 2)
    for rows in (here, ~here)
  ]
  for item, one, two in zip(whole, *parts, strict=True):
    for feature, rows in item.batch.items():
      np.testing.assert_array_equal(one.batch[feature][:5], rows[:5])
      np.testing.assert_array_equal(two.batch[feature][5:], rows[5:])
      assert not one.batch[feature][6:].any()  # The last shard was not read.
  # From what all of them saved, any number of them goes on.
  saved = [items[1].position for items in parts]
  position = data_position.merge(saved[0], lambda mine: saved)
  _assert_equal(
    _take(4, name, num_shards=4, step=2, position=position), whole[2:]
  )
  with pytest.raises(UserError, match='DATA_SHARDS'):
    _take(1, name, num_shards=8, step=2, position=position)


def test_each_shard_has_its_own_examples():
  rows = [np.arange(8) // 2 == shard for shard in range(4)]
  texts = [
    {
      text
      for item in _take(30, 'toy_data', num_shards=4, rows=wanted, pack=False)
      for text in _texts(item.batch)
    }
    for wanted in rows
  ]
  assert all(texts)
  assert sum(map(len, texts)) == len(set.union(*texts))


def test_a_position_is_taken_after_its_batch_however_much_is_read_ahead():
  for prefetch in (1, 5):
    with _iterate(
      'toy_data', prefetch=prefetch, save_after=lambda step: step == 2
    ) as items:
      first = next(items)
      time.sleep(0.5)  # The thread runs ahead as far as it may.
      rest = [next(items) for _ in range(4)]
    assert first.position is None
    resumed = _take(3, 'toy_data', step=2, position=rest[0].position)
    _assert_equal(resumed, rest[1:])


def test_the_random_seed_determines_the_order():
  _assert_equal(_take(5, 'toy_data'), _take(5, 'toy_data'))
  first, other = _take(1, 'toy_data'), _take(1, 'toy_data', random_seed=2)
  tokens = 'encoder_input_tokens'
  assert not np.array_equal(first[0].batch[tokens], other[0].batch[tokens])


def test_training_shows_every_example_once_an_epoch_and_shuffles():
  items = _take(30, 'toy_data', batch_size=10, pack=False)
  texts = [text for item in items for text in _texts(item.batch)]
  # The buffer of 1000 examples holds several epochs: each is there, mixed.
  assert len(texts) == 300
  assert len(set(texts)) > 150
  assert texts != sorted(texts)


def test_packed_rows_hold_several_examples():
  (item,) = _take(1, 'toy_data', lengths={'inputs': 48, 'targets': 48})
  batch = item.batch
  assert batch['encoder_input_tokens'].shape == (8, 48)
  assert batch['decoder_segment_ids'].max() >= 3
  unpacked = _take(1, 'toy_data', pack=False)[0].batch
  assert 'decoder_segment_ids' not in unpacked


def test_a_dataset_smaller_than_a_packed_batch_repeats():
  items = _take(
    3, 'toy_two', batch_size=16, lengths={'inputs': 64, 'targets': 64}
  )
  assert items[-1].batch['decoder_target_tokens'].shape == (16, 64)


def test_place_is_called_in_the_thread():
  threads = set()

  def place(batch):
    threads.add(threading.current_thread().name)
    return {name: rows + 1 for name, rows in batch.items()}

  placed = _take(2, 'toy_data', place=place)
  plain = _take(2, 'toy_data')
  np.testing.assert_array_equal(
    placed[1].batch['encoder_input_tokens'],
    plain[1].batch['encoder_input_tokens'] + 1,
  )
  assert threads == {'train-data'}


def test_exceptions_of_the_thread_reach_the_consumer():
  def place(batch):
    del batch
    raise MemoryError('the device is full')

  with _iterate('toy_data', place=place) as items:
    with pytest.raises(MemoryError, match='the device is full'):
      next(items)
    assert list(items) == []


def test_close_ends_the_thread():
  before = threading.active_count()
  items = _iterate('toy_data')
  next(items)
  items.close()
  items.close()
  assert threading.active_count() == before
  assert list(items) == []


@pytest.mark.parametrize('damage', ['other task', 'cut', 'empty'])
def test_a_position_that_does_not_fit_is_refused(damage):
  position = _take(1, 'toy_data', save_after=lambda step: True)[0].position
  if damage == 'other task':
    position = _take(1, 'toy_mixture', save_after=lambda step: True)[0].position
  if damage == 'cut':
    position = position[: len(position) // 2]
  if damage == 'empty':
    position = b''
  with pytest.raises(UserError, match='data position') as error:
    _take(1, 'toy_data', step=1, position=position)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['toy_data', 'toy_mixture', 'toy_two'])
def test_evaluation_shows_every_example_once(name):
  task = seqio.get_mixture_or_task(name)
  batches = list(pipeline.eval_batches(task, _LENGTHS, 16, _UNPACKED))
  texts = [text for batch in batches for text in _texts(batch)]
  expected = {'toy_data': 300, 'toy_mixture': 337, 'toy_two': 2}[name]
  assert len(texts) == len(set(texts)) == expected
  assert all(len(rows) == 16 for batch in batches for rows in batch.values())
  padding = batches[-1]['decoder_loss_weights'][expected % 16 or 16 :]
  assert not padding.any()


def test_evaluation_of_some_examples():
  task = seqio.get_mixture_or_task('toy_mixture')
  batches = pipeline.eval_batches(task, _LENGTHS, 4, _UNPACKED, num_examples=6)
  texts = [text for batch in batches for text in _texts(batch)]
  # Of each task so many, as seqio's evaluator counts.
  assert texts == [f'{name} {i}' for name in ('toy_data', 'toy_other')
                   for i in range(6)]  # fmt: skip


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'name': 'toy_dada'}, r"'toy_dada'.*did you mean 'toy_data'"),
    ({'batch_size': 0}, 'BATCH_SIZE must be a positive'),
    ({'split': 'test'}, r"no split 'test'.*'train', 'validation'"),
    ({'name': 'toy_targets'}, "no feature 'inputs'"),
    ({'name': 'toy_empty'}, 'toy_empty.* has no example'),
    ({'name': 'toy_broken'}, "'toy_broken'.*missing/toy_broken 0"),
    ({'feature_lengths': {'inputs': 8}}, "length for 'targets'"),
    (
      {'feature_lengths': {'inputs': 0, 'targets': 8}},
      "length for 'inputs'",
    ),
  ],
)
def test_mistakes_are_named_before_work(changes, message):
  arguments = {
    'name': 'toy_data',
    'feature_lengths': _LENGTHS,
    'batch_size': 4,
    'split': 'train',
  }
  assert task_checks.check(**arguments).name == 'toy_data'
  with pytest.raises(UserError, match=message) as error:
    task_checks.check(**arguments | changes)
  assert '\n' not in str(error.value)


def test_a_mixture_is_checked_as_a_whole():
  assert task_checks.check('toy_mixture', _LENGTHS, 4).name == 'toy_mixture'
  with pytest.raises(UserError, match="no split 'test'"):
    task_checks.check('toy_mixture', _LENGTHS, 4, split='test')


def test_tfds_splits_that_nobody_has_named_yet(tmp_path):
  seqio.TaskRegistry.add(
    'toy_tfds',
    source=seqio.TfdsDataSource('gsm8k:1.0.0', tfds_data_dir=str(tmp_path)),
    preprocessors=[],
    output_features={'inputs': _FEATURE, 'targets': _FEATURE},
  )
  try:
    with pytest.raises(UserError, match=r'toy_tfds.* is not prepared'):
      task_checks.check('toy_tfds', _LENGTHS, 4)
  finally:
    seqio.TaskRegistry.remove('toy_tfds')


def test_gsm8k_positions_are_small_and_exact(gsm8k_task):  # noqa: F811
  lengths = {'inputs': 256, 'targets': 320}
  task = task_checks.check(gsm8k_task.name, lengths, 16)
  options = {'lengths': lengths, 'batch_size': 16}
  whole = _take(6, task.name, save_after=lambda step: step == 3, **options)
  position = whole[2].position
  assert len(position) < 800_000
  rest = _take(3, task.name, step=3, position=position, **options)
  _assert_equal(rest, whole[3:])


def test_unprepared_data_is_named_with_the_remedy(
  tmp_path,
  repository,
  vocabulary_file,  # noqa: F811
):
  code = (
    'from dst_t5x.data import task_checks\n'
    'from dst_t5x.tasks import gsm8k\n'
    'try:\n'
    "  task_checks.check('gsm8k', {'inputs': 256, 'targets': 320}, 8)\n"
    'except task_checks.UserError as error:\n'
    '  print(error)\n'
  )
  environment = os.environ | {
    'TFDS_DATA_DIR': str(tmp_path / 'none'),
    'DST_VOCABULARY': str(vocabulary_file),
  }
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=repository,
    env=environment,
    capture_output=True,
    text=True,
    timeout=commands.TIMEOUT,
  )
  (line,) = done.stdout.splitlines()
  for part in (str(tmp_path / 'none'), 'TFDS_DATA_DIR', 'prepare_data gsm8k`'):
    assert part in line
