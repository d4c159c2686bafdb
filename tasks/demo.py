"""Two small generated tasks for the demonstration.

Inputs are an operation and a word, `upper: plum`. The target is the word after
the operation. Both are texts of bytes. `demo_pretrain` has three operations.
`demo_finetune` has another one: every letter is replaced by its partner in a
fixed substitution cipher.

Words are random strings of different letters. The splits share no words: the
sum of a word's letters decides its split, and one sixteenth of the words is for
validation.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import string

import numpy as np
import seqio
import tensorflow as tf

_LETTERS = string.ascii_lowercase
_LENGTHS = (3, 4, 5)
_ROWS = {'train': 50_000, 'validation': 512}
_POOL = 64_000  # Words that the splits are drawn from.
_SEED = 2024

_SUCCESSORS = str.maketrans(_LETTERS, _LETTERS[1:] + _LETTERS[0])
_CIPHER = str.maketrans(_LETTERS, 'qwertyuiopasdfghjklzxcvbnm')

PRETRAINING: Mapping[str, Callable[[str], str]] = {
  'copy': str,
  'upper': str.upper,
  'next': lambda word: word.translate(_SUCCESSORS),
}
FINE_TUNING: Mapping[str, Callable[[str], str]] = {
  'cipher': lambda word: word.translate(_CIPHER),
}


def make_rows(
  operations: Mapping[str, Callable[[str], str]], split: str
) -> tuple[list[str], list[str]]:
  """Returns the inputs and the targets of a split, always the same ones."""
  draw = np.random.default_rng(_SEED)
  # The first letters of a random permutation are all different.
  orders = draw.permuted(np.tile(np.arange(26), (_POOL, 1)), axis=1)
  lengths = draw.choice(_LENGTHS, _POOL)
  names = draw.choice(sorted(operations), _POOL)
  inputs, targets = [], []
  for order, length, name in zip(orders, lengths, names, strict=True):
    letters = order[:length]
    if (letters.sum() % 16 == 0) != (split == 'validation'):
      continue
    word = ''.join(_LETTERS[letter] for letter in letters)
    inputs.append(f'{name}: {word}')
    targets.append(operations[name](word))
  return inputs[: _ROWS[split]], targets[: _ROWS[split]]


def exact_match(
  targets: Sequence[str], predictions: Sequence[str]
) -> Mapping[str, float]:
  """Returns the percentage of correct words."""
  right = sum(map(str.__eq__, targets, predictions))
  return {'exact_match': 100.0 * right / len(targets)}


def character_accuracy(
  targets: Sequence[str], predictions: Sequence[str]
) -> Mapping[str, float]:
  """Returns the percentage of characters that are correct at their positions.

  Missing and additional characters are wrong.
  """
  pairs = list(zip(targets, predictions, strict=True))
  right = sum(sum(map(str.__eq__, *pair)) for pair in pairs)
  total = sum(max(map(len, pair)) for pair in pairs)
  return {'character_accuracy': 100.0 * right / total}


def add(
  name: str,
  rows: Callable[[str], tuple[list[str], list[str]]],
  splits: Sequence[str],
  num_input_examples: Mapping[str, int] | None = None,
) -> None:
  """Registers a task of bytes, scored by words and by characters.

  Args:
    name: the task's name.
    rows: split -> inputs and targets, in random order, always the same ones.
    splits: the names of the splits.
    num_input_examples: split -> number of examples, if known in advance.
  """

  def read(split: str, shuffle_files: bool, seed: int = 0) -> tf.data.Dataset:
    del shuffle_files, seed  # The rows are in random order already.
    inputs, targets = rows(split)
    return tf.data.Dataset.from_tensor_slices(
      {'inputs': inputs, 'targets': targets}
    )

  feature = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
  seqio.TaskRegistry.add(
    name,
    source=seqio.FunctionDataSource(
      read, splits=splits, num_input_examples=num_input_examples
    ),
    preprocessors=[
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos,
    ],
    output_features={'inputs': feature, 'targets': feature},
    metric_fns=[exact_match, character_accuracy],
  )


for _name, _operations in (
  ('demo_pretrain', PRETRAINING),
  ('demo_finetune', FINE_TUNING),
):
  add(_name, functools.partial(make_rows, _operations), tuple(_ROWS), _ROWS)
