"""Subsets beside the seed on the devices, and into it, at a subset's cost.

    layout = Layout(params, fingerprint)
    placed = layout.place(subset, params)  # `params` are the seed.
    params = layout.write(params, placed, tuned=True)
    params = layout.swap(params, placed, another)
    params = layout.write(params, another, tuned=False)  # The seed's bits.

A placed subset is three vectors as long as its capacity class, and where in
them each tensor's entries begin. What is compiled depends on the class alone: a
new subset of a class that has been seen compiles nothing.

Parameters are donated and changed in place, and a sharded tensor stays where
its shards are. `write` never reads: what has to be there again is known since
`place`. So the seed comes back whether or not an earlier `write` got to its
end, and on a mesh no device sends anything.
"""

from collections.abc import Sequence
import math
from typing import Any, NamedTuple

import jax
from jax import sharding as jax_sharding
import jax.numpy as jnp
import numpy as np

from dst_t5x.core import tree_paths
from dst_t5x.core.errors import UserError
from dst_t5x.method import silos
from dst_t5x.subsets import exchange
from dst_t5x.subsets import extraction

PyTree = Any
Rooms = exchange.Rooms
Arrays = exchange.Arrays

LEAST_CAPACITY = 1024
# How many times its share of the capacity a tensor may have in one round.
SLACKS = (1, 2, 4, 8)
# A tensor has room for its share of the capacity, some standard deviations of
# what chance makes of it, and a few more; the rest waits for another round.
_DEVIATIONS = 4
_MORE_ROOM = 4


class Placed(NamedTuple):
  """A subset that is on the devices.

  Attributes:
    arrays: its entries.
    slack: the least of `SLACKS` whose rooms are large enough, else the largest.
    rounds: how many rounds of these rooms it takes.
    size: the number of its entries.
  """

  arrays: Arrays
  slack: int
  rounds: int
  size: int

  @property
  def capacity(self) -> int:
    """Its class: entries that there is room for."""
    return self.arrays.positions.shape[0]

  @property
  def nbytes(self) -> int:
    """Bytes on each device."""
    return sum(array.nbytes for array in self.arrays)


def capacity_class(size: int) -> int:
  """Returns the room that a subset of so many entries gets, a power of two."""
  return max(LEAST_CAPACITY, 1 << max(size - 1, 0).bit_length())


class Tensors(NamedTuple):
  """The leaves of the parameters' tree, in its order; hashable.

  Attributes:
    paths: of the leaves, `layers` in them where they are stacked.
    shapes: of the leaves.
  """

  paths: tuple[str, ...]
  shapes: tuple[tuple[int, ...], ...]

  @property
  def sizes(self) -> tuple[int, ...]:
    """The leaves' numbers of components."""
    return tuple(map(math.prod, self.shapes))


class Layout:
  """Which tensors the parameters have, and how much room each gets.

  Attributes:
    fingerprint: the seed's.
    types: unstacked path -> shape and dtype.
    tensors: the leaves.
    sizes: their numbers of components.
    size: of all of them.
  """

  def __init__(self, params: PyTree, fingerprint: str) -> None:
    """Notes shapes and shardings; allocates nothing.

    Args:
      params: the seed, a tree of JAX arrays, stacked or not, or of
        `jax.ShapeDtypeStruct` with shardings.
      fingerprint: the seed's.

    Raises:
      UserError: the parameters are not on devices, or a tensor has 2³² - 1
        components or more, or components of more than four bytes.
    """
    self.fingerprint = fingerprint
    self.types = extraction.types_of(params)
    leaves = jax.tree.leaves_with_path(params)
    self.tensors = Tensors(
      tuple(tree_paths.path_of(path) for path, _ in leaves),
      tuple(leaf.shape for _, leaf in leaves),
    )
    self.sizes = self.tensors.sizes
    self.size = sum(self.sizes)
    for (_, leaf), path in zip(leaves, self.tensors.paths, strict=True):
      if math.prod(leaf.shape) > silos.MOST:
        raise UserError(f'subset: {path} has 2³² - 1 components or more')
      if leaf.dtype.itemsize > 4:
        raise UserError(f'subset: {path} is {leaf.dtype}, of more than 4 bytes')
    self._shardings = _shardings([leaf for _, leaf in leaves])
    self._programs: dict[tuple[int, int], exchange.Programs] = {}

  def rooms(self, capacity: int, slack: int) -> Rooms:
    """Returns how many entries of each tensor one round has room for.

    A tensor's share of the capacity times the slack, and some standard
    deviations of what chance makes of it.
    """
    shares = [
      slack * capacity * size / max(self.size, 1) for size in self.sizes
    ]
    return tuple(
      min(size, math.ceil(share + _DEVIATIONS * math.sqrt(share)) + _MORE_ROOM)
      for size, share in zip(self.sizes, shares, strict=True)
    )

  def check(self, subset: extraction.Subset) -> None:
    """Checks a subset, without touching the devices.

    Raises:
      UserError: it is of another seed, has other tensors, or contradicts
        itself.
    """
    extraction.check_tensors(
      self.types, subset.tensors, 'the model', 'the subset'
    )
    extraction.check_fingerprint(subset, self.fingerprint)
    extraction.check_entries(subset)

  def place(self, subset: extraction.Subset, params: PyTree) -> Placed:
    """Puts a subset on the devices, checked.

    Args:
      subset: what to place.
      params: what `write` is to bring back: the seed, or a seed into which
        another subset was written. Nothing is written into them here.

    Raises:
      UserError: see `check`.
    """
    self.check(subset)
    capacity = capacity_class(subset.size)
    positions = np.zeros(capacity, np.uint32)
    values = np.zeros(capacity, np.uint32)
    starts = [0]
    for path, shape in zip(*self.tensors, strict=True):
      _, paths = tree_paths.slice_paths(path, shape)
      end = starts[-1]
      for layer, path_of_slice in enumerate(paths):
        where, new = extraction.entries(subset, path_of_slice)
        here = slice(end, end + len(where))
        positions[here] = where + layer * (math.prod(shape) // len(paths))
        values[here] = extraction.bits(new)
        end = here.stop
      starts.append(end)
    slack, rounds = self._rounds(capacity, np.diff(starts).tolist())
    on_device = jax.device_put(
      (positions, values, np.array(starts, np.int32)), self._everywhere
    )
    arrays = Arrays(
      on_device[0], on_device[1], jnp.zeros_like(on_device[1]), on_device[2]
    )
    leaves = jax.tree.leaves(params)
    programs = self._compiled(capacity, slack)
    for i in range(rounds):
      arrays = _read(programs, leaves, arrays, i)
    return Placed(arrays, slack, rounds, subset.size)

  def empty(self, capacity: int) -> Placed:
    """Returns a subset of a class without entries."""
    vectors = (
      *(np.zeros(capacity, np.uint32) for _ in range(3)),
      np.zeros(len(self.sizes) + 1, np.int32),
    )
    on_device = jax.device_put(vectors, self._everywhere)
    return Placed(Arrays(*on_device), slack=1, rounds=1, size=0)

  def _rounds(self, capacity: int, counts: Sequence[int]) -> tuple[int, int]:
    """Returns the slack of a subset, and the rounds that it takes then."""
    rounds = 0
    for slack in SLACKS:
      rooms = np.maximum(self.rooms(capacity, slack), 1)
      rounds = int(np.max(-(-np.asarray(counts) // rooms)))
      if rounds <= 1:
        break
    return slack, max(rounds, 1)

  @property
  def _everywhere(self) -> jax_sharding.Sharding:
    return exchange.replicated(self._shardings)

  def _compiled(self, capacity: int, slack: int) -> exchange.Programs:
    """Returns what reads and writes subsets of a class."""
    key = capacity, slack
    if key not in self._programs:
      rooms = self.rooms(capacity, slack)
      self._programs[key] = exchange.programs(self._shardings, rooms)
    return self._programs[key]

  def write(self, params: PyTree, placed: Placed, *, tuned: bool) -> PyTree:
    """Returns the parameters with a subset's values, or with the seed's.

    Of several subsets that share components, each placed when those before it
    had been written, the last has to be taken out first.

    Args:
      params: donated: their memory becomes the result's.
      placed: whose entries to write.
      tuned: the subset's values, else those of the seed.
    """
    leaves, tree = jax.tree.flatten(params)
    arrays = placed.arrays if tuned else _untuned(placed)
    programs = self._compiled(placed.capacity, placed.slack)
    for i in range(placed.rounds):
      leaves = _write(programs, leaves, [arrays], i)
    return jax.tree.unflatten(tree, leaves)

  def swap(self, params: PyTree, old: Placed, new: Placed) -> PyTree:
    """Returns the parameters with another subset than they had.

    Args:
      params: with the values of `old`; donated.
      old: goes.
      new: comes.
    """
    if (
      (old.capacity, old.slack) != (new.capacity, new.slack)
      or old.rounds > 1
      or new.rounds > 1
    ):
      params = self.write(params, old, tuned=False)
      return self.write(params, new, tuned=True)
    leaves, tree = jax.tree.flatten(params)
    programs = self._compiled(new.capacity, new.slack)
    # In one call: a call with so many tensors takes longer than it works.
    leaves = _write(programs, leaves, [_untuned(old), new.arrays], 0)
    return jax.tree.unflatten(tree, leaves)


def _untuned(placed: Placed) -> Arrays:
  """Returns a subset's entries with the seed's values."""
  return placed.arrays._replace(values=placed.arrays.seeds)


def _shardings(leaves: Sequence[Any]) -> exchange.Shardings:
  """Returns where each tensor is; raises UserError if on no device."""
  shardings = [getattr(leaf, 'sharding', None) for leaf in leaves]
  if None in shardings:
    raise UserError(
      'subset: these parameters are not on the devices; use `subset.apply`, or '
      'move them with `jax.device_put`'
    )
  return tuple(sharding for sharding in shardings if sharding is not None)


def _write(
  programs: exchange.Programs,
  leaves: list[jax.Array],
  in_turn: list[Arrays],
  round_: int,
) -> list[jax.Array]:
  """Returns the tensors with the values of a round of some subsets in turn."""
  return programs.write(leaves, in_turn, round_)


def _read(
  programs: exchange.Programs,
  leaves: list[jax.Array],
  arrays: Arrays,
  round_: int,
) -> Arrays:
  """Returns the arrays with the tensors' values of a round as `seeds`."""
  return programs.read(leaves, arrays, round_)
