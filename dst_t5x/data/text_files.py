"""Text files: UTF-8, one text or one row a line.

This is the one reader of inputs to decode, predictions to score and rows to
train on. A line ends with a line feed or with a carriage return and a line
feed. Other separators, such as a lone carriage return or Unicode's, are part of
the text. A byte order mark at the beginning of any line is dropped, because
`cat` joins files.

The name of a file tells how it holds rows: `.jsonl` has one object a line,
`.tsv` has inputs, a tab and targets. Lines without text are no rows.
"""

import codecs
from collections.abc import Callable, Iterator, Mapping, Sequence
import json
import os
import re
from typing import Any, TypeVar

from absl import logging
from etils import epath

from dst_t5x.core import object_stores
from dst_t5x.core.errors import UserError, first_line, nearest

T = TypeVar('T')

HEADER = ('inputs', 'targets')
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
# Usual titles of columns of pairs. A text of a row is hardly ever one of them.
_TITLE = re.compile(
  '(answer|input|label|output|prompt|question|reference|response|source|target'
  '|text)s?|completion|document|hypothesis|instruction|src|summary|tgt'
  '|translation'
)
# Files of rows in other formats, which must not be read as texts.
_OTHER_ROWS = ('.csv', '.json', '.jsonlines', '.ndjson')


class MalformedRow(ValueError):
  """A malformed line. The message continues a sentence: `has no 'targets'`."""


def decode(line: bytes) -> str:
  """Returns the text of a line without the line end.

  Raises:
    MalformedRow: the line is not UTF-8.
  """
  if line.endswith(b'\n'):
    line = line[:-1].removesuffix(b'\r')
  try:
    return line.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    utf_16 = ' but UTF-16: convert the file' * line.startswith(_UTF_16)
    raise MalformedRow(f'is not UTF-8{utf_16}') from error


def raw_lines(what: str, path: str | os.PathLike[str]) -> Iterator[bytes]:
  """Yields the lines of a file with their line ends; arguments as in `read`.

  Raises:
    UserError: the file cannot be read.
  """
  object_stores.check(path)
  with (
    object_stores.explained(path, f'cannot read {what}: '),
    epath.Path(path).open('rb') as lines,
  ):
    yield from lines


def read(
  what: str, path: str | os.PathLike[str], parse: Callable[[str], T | None]
) -> Iterator[T]:
  """Yields the parsed lines of a file.

  Args:
    what: the file's name in messages, such as `INPUT_FILE x.txt`.
    path: the file, which may be in an object store.
    parse: parses a line; returns None for a line to skip.

  Raises:
    UserError: the file cannot be read, or a line is malformed.
  """
  for number, line in enumerate(raw_lines(what, path), start=1):
    try:
      row = parse(decode(line))
    except MalformedRow as error:
      raise UserError(f'{what}:{number} {error}') from error
    if row is not None:
      yield row


def read_texts(what: str, path: str | os.PathLike[str]) -> Iterator[str]:
  """Yields the texts of a file, one a line; arguments and errors as in `read`.

  Empty lines are empty texts.

  Raises:
    UserError: the file's name is that of a file of rows.
  """
  suffix = epath.Path(path).suffix.lower()
  if suffix in _OTHER_ROWS:
    raise UserError(
      f'{what} is named {suffix}: make it .txt with a text a line, or .jsonl'
      ' with an object a line'
    )
  yield from read(what, path, str)


def parse_object(line: str) -> dict[str, Any] | None:
  """Returns the object of a line of a `.jsonl` file; None for an empty line.

  Raises:
    MalformedRow: the line is not one object, or has a key twice.
  """
  if not line.strip():
    return None
  try:
    row = json.loads(line, object_pairs_hook=_without_duplicates)
  except json.JSONDecodeError as error:
    reason = f'{error.msg} at column {error.colno}'
    raise MalformedRow(f'is not JSON ({reason})') from error
  except RecursionError as error:
    raise MalformedRow('nests too deeply') from error
  except MalformedRow:
    raise
  except ValueError as error:  # A number has more digits than Python reads.
    raise MalformedRow(f'cannot be read ({first_line(error)})') from error
  if not isinstance(row, dict):
    raise MalformedRow('is not an object in braces')
  return row


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
  row = dict(pairs)
  if len(row) < len(pairs):
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    raise MalformedRow(f'has {twice!r} more than once')
  return row


def text_of(row: Mapping[str, Any], name: str) -> str:
  """Returns a text of a row.

  Raises:
    MalformedRow: the entry is missing or no text.
  """
  if name not in row:
    raise MalformedRow(f'has no {name!r}{nearest(name, row)}')
  return _check_text(row[name], name)


def texts_of(row: Mapping[str, Any], name: str) -> list[str]:
  """Returns a list of texts of a row; a single text is a list of one.

  Raises:
    MalformedRow: the entry is missing, or neither a text nor a list of texts.
  """
  if name not in row or isinstance(row[name], str):
    return [text_of(row, name)]
  if not isinstance(row[name], list) or not row[name]:
    raise MalformedRow(f'has {name!r} that is neither text nor a list of texts')
  return [_check_text(text, name) for text in row[name]]


def _check_text(text: Any, name: str) -> str:
  if not isinstance(text, str):
    raise MalformedRow(f'has {name!r} that is not text in quotes')
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise MalformedRow(f'has half a character in {name!r}') from error
  return text


def pair_of(row: Mapping[str, Any]) -> tuple[str, str]:
  """Returns the inputs and targets of a row.

  Raises:
    MalformedRow: one is missing or no text.
  """
  return text_of(row, HEADER[0]), text_of(row, HEADER[1])


def parse_tabs(line: str) -> tuple[str, str] | None:
  """Returns the inputs and targets of a line of a `.tsv` file.

  Returns None for an empty line and for the header.

  Raises:
    MalformedRow: the line does not have exactly one tab.
  """
  if not line.strip():
    return None
  cells = line.split('\t')
  if len(cells) != 2:
    raise MalformedRow(f'has {len(cells) - 1} tabs instead of one')
  return None if tuple(cells) == HEADER else (cells[0], cells[1])


def warn_of_title(what: str, pair: tuple[str, str]) -> None:
  """Warns if the first row of a file looks like a header with other names."""
  if all(_TITLE.fullmatch(cell.strip(' "').lower()) for cell in pair):
    logging.warning(
      '%s begins with the row %r: if it is a header, make it inputs, a tab,'
      ' targets, or leave it out',
      *(what, '\t'.join(pair)),
    )
