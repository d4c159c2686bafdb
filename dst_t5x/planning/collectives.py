"""The collective operations of a compiled program."""

import collections
from collections.abc import Sequence
import math
import re
from typing import NamedTuple

_COLLECTIVE = re.compile(
  r'= (\S.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|'
  r'collective-permute|collective-broadcast)(?:-start)?\('
)
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\]')
_BITS = re.compile(r'\d+')


class Collective(NamedTuple):
  """One collective operation.

  Attributes:
    operation: for example `all-reduce`.
    types: types of the results, such as `u32[3,24,4]`, joined by spaces.
    bytes: size of the results on each device.
  """

  operation: str
  types: str
  bytes: int


def find_all(program: str) -> list[Collective]:
  """Returns the collectives of a program; those in a loop appear once.

  Args:
    program: `jax.jit(…).lower(…).compile().as_text()`.
  """
  operations = []
  for results, operation in _COLLECTIVE.findall(program):
    arrays = _ARRAY.findall(results)
    size = sum(
      math.prod(int(n) for n in shape.split(',') if n) * _itemsize(dtype)
      for dtype, shape in arrays
    )
    types = ' '.join(f'{dtype}[{shape}]' for dtype, shape in arrays)
    operations.append(Collective(operation, types, size))
  return operations


def _itemsize(dtype: str) -> int:
  bits = _BITS.search(dtype)
  return max(int(bits.group()) // 8, 1) if bits else 1  # `pred`


def describe(operations: Sequence[Collective]) -> str:
  """Returns `2 all-reduce of u32[3,24], …`, or `none`."""
  counts = collections.Counter(operations)
  return (
    ', '.join(
      f'{count} {one.operation} of {one.types}' for one, count in counts.items()
    )
    or 'none'
  )
