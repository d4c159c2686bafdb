"""The demonstration's tasks: the rows, and the metrics."""

import pytest
import seqio

from dst_t5x.data import task_checks
from dst_t5x.tasks import demo

_LENGTHS = {'inputs': 14, 'targets': 6}


@pytest.mark.parametrize(
  ('name', 'operations'),
  [('demo_pretrain', demo.PRETRAINING), ('demo_finetune', demo.FINE_TUNING)],
)
def test_rows_follow_their_operation_and_fit(name, operations):
  task = task_checks.check(name, _LENGTHS, 64)
  for split, count in (('train', 50_000), ('validation', 512)):
    inputs, targets = demo.make_rows(operations, split)
    assert len(inputs) == len(targets) == count
    for text, target in zip(inputs, targets, strict=True):
      operation, word = text.split(': ')
      assert operations[operation](word) == target
      assert len(set(word)) == len(word)
    # One more for EOS.
    assert max(map(len, inputs)) < _LENGTHS['inputs']
    assert max(map(len, targets)) < _LENGTHS['targets']
    assert task.num_input_examples(split) == count


def test_no_word_is_in_both_splits():
  words = {
    split: {
      text.split(': ')[1] for text in demo.make_rows(demo.PRETRAINING, split)[0]
    }
    for split in ('train', 'validation')
  }
  assert not words['train'] & words['validation']


def test_rows_are_the_same_every_time():
  first = demo.make_rows(demo.FINE_TUNING, 'validation')
  assert first == demo.make_rows(demo.FINE_TUNING, 'validation')
  assert len(set(first[0])) > 450


def test_the_fine_tuning_operation_is_none_of_the_pretraining():
  for word in demo.make_rows(demo.FINE_TUNING, 'validation')[0][:50]:
    word = word.split(': ')[1]
    known = {operation(word) for operation in demo.PRETRAINING.values()}
    assert demo.FINE_TUNING['cipher'](word) not in known


def test_the_cipher_is_a_permutation_of_the_letters():
  letters = 'abcdefghijklmnopqrstuvwxyz'
  assert sorted(demo.FINE_TUNING['cipher'](letters)) == sorted(letters)


def test_examples_are_bytes_with_eos():
  task = seqio.get_mixture_or_task('demo_finetune')
  dataset = task.get_dataset(_LENGTHS, split='validation', shuffle=False)
  example = next(dataset.as_numpy_iterator())
  text = demo.make_rows(demo.FINE_TUNING, 'validation')[0][0]
  assert example['inputs'].tolist() == [*(b + 3 for b in text.encode()), 1]


def test_metrics():
  targets = ['abc', 'wxyz']
  assert demo.exact_match(targets, targets) == {'exact_match': 100.0}
  assert demo.character_accuracy(targets, targets) == {
    'character_accuracy': 100.0
  }
  wrong = ['abd', 'wxyz!']
  assert demo.exact_match(targets, wrong) == {'exact_match': 0.0}
  # Two of three characters, four of five.
  assert demo.character_accuracy(targets, wrong) == {'character_accuracy': 75.0}
  assert demo.character_accuracy(targets, ['', '']) == {
    'character_accuracy': 0.0
  }
