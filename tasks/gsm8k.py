"""GSM8K: grade school mathematics in words, with worked answers.

Cobbe et al. 2021, "Training Verifiers to Solve Math Word Problems",
arXiv 2110.14168. The score is the solve rate of the final answer, extracted in
the two ways of lm-evaluation-harness: `strict_match` reads the number after the
marker `####`, `flexible_extract` reads the last number of the text. Here,
numbers are compared by value (`3.0` equals `3`); see `numerals`.

T5's vocabulary has no newline, no `<`, `^`, `{`, `}`, backquote, and few
mathematical signs. Lines are therefore joined by ` | `, which is one piece and
occurs in no row, and signs are replaced by pieces of the vocabulary. The
calculator's notes `<<48/2=24>>` are removed in `gsm8k` and written as
`[[48/2=24]]` in `gsm8k_notes`; `read_lines` restores them. After that, no row
of the public data has an unknown piece. The model writes its notes itself:
decoding does not stop for a calculator.

GSM8K has no development split and the paper names none. The split 'validation'
is the test split, as in the paper's table.
"""

from collections.abc import Mapping, Sequence
import functools
import re
from typing import Any

import seqio
import tensorflow as tf

from dst_t5x.data import task_vocabulary
from dst_t5x.tasks import numerals

NAME = 'gsm8k'
NOTES_NAME = 'gsm8k_notes'
PREFIX = 'gsm8k question: '
LINE_BREAK = ' | '
MARKER = '####'

# RE2 patterns and their replacements, applied in this order.
_FRACTIONS = {'½': '1/2', '¼': '1/4', '¾': '3/4', '⅓': '1/3', '⅔': '2/3'}
_NOTE = r'<<([^<>]*)>>'
_REWRITES = (
  (r'\s*[\n\r\x{2028}]\s*', LINE_BREAK),
  (r'[\s\x{a0}\x{200b}]+', ' '),
  *((rf'(\d)\s*{sign}', rf'\1 {spelt}') for sign, spelt in _FRACTIONS.items()),
  *_FRACTIONS.items(),
  (r'¢\s*(\d[\d,.]*)', r'\1 cents'),
  (r'(\d)\s*¢', r'\1 cents'),
  (r'¢', 'cents'),
  (r'\s*<=\s*', ' is at most '),
  (r'\s*<\s*', ' is less than '),
  (r'×', '*'),
  (r'÷', '/'),
  (r'−', '-'),
  (r'√', 'sqrt'),
  (r'\^', '**'),
  (r'²', '**2'),
  (r'³', '**3'),
  (r'`', "'"),
  (r'\{', '('),
  (r'\}', ')'),
  (r'ñ', 'n'),
  (r'А', 'A'),  # A Cyrillic letter.
)


def rewrite(text: tf.Tensor, notes: bool = False) -> tf.Tensor:
  """Replaces characters that are not in T5's vocabulary.

  Args:
    text: string tensor of any shape.
    notes: whether to keep the calculator's notes.
  """
  text = tf.strings.regex_replace(text, _NOTE, r'[[\1]]' if notes else '')
  for pattern, replacement in _REWRITES:
    text = tf.strings.regex_replace(text, pattern, replacement)
  return tf.strings.strip(text)


def read_lines(text: str) -> str:
  """Restores line breaks and notes in a target or a prediction."""
  text = text.replace(LINE_BREAK, '\n')
  return re.sub(r'\[\[([^\[\]]*)\]\]', r'<<\1>>', text)


def _to_text(
  example: Mapping[str, tf.Tensor], notes: bool
) -> dict[str, tf.Tensor]:
  return {
    'inputs': tf.strings.join([PREFIX, rewrite(example['question'])]),
    'targets': rewrite(example['answer'], notes),
  }


def extract_strict(text: str) -> str | None:
  """Returns the first number after `####` in canonical form, or None."""
  return numerals.after(MARKER, text)


def extract_flexible(text: str) -> str | None:
  """Returns the last number of the text in canonical form, or None."""
  return numerals.last(text)


def _postprocess(text: str, is_target: bool = False, **unused: Any) -> Any:
  """Returns the final answer of a target, and a prediction unchanged."""
  del unused
  return extract_strict(text) if is_target else text


def _percent_equal(
  targets: Sequence[str], answers: Sequence[str | None]
) -> float:
  return 100.0 * sum(map(str.__eq__, targets, map(str, answers))) / len(targets)


def strict_match(
  targets: Sequence[str], predictions: Sequence[str]
) -> Mapping[str, float]:
  """Returns the percentage solved, by the number after the marker."""
  answers = [extract_strict(text) for text in predictions]
  return {'strict_match': _percent_equal(targets, answers)}


def flexible_extract(
  targets: Sequence[str], predictions: Sequence[str]
) -> Mapping[str, float]:
  """Returns the percentage solved, by the last number of the text."""
  answers = [extract_flexible(text) for text in predictions]
  return {'flexible_extract': _percent_equal(targets, answers)}


def _add(name: str, notes: bool) -> None:
  seqio.TaskRegistry.add(
    name,
    source=seqio.TfdsDataSource(
      'gsm8k:1.0.0',
      splits={'train': 'train', 'validation': 'test', 'test': 'test'},
      read_only=True,
    ),
    preprocessors=[
      seqio.map_over_dataset(functools.partial(_to_text, notes=notes)),
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos,
    ],
    output_features=task_vocabulary.output_features(),
    postprocess_fn=_postprocess,
    metric_fns=[strict_match, flexible_extract],
  )


_add(NAME, notes=False)
_add(NOTES_NAME, notes=True)
