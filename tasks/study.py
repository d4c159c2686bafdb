"""The tasks of the ablation study (`docs/study.md`), made without any file.

Inputs are an operation and a word, `next: plum`; the target is the word after
the operation, byte by byte. `study_pretrain` teaches six operations.
`study_finetune` has three names that are new: `back` is an operation that the
seed knows, `both` is two of them after each other, and `code` a substitution
cipher without a system, whose table has to be learnt. A few parameters may do
for the first; the last takes more.

Words are random strings of letters. No word is in two splits, nor in those of
the other task: the sum of a word's letters decides where it belongs.
"""

from collections.abc import Callable, Mapping
import functools
import string

import numpy as np

from dst_t5x.tasks import demo

_LETTERS = string.ascii_lowercase
_LENGTHS = (3, 4, 5)
_ROWS = {'train': 36_765, 'validation': 512, 'test': 1024}
_POOL = 52_000  # Words to draw the splits from.
_SEED = 2024


def _substitute(partners: str) -> Callable[[str], str]:
  table = str.maketrans(_LETTERS, partners)
  return lambda word: word.translate(table)


_NEXT = _substitute(_LETTERS[1:] + _LETTERS[0])
_SHUFFLED = np.random.default_rng(_SEED + 1).permutation(list(_LETTERS))

PRETRAINING: Mapping[str, Callable[[str], str]] = {
  'copy': str,
  'flip': lambda word: word[::-1],
  'last': lambda word: word[-1],
  'next': _NEXT,
  'prev': _substitute(_LETTERS[-1] + _LETTERS[:-1]),
  'caps': str.upper,
}
FINE_TUNING: Mapping[str, Callable[[str], str]] = {
  'back': lambda word: word[::-1],
  'both': lambda word: _NEXT(word).upper(),
  'code': _substitute(''.join(_SHUFFLED)),
}


def split_of(word: str) -> str:
  """Returns the split that a word belongs to."""
  remainder = sum(map(_LETTERS.index, word)) % 16
  return {0: 'validation', 1: 'test', 2: 'test'}.get(remainder, 'train')


@functools.cache
def _words() -> tuple[str, ...]:
  """Returns the words of all splits; different ones, in random order."""
  draw = np.random.default_rng(_SEED)
  letters = draw.choice(list(_LETTERS), (_POOL, max(_LENGTHS)))
  lengths = draw.choice(_LENGTHS, _POOL)
  return tuple(
    dict.fromkeys(
      ''.join(row[:length])
      for row, length in zip(letters, lengths, strict=True)
    )
  )


def make_rows(
  operations: Mapping[str, Callable[[str], str]], split: str
) -> tuple[list[str], list[str]]:
  """Returns the inputs and the targets of a split, the same ones always."""
  words = [word for word in _words() if split_of(word) == split][: _ROWS[split]]
  names = sorted(operations)
  inputs, targets = [], []
  for i, word in enumerate(words):
    name = names[i % len(names)]
    inputs.append(f'{name}: {word}')
    targets.append(operations[name](word))
  return inputs, targets


for _name, _operations in (
  ('study_pretrain', PRETRAINING),
  ('study_finetune', FINE_TUNING),
):
  _rows = functools.cache(functools.partial(make_rows, _operations))
  demo.add(_name, _rows, tuple(_ROWS))
