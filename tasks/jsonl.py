"""A task from files of `inputs` and `targets`, without any code.

A `.jsonl` file has one object a line, `{"inputs": "…", "targets": "…"}`; other
keys are ignored. A conversation, `{"messages": […]}`, is such a row, too: its
last message is the target; see `conversations`. A `.tsv` file has inputs, a tab
and targets on each line, and optionally the header `inputs<TAB>targets`.
`text_files` reads the lines; empty ones are skipped. Files may be of any size:
every line is checked once, then rows are read as they are needed. Gin names the
files (`gin/tasks/jsonl.gin`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import itertools
from typing import Any

import gin
import numpy as np
import seqio
import tensorflow as tf

from dst_t5x.core import stable_ids
from dst_t5x.core import values
from dst_t5x.core.errors import UserError, nearest
from dst_t5x.data import conversations
from dst_t5x.data import file_source
from dst_t5x.data import row_files
from dst_t5x.data import task_vocabulary
from dst_t5x.data import text_files
from dst_t5x.data import text_scores

NAME = 'jsonl'
_CHUNK = 256  # Rows in one tensor.

Row = tuple[str, str]
# (targets, predictions) -> scores
Metric = Callable[[Sequence[str], Sequence[str]], Mapping[str, Any]]


def parse_row(line: str) -> Row | None:
  """Returns the inputs and targets of a line of a `.jsonl` file.

  Raises:
    MalformedRow: the line has neither two texts nor a conversation.
  """
  row = text_files.parse_object(line)
  if row is None:
    return None
  if conversations.KEY not in row:
    return text_files.pair_of(row)
  asked, answer = conversations.split(row[conversations.KEY])
  if answer is None:
    raise text_files.MalformedRow(
      f'has {conversations.KEY!r} that do not end with the assistant'
    )
  task_vocabulary.check_messages(asked)
  return asked, answer


_PARSERS: Mapping[str, row_files.Parser] = {
  '.jsonl': parse_row,
  '.tsv': text_files.parse_tabs,
}


def _dataset(file: row_files.File) -> tf.data.Dataset:
  """Returns the rows as `inputs` and `targets`, in the file's order."""

  def chunks() -> Iterator[dict[str, np.ndarray]]:
    # TextLineDataset would drop all carriage returns.
    rows = file.rows()
    while chunk := list(itertools.islice(rows, _CHUNK)):
      yield {
        name: np.array([text.encode() for text in texts], object)
        for name, texts in zip(
          text_files.HEADER, zip(*chunk, strict=True), strict=True
        )
      }

  texts = tf.TensorSpec([None], tf.string)
  signature = dict.fromkeys(text_files.HEADER, texts)
  return tf.data.Dataset.from_generator(
    chunks, output_signature=signature
  ).unbatch()


@dataclasses.dataclass(frozen=True)
class Settings:
  """The settings of the task.

  Attributes:
    train_file: rows of the split `train`.
    eval_file: rows of the splits `validation` and `test`.
    metrics: names of `METRICS`.
    language: the targets' language, for BLEU; see `text_scores.tokenizer_for`.
  """

  train_file: str | None = None
  eval_file: str | None = None
  metrics: Sequence[str] = ('exact_match',)
  language: str = ''

  def file(self, split: str) -> row_files.File:
    """Returns the file of a split.

    Raises:
      UserError: no file is set, or its name's suffix is unknown.
    """
    macro, path = (
      ('TRAIN_FILE', self.train_file)
      if split == 'train'
      else ('EVAL_FILE', self.eval_file)
    )
    if not path:
      raise UserError(
        f'the {split} split of task {NAME!r} needs a file: set --gin.{macro}=…'
      )
    parser = row_files.parser_of(macro, path, _PARSERS)
    return row_files.File(macro, path, parser, task_vocabulary.has_chat())

  def chosen_metrics(self) -> list[Metric]:
    """Returns the metrics.

    Raises:
      UserError: there is no such metric or language, or the package of the
        language's tokenizer is missing.
    """
    for name in self.metrics:
      if name not in METRICS:
        raise UserError(
          f'METRICS: there is no {name!r}{nearest(name, METRICS)} (known:'
          f' {sorted(METRICS)})'
        )
    return [METRICS[name](self.language) for name in self.metrics]


@gin.configurable
@stable_ids.called('jsonl')
def settings(
  train_file: values.Path | None = None,
  eval_file: values.Path | None = None,
  metrics: Sequence[str] = ('exact_match',),
  language: str = '',
) -> Settings:
  """Returns the settings that gin binds; see `Settings`."""
  return Settings(train_file, eval_file, metrics, language)


class FileSource(file_source.FileSource):
  """The rows of the files that gin names."""

  def check(self, split: str) -> None:
    """Checks every line of a split's file; see `row_files.File`."""
    settings().chosen_metrics()
    settings().file(split).check()

  def rows_of(self, split: str) -> dict[str, Any]:
    """Returns the identity of a split's rows; raises as `check`."""
    file = settings().file(split)
    rows = file.check()
    return {'file': file.macro, 'rows': rows, 'sha256': file.digest()}

  def num_input_examples(self, split: str) -> int:
    """Returns the number of rows; raises as `check`."""
    return settings().file(split).check()

  def list_shards(self, split: str) -> Sequence[str]:
    """Returns the file of a split."""
    return [settings().file(split).path]

  def dataset(self, split: str) -> tf.data.Dataset:
    """Returns the rows of a split; see `file_source.FileSource`."""
    return _dataset(settings().file(split))


def _exact_match(
  targets: Sequence[str], predictions: Sequence[str]
) -> Mapping[str, float]:
  pairs = zip(targets, predictions, strict=True)
  right = sum(a.strip() == b.strip() for a, b in pairs)
  return {'exact_match': 100.0 * right / len(targets)}


def _against_one(name: str, scorer: text_scores.Scorer) -> Metric:
  def score(
    targets: Sequence[str], predictions: Sequence[str]
  ) -> Mapping[str, Any]:
    result = scorer(predictions, [[target] for target in targets])
    signature = seqio.metrics.Text(result.signature)
    return {name: result.value, f'{name}_signature': signature}

  return score


# Name -> a function that makes the metric for a language.
METRICS: Mapping[str, Callable[[str], Metric]] = {
  'exact_match': lambda language: _exact_match,
  'bleu': lambda language: _against_one('bleu', text_scores.bleu(language)),
  'chrf': lambda language: _against_one('chrf', text_scores.chrf()),
}


def chosen_metrics(
  targets: Sequence[str], predictions: Sequence[str]
) -> Mapping[str, Any]:
  """Returns the chosen metrics; exact match is in per cent of the rows."""
  scores: dict[str, Any] = {}
  for metric in settings().chosen_metrics():
    scores |= metric(targets, predictions)
  return scores


seqio.TaskRegistry.add(
  NAME,
  source=FileSource(),
  preprocessors=[
    seqio.preprocessors.tokenize,
    seqio.preprocessors.append_eos,
  ],
  output_features=task_vocabulary.output_features(),
  metric_fns=[chosen_metrics],
)
