"""The generated tasks of the ablation study (`docs/study.md`).

Inputs are an operation and a word, `next: plum`. The target is the word after
the operation. Both are texts of bytes. `study_pretrain` has six operations.
`study_finetune` has three operations with new names: `back` is one that the
seed knows, `both` is two of them in sequence, and `code` is a substitution
cipher with a random table. A few parameters may be enough for the first; the
last needs more.

Words are random strings of letters. The splits share no words, within a task or
between tasks: the sum of a word's letters decides its split.
"""

from collections.abc import Callable, Mapping
import functools
import string

import numpy as np

from dst_t5x.tasks import demo

_LETTERS = string.ascii_lowercase
_LENGTHS = (3, 4, 5)
_ROWS = {'train': 36_765, 'validation': 512, 'test': 1024}
_POOL = 52_000  # Words that the splits are drawn from.
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
  """Returns the split of a word."""
  remainder = sum(map(_LETTERS.index, word)) % 16
  return {0: 'validation', 1: 'test', 2: 'test'}.get(remainder, 'train')


@functools.cache
def _words() -> tuple[str, ...]:
  """Returns the words of all splits, without repetition, in random order."""
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
  """Returns the inputs and the targets of a split, always the same ones."""
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
