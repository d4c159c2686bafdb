"""A task of one's own without code: files of `inputs` and `targets`.

A `.jsonl` file has an object a line, `{"inputs": "…", "targets": "…"}`, whose
other keys are ignored; a `.tsv` file has a line of inputs, tab, targets, and
perhaps the header `inputs<TAB>targets`. Text is UTF-8, empty lines are skipped.
Files may be of any size: rows are read as they are needed, after every line was
looked at once. Gin says which files they are (`gin/tasks/jsonl.gin`).
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
import hashlib
import json
from typing import Any

from etils import epath
import gin
import numpy as np
import seqio
import tensorflow as tf
import tqdm

from dst_t5x import text_scores
from dst_t5x.errors import UserError, nearest
from dst_t5x.tasks import vocabulary

NAME = 'jsonl'
_FEATURES = ('inputs', 'targets')
_SHOWN = 5  # Malformed rows that are told one by one.
_CHUNK = 256  # Lines that are parsed at once.
_SHUFFLE_BUFFER = 10_000

Row = tuple[str, str]


class MalformedRow(ValueError):
  """What is wrong with a row: `is not JSON …`, `has no 'targets'`."""


def parse_json(line: str) -> Row:
  """Returns inputs and targets of a line of a `.jsonl` file."""
  try:
    row = json.loads(line)
  except json.JSONDecodeError as error:
    raise MalformedRow(
      f'is not JSON ({error.msg} at column {error.colno})'
    ) from error
  if not isinstance(row, dict):
    raise MalformedRow('is not an object in braces')
  for name in _FEATURES:
    if name not in row:
      raise MalformedRow(f'has no {name!r}{nearest(name, row)}')
    if not isinstance(row[name], str):
      raise MalformedRow(f'has {name!r} that is not text in quotes')
    try:
      row[name].encode()
    except UnicodeEncodeError as error:
      raise MalformedRow(f'has half a character in {name!r}') from error
  return row['inputs'], row['targets']


def parse_tabs(line: str) -> Row | None:
  """Returns inputs and targets of a line of a `.tsv` file, None of a header."""
  cells = line.split('\t')
  if len(cells) != 2:
    raise MalformedRow(f'has {len(cells) - 1} tabs instead of one')
  return None if tuple(cells) == _FEATURES else (cells[0], cells[1])


_PARSERS: Mapping[str, Callable[[str], Row | None]] = {
  '.jsonl': parse_json,
  '.tsv': parse_tabs,
}


def _parse(line: bytes, parser: Callable[[str], Row | None]) -> Row | None:
  """Returns a row, or None where a line holds none."""
  try:
    text = line.decode('utf-8-sig').rstrip('\r\n')
  except UnicodeDecodeError as error:
    raise MalformedRow('is not UTF-8') from error
  return parser(text) if text.strip() else None


@dataclasses.dataclass(frozen=True)
class File:
  """A file of rows, whose name says what it holds.

  Attributes:
    macro: the name by which gin knows it, for messages.
    path: where it is, perhaps remote.
  """

  macro: str
  path: str

  @property
  def parser(self) -> Callable[[str], Row | None]:
    """What makes a row of a line.

    Raises:
      UserError: the name does not say.
    """
    suffix = epath.Path(self.path).suffix
    if suffix not in _PARSERS:
      raise UserError(
        f'{self.macro} {self.path!r} must end in {" or ".join(_PARSERS)}'
      )
    return _PARSERS[suffix]

  def check(self) -> int:
    """Looks at every line; returns the number of rows.

    Raises:
      UserError: the file cannot be read, holds no row, or malformed ones,
        which are named by line.
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

    def parse(lines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
      rows = [row for line in lines if (row := _parse(line, parser))]
      columns = [[text.encode() for text in texts] for texts in zip(*rows)]  # noqa: B905
      inputs, targets = columns or ([], [])
      return np.array(inputs, object), np.array(targets, object)

    def to_rows(lines: tf.Tensor) -> dict[str, tf.Tensor]:
      columns = tf.numpy_function(parse, [lines], [tf.string, tf.string])
      return {
        name: tf.ensure_shape(column, [None])
        for name, column in zip(_FEATURES, columns, strict=True)
      }

    lines = tf.data.TextLineDataset(self.path)
    return lines.batch(_CHUNK).map(to_rows).unbatch()


@functools.cache
def _digest(path: str, length: int, mtime: float) -> str:
  """Returns a file's SHA-256, computed again only if it has changed."""
  del length, mtime
  with epath.Path(path).open('rb') as content:
    return hashlib.file_digest(content, 'sha256').hexdigest()


@functools.cache
def _count(
  file: File, parser: Callable[[str], Row | None], length: int, mtime: float
) -> int:
  """Checks a file, again only if it has changed; see `File.check`."""
  del mtime
  rows, malformed, shown = 0, 0, []
  bar = tqdm.tqdm(
    desc=file.macro, total=length, unit='B', unit_scale=True, disable=None
  )
  with bar, epath.Path(file.path).open('rb') as lines:
    for number, line in enumerate(lines, start=1):
      bar.update(len(line))
      try:
        rows += _parse(line, parser) is not None
      except MalformedRow as error:
        malformed += 1
        if malformed <= _SHOWN:
          shown.append(f'line {number} {error}')
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
  """What gin says of the task.

  Attributes:
    train_file: rows of the split `train`.
    eval_file: rows of the splits `validation` and `test`.
    metrics: names of `METRICS`.
  """

  train_file: str | None = None
  eval_file: str | None = None
  metrics: Sequence[str] = ('exact_match',)

  def file(self, split: str) -> File:
    """Returns the file of a split.

    Raises:
      UserError: none was named.
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

  def check(self) -> None:
    """Raises UserError if there is no such metric."""
    for name in self.metrics:
      if name not in METRICS:
        raise UserError(
          f'METRICS: there is no {name!r}{nearest(name, METRICS)} (known:'
          f' {sorted(METRICS)})'
        )


@gin.configurable
def settings(
  train_file: str | None = None,
  eval_file: str | None = None,
  metrics: Sequence[str] = ('exact_match',),
) -> Settings:
  """Returns what gin says; see `Settings`."""
  return Settings(train_file, eval_file, metrics)


class FileSource(seqio.DataSource):
  """The rows of whichever files gin names."""

  def __init__(self) -> None:
    super().__init__(splits=('train', 'validation', 'test'))

  @property
  def supports_arbitrary_sharding(self) -> bool:
    """Rows cannot be found without reading all lines before them."""
    return False

  def check(self, split: str) -> None:
    """Looks at every line of a split's file; see `File.check`."""
    settings().check()
    settings().file(split).check()

  def rows_of(self, split: str) -> dict[str, Any]:
    """Returns what tells a split's rows from others; raises as `check`."""
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
    """Returns the rows, each once, shuffled as far as a buffer goes."""
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


def _against_one(name: str, scorer: text_scores.Scorer) -> Callable[..., Any]:
  def score(
    targets: Sequence[str], predictions: Sequence[str]
  ) -> Mapping[str, Any]:
    found = scorer(predictions, [[target] for target in targets])
    signature = seqio.metrics.Text(found.signature)
    return {name: found.value, f'{name}_signature': signature}

  return score


METRICS: Mapping[str, Callable[..., Mapping[str, Any]]] = {
  'exact_match': _exact_match,
  'bleu': _against_one('bleu', text_scores.bleu()),
  'chrf': _against_one('chrf', text_scores.chrf()),
}


def chosen_metrics(
  targets: Sequence[str], predictions: Sequence[str]
) -> Mapping[str, Any]:
  """Returns the metrics that gin names; exact match in per cent of the rows."""
  scores: dict[str, Any] = {}
  for name in settings().metrics:
    scores |= METRICS[name](targets, predictions)
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
