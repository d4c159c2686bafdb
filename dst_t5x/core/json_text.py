"""JSON as the standard has it: without NaN and infinity, both ways.

Python's parser takes `NaN` and `Infinity`, and its writer makes them; no other
reader knows them.
"""

from collections.abc import Mapping
import json
import math
from typing import Any

import numpy as np


def loads(text: str | bytes) -> Any:
  """Returns what a text says.

  Raises:
    ValueError: it is no JSON, holds a number that is not finite, or is nested
      too deeply.
  """
  try:
    return json.loads(text, parse_constant=_refuse, parse_float=_finite)
  except RecursionError as error:
    raise ValueError('it is nested too deeply') from error


def dumps(value: Any, **options: Any) -> str:
  """Returns the text of a value; what is not finite becomes `null`.

  Args:
    value: of what JSON knows, and NumPy's numbers.
    **options: of `json.dumps`.
  """
  return json.dumps(plain(value), allow_nan=False, **options)


def plain(value: Any) -> Any:
  """Returns a value of what JSON can say: no NaN, infinity, NumPy or tuple."""
  if isinstance(value, Mapping):
    return {key: plain(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [plain(item) for item in value]
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _refuse(constant: str) -> Any:
  raise ValueError(f'{constant} is no number in JSON')


def _finite(digits: str) -> float:
  number = float(digits)
  if not math.isfinite(number):
    raise ValueError(f'{digits[:20]} is too large')
  return number
