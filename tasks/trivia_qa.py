"""TriviaQA without documents: closed-book, open-domain questions.

Joshi et al. 2017, "TriviaQA", arXiv 1705.03551; without documents since Roberts
et al. 2020, "How Much Knowledge Can You Pack Into the Parameters of a Language
Model?", arXiv 2002.08910. The paper (App. G) follows the recipe in seqio's
README, and so does this task: prefix, target and splits are seqio's, and inputs
end without EOS. Exact match and F1 are t5's: the best over all accepted
answers, after TriviaQA's own normalization.

seqio's development set is the last tenth of the official training questions.
Its test set is the official development set, because the answers of the
official test set are not public. `trivia_qa_closed_book_full` trains on all
87,622 questions, the paper's number, and has no development set: its split
'validation' is the test set. Use the other task to choose settings.
"""

from collections.abc import Mapping
from typing import Any

import seqio
from t5.evaluation import metrics
import tensorflow as tf

from dst_t5x.data import task_vocabulary

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
  """Returns all accepted answers of a target, and a prediction unchanged."""
  if not is_target:
    return text
  assert example is not None
  return [answer.decode() for answer in example['answers']]


def _add(name: str, train: str, validation: str) -> None:
  features = task_vocabulary.output_features()
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
