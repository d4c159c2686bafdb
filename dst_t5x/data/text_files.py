"""Text files as people write them: UTF-8, a text or a row a line.

One reader for inputs to decode, predictions to score and rows to train on. A
line ends with a line feed, before which a carriage return may stand; any other
character stays in it, such as a lone carriage return or Unicode's separators.
A byte order mark is no text, wherever a line begins with it: `cat` joins files.

Two kinds of file hold rows, by their names: `.jsonl` an object a line, `.tsv`
inputs, a tab and targets. Lines without text are no rows.
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
# What columns of pairs are usually called; no text of either is just that.
_TITLE = re.compile(
  '(answer|input|label|output|prompt|question|reference|response|source|target'
  '|text)s?|completion|document|hypothesis|instruction|src|summary|tgt'
  '|translation'
)
# Files of rows that would be read as texts, braces, commas and all.
_OTHER_ROWS = ('.csv', '.json', '.jsonlines', '.ndjson')


class MalformedRow(ValueError):
  """What is wrong with a line: `is not JSON …`, `has no 'targets'`."""


def decode(line: bytes) -> str:
  """Returns the text of a line, without its end.

  Raises:
    MalformedRow: it is not UTF-8.
  """
  if line.endswith(b'\n'):
    line = line[:-1].removesuffix(b'\r')
  try:
    return line.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    utf_16 = ' but UTF-16: convert the file' * line.startswith(_UTF_16)
    raise MalformedRow(f'is not UTF-8{utf_16}') from error


def raw_lines(what: str, path: str | os.PathLike[str]) -> Iterator[bytes]:
  """Reads the lines of a file with their ends; arguments as `read`.

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
  """Reads a file line by line.

  Args:
    what: the file's name in messages, such as `INPUT_FILE x.txt`.
    path: where it is, perhaps remote.
    parse: makes what is returned of a line; None of one that is left out.

  Raises:
    UserError: the file cannot be read, or a line is malformed.
  """
  for number, line in enumerate(raw_lines(what, path), start=1):
    try:
      found = parse(decode(line))
    except MalformedRow as error:
      raise UserError(f'{what}:{number} {error}') from error
    if found is not None:
      yield found


def read_texts(what: str, path: str | os.PathLike[str]) -> Iterator[str]:
  """Reads a text a line, empty ones too; arguments and errors as `read`.

  Raises:
    UserError: the file is named as one of rows.
  """
  suffix = epath.Path(path).suffix.lower()
  if suffix in _OTHER_ROWS:
    raise UserError(
      f'{what} is named {suffix}: make it .txt with a text a line, or .jsonl'
      ' with an object a line'
    )
  yield from read(what, path, str)


def parse_object(line: str) -> dict[str, Any] | None:
  """Returns the object of a line of a `.jsonl` file, None of an empty line.

  Raises:
    MalformedRow: it is not one object, or has a key twice.
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
  except ValueError as error:  # A number of more digits than Python reads.
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
    MalformedRow: there is none of this name, or it is no text.
  """
  if name not in row:
    raise MalformedRow(f'has no {name!r}{nearest(name, row)}')
  return _check_text(row[name], name)


def texts_of(row: Mapping[str, Any], name: str) -> list[str]:
  """Returns the texts of a row: a list of them, or the only one.

  Raises:
    MalformedRow: there is none of this name, or it is neither.
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


def parse_pair(line: str) -> tuple[str, str] | None:
  """Returns inputs and targets of a line of a `.jsonl` file.

  Raises:
    MalformedRow: it is no object with the two texts.
  """
  row = parse_object(line)
  if row is None:
    return None
  return text_of(row, HEADER[0]), text_of(row, HEADER[1])


def parse_tabs(line: str) -> tuple[str, str] | None:
  """Returns inputs and targets of a line of a `.tsv` file, None of a header.

  Raises:
    MalformedRow: it has not one tab.
  """
  if not line.strip():
    return None
  cells = line.split('\t')
  if len(cells) != 2:
    raise MalformedRow(f'has {len(cells) - 1} tabs instead of one')
  return None if tuple(cells) == HEADER else (cells[0], cells[1])


def warn_of_title(what: str, pair: tuple[str, str]) -> None:
  """Warns if a file's first row looks like a header of other names."""
  if all(_TITLE.fullmatch(cell.strip(' "').lower()) for cell in pair):
    logging.warning(
      '%s begins with the row %r: if it is a header, make it inputs, a tab,'
      ' targets, or leave it out',
      *(what, '\t'.join(pair)),
    )
