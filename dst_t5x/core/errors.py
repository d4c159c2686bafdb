"""`UserError`, the exception for users' mistakes, and helpers for messages."""

from collections.abc import Iterable, Iterator
import contextlib
import difflib
import os
from typing import Any

# Packages whose exceptions, besides OSError, mean that a store cannot be used.
_CLIENTS = {'aiobotocore', 'aiohttp', 'botocore', 'gcsfs', 'google', 's3fs'}


class UserError(Exception):
  """A user's mistake: one line that names the mistake and the remedy."""


def nearest(name: str, known: Iterable[str]) -> str:
  """Returns `; did you mean 'x'?` for the nearest known name, or ''."""
  matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
  return f'; did you mean {matches[0]!r}?' if matches else ''


def first_line(error: BaseException) -> str:
  """Returns the first line of an error's message, or the name of its class."""
  return (str(error).strip().splitlines() or [type(error).__name__])[0]


def error_of_log(path: os.PathLike[str]) -> str:
  """Returns the last line of a command's log if it is an error, or ''."""
  from etils import epath  # PyTorch's reader of subsets does without.

  try:
    lines = epath.Path(path).read_text().strip().splitlines()
  except (OSError, UnicodeDecodeError):
    return ''
  return lines[-1] if lines and lines[-1].startswith('error: ') else ''


def is_io(error: BaseException) -> bool:
  """Returns whether an error means that a file cannot be read or written."""
  client = type(error).__module__.partition('.')[0]
  return isinstance(error, OSError) or client in _CLIENTS


def check_positive(name: str, value: Any) -> None:
  """Raises UserError unless the value is a positive whole number."""
  if not isinstance(value, int) or isinstance(value, bool) or value < 1:
    raise UserError(f'{name} must be a positive whole number; it is {value!r}')


@contextlib.contextmanager
def writing(what: str) -> Iterator[None]:
  """Turns errors in writing files, such as a full disk, into UserError."""
  try:
    yield
  except Exception as e:
    if not is_io(e):
      raise
    raise UserError(f'cannot write to {what}: {e}') from e
