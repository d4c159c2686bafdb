"""What devices send each other, read from a compiled program."""

import collections
from collections.abc import Sequence
import math
import re
from typing import NamedTuple

_COLLECTIVE = re.compile(
  r'= (\S.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|'
  r'collective-permute|collective-broadcast)(?:-start)?\('
)
_SHAPE = re.compile(r'(\w+)\[([\d,]*)\]')


class Sent(NamedTuple):
  """One collective operation.

  Attributes:
    operation: `all-reduce`, say.
    types: of its results, `u32` or `f32 s32`.
    size: their number of elements.
  """

  operation: str
  types: str
  size: int


def sent(program: str) -> list[Sent]:
  """Returns the collectives of a program.

  Args:
    program: `jax.jit(…).lower(…).compile().as_text()`.
  """
  found = []
  for types, operation in _COLLECTIVE.findall(program):
    shapes = _SHAPE.findall(types)
    size = sum(
      math.prod(int(n) for n in shape.split(',') if n) for _, shape in shapes
    )
    names = ' '.join(sorted({dtype for dtype, _ in shapes}))
    found.append(Sent(operation, names, size))
  return found


def show(found: Sequence[Sent]) -> str:
  """Returns `2 all-reduce of 24 u32, …`, or `none`."""
  counts = collections.Counter(found)
  return (
    ', '.join(
      f'{count} {one.operation} of {one.size} {one.types}'
      for one, count in counts.items()
    )
    or 'none'
  )
