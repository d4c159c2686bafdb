"""JSON without NaN and infinity, as RFC 8259 requires.

Python's `json` reads and writes `NaN` and `Infinity`, which other programs
refuse.
"""

from collections.abc import Iterator, Mapping
import json
import math
from typing import Any

import numpy as np


def loads(text: str | bytes) -> Any:
  """Returns the parsed text.

  Raises:
    ValueError: the text is no JSON, has a number that is not finite, or is
      nested too deeply.
  """
  try:
    return json.loads(text, parse_constant=_refuse, parse_float=_finite)
  except RecursionError as error:
    raise ValueError('it is nested too deeply') from error


def dumps(value: Any, **options: Any) -> str:
  """Returns the text of a value; numbers that are not finite become `null`.

  Args:
    value: made of the types of JSON, tuples, and NumPy scalars.
    **options: arguments of `json.dumps`.
  """
  return json.dumps(plain(value), allow_nan=False, **options)


def plain(value: Any) -> Any:
  """Returns a value in the types of JSON; None for NaN and the infinities."""
  if isinstance(value, Mapping):
    return {key: plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [plain(item) for item in value]
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def flat(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
  """Yields `data.batch_size` and its value, for each entry of an object.

  Args:
    value: an object, in which entries may be objects or lists of them. What
      holds none is a value: numbers, texts, lists, an empty object.
    path: of the object in another.
  """
  if isinstance(value, list) and any(isinstance(x, Mapping) for x in value):
    value = {str(i): item for i, item in enumerate(value)}
  if isinstance(value, Mapping) and value:
    for key, item in value.items():
      yield from flat(item, (*path, key))
  else:
    yield '.'.join(path), value


def _refuse(constant: str) -> Any:
  raise ValueError(f'{constant} is no number in JSON')


def _finite(digits: str) -> float:
  number = float(digits)
  if not math.isfinite(number):
    raise ValueError(f'{digits[:20]} is too large')
  return number
