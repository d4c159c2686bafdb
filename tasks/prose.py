"""English prose that comes with Python, for a first look at forgetting.

The texts are of the reference of the Python language. A row is the beginning of
a text, and how it goes on. There is no training split.
"""

from collections.abc import Iterator
import hashlib
import itertools
from typing import Any

import seqio
import tensorflow as tf

from dst_t5x.core import json_text
from dst_t5x.data import task_vocabulary

NAME = 'prose'
SPLIT = 'validation'
ROWS = 24
_WORDS = (15, 45)  # Of a row: what is given, what is predicted.


def rows() -> Iterator[dict[str, str]]:
  """Yields the rows, always the same for one version of Python."""
  from pydoc_data import topics

  given, predicted = _WORDS
  paragraphs = (
    paragraph.split()
    for _, text in sorted(topics.topics.items())
    for paragraph in text.split('\n\n')
    if '::=' not in paragraph and '**' not in paragraph
  )
  long = (words for words in paragraphs if len(words) >= given + predicted)
  for words in itertools.islice(long, ROWS):
    yield {
      'inputs': ' '.join(words[:given]),
      'targets': ' ' + ' '.join(words[given : given + predicted]),
    }


def _dataset(
  split: str, shuffle_files: bool, seed: int | None = None
) -> tf.data.Dataset:
  del split, shuffle_files, seed
  found = list(rows())
  return tf.data.Dataset.from_tensor_slices(
    {name: [row[name] for row in found] for name in found[0]}
  )


class _Source(seqio.FunctionDataSource):
  """The rows, and what identifies them."""

  def rows_of(self, split: str) -> dict[str, Any]:
    """Returns the identity of the rows; see `task_checks.rows_of`."""
    del split
    texts = json_text.dumps(list(rows())).encode()
    return {'rows': ROWS, 'sha256': hashlib.sha256(texts).hexdigest()}


seqio.TaskRegistry.add(
  NAME,
  source=_Source(_dataset, splits=[SPLIT]),
  preprocessors=[
    seqio.preprocessors.tokenize,
    seqio.preprocessors.append_eos,
  ],
  output_features=task_vocabulary.output_features(),
  metric_fns=[],
)
