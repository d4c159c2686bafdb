"""News translation from WMT, with SacreBLEU's test sets.

`wmt22_de_en` follows the paper (App. G): German to English, fine-tuned on the
earlier news test sets, developed on 500 sentences of newstest2021, and tested
on the general test set of 2022 against both its references. The paper does not
list its 31.5K pairs; the sets below have 31,480.

`add_task` adds any other pair of languages and years, also from a gin file
(`gin/tasks/wmt.gin`). BLEU and chrF are SacreBLEU's and use all references; for
BLEURT see `dst_t5x/data/score_command.py`.
"""

from collections.abc import Mapping, Sequence
import hashlib
from typing import Any

from absl import logging
import babel
import numpy as np
import seqio
import tensorflow as tf

from dst_t5x.core import values
from dst_t5x.core.errors import UserError, check_positive
from dst_t5x.data import task_vocabulary
from dst_t5x.data.text_scores import translation_metric
from dst_t5x.tasks import sacrebleu_data

NAME = 'wmt22_de_en'
PAIR = 'de-en'
# 'wmt14' is the shorter test set that was published, 'wmt14/full' all of it.
TRAIN_SETS = (
  sacrebleu_data.SYSCOMB,
  *('wmt09', 'wmt10', 'wmt11', 'wmt12', 'wmt13', 'wmt14/full', 'wmt15'),
  *('wmt16', 'wmt17', 'wmt18', 'wmt19', 'wmt20'),
)
DEV_SET = 'wmt21'
TEST_SET = 'wmt22'
DEV_EXAMPLES = 500
# Set -> number of pairs of German and English sentences.
SIZES: Mapping[str, int] = {
  sacrebleu_data.SYSCOMB: 502,
  'wmt09': 2525,
  'wmt10': 2489,
  'wmt11': 3003,
  'wmt12': 3003,
  'wmt13': 3000,
  'wmt14/full': 3003,
  'wmt15': 2169,
  'wmt16': 2999,
  'wmt17': 3004,
  'wmt18': 2998,
  'wmt19': 2000,
  'wmt20': 785,
  'wmt21': 1000,
  'wmt22': 1984,
}
_added: dict[str, tuple[Any, ...]] = {}


class SacreBleuSource(seqio.FunctionDataSource):
  """Sentence pairs of SacreBLEU's test sets.

  Examples are `source` and `references`, texts of shape [] and [references].
  The source shuffles the training data itself, because the sets are longer than
  seqio's shuffle buffer.
  """

  def __init__(
    self,
    pair: str,
    splits: Mapping[str, Sequence[str]],
    samples: Mapping[str, int],
  ) -> None:
    """Reads nothing yet.

    Args:
      pair: a pair of languages, such as `de-en`.
      splits: split -> names of sets.
      samples: split -> number of sentences to draw. Splits that are not listed
        are used whole.
    """
    self._pair = pair
    self._sets = splits
    self._samples = samples
    super().__init__(self._read, splits=tuple(splits))

  def num_input_examples(self, split: str) -> int:
    """Returns the number of sentence pairs; raises as `rows`."""
    return len(self.rows(split))

  def prepare(self) -> None:
    """Makes SacreBLEU download the missing sets; see `fetch`."""
    for name in dict.fromkeys(
      name for ns in self._sets.values() for name in ns
    ):
      logging.info('%s %s', name, self._pair)
      sacrebleu_data.fetch(name, self._pair)

  def rows(self, split: str) -> list[tuple[str, tuple[str, ...]]]:
    """Returns (source, references) of each sentence of a split.

    Raises:
      UserError: a set is missing or damaged.
    """
    rows: list[tuple[str, tuple[str, ...]]] = []
    odd = []
    for name in self._sets[split]:
      pairs = sacrebleu_data.read(name, self._pair)
      size, known = len(pairs.sources), SIZES.get(name)
      if self._pair == PAIR and known not in (None, size):
        odd.append(f'{name} {size} instead of {known}')
      rows += zip(*pairs, strict=True)
    if odd:
      logging.warning(
        'SacreBLEU sets in %s have other sizes than they should: %s',
        *(sacrebleu_data.folder(), ', '.join(odd)),
      )
    if split in self._samples:
      rows = [rows[i] for i in sample(self._samples[split], len(rows))]
    return rows

  def _read(
    self, split: str, shuffle_files: bool, seed: int | None = None
  ) -> tf.data.Dataset:
    rows = self.rows(split)
    if shuffle_files:
      order = np.random.default_rng(seed).permutation(len(rows))
      rows = [rows[i] for i in order]
    # Sets differ in their number of references. No line has a line break.
    texts = {
      'source': [source for source, _ in rows],
      'references': ['\n'.join(references) for _, references in rows],
    }
    return tf.data.Dataset.from_tensor_slices(texts).map(
      lambda row: (
        row | {'references': tf.strings.split(row['references'], sep='\n')}
      )
    )


def sample(count: int, total: int) -> list[int]:
  """Returns `count` of the numbers below `total`, always the same ones.

  They are those whose decimal digits have the smallest SHA-256, in ascending
  order. This does not depend on the version of Python or NumPy.
  """
  digests = [hashlib.sha256(str(i).encode()).digest() for i in range(total)]
  return sorted(sorted(range(total), key=digests.__getitem__)[:count])


def prefix(pair: str) -> str:
  """Returns T5's prefix for a pair, `translate German to English: `.

  Raises:
    UserError: a language has no English name.
  """
  try:
    names = [babel.Locale.parse(code).english_name for code in pair.split('-')]
  except (babel.UnknownLocaleError, ValueError) as error:
    raise UserError(
      f'no English names for the languages of {pair!r}: {error}'
    ) from error
  return f'translate {names[0]} to {names[1]}: '


def add_task(
  pair: str,
  train_sets: Sequence[str],
  dev_set: str,
  test_set: str,
  dev_examples: values.Positive | None = DEV_EXAMPLES,
  name: str | None = None,
) -> str:
  """Registers a translation task, once for the same arguments.

  Args:
    pair: a pair of languages, such as `de-en`: from German to English.
    train_sets: SacreBLEU's names of the sets to train on (`sacrebleu --list`),
      and `newssyscomb2009`; the first references are the targets.
    dev_set: the set of the split `validation`.
    test_set: the set of the split `test`.
    dev_examples: number of sentences to draw from `dev_set`; None for all.
    name: the task's name; by default made of the test set and the pair, such as
      `wmt22_de_en`.

  Returns:
    The task's name.

  Raises:
    UserError: another task has the name, or SacreBLEU has no such set or pair.
  """
  if dev_examples is not None:
    check_positive('dev_examples', dev_examples)
  name = name or f'{test_set}_{pair}'.replace('/', '_').replace('-', '_')
  splits = {
    'train': tuple(train_sets),
    'validation': (dev_set,),
    'test': (test_set,),
  }
  definition = pair, splits, dev_examples
  if name in seqio.TaskRegistry.names():
    if _added.get(name) != definition:
      raise UserError(
        f'another task is called {name!r} already: give this one a name'
        ' (TASK_NAME of gin/tasks/wmt.gin)'
      )
    return name
  for used in (*train_sets, dev_set, test_set):
    sacrebleu_data.is_there(used, pair)
  begin = prefix(pair)

  def to_text(example: Mapping[str, tf.Tensor]) -> dict[str, tf.Tensor]:
    return {
      'inputs': tf.strings.join([begin, example['source']]),
      'targets': example['references'][0],
      'references': example['references'],
    }

  samples = {} if dev_examples is None else {'validation': dev_examples}
  seqio.TaskRegistry.add(
    name,
    source=SacreBleuSource(pair, splits, samples),
    preprocessors=[
      seqio.map_over_dataset(to_text),
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos,
    ],
    output_features=task_vocabulary.output_features(),
    postprocess_fn=_postprocess,
    metric_fns=[translation_metric(pair.split('-')[1])],
  )
  _added[name] = definition
  return name


def _postprocess(
  text: str, example: Mapping[str, Any] | None = None, is_target: bool = False
) -> Any:
  """Returns all references of a target, and a prediction unchanged."""
  if not is_target:
    return text
  assert example is not None
  return [reference.decode() for reference in example['references']]


add_task(PAIR, TRAIN_SETS, DEV_SET, TEST_SET, name=NAME)
