"""Reports on a task: first examples, lengths, and what the vocabulary loses."""

from collections.abc import Mapping
import dataclasses
import itertools
import textwrap
from typing import Any, Protocol, runtime_checkable

from dst_t5x.runtime import quiet_tensorflow  # noqa: F401

# isort: split
from absl import logging
import numpy as np
import seqio
import tqdm

from dst_t5x.core import values
from dst_t5x.core.errors import UserError, first_line
from dst_t5x.data import chat_vocabulary
from dst_t5x.data import task_checks
from dst_t5x.data import task_examples
from dst_t5x.data import task_vocabulary
from dst_t5x.data import tokenizers_vocabulary

PERCENTILES = (50, 90, 95, 99, 100)
# A warning is given if more than half a per cent of the examples are cut.
CUT_WARNING = 0.005
_WIDTH = 80


@dataclasses.dataclass
class FeatureReport:
  """Statistics of one feature of a split.

  Attributes:
    limit: the feature's length in TASK_FEATURE_LENGTHS.
    lengths: pieces of each example, EOS included, before cutting.
    unknown: number of examples with a piece that is not in the vocabulary.
    changed: number of examples that differ after encoding and decoding.
  """

  limit: int
  lengths: list[int] = dataclasses.field(default_factory=list)
  unknown: int = 0
  changed: int = 0

  def add(self, text: str | None, ids: list[int], vocab: Any) -> None:
    """Counts an example; `text` is None if ids are not those of a text."""
    self.lengths.append(len(ids))
    self.unknown += vocab.unk_id in ids
    self.changed += text is not None and vocab.decode(ids) != text

  @property
  def cut(self) -> int:
    """The number of examples that are cut."""
    return sum(length > self.limit for length in self.lengths)

  def shares(self) -> list[float]:
    """Returns the shares of examples that are cut, unknown, changed."""
    counts = (self.cut, self.unknown, self.changed)
    return [count / len(self.lengths) for count in counts]

  def percentiles(self) -> list[int]:
    """Returns PERCENTILES of the lengths; each is the length of an example."""
    values_at = np.percentile(self.lengths, PERCENTILES, method='inverted_cdf')
    return [int(length) for length in values_at]


@dataclasses.dataclass
class SplitReport:
  """Statistics of a split.

  Attributes:
    task: the task's name.
    split: the split's name.
    features: name -> statistics of the feature.
    first: the first examples as the task makes them, not cut.
    rows: lines that show them as the network reads them.
  """

  task: str
  split: str
  features: dict[str, FeatureReport]
  first: list[Mapping[str, Any]] = dataclasses.field(default_factory=list)
  rows: list[list[str]] = dataclasses.field(default_factory=list)

  @property
  def examples(self) -> int:
    """The number of examples that were measured."""
    return len(next(iter(self.features.values())).lengths)

  def warnings(self) -> list[str]:
    """Returns one line for each feature that is cut too often."""
    return [
      f'TASK_FEATURE_LENGTHS cuts {feature.shares()[0]:.2%} of the {name},'
      f' which have up to {max(feature.lengths)} pieces'
      for name, feature in self.features.items()
      if feature.shares()[0] > CUT_WARNING
    ]


def measure(
  task: seqio.Task,
  split: str,
  feature_lengths: Mapping[str, int],
  show_examples: int,
  measure_examples: int | None = None,
) -> SplitReport:
  """Reads a split and measures its examples.

  Args:
    task: the task; its data must be prepared.
    split: one of its splits.
    feature_lengths: feature -> maximum number of pieces.
    show_examples: number of first examples to keep.
    measure_examples: number of examples to read; None for all.

  Raises:
    UserError: the split cannot be read or has no example.
  """
  report = SplitReport(
    task.name,
    split,
    {
      name: FeatureReport(feature_lengths[name])
      for name in task_examples.FEATURES
    },
  )
  try:
    task_checks.check_source(task, split)
    dataset = task_examples.read_whole(task, feature_lengths, split)
    examples = itertools.islice(dataset.as_numpy_iterator(), measure_examples)
    for example in tqdm.tqdm(examples, f'{task.name} {split}', disable=None):
      if len(report.first) < show_examples:
        report.first.append(example)
      for name, feature in report.features.items():
        vocab = task_vocabulary.of_feature(task.output_features[name])
        feature.add(
          _decodable(name, example, vocab), example[name].tolist(), vocab
        )
  except UserError:
    raise
  # Errors of the source, the preprocessors or TensorFlow.
  except Exception as error:
    raise UserError(
      f'cannot read the {split} split of task {task.name!r}:'
      f' {first_line(error)}'
    ) from error
  if not report.examples:
    raise UserError(f'the {split} split of task {task.name!r} has no example')
  return report


def _decodable(
  name: str, example: Mapping[str, Any], vocab: seqio.Vocabulary
) -> str | None:
  """Returns the text that decoding must give back, or None."""
  text = example.get(f'{name}_pretokenized')
  is_prompt = name == 'inputs' and isinstance(
    vocab, chat_vocabulary.ChatVocabulary
  )
  return None if text is None or is_prompt else text.decode()


@runtime_checkable
class Network(Protocol):
  """The methods of `models.api.Network` that make rows of examples."""

  def feature_converter(self, pack: bool) -> Any:
    """Returns the converter of examples to rows."""

  def prompt(self, example: Mapping[str, Any]) -> Any:
    """Returns the tokens of a row from which decoding starts."""

  def targets(self, batch: Mapping[str, Any]) -> Any:
    """Returns the tokens that have a loss."""


def show_task(
  task: str,
  feature_lengths: Mapping[str, values.Positive],
  show_examples: values.Count = 3,
  measure_examples: values.Positive | None = None,
  network: Network | None = None,
) -> list[SplitReport]:
  """Prints statistics of the splits of a task, or of the tasks of a mixture.

  Args:
    task: a registered seqio task or mixture.
    feature_lengths: feature -> maximum number of pieces in training.
    show_examples: number of examples of each split to print.
    measure_examples: number of examples of each split to read; None for all.
    network: the network whose rows are shown; None for no rows.

  Returns:
    The printed reports.

  Raises:
    UserError: there is no such task, or none of its splits can be read. If only
      some cannot be read, a warning names them.
  """
  values.check(
    {
      'SHOW_EXAMPLES': (show_examples, values.Count),
      'MEASURE_EXAMPLES': (measure_examples, values.Positive | None),
    }
  )
  task_or_mixture = task_checks.find(task)
  task_checks.check_features(task_or_mixture, feature_lengths)
  if isinstance(task_or_mixture, seqio.Mixture):
    print('\n'.join(_mixture_lines(task_or_mixture)))
  reports: list[SplitReport] = []
  problems: list[UserError] = []
  for member in task_examples.tasks_of(task_or_mixture):
    try:
      task_checks.check_prepared(member)
      splits = list(member.splits)
    except UserError as error:
      problems.append(error)
      continue
    for split in splits:
      try:
        report = measure(
          member, split, feature_lengths, show_examples, measure_examples
        )
      except UserError as error:
        problems.append(error)
        continue
      if network is not None:
        report.rows = _rows(network, member, split, feature_lengths, report)
      reports.append(report)
      print('\n'.join(['', *_lines(report, member)]), flush=True)
  if not reports:
    raise problems[0]
  for problem in problems:
    logging.warning('not shown: %s', problem)
  return reports


def _mixture_lines(mixture: seqio.Mixture) -> list[str]:
  tasks = task_examples.tasks_of(mixture)
  lines = [f'{mixture.name}: {len(tasks)} tasks, trained on in proportion to']
  for member in sorted(tasks, key=mixture.get_rate, reverse=True):
    rate = mixture.get_rate(member)
    share = rate / mixture.total_rate
    lines.append(f'  {member.name:32}{rate:12,.10g}{share:9.2%}')
  return lines


def _lines(report: SplitReport, task: seqio.Task) -> list[str]:
  """Returns the lines of a split's report."""
  titles = ('median', *(f'{p} %' for p in PERCENTILES[1:-1]), 'most', 'limit')
  shares = ('cut', 'unknown', 'changed')
  lines = [
    f'{report.task}, {report.split}: {report.examples:,} examples',
    f'  {"pieces":8}'
    + ''.join(f'{title:>7}' for title in titles)
    + ''.join(f'{share:>9}' for share in shares),
  ]
  for name, feature in report.features.items():
    columns = (*feature.percentiles(), feature.limit)
    lines.append(
      f'  {name:8}'
      + ''.join(f'{number:7}' for number in columns)
      + ''.join(f'{share:9.2%}' for share in feature.shares())
    )
  lines += [f'  warning: {warning}' for warning in report.warnings()]
  for number, example in enumerate(report.first, start=1):
    lines.append(f'  example {number}')
    for name in report.features:
      lines += _example_lines(name, example, task.output_features[name])
    lines += report.rows[number - 1] if report.rows else []
  return lines


def _rows(
  network: Any,
  task: seqio.Task,
  split: str,
  feature_lengths: Mapping[str, int],
  report: SplitReport,
) -> list[list[str]]:
  """Returns the lines of the first examples as a network reads them."""
  vocab = task_vocabulary.of_feature(task.output_features['targets'])
  converter = network.feature_converter(pack=False)
  dataset = task_examples.read(task, feature_lengths, split, converter)
  rows = []
  for features in dataset.take(len(report.first)).as_numpy_iterator():
    prompt, targets = network.prompt(features), network.targets(features)
    counts = np.asarray(targets.weights) > 0
    read = prompt[prompt != network.pad_id].tolist()
    predicted = np.asarray(targets.tokens)[counts].tolist()
    rows.append(
      [
        f'    row of {len(counts)} positions: {len(read)} pieces are read'
        f' first, {len(predicted)} have loss',
        *_wrapped('read', ' '.join(to_pieces(vocab, read))),
        *_wrapped('loss', ' '.join(to_pieces(vocab, predicted))),
      ]
    )
  return rows


def _example_lines(
  name: str, example: Mapping[str, Any], feature: seqio.Feature
) -> list[str]:
  """Returns the lines of a feature of an example: its text and its pieces."""
  text = example.get(f'{name}_pretokenized', b'').decode()
  pieces = ' '.join(to_pieces(feature.vocabulary, example[name].tolist()))
  return [*_wrapped(name, text), *_wrapped('', pieces)]


def _wrapped(title: str, value: str) -> list[str]:
  return textwrap.wrap(
    f'{title:9}{value}',
    _WIDTH,
    initial_indent='    ',
    subsequent_indent=' ' * 13,
  )


def to_pieces(vocab: seqio.Vocabulary, ids: list[int]) -> list[str]:
  """Returns the name of each id: the vocabulary's, or the decoded text."""
  if isinstance(vocab, task_vocabulary.TaskVocabulary):
    vocab = vocab.chosen
  if isinstance(vocab, chat_vocabulary.ChatVocabulary):
    vocab = vocab.base
  if isinstance(vocab, seqio.SentencePieceVocabulary):
    return [vocab.tokenizer.IdToPiece(i) for i in ids]
  if isinstance(vocab, tokenizers_vocabulary.TokenizersVocabulary):
    return [vocab.piece(i) for i in ids]
  return [vocab.decode([i]) or f'<{i}>' for i in ids]
