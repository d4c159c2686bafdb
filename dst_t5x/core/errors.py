"""The one exception that a user's mistake raises."""

from collections.abc import Iterable, Iterator
import contextlib
import difflib
import os
from typing import Any

from etils import epath

# Where exceptions come from that object stores' clients raise, besides OSError.
_CLIENTS = {'aiobotocore', 'aiohttp', 'botocore', 'gcsfs', 'google', 's3fs'}


class UserError(Exception):
  """A mistake of the user's: one line that names the thing and the remedy."""


def nearest(name: str, known: Iterable[str]) -> str:
  """Returns `; did you mean 'x'?` for the nearest known name, or nothing."""
  matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
  return f'; did you mean {matches[0]!r}?' if matches else ''


def first_line(error: BaseException) -> str:
  """Returns the first line of an error's message, or its class's name."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0]


def error_of_log(path: os.PathLike[str]) -> str:
  """Returns the last line of a command's output, if that is an error."""
  try:
    lines = epath.Path(path).read_text().strip().splitlines()
  except (OSError, UnicodeDecodeError):
    return ''
  return lines[-1] if lines and lines[-1].startswith('error: ') else ''


def is_io(error: BaseException) -> bool:
  """Whether an exception says that a file cannot be read or written."""
  client = type(error).__module__.partition('.')[0]
  return isinstance(error, OSError) or client in _CLIENTS


def check_positive(name: str, value: Any) -> None:
  """Raises UserError unless the value is a positive whole number."""
  if not isinstance(value, int) or isinstance(value, bool) or value < 1:
    raise UserError(f'{name} must be a positive whole number; it is {value!r}')


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
  """Raises UserError where files cannot be written: no space, no permission."""
  try:
    yield
  except Exception as e:
    if not is_io(e):
      raise
    raise UserError(f'cannot write to {what}: {e}') from e
