"""The collective operations of a compiled program, and what they send."""

import collections
from collections.abc import Sequence
import math
import re
from typing import NamedTuple

from dst_t5x.planning import hlo

_OPERATIONS = (
  *('all-reduce', 'all-gather', 'all-to-all', 'reduce-scatter'),
  *('collective-permute', 'collective-broadcast'),
)
_LISTED = re.compile(r'replica_groups=\{\{([\d,]+)\}')
_IOTA = re.compile(r'replica_groups=\[\d+,(\d+)\]')
_MESH = re.compile(r'replica_groups=mesh\[(.*?)\].*?\{([^}]*)\}')
_AXIS = re.compile(r"'(\w+)'=(\d+)")
_OP_NAME = re.compile(r'op_name="([^"]*)"')
# XLA:CPU sums bfloat16 in float32, and names the sum so.
_PROMOTED = re.compile(r'to_apply=%[\w.-]*promoted')


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


class Sent(NamedTuple):
  """What a collective operation sends.

  Attributes:
    operation: for example `all-reduce`.
    op_name: XLA's name of the operations that it serves.
    bytes: what a device sends, all rounds of loops together.
    bytes_as_is: the same without what accelerators' compilers improve; see
      `sent`.
  """

  operation: str
  op_name: str
  bytes: float
  bytes_as_is: float


def find_all(program: str) -> list[Collective]:
  """Returns the collectives of a program; those in a loop appear once.

  Args:
    program: `jax.jit(…).lower(…).compile().as_text()`.
  """
  return [
    Collective(
      operation,
      ' '.join(map(str, one.results)),
      sum(array.bytes for array in one.results),
    )
    for instructions in hlo.parse(program).computations.values()
    for one in instructions.values()
    if (operation := one.operation.removesuffix('-start')) in _OPERATIONS
  ]


def sent(text: str) -> list[Sent]:
  """Returns what the collectives of a program send, by the usual algorithms.

  A device sends (n − 1) / n of an array in an all-gather, an all-to-all or a
  reduce-scatter among n devices, and twice as much in an all-reduce: both ways
  around a ring. bfloat16 counts as such, though a program for CPUs sends
  float32. `Sent.bytes` is what XLA's compiler for GPUs makes of two things that
  its compiler for CPUs leaves: a sum of which each device needs a slice only is
  scattered (`ReduceScatterCreator`), and sums that are then added up are one
  sum (`AllReduceReassociate`).

  Args:
    text: `jax.jit(…).lower(…).compile().as_text()`.
  """
  program = hlo.parse(text)
  found: list[Sent] = []
  for computation, times in program.runs.items():
    known: set[tuple[str, ...]] = set()
    for one in program.computations[computation].values():
      operation = one.operation.removesuffix('-start')
      if operation not in _OPERATIONS:
        continue
      name = _OP_NAME.search(one.attributes)
      place = hlo.Place(computation, one)
      for i in range(len(one.results)):
        narrow = _narrow(program, computation, one, i).bytes
        plain = _sent(operation, narrow, _devices(one))
        as_made, size = _as_accelerators(program, place, i, known)
        found.append(
          Sent(as_made, name[1] if name else '', times * size, times * plain)
        )
  return found


def _as_accelerators(
  program: hlo.Program,
  place: hlo.Place,
  i: int,
  known: set[tuple[str, ...]],
) -> tuple[str, float]:
  """Returns a collective as accelerators have it, and the bytes sent.

  Args:
    program: the program.
    place: a collective.
    i: which of its results.
    known: sums that the program adds up, of those before this one; this one is
      added.
  """
  one = place.instruction
  operation = one.operation.removesuffix('-start')
  devices = _devices(one)
  size = _narrow(program, place.computation, one, i).bytes
  if operation != 'all-reduce':
    return operation, _sent(operation, size, devices)
  total = _added_to(program, place, i)
  if total:
    key = total, str(one.results[i].bytes), str(devices)
    if key in known:
      return operation, 0.0
    known.add(key)
  slices = _slices(program, place, i)
  if slices == 1:
    return operation, _sent(operation, size, devices)
  # Of what is left, the sum among the devices that need the same slice.
  among = max(devices // slices, 1)
  rest = _sent(operation, size / slices, among)
  scattered = 'reduce-scatter'
  return scattered, _sent(scattered, size, slices) + rest


def _sent(operation: str, size: float, devices: int) -> float:
  """Returns the bytes that a device sends.

  Args:
    operation: a collective.
    size: bytes of its largest array, operand or result, on a device.
    devices: the number of devices of a group.
  """
  if operation in ('collective-permute', 'collective-broadcast'):
    return size
  return size * (devices - 1) / devices * (1 + (operation == 'all-reduce'))


def _devices(one: hlo.Instruction) -> int:
  """Returns the number of devices of a group, from one of three notations."""
  if listed := _LISTED.search(one.attributes):
    return len(listed[1].split(','))
  if iota := _IOTA.search(one.attributes):
    return int(iota[1])
  if mesh := _MESH.search(one.attributes):
    sizes = dict(_AXIS.findall(mesh[1]))
    return math.prod(
      int(sizes[axis.strip("' ")]) for axis in mesh[2].split(',')
    )
  return 1


def _narrow(
  program: hlo.Program, computation: str, one: hlo.Instruction, i: int
) -> hlo.Array:
  """Returns the i-th result in the type that the program asks for."""
  result = one.results[i]
  if _PROMOTED.search(one.attributes):
    return result._replace(dtype='bf16')
  source = program.source(computation, one.operands[i])
  if source is None or source.bytes == result.bytes:
    return result
  narrow = result._replace(dtype=source.dtype)
  return narrow if narrow.bytes < result.bytes else result


def _slices(program: hlo.Program, place: hlo.Place, i: int) -> int:
  """Returns into how many slices a sum is divided; 1 if all of it is used."""
  uses = [use.instruction for use in program.uses_of_result(place, i)]
  if not uses or any(use.operation != 'dynamic-slice' for use in uses):
    return 1
  size = place.instruction.results[i].bytes
  return min(size // use.results[0].bytes for use in uses)


def _added_to(program: hlo.Program, place: hlo.Place, i: int) -> str:
  """Returns the last of the additions that a sum goes into; '' if none."""
  last = ''
  uses = list(program.uses_of_result(place, i))
  while len(uses) == 1 and uses[0].instruction.operation == 'add':
    last = uses[0].instruction.name
    uses = list(program.uses(uses[0]))
  return last


def describe(operations: Sequence[Collective]) -> str:
  """Returns `2 all-reduce of u32[3,24], …`, or `none`."""
  counts = collections.Counter(operations)
  return (
    ', '.join(
      f'{count} {one.operation} of {one.types}' for one, count in counts.items()
    )
    or 'none'
  )
