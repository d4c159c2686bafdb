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
    bytes_on_cpu: the same as the program has it for CPUs: bfloat16 as float32,
      and sums of which each device needs a part as sums of all.
  """

  operation: str
  op_name: str
  bytes: float
  bytes_on_cpu: float


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
  around a ring. Other compilers than XLA's for CPUs make a reduce-scatter of an
  all-reduce of which each device needs a slice only, and so it is counted.

  Args:
    text: `jax.jit(…).lower(…).compile().as_text()`.
  """
  program = hlo.parse(text)
  found: list[Sent] = []
  for computation, times in program.runs.items():
    for one in program.computations[computation].values():
      operation = one.operation.removesuffix('-start')
      if operation not in _OPERATIONS:
        continue
      devices = _devices(one)
      name = _OP_NAME.search(one.attributes)
      for i, array in enumerate(one.results):
        plain = _sent(operation, array.bytes, devices)
        slices = _slices(program, computation, one, i)
        size = _narrow(program, computation, one, i).bytes
        as_made, least = operation, _sent(operation, size, devices)
        if slices > 1:
          as_made = 'reduce-scatter'
          # Of what is left, the sum among the devices that need the same slice.
          least = _sent(as_made, size, slices)
          least += _sent(operation, size / slices, max(devices // slices, 1))
        found.append(
          Sent(as_made, name[1] if name else '', times * least, times * plain)
        )
  return found


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


def _slices(
  program: hlo.Program, computation: str, one: hlo.Instruction, i: int
) -> int:
  """Returns into how many slices a sum is divided; 1 if all of it is used."""
  if one.operation.removesuffix('-start') != 'all-reduce':
    return 1
  uses = list(program.uses_of_result(computation, one, i))
  if not uses or any(use.operation != 'dynamic-slice' for use in uses):
    return 1
  return min(one.results[i].bytes // use.results[0].bytes for use in uses)


def describe(operations: Sequence[Collective]) -> str:
  """Returns `2 all-reduce of u32[3,24], …`, or `none`."""
  counts = collections.Counter(operations)
  return (
    ', '.join(
      f'{count} {one.operation} of {one.types}' for one, count in counts.items()
    )
    or 'none'
  )
