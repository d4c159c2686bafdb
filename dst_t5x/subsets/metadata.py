"""What may be shown of a subset file's metadata.

They are untrusted JSON. Only short values under the names of
docs/subset_format.md are shown.
"""

from collections.abc import Mapping
import math
from typing import Any

_SHOWN = ('task', 'step', 'epsilon', 'silos', 'distance', 'scores')
_MOST_CHARACTERS = 1000
_MOST_ITEMS = 100
# Integers up to this one are exact in every JSON reader.
_MOST_NUMBER = 2**53


def shown(about: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the metadata of a file that have a known name and a plain value."""
  return {
    key: about[key]
    for key in _SHOWN
    if key in about and _is_plain(about[key], levels=1)
  }


def _is_plain(value: Any, levels: int) -> bool:
  """Returns whether a value is short and simple.

  Args:
    value: a JSON value.
    levels: how deep lists and objects may be nested in it.
  """
  if value is None or isinstance(value, bool):
    return True
  if isinstance(value, str):
    # Excludes lone surrogates and line breaks.
    return len(value) <= _MOST_CHARACTERS and value.isprintable()
  if isinstance(value, (int, float)):
    # Compared first: an int can be too large to convert to float.
    return abs(value) <= _MOST_NUMBER or (
      isinstance(value, float) and math.isfinite(value)
    )
  if not levels or len(value) > _MOST_ITEMS:
    return False
  inner = [*value, *value.values()] if isinstance(value, dict) else value
  return all(_is_plain(item, levels - 1) for item in inner)
