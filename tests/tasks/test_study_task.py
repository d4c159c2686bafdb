"""The tasks of the ablation study."""

import pytest

from dst_t5x.data import task_checks
from dst_t5x.tasks import study

_LENGTHS = {'inputs': 12, 'targets': 6}
_SPLITS = {'train': 36_765, 'validation': 512, 'test': 1024}


@pytest.mark.parametrize(
  ('name', 'operations'),
  [
    ('study_pretrain', study.PRETRAINING),
    ('study_finetune', study.FINE_TUNING),
  ],
)
def test_rows_follow_their_operation_and_fit(name, operations):
  task = task_checks.check(name, _LENGTHS, 64)
  words = {}
  for split, count in _SPLITS.items():
    inputs, targets = study.make_rows(operations, split)
    assert len(inputs) == len(targets) == count
    for text, target in zip(inputs, targets, strict=True):
      operation, word = text.split(': ')
      assert operations[operation](word) == target
      assert study.split_of(word) == split
    # One more for EOS.
    assert max(map(len, inputs)) < _LENGTHS['inputs']
    assert max(map(len, targets)) < _LENGTHS['targets']
    words[split] = {text.split(': ')[1] for text in inputs}
    assert task.num_input_examples(split) in (None, count)
  assert sum(map(len, words.values())) == sum(_SPLITS.values())
  assert len(set().union(*words.values())) == sum(_SPLITS.values())


def test_fine_tuning_asks_for_what_the_seed_does_not_know():
  assert not study.FINE_TUNING.keys() & study.PRETRAINING.keys()
  words = study.make_rows(study.PRETRAINING, 'test')[0][:50]
  words = [text.split(': ')[1] for text in words]
  known = [list(map(f, words)) for f in study.PRETRAINING.values()]
  for name, operation in study.FINE_TUNING.items():
    # One of them is a known operation under a new name.
    assert (list(map(operation, words)) in known) == (name == 'back')
