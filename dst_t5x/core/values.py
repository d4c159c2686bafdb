"""Checks values against annotations.

`config/check.py` checks everything that gin binds before anything is called. A
class checks what Python code passes to it with `check_fields`. Ranges are part
of the annotation:

>>> describe(Positive | None)
'a positive whole number or None'
>>> fits(3, Positive), fits(0, Positive), fits(True, Positive), fits('3', int)
(True, False, False, False)

No library does this: typeguard and beartype accept True as a number and a text
as a list of texts, pydantic also checks the fields of other libraries' classes,
and none knows gin's references.
"""

import ast
from collections.abc import Callable, Hashable, Iterator, Mapping
import contextlib
import dataclasses
import functools
import inspect
import math
import numbers
import types
import typing
from typing import Annotated, Any

from dst_t5x.core.errors import UserError, nearest

# Constants of other languages -> the constants of gin and Python.
WORDS = {
  **dict.fromkeys(('true', 'yes', 'on'), True),
  **dict.fromkeys(('false', 'no', 'off'), False),
  **dict.fromkeys(('none', 'null'), None),
}


@dataclasses.dataclass(frozen=True)
class Range:
  """A range of numbers in an annotation: `Annotated[float, Range(0, 1)]`.

  Attributes:
    low: the lower bound.
    high: the upper bound.
    above: whether `low` itself is excluded.
    below: whether `high` itself is excluded.
  """

  low: float
  high: float = math.inf
  above: bool = False
  below: bool = False

  def allows(self, value: Any) -> bool:
    """Returns whether a number is in the range."""
    is_high_enough = value > self.low if self.above else value >= self.low
    is_low_enough = value < self.high if self.below else value <= self.high
    return bool(is_high_enough and is_low_enough)

  def describe(self, kind: Any) -> str:
    """Returns the range in words, for int or float."""
    low, high = f'{self.low:.15g}', f'{self.high:.15g}'
    left, right = '(' if self.above else '[', ')' if self.below else ']'
    if math.isfinite(self.high):
      text = f'in {left}{low}, {high}{right}'
      return text if kind is float else f'a whole number {text}'
    if kind is float:
      return f'{"above" if self.above else "at least"} {low} and finite'
    is_positive = self.low == 1
    return f'a {"positive " * is_positive}whole number' + (
      '' if is_positive else f' ({low} or more)'
    )


@dataclasses.dataclass(frozen=True)
class FilePath:
  """Marks a text in an annotation as the path of a file or folder."""

  def allows(self, value: Any) -> bool:
    """Returns whether a path is not empty; '' is the working directory."""
    return bool(value.strip())

  def describe(self, kind: Any) -> str:
    """Returns `a path`."""
    del kind
    return 'a path'


Positive = Annotated[int, Range(1)]
Count = Annotated[int, Range(0)]
# The random seeds that JAX, NumPy and TensorFlow all accept.
RandomSeed = Annotated[int, Range(0, 2**31 - 1)]
Share = Annotated[float, Range(0, 1, above=True)]
BelowOne = Annotated[float, Range(0, 1, below=True)]
NotNegative = Annotated[float, Range(0)]
AboveZero = Annotated[float, Range(0, above=True)]
Path = Annotated[str, FilePath()]


@dataclasses.dataclass(frozen=True)
class Reference:
  """A reference of gin, `@module.Class` or `@module.Class()`.

  Attributes:
    text: the reference as gin writes it.
    result: annotation of the result of a call.
    is_called: whether gin calls it, because it ends in `()`.
  """

  text: str
  result: Any
  is_called: bool

  def __repr__(self) -> str:
    return self.text


def fits(value: Any, hint: Any) -> bool:
  """Returns whether a value fits an annotation.

  True is not a number here, and neither are NaN and the infinities.

  Args:
    value: the value, or a Reference.
    hint: the annotation. An annotation that is not understood, such as a type
      variable, allows everything.
  """
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  kind = types.NoneType if hint is None else origin or hint
  if kind is Annotated:
    plain, *marks = arguments
    return fits(value, plain) and (
      isinstance(value, Reference) or all(m.allows(value) for m in _ours(marks))
    )
  if kind in (typing.Union, types.UnionType):
    return any(fits(value, argument) for argument in arguments)
  if isinstance(value, Reference):
    return _may_be(value, kind, arguments)
  if kind is typing.Literal:
    return any(type(value) is type(a) and value == a for a in arguments)
  if not _is_known(kind):
    return True
  if _is_protocol(kind):
    return _has_members(type(value), kind)
  if isinstance(value, bool | str):
    own = bool if isinstance(value, bool) else str
    return kind in (own, object, Hashable)
  if kind in (int, float):
    number = numbers.Integral if kind is int else numbers.Real
    return isinstance(value, number) and math.isfinite(value)
  if isinstance(value, list | tuple | dict):
    return _holds(value, kind, arguments)
  return isinstance(value, kind)


def _ours(marks: list[Any]) -> list[Any]:
  """Returns the marks of an annotation that this module defines."""
  return [mark for mark in marks if isinstance(mark, Range | FilePath)]


def _is_known(kind: Any) -> bool:
  """Returns whether `isinstance` works for a type."""
  is_class = isinstance(kind, type) and kind is not Any
  return is_class and not typing.is_typeddict(kind)


def _is_protocol(kind: Any) -> bool:
  return getattr(kind, '_is_protocol', False)


def _has_members(kind: Any, protocol: Any) -> bool:
  """Returns whether a class has members of the names that a protocol lists."""

  def names(cls: type) -> set[str]:
    return {*vars(cls), *inspect.get_annotations(cls)}

  wanted = {
    name
    for cls in filter(_is_protocol, protocol.__mro__)
    for name in names(cls)
    if name == '__call__' or not name.startswith('_')
  }
  return wanted <= set().union(*map(names, kind.__mro__))


def _holds(value: Any, kind: Any, arguments: tuple[Any, ...]) -> bool:
  """Returns whether a list, tuple or dictionary and its items fit."""
  if isinstance(value, dict):
    return issubclass(dict, kind) and all(
      fits(part, hint)
      for item in value.items()
      for part, hint in zip(item, arguments, strict=False)
    )
  if kind is tuple and arguments and arguments[-1] is not Ellipsis:
    is_as_long = len(value) == len(arguments)
    return is_as_long and all(map(fits, value, arguments))
  # Gin files use lists and tuples alike.
  if not (issubclass(list, kind) or issubclass(tuple, kind)):
    return False
  return not arguments or all(fits(item, arguments[0]) for item in value)


def _may_be(
  reference: Reference, kind: Any, arguments: tuple[Any, ...]
) -> bool:
  """Returns whether a reference may become an instance of a type."""
  if not _is_known(kind):
    return True
  if not reference.is_called:
    if kind is Callable:
      called = dataclasses.replace(reference, is_called=True)
      return not arguments or fits(called, arguments[-1])
    return kind in (type, object) or (
      _is_protocol(kind) and '__call__' in vars(kind)
    )
  result = typing.get_origin(reference.result) or reference.result
  if result in (typing.Union, types.UnionType):
    return any(
      _may_be(dataclasses.replace(reference, result=part), kind, arguments)
      for part in typing.get_args(reference.result)
    )
  if not _is_known(result):
    return True
  if _is_protocol(kind):
    return _has_members(result, kind)
  if kind is float and result is int:
    return True
  return issubclass(result, kind) or issubclass(kind, result)


def describe(hint: Any) -> str:
  """Returns the values that an annotation allows, in words."""
  origin, arguments = typing.get_origin(hint), typing.get_args(hint)
  kind = origin or hint
  if kind is Annotated:
    plain, *marks = arguments
    return next((m.describe(plain) for m in _ours(marks)), describe(plain))
  if kind in (typing.Union, types.UnionType):
    texts = list(dict.fromkeys(map(describe, arguments)))
    # Gin files can write a dtype by name, so the object need not be named.
    literals = [text for text in texts if not text.endswith(_MADE)]
    return ' or '.join(texts if literals in ([], ['None']) else literals)
  if kind is typing.Literal:
    return f'one of {", ".join(map(repr, arguments))}'
  if kind is tuple and arguments and arguments[-1] is not Ellipsis:
    return f'({", ".join(map(describe, arguments))})'
  for known, text in _KINDS.items():
    if kind is known:
      return text
  if kind is Callable:
    return 'a function (@module.name)'
  if _is_known(kind) and not _is_protocol(kind):
    if issubclass(dict, kind) and len(arguments) == 2:
      return f'a dictionary (each value {describe(arguments[1])})'
    if issubclass(list, kind) or kind is tuple:
      item = f' (each item {describe(arguments[0])})' if arguments else ''
      return f'a list{item}'
  return f'a {getattr(kind, "__name__", kind)}{_MADE}'


_MADE = ' (@module.name())'
_KINDS = {
  Any: 'anything',
  bool: 'True or False',
  int: 'a whole number',
  float: 'a finite number',
  str: 'text',
  None: 'None',
  types.NoneType: 'None',
}


def is_path(hint: Any) -> bool:
  """Returns whether an annotation includes a path."""
  return any(
    isinstance(part, FilePath) or is_path(part) for part in _parts(hint)
  )


def _parts(hint: Any) -> tuple[Any, ...]:
  """Returns the arguments and the marks of an annotation."""
  marks = getattr(hint, '__metadata__', ())
  return (*typing.get_args(hint), *marks)


def mistake(name: str, value: Any, hint: Any) -> str:
  """Returns one line: what a parameter must be, what it is, and the remedy.

  Args:
    name: the user's name of the parameter.
    value: the value, which does not fit.
    hint: the annotation.
  """
  line = f'{name} must be {describe(hint)}; it is {value!r}'
  for meant in _alternatives(value):
    if fits(meant, hint):
      return f'{line}: write {meant!r}'
  return line + (nearest(value, _options(hint)) if value is str(value) else '')


def _alternatives(value: Any) -> Iterator[Any]:
  """Yields values that the user may have meant."""
  if isinstance(value, Reference):
    call = value.text.removesuffix('()') + '()' * (not value.is_called)
    yield dataclasses.replace(value, text=call, is_called=not value.is_called)
  elif isinstance(value, str):
    if value.lower() in WORDS:
      yield WORDS[value.lower()]
    with contextlib.suppress(ValueError, SyntaxError):
      yield ast.literal_eval(value)
    if value:
      yield [value]
  elif isinstance(value, float) and value.is_integer():
    yield int(value)
  elif isinstance(value, int) and not isinstance(value, bool):
    yield str(value)


def _options(hint: Any) -> list[str]:
  """Returns the texts of the Literals in an annotation."""
  if typing.get_origin(hint) is typing.Literal:
    return [a for a in typing.get_args(hint) if isinstance(a, str)]
  return [o for a in typing.get_args(hint) for o in _options(a)]


def _signature(function: Any) -> inspect.Signature:
  """Returns a signature; evaluates annotations that are text if possible."""
  # A wrapper may pass arguments of its own to the wrapped function.
  signature = functools.partial(
    inspect.signature, function, follow_wrapped=False
  )
  try:
    return signature(eval_str=True)
  except Exception:  # Evaluating a text can raise anything.
    return signature()


def parameters(function: Any) -> dict[str, inspect.Parameter]:
  """Returns the parameters of a function or class; {} if they are unknown."""
  try:
    return dict(_signature(function).parameters)
  except (TypeError, ValueError):
    return {}


def result_of(function: Any) -> Any:
  """Returns the annotation of the result of a call; Any if there is none."""
  if isinstance(function, type):
    return function
  try:
    result = _signature(function).return_annotation
  except (TypeError, ValueError):
    return Any
  is_unknown = result is inspect.Signature.empty or isinstance(result, str)
  return Any if is_unknown else result


def hint_of(parameter: inspect.Parameter) -> Any:
  """Returns the annotation of a parameter; Any if there is none."""
  hint = parameter.annotation
  if hint is inspect.Parameter.empty or isinstance(hint, str):
    return Any
  # Older code writes `name: str = None`.
  if parameter.default is None and not fits(None, hint):
    return typing.Optional[hint]  # noqa: UP045
  return hint


def check_fields(instance: Any, prefix: str = '') -> None:
  """Checks the fields of a dataclass against their annotations.

  Args:
    instance: the dataclass.
    prefix: the prefix of the macros that stand for the fields.

  Raises:
    UserError: a field does not fit; the first one is named.
  """
  check(
    {
      f'{prefix}{name.upper()}': (getattr(instance, name), hint_of(parameter))
      for name, parameter in parameters(type(instance)).items()
    }
  )


def check(named: Mapping[str, tuple[Any, Any]]) -> None:
  """Checks values against annotations.

  Args:
    named: name -> (value, annotation).

  Raises:
    UserError: a value does not fit; the first one is named.
  """
  for name, (value, hint) in named.items():
    if not fits(value, hint):
      raise UserError(mistake(name, value, hint))
