"""The text of a compiled program: its instructions, and how often each runs."""

import collections
from collections.abc import Iterator, Mapping
import dataclasses
import functools
import math
import re
from typing import NamedTuple

_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.-]+) \(.*\{$')
_INSTRUCTION = re.compile(
  r'\s+(ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$'
)
_NAME = re.compile(r'%([\w.-]+)')
_ARRAY = re.compile(r'(\w+)\[([\d,]*)\]')
_BITS = re.compile(r'\d+')
_CALLED = re.compile(
  r'(?:body|calls|to_apply|branch_computations|true_computation|'
  r'false_computation)=(\{[^}]*\}|%[\w.-]+)'
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# They change no more than the type or the order of what they are given.
_COPIES = frozenset(
  [
    *('bitcast', 'copy', 'convert', 'transpose', 'reshape'),
    'get-tuple-element',
  ]
)


class Array(NamedTuple):
  """An array of a program.

  Attributes:
    dtype: as in the text: `f32`, `bf16`, `pred`.
    shape: the sizes of the axes on a device.
  """

  dtype: str
  shape: tuple[int, ...]

  @property
  def bytes(self) -> int:
    """The size on a device."""
    bits = _BITS.search(self.dtype)  # None of `pred`.
    itemsize = max(int(bits.group()) // 8, 1) if bits else 1
    return math.prod(self.shape) * itemsize

  def __str__(self) -> str:
    """Returns `f32[8,16]`."""
    return f'{self.dtype}[{",".join(map(str, self.shape))}]'


class Instruction(NamedTuple):
  """An instruction of a computation.

  Attributes:
    name: unique in the program.
    results: an array, or several.
    operation: for example `all-reduce`.
    operands: names of instructions, in order.
    attributes: the rest of the text.
    is_root: whether the computation returns it.
  """

  name: str
  results: tuple[Array, ...]
  operation: str
  operands: tuple[str, ...]
  attributes: str
  is_root: bool


class Place(NamedTuple):
  """Where an instruction is.

  Attributes:
    computation: its name.
    instruction: the instruction.
    caller: where the fusion is whose computation it is; None outside of one.
  """

  computation: str
  instruction: Instruction
  caller: 'Place | None' = None


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program.

  Attributes:
    computations: name -> its instructions, by name.
    entry: the name of the computation that runs first.
  """

  computations: Mapping[str, Mapping[str, Instruction]]
  entry: str

  @functools.cached_property
  def runs(self) -> dict[str, int]:
    """Computation -> how often it runs.

    A loop whose number of rounds is not in the text counts as one round, and
    each branch of a condition as taken.
    """
    runs: collections.Counter[str] = collections.Counter()

    def add(name: str, times: int) -> None:
      runs[name] += times
      for one in self.computations[name].values():
        trips = _TRIPS.search(one.attributes)
        rounds = int(trips[1]) if trips and one.operation == 'while' else 1
        for called in called_by(one):
          add(called, times * rounds)

    add(self.entry, 1)
    return dict(runs)

  def uses_of_result(self, place: 'Place', i: int) -> Iterator['Place']:
    """Yields what uses the i-th result of an instruction.

    Where that is a copy or the like, its own uses are yielded instead; where it
    is a fusion, the uses within it.
    """
    if len(place.instruction.results) == 1:
      yield from self.uses(place)
      return
    users = self._direct[place.computation].get(place.instruction.name, ())
    for one in users:
      if one.operation != 'get-tuple-element':
        yield place._replace(instruction=one)
      elif re.search(rf'index={i}\b', one.attributes):
        yield from self.uses(place._replace(instruction=one))

  def uses(self, place: 'Place') -> Iterator['Place']:
    """Yields what uses the one result of an instruction, as above."""
    name = place.instruction.name
    for one in self._direct[place.computation].get(name, ()):
      at = place._replace(instruction=one)
      number = one.operands.index(name)
      if one.operation == 'fusion':
        [inner] = called_by(one)
        parameter = self._parameter(inner, number)
        yield from self.uses(Place(inner, parameter, at))
      elif one.operation in _COPIES:
        yield from self.uses(at)
      elif one.operation == 'tuple' and one.is_root and place.caller:
        yield from self.uses_of_result(place.caller, number)
      else:
        yield at
    if place.instruction.is_root and place.caller:
      yield from self.uses(place.caller)

  def _parameter(self, computation: str, number: int) -> Instruction:
    [parameter] = (
      one
      for one in self.computations[computation].values()
      if one.operation == 'parameter'
      and one.attributes.startswith(f'{number})')
    )
    return parameter

  @functools.cached_property
  def _direct(self) -> dict[str, dict[str, list[Instruction]]]:
    """Computation -> name -> the instructions that have it as an operand."""
    direct: dict[str, dict[str, list[Instruction]]] = {}
    for name, instructions in self.computations.items():
      uses = direct.setdefault(name, {})
      for one in instructions.values():
        for operand in dict.fromkeys(one.operands):
          uses.setdefault(operand, []).append(one)
    return direct

  def source(self, computation: str, name: str) -> Array | None:
    """Returns the array that a result is a copy of; None for a tuple.

    This looks through conversions to a wider type, which a CPU needs, because
    it computes no bfloat16.
    """
    one = self.computations[computation].get(name)
    if one is None or len(one.results) != 1:
      return None
    [array] = one.results
    before = None
    if one.operation == 'fusion':
      [inner] = called_by(one)
      [root] = (x for x in self.computations[inner].values() if x.is_root)
      before = self.source(inner, root.name)
    elif one.operation in _COPIES and one.operation != 'get-tuple-element':
      before = self.source(computation, one.operands[0])
    if before and before.bytes < array.bytes:
      return array._replace(dtype=before.dtype)
    return array


def parse(text: str) -> Program:
  """Returns the program of `jax.jit(…).lower(…).compile().as_text()`."""
  computations: dict[str, dict[str, Instruction]] = {}
  instructions: dict[str, Instruction] = {}
  entry = ''
  for line in text.splitlines():
    if found := _INSTRUCTION.match(line):
      one = _instruction(found)
      instructions[one.name] = one
    elif found := _COMPUTATION.match(line):
      instructions = computations.setdefault(found[2], {})
      if found[1]:
        entry = found[2]
  return Program(computations, entry)


def _instruction(found: re.Match[str]) -> Instruction:
  root, name, results, operation, rest = found.groups()
  operands, _, _ = rest.partition(')')
  return Instruction(
    name,
    tuple(
      Array(dtype, tuple(int(n) for n in shape.split(',') if n))
      for dtype, shape in _ARRAY.findall(results)
    ),
    operation,
    tuple(_NAME.findall(operands)),
    rest,
    bool(root),
  )


def called_by(one: Instruction) -> list[str]:
  """Returns the computations that an instruction runs."""
  called = _CALLED.findall(one.attributes)
  return [name for names in called for name in _NAME.findall(names)]
