"""Objects of JSON that others wrote, whose entries are read by type.

Whatever a stranger's file says, a reader gets an entry of the type that it
asked for, or the user one line that names the file, the entry and what it must
be.
"""

import math
from typing import Any, TypeVar, overload

from etils import epath

from dst_t5x.core import json_text
from dst_t5x.core import object_stores
from dst_t5x.core.errors import UserError, first_line

T = TypeVar('T')
D = TypeVar('D')

_NEEDED: Any = object()
# What each type is called. A `bool` is no `int`, an `int` is a `float`.
_NAMES = {
  bool: 'true or false',
  dict: 'an object',
  float: 'a finite number',
  int: 'a whole number',
  list: 'a list',
  str: 'a text on one line',
}
# More than any array of this project can have along an axis.
LARGEST = 2**31 - 1
_SHOWN = 60


class JsonObject:
  """An object; an entry that is `null` counts as missing.

  Attributes:
    content: all of it, as it was parsed.
    where: the file and the place in it, for messages.
  """

  def __init__(self, content: Any, where: str) -> None:
    """Checks that it is an object.

    Raises:
      UserError: it is none.
    """
    if not isinstance(content, dict):
      raise UserError(f'{where} holds no JSON object, but {shown(content)}')
    self.content: dict[str, Any] = content
    self.where = where

  @overload
  def get(self, key: str, kind: type[T]) -> T: ...
  @overload
  def get(self, key: str, kind: type[T], default: D) -> T | D: ...
  def get(self, key: str, kind: Any, default: Any = _NEEDED) -> Any:
    """Returns an entry.

    Args:
      key: its name.
      kind: bool, int, float, str, list or dict; of `int` also what is written
        as `2.0` is refused, of `float` also `2` is taken.
      default: what stands for a missing one; without it, it must be there.

    Raises:
      UserError: it is missing, or of another type.
    """
    value = self.content.get(key)
    if value is None:
      if default is _NEEDED:
        raise UserError(f'{self.where} lacks {key!r}')
      return default
    if not _is(value, kind):
      raise self.refusal(key, f'must be {_NAMES[kind]}')
    return float(value) if kind is float else value

  @overload
  def size(self, key: str, *, most: int = ...) -> int: ...
  @overload
  def size(self, key: str, default: D, *, most: int = ...) -> int | D: ...
  def size(
    self, key: str, default: Any = _NEEDED, *, most: int = LARGEST
  ) -> Any:
    """Returns an entry that says how many: a whole number from 1 on.

    Args:
      key: its name.
      default: as of `get`.
      most: the largest that makes sense.

    Raises:
      UserError: it is missing, or no such number.
    """
    value = self.get(key, int, default)
    if value is not default and not 1 <= value <= most:
      raise self.refusal(key, f'must be from 1 to {most:,}')
    return value

  def inner(self, key: str) -> 'JsonObject':
    """Returns an entry that is an object itself.

    Raises:
      UserError: it is missing, or none.
    """
    return JsonObject(self.get(key, dict), f'{key} in {self.where}')

  def refusal(self, key: str, must: str) -> UserError:
    """Returns the error for an entry: what it must be, and what it is."""
    value = shown(self.content.get(key))
    return UserError(f'{self.where}: {key} {must}, it is {value}')


def read(file: epath.Path) -> JsonObject:
  """Returns the object that a JSON file holds.

  Raises:
    UserError: the file is missing or damaged, or holds something else.
  """
  try:
    with object_stores.explained(file):
      content = json_text.loads(file.read_bytes())
  except (UserError, ValueError) as e:
    raise UserError(f'cannot read {file}: {first_line(e)}') from e
  return JsonObject(content, str(file))


def parse(text: str, where: str) -> JsonObject:
  """Returns the object that a text holds, such as one inside a file.

  Args:
    text: JSON.
    where: the file and the place in it, for messages.

  Raises:
    UserError: it is no JSON, or no object.
  """
  try:
    return JsonObject(json_text.loads(text), where)
  except ValueError as e:
    raise UserError(f'{where} is no JSON: {first_line(e)}') from e


def shown(value: Any) -> str:
  """Returns a value for a message: on one line, and not too long."""
  text = ascii(value)
  return text if len(text) <= _SHOWN else f'{text[:_SHOWN]}…'


def _is(value: Any, kind: type) -> bool:
  """Whether a parsed value is of a type, none of JSON's taken for another."""
  if isinstance(value, bool):
    return kind is bool
  if kind is float:
    return isinstance(value, int | float) and _is_finite(value)
  if kind is str:  # No lone surrogate either, which cannot be printed.
    return isinstance(value, str) and value.isprintable()
  return isinstance(value, kind)


def _is_finite(value: float) -> bool:
  try:
    return math.isfinite(value)
  except OverflowError:  # A whole number beyond any float.
    return False
