"""A task from files of `inputs` and `targets`, without any code.

A `.jsonl` file has one object a line, `{"inputs": "…", "targets": "…"}`; other
keys are ignored. A `.tsv` file has inputs, a tab and targets on each line, and
optionally the header `inputs<TAB>targets`. `text_files` reads the lines; empty
ones are skipped. Files may be of any size: every line is checked once, then
rows are read as they are needed. Gin names the files (`gin/tasks/jsonl.gin`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import functools
import hashlib
import itertools
from typing import Any

from etils import epath
import gin
import numpy as np
import seqio
import tensorflow as tf
import tqdm

from dst_t5x.core import stable_ids
from dst_t5x.core import values
from dst_t5x.core.errors import UserError, nearest
from dst_t5x.data import text_files
from dst_t5x.data import text_scores
from dst_t5x.data import vocabulary

NAME = 'jsonl'
_SHOWN = 5  # Malformed rows that a message describes.
_CHUNK = 256  # Rows in one tensor.
_SHUFFLE_BUFFER = 10_000

Row = tuple[str, str]
Parser = Callable[[str], Row | None]
# (targets, predictions) -> scores
Metric = Callable[[Sequence[str], Sequence[str]], Mapping[str, Any]]

_PARSERS: Mapping[str, Parser] = {
  '.jsonl': text_files.parse_pair,
  '.tsv': text_files.parse_tabs,
}


@dataclasses.dataclass(frozen=True)
class File:
  """A file of rows; the suffix of its name is its format.

  Attributes:
    macro: the macro that names the file, for messages.
    path: the file, which may be in an object store.
  """

  macro: str
  path: str

  @property
  def parser(self) -> Parser:
    """The parser of a line.

    Raises:
      UserError: the suffix is unknown.
    """
    suffix = epath.Path(self.path).suffix
    if suffix not in _PARSERS:
      raise UserError(
        f'{self.macro} {self.path!r} must end in {" or ".join(_PARSERS)}'
      )
    return _PARSERS[suffix]

  def check(self) -> int:
    """Checks every line; returns the number of rows.

    Raises:
      UserError: the file cannot be read, has no row, or has malformed rows,
        whose lines are named.
    """
    parser = self.parser
    try:
      stat = epath.Path(self.path).stat()
    except OSError as error:
      raise UserError(f'cannot read {self.macro}: {error}') from error
    return _count(self, parser, stat.length, stat.mtime)

  def dataset(self) -> tf.data.Dataset:
    """Returns the rows as `inputs` and `targets`, in the file's order."""
    parser = self.parser

    def chunks() -> Iterator[dict[str, np.ndarray]]:
      # TextLineDataset would drop all carriage returns.
      rows = text_files.read(f'{self.macro} {self.path}', self.path, parser)
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


@functools.cache
def _digest(path: str, length: int, mtime: float) -> str:
  """Returns a file's SHA-256, computed again only if the file has changed."""
  del length, mtime
  with epath.Path(path).open('rb') as content:
    return hashlib.file_digest(content, 'sha256').hexdigest()


@functools.cache
def _count(file: File, parser: Parser, length: int, mtime: float) -> int:
  """Checks a file, again only if it has changed; see `File.check`."""
  del mtime
  rows, malformed, shown = 0, 0, []
  bar = tqdm.tqdm(
    desc=file.macro, total=length, unit='B', unit_scale=True, disable=None
  )
  with bar:
    lines = text_files.raw_lines(file.macro, file.path)
    for number, line in enumerate(lines, start=1):
      bar.update(len(line))
      try:
        row = parser(text_files.decode(line))
      except text_files.MalformedRow as error:
        malformed += 1
        if malformed <= _SHOWN:
          shown.append(f'line {number} {error}')
        continue
      if row is None:
        continue
      rows += 1
      if rows == 1 and parser is text_files.parse_tabs:
        text_files.warn_of_title(f'{file.macro} {file.path!r}', row)
  if malformed > _SHOWN:
    shown.append(f'and {malformed - _SHOWN} more')
  if malformed:
    raise UserError(
      f'{file.macro} {file.path!r} has {malformed} malformed'
      f' row{"s" * (malformed > 1)}: {", ".join(shown)}'
    )
  if not rows:
    raise UserError(f'{file.macro} {file.path!r} holds no row')
  return rows


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

  def file(self, split: str) -> File:
    """Returns the file of a split.

    Raises:
      UserError: no file is set.
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
    return File(macro, path)

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


class FileSource(seqio.DataSource):
  """The rows of the files that gin names."""

  def __init__(self) -> None:
    super().__init__(splits=('train', 'validation', 'test'))

  @property
  def supports_arbitrary_sharding(self) -> bool:
    """False: a row cannot be found without reading all lines before it."""
    return False

  def check(self, split: str) -> None:
    """Checks every line of a split's file; see `File.check`."""
    settings().chosen_metrics()
    settings().file(split).check()

  def rows_of(self, split: str) -> dict[str, Any]:
    """Returns the identity of a split's rows; raises as `check`."""
    file = settings().file(split)
    rows, stat = file.check(), epath.Path(file.path).stat()
    digest = _digest(file.path, stat.length, stat.mtime)
    return {'file': file.macro, 'rows': rows, 'sha256': digest}

  def num_input_examples(self, split: str) -> int:
    """Returns the number of rows; raises as `check`."""
    return settings().file(split).check()

  def list_shards(self, split: str) -> Sequence[str]:
    """Returns the file of a split."""
    return [settings().file(split).path]

  def get_dataset(
    self,
    split: str = 'train',
    shuffle: bool = True,
    seed: int | None = None,
    shard_info: seqio.ShardInfo | None = None,
    **unused: Any,
  ) -> tf.data.Dataset:
    """Returns the rows, each once, shuffled within a buffer."""
    del unused
    dataset = settings().file(split).dataset()
    if shard_info is not None:
      dataset = dataset.shard(shard_info.num_shards, shard_info.index)
    return dataset.shuffle(_SHUFFLE_BUFFER, seed) if shuffle else dataset


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
  output_features=vocabulary.output_features(),
  metric_fns=[chosen_metrics],
)
