"""What there is to say of a subset, to anyone.

The metadata of a file are a stranger's: any JSON. Only facts of the kind that
docs/subset_format.md describes are shown: they fit into every answer.
"""

from collections.abc import Mapping
import math
from typing import Any, NamedTuple

_SHOWN = ('task', 'step', 'epsilon', 'silos', 'distance', 'scores')
_MOST_CHARACTERS = 1000
_MOST_ITEMS = 100
# What every reader of JSON takes for the same number.
_MOST_NUMBER = 2**53


class Facts(NamedTuple):
  """What a server keeps of a subset, whether or not it is in memory.

  Attributes:
    digest: the SHA-256 of its file, which tells it from all others.
    size: the number of its entries.
    file_bytes: the file's size.
    about: what the file says of the training.
  """

  digest: str
  size: int
  file_bytes: int
  about: dict[str, Any]


def shown(about: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the metadata of a file that are as they should be."""
  return {
    key: about[key]
    for key in _SHOWN
    if key in about and _is_plain(about[key], levels=1)
  }


def _is_plain(value: Any, levels: int) -> bool:
  """Returns whether a value is short and simple.

  Args:
    value: any JSON.
    levels: of lists and objects that it may have.
  """
  if value is None or isinstance(value, bool):
    return True
  if isinstance(value, str):
    # Neither half a character (a lone surrogate) nor a line's end.
    return len(value) <= _MOST_CHARACTERS and value.isprintable()
  if isinstance(value, (int, float)):
    # An int may be too large for a float, so it is compared first.
    return abs(value) <= _MOST_NUMBER or (
      isinstance(value, float) and math.isfinite(value)
    )
  if not levels or len(value) > _MOST_ITEMS:
    return False
  inner = [*value, *value.values()] if isinstance(value, dict) else value
  return all(_is_plain(item, levels - 1) for item in inner)
