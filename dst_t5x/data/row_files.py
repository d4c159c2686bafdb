"""Files of rows that gin names: checked once, then read as they are needed."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import hashlib
from typing import Any

from etils import epath
import tqdm

from dst_t5x.core import object_stores
from dst_t5x.core.errors import UserError
from dst_t5x.data import text_files

_SHOWN = 5  # Malformed rows that a message describes.

# Line -> row; None for a line to skip. It raises MalformedRow.
Parser = Callable[[str], Any]


@dataclasses.dataclass(frozen=True)
class File:
  """A file of rows, one a line.

  Attributes:
    macro: the macro that names the file, for messages.
    path: the file, which may be in an object store.
    parser: the parser of a line.
    with_chat: whether there is a chat template, on which parsers depend.
  """

  macro: str
  path: str
  parser: Parser
  with_chat: bool = False

  def check(self) -> int:
    """Checks every line; returns the number of rows.

    Raises:
      UserError: the file cannot be read, has no row, or has malformed rows,
        whose lines are named.
    """
    return _count(self, self._state())

  def digest(self) -> str:
    """Returns the SHA-256 of the file.

    Raises:
      UserError: the file cannot be read.
    """
    return _digest(self.path, self._state())

  def rows(self) -> Iterator[Any]:
    """Yields the rows in the file's order; raises as `text_files.read`."""
    what = f'{self.macro} {self.path}'
    return text_files.read(what, self.path, self.parser)

  def _state(self) -> object_stores.State:
    try:
      return object_stores.state(self.path)
    except OSError as error:
      raise UserError(f'cannot read {self.macro}: {error}') from error


def parser_of(macro: str, path: str, parsers: Mapping[str, Parser]) -> Parser:
  """Returns the parser of a file's lines.

  Args:
    macro: the macro that names the file, for messages.
    path: the file.
    parsers: suffix -> parser.

  Raises:
    UserError: the suffix is unknown.
  """
  suffix = epath.Path(path).suffix
  if suffix not in parsers:
    raise UserError(f'{macro} {path!r} must end in {" or ".join(parsers)}')
  return parsers[suffix]


@functools.cache
def _digest(path: str, state: object_stores.State) -> str:
  """Returns a file's SHA-256, computed again only if the file has changed."""
  del state
  with epath.Path(path).open('rb') as content:
    return hashlib.file_digest(content, 'sha256').hexdigest()


@functools.cache
def _count(file: File, state: object_stores.State) -> int:
  """Checks a file, again only if it has changed; see `File.check`."""
  rows, malformed, shown = 0, 0, []
  bar = tqdm.tqdm(
    desc=file.macro, total=state.length, unit='B', unit_scale=True, disable=None
  )
  with bar:
    lines = text_files.raw_lines(file.macro, file.path)
    for number, line in enumerate(lines, start=1):
      bar.update(len(line))
      try:
        row = file.parser(text_files.decode(line))
      except text_files.MalformedRow as error:
        malformed += 1
        if malformed <= _SHOWN:
          shown.append(f'line {number} {error}')
        continue
      if row is None:
        continue
      rows += 1
      if rows == 1 and file.parser is text_files.parse_tabs:
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
