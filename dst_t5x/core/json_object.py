"""JSON objects from untrusted files, whose entries are read with their type.

A reader gets an entry of the type that it asks for. Otherwise the user gets one
line that names the file, the entry and the type. No library among the base
dependencies validates JSON.
"""

import math
from typing import TYPE_CHECKING, Any, TypeVar, overload

from dst_t5x.core import json_text
from dst_t5x.core.errors import UserError, first_line

if TYPE_CHECKING:
  from etils import epath

T = TypeVar('T')
D = TypeVar('D')

_NEEDED: Any = object()
# Type -> its name in messages. A `bool` is no `int`, but an `int` is a `float`.
_NAMES = {
  bool: 'true or false',
  dict: 'an object',
  float: 'a finite number',
  int: 'a whole number',
  list: 'a list',
  str: 'a text on one line',
}
# The largest size of an axis of an array.
LARGEST = 2**31 - 1
_SHOWN = 60


class JsonObject:
  """A JSON object. An entry that is `null` counts as missing.

  Attributes:
    content: the parsed object.
    where: the file and the place in it, for messages.
  """

  def __init__(self, content: Any, where: str) -> None:
    """Checks that the content is an object.

    Raises:
      UserError: the content is not an object.
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
      key: the name of the entry.
      kind: bool, int, float, str, list or dict. `int` does not accept `2.0`;
        `float` accepts `2`.
      default: the value of a missing entry. Without a default, the entry is
        required.

    Raises:
      UserError: the entry is missing or has another type.
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
    """Returns an entry that is a size: a whole number of at least 1.

    Args:
      key: the name of the entry.
      default: the same as in `get`.
      most: the largest size allowed.

    Raises:
      UserError: the entry is missing or no such number.
    """
    value = self.get(key, int, default)
    if value is not default and not 1 <= value <= most:
      raise self.refusal(key, f'must be from 1 to {most:,}')
    return value

  def inner(self, key: str) -> 'JsonObject':
    """Returns an entry that is an object.

    Raises:
      UserError: the entry is missing or no object.
    """
    return JsonObject(self.get(key, dict), f'{key} in {self.where}')

  def refusal(self, key: str, must: str) -> UserError:
    """Returns the error for an entry: what it must be and what it is."""
    value = shown(self.content.get(key))
    return UserError(f'{self.where}: {key} {must}, it is {value}')


def read(file: 'epath.Path') -> JsonObject:
  """Returns the object that a JSON file holds.

  Raises:
    UserError: the file is missing or damaged, or holds something else.
  """
  # Names of tensors are read without it; see `hugging_face`.
  from dst_t5x.core import object_stores

  try:
    with object_stores.explained(file):
      content = json_text.loads(file.read_bytes())
  except (UserError, ValueError) as e:
    raise UserError(f'cannot read {file}: {first_line(e)}') from e
  return JsonObject(content, str(file))


def parse(text: str, where: str) -> JsonObject:
  """Returns the object in a text.

  Args:
    text: JSON.
    where: the file and the place in it, for messages.

  Raises:
    UserError: the text is no JSON or no object.
  """
  try:
    return JsonObject(json_text.loads(text), where)
  except ValueError as e:
    raise UserError(f'{where} is no JSON: {first_line(e)}') from e


def shown(value: Any) -> str:
  """Returns a value for a message: one line of limited length."""
  text = ascii(value)
  return text if len(text) <= _SHOWN else f'{text[:_SHOWN]}…'


def _is(value: Any, kind: type) -> bool:
  """Returns whether a parsed value has a type of JSON."""
  if isinstance(value, bool):
    return kind is bool
  if kind is float:
    return isinstance(value, int | float) and _is_finite(value)
  if kind is str:  # Lone surrogates are not printable.
    return isinstance(value, str) and value.isprintable()
  return isinstance(value, kind)


def _is_finite(value: float) -> bool:
  try:
    return math.isfinite(value)
  except OverflowError:  # The whole number is larger than any float.
    return False
