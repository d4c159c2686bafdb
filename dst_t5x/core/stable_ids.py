"""What classes and functions are called in files that outlive the code.

`run.json` names a network, an optimizer or a method. The name must stay when a
module moves, so it never has a module's path: it is the one that the class or
function declares, else its own in snake case.

>>> class ShiftProjection:
...   pass
>>> stable_id(ShiftProjection)
'shift_projection'
>>> @called('shift')
... class Renamed:
...   pass
>>> stable_id(Renamed)
'shift'
"""

from collections.abc import Callable
import re
from typing import Any, TypeVar

T = TypeVar('T')

_ATTRIBUTE = '__stable_id__'
_WORDS = re.compile(r'(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])')


def called(name: str) -> Callable[[T], T]:
  """Returns a decorator that declares the id of a class or function."""

  def declare(function: T) -> T:
    setattr(function, _ATTRIBUTE, name)
    return function

  return declare


def stable_id(function: Any) -> str:
  """Returns the id of a class or function; a subclass has one of its own."""
  declared = getattr(function, '__dict__', {}).get(_ATTRIBUTE)
  named = function if hasattr(function, '__name__') else type(function)
  return declared or _WORDS.sub('_', named.__name__).lower()
