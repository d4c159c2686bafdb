"""TriviaQA without its documents: closed-book, open-domain questions.

Joshi et al. 2017, "TriviaQA", arXiv 1705.03551; without documents since Roberts
et al. 2020, "How Much Knowledge Can You Pack Into the Parameters of a Language
Model?", arXiv 2002.08910. The recipe is the one that seqio's README publishes
and that the paper follows (App. G): prefix, target and splits are seqio's, and
inputs end without EOS as they do there. Exact match and F1 are t5's: the best
over all accepted answers, after TriviaQA's own normalization.

seqio holds the last tenth of the official training questions back for
development, and tests on the official development set, as the answers of the
official test set are not public. `trivia_qa_closed_book_full` trains on all
87,622 questions, the number that the paper gives, and has none to develop on:
its 'validation' split is the test set. Choose by the other task.
"""

from collections.abc import Mapping
from typing import Any

import seqio
from t5.evaluation import metrics
import tensorflow as tf

from dst_t5x.data import vocabulary

NAME = 'trivia_qa_closed_book'
FULL_NAME = 'trivia_qa_closed_book_full'
PREFIX = 'trivia_qa question: '


def _to_text(example: Mapping[str, Any]) -> dict[str, tf.Tensor]:
  return {
    'inputs': tf.strings.join([PREFIX, example['question']]),
    'targets': example['answer']['value'],
    'answers': example['answer']['aliases'],
  }


def _postprocess(
  text: str, example: Mapping[str, Any] | None = None, is_target: bool = False
) -> Any:
  """Returns all accepted answers of a target, a prediction as it is."""
  if not is_target:
    return text
  assert example is not None
  return [answer.decode() for answer in example['answers']]


def _add(name: str, train: str, validation: str) -> None:
  features = vocabulary.output_features()
  features['inputs'] = seqio.Feature(
    features['inputs'].vocabulary, add_eos=False
  )
  seqio.TaskRegistry.add(
    name,
    source=seqio.TfdsDataSource(
      'trivia_qa/unfiltered.nocontext:1.1.0',
      splits={'train': train, 'validation': validation, 'test': 'validation'},
      read_only=True,
    ),
    preprocessors=[
      seqio.map_over_dataset(_to_text),
      seqio.preprocessors.tokenize,
      seqio.preprocessors.append_eos,
    ],
    output_features=features,
    postprocess_fn=_postprocess,
    metric_fns=[metrics.trivia_qa],
  )


_add(NAME, 'train[:90%]', 'train[90%:]')
_add(FULL_NAME, 'train', 'validation')
