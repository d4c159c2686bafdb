"""Which values an annotation allows, and what is said of those it does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import doctest
import math
import typing
from typing import Annotated, Any, Literal, Protocol

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import numpy as np
import pydantic
import pytest

from dst_t5x.core import values
from dst_t5x.core.errors import UserError


def test_examples():
  failed, tried = doctest.testmod(values)
  assert not failed
  assert tried


_PLAIN = [bool, int, float, str, None, Literal['a', 'b', 3]]
_HINTS = st.recursive(
  st.sampled_from(_PLAIN),
  lambda inner: st.one_of(
    inner.map(lambda hint: Sequence[hint]),
    inner.map(lambda hint: Mapping[str, hint]),
    st.tuples(inner, inner).map(lambda hints: typing.Union[hints]),  # noqa: UP007
  ),
  max_leaves=4,
)
_VALUES = st.recursive(
  st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(width=16),
    st.sampled_from(['a', 'b', 'no', '32', '']),
  ),
  lambda inner: st.one_of(
    st.lists(inner, max_size=2),
    st.lists(inner, max_size=2).map(tuple),
    st.dictionaries(st.sampled_from(['a', 'b']), inner, max_size=2),
  ),
  max_leaves=4,
)


@settings(max_examples=500, deadline=None)
@given(hint=_HINTS, value=_VALUES)
def test_what_fits_is_what_pydantic_takes_when_it_is_strict(hint, value):
  judge = pydantic.TypeAdapter(
    hint, config={'strict': True, 'allow_inf_nan': False}
  )
  try:
    judge.validate_python(value)
    expected = True
  except pydantic.ValidationError:
    expected = False
  assert values.fits(value, hint) == expected
  if not expected:
    line = values.mistake('NAME', value, hint)
    assert line.startswith('NAME must be ')
    assert repr(value) in line


@settings(deadline=None)
@given(
  st.floats(-5, 5),
  st.floats(-5, 5),
  st.booleans(),
  st.booleans(),
  st.floats(-5, 5) | st.integers(-5, 5) | st.sampled_from([math.nan, math.inf]),
)
def test_ranges_are_those_of_pydantic(low, high, above, below, number):
  field = pydantic.Field(
    allow_inf_nan=False,
    **{'gt' if above else 'ge': low, 'lt' if below else 'le': high},
  )
  judge = pydantic.TypeAdapter(Annotated[float, field])
  try:
    judge.validate_python(number, strict=True)
    expected = True
  except pydantic.ValidationError:
    expected = False
  hint = Annotated[float, values.Range(low, high, above, below)]
  assert values.fits(number, hint) == expected


@pytest.mark.parametrize(
  ('value', 'hint', 'line'),
  [
    ('no', bool, "True or False; it is 'no': write False"),
    ('on', bool, "True or False; it is 'on': write True"),
    ('False', bool, "True or False; it is 'False': write False"),
    (0, bool, 'True or False; it is 0'),
    (True, int, 'a whole number; it is True'),
    (1.5, int, 'a whole number; it is 1.5'),
    (1e3, int, 'a whole number; it is 1000.0: write 1000'),
    ('32', int, "a whole number; it is '32': write 32"),
    (None, int, 'a whole number; it is None'),
    ('null', int | None, "a whole number or None; it is 'null': write None"),
    (0, values.Positive, 'a positive whole number; it is 0'),
    (-1, values.Count, 'a whole number (0 or more); it is -1'),
    (2**31, values.RandomSeed, 'a whole number in [0, 2147483647]; it is 2'),
    (-0.1, values.BelowOne, 'in [0, 1); it is -0.1'),
    (0.0, values.Share, 'in (0, 1]; it is 0.0'),
    (math.inf, values.NotNegative, 'at least 0 and finite; it is inf'),
    (math.nan, values.AboveZero, 'above 0 and finite; it is nan'),
    (2024, str, "text; it is 2024: write '2024'"),
    ('', values.Path, "a path; it is ''"),
    (' ', values.Path | None, "a path or None; it is ' '"),
    ('bleu', Sequence[str], "a list (each item text); it is 'bleu': write ['b"),
    (
      {'inputs': '32'},
      Mapping[str, values.Positive],
      "a dictionary (each value a positive whole number); it is {'inputs': '32",
    ),
    (
      'cosin',
      Literal['linear', 'cosine'] | None,
      "one of 'linear', 'cosine' or None; it is 'cosin'; did you mean 'cosine'",
    ),
    ('greedy', Callable[..., int], "a function (@module.name); it is 'greedy'"),
  ],
)
def test_what_is_said(value, hint, line):
  assert not values.fits(value, hint)
  assert values.mistake('X', value, hint).startswith(f'X must be {line}')


class Made:
  def __call__(self) -> tuple[int, int]: ...


class Asked(Protocol):
  size: int

  def use(self) -> None: ...


@dataclasses.dataclass
class Answer:
  size: int

  def use(self) -> None: ...


def _reference(result, is_called=True):
  return values.Reference(f'@m.x{"()" * is_called}', result, is_called)


@pytest.mark.parametrize(
  ('reference', 'hint', 'expected'),
  [
    (_reference(Made), Made, True),
    (_reference(Made), Made | None, True),
    (_reference(Made), Answer, False),
    (_reference(Made | None), Made | None, True),
    (_reference(Made | None), Made, True),
    (_reference(Made | None), Answer | None, True),
    (_reference(Made | int), Answer, False),
    (_reference(Made), str, False),
    (_reference(Any), str, True),
    (_reference(int), float, True),
    (_reference(str), values.Path, True),
    (_reference(object), Made, True),
    (_reference(Made), Callable[..., Any], True),
    (_reference(Answer), Callable[..., Any], False),
    (_reference(Answer), Asked, True),
    (_reference(Made), Asked, False),
    (_reference(Made), Literal['a'], True),
    (_reference(Made, is_called=False), Made, False),
    (_reference(Made, is_called=False), type, True),
    (_reference(Made, is_called=False), Callable[..., Made], True),
    # A decoder's class instead of a decoder.
    (_reference(Made, is_called=False), Callable[..., tuple[int, int]], False),
    (_reference(Any, is_called=False), Callable[..., tuple[int, int]], True),
  ],
)
def test_references(reference, hint, expected):
  assert values.fits(reference, hint) == expected
  assert values.fits([reference], Sequence[hint]) == expected


def test_a_reference_that_should_be_called_or_not():
  line = values.mistake('DECODER', _reference(Made, is_called=False), Made)
  assert (
    line
    == 'DECODER must be a Made (@module.name()); it is @m.x: write '
    + ('@m.x()')
  )
  line = values.mistake('KIND', _reference(Made), type[Made])
  assert line.endswith('it is @m.x(): write @m.x')


@pytest.mark.parametrize(
  'hint',
  [
    Any,
    object,
    typing.TypeVar('T'),
    typing.NewType('N', int),
    typing.TypedDict('D', {'a': int}),
    np.dtype('float32'),
  ],
)
@pytest.mark.parametrize('value', [None, True, 3, 'x', [1], {'a': 'b'}])
def test_what_says_nothing_allows_everything(hint, value):
  assert values.fits(value, hint)


def _older(name: str = None, size: int = 3, odd: NoSuchName = 3): ...  # noqa: F821, RUF013


class Older:
  def __init__(self, name: str = None): ...  # noqa: RUF013


def test_hints_of_functions_of_others():
  # One name that is not to be had makes all others text, which says nothing.
  assert [values.hint_of(p) for p in values.parameters(_older).values()] == [
    Any
  ] * 3
  (hint,) = map(values.hint_of, values.parameters(Older).values())
  assert hint == typing.Optional[str]  # noqa: UP045
  assert values.parameters(dict) == {}
  assert values.result_of(len) is Any
  assert values.result_of(Made.__call__) == tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Fields:
  size: values.Positive
  rate: values.BelowOne = 0.0
  names: Sequence[str] = ()

  def __post_init__(self) -> None:
    values.check_fields(self, 'MY_')


def test_fields_of_a_dataclass():
  Fields(np.int64(3), np.float32(0.5), ['a'])
  for arguments, line in (
    ((0,), 'MY_SIZE must be a positive whole number; it is 0'),
    ((3, 1.0), 'MY_RATE must be in [0, 1); it is 1.0'),
    ((3, 0.5, 'abc'), "MY_NAMES must be a list (each item text); it is 'abc'"),
  ):
    with pytest.raises(UserError) as caught:
      Fields(*arguments)
    assert str(caught.value).startswith(line)
