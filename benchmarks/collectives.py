"""What a compiled program sends between devices, read from its text."""

import collections
import math
import re
from typing import NamedTuple

_COLLECTIVE = re.compile(
  r'= (\S.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|'
  r'collective-permute|collective-broadcast)(?:-start)?\('
)
_BITS = re.compile(r'\d+')


class Collective(NamedTuple):
  """One operation of a program.

  Attributes:
    operation: `all-reduce`, say.
    types: of its results, `u32[3,24,4]`, joined by spaces.
    bytes: of its results, on each device.
  """

  operation: str
  types: str
  bytes: int


def of_program(text: str) -> 'collections.Counter[Collective]':
  """Returns the collectives of a program, and how often each stands in it.

  Args:
    text: `compiled.as_text()`. What stands in a loop is there once.
  """
  found: collections.Counter[Collective] = collections.Counter()
  for results, operation in _COLLECTIVE.findall(text):
    arrays = re.findall(r'(\w+)\[([\d,]*)\]', results)
    size = sum(
      math.prod(int(n) for n in shape.split(',') if n) * _itemsize(dtype)
      for dtype, shape in arrays
    )
    types = ' '.join(f'{dtype}[{shape}]' for dtype, shape in arrays)
    found[Collective(operation, types, size)] += 1
  return found


def _itemsize(dtype: str) -> int:
  bits = _BITS.search(dtype)
  return max(int(bits.group()) // 8, 1) if bits else 1  # `pred`
