"""Subsets beside the seed on the device, and into it, at a subset's cost.

A placed subset is three vectors as long as its capacity class, and where in
them each tensor's entries begin. What is compiled hangs on the class alone: a
new subset of a class that has been seen compiles nothing.

    layout = Layout(params, fingerprint)
    placed = layout.place(subset, params)  # `params` are the seed.
    params = layout.write(params, placed, tuned=True)
    params = layout.swap(params, placed, another)
    params = layout.write(params, another, tuned=False)  # The seed's bits.

Unlike `subset.apply_in_place`, `write` never reads: what has to be there again
is known since `place`. That takes half the time, and the seed comes back
whether or not an earlier `write` got to its end.
"""

from collections.abc import Sequence
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dst_t5x import subsets as subset_lib
from dst_t5x.core.errors import UserError
from dst_t5x.method import silos
from dst_t5x.subsets import extraction

Array = jax.Array
PyTree = Any
Rooms = tuple[int, ...]

LEAST_CAPACITY = 1024
# How many times its share of the capacity a tensor may have in one round.
SLACKS = (1, 2, 4, 8)
_DEVIATIONS = 4
_MORE_ROOM = 4


class Arrays(NamedTuple):
  """A subset's entries on the device.

  Attributes:
    positions: uint32 [capacity], in the flattened tensors, tensor by tensor.
    values: float32 [capacity], the subset's.
    seeds: float32 [capacity], the seed's.
    starts: int32 [tensors + 1], where each tensor's entries begin, and the end.
  """

  positions: Array
  values: Array
  seeds: Array
  starts: Array


class Placed(NamedTuple):
  """A subset that is on the device.

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
    """Bytes on the device."""
    return sum(array.nbytes for array in self.arrays)


def capacity_class(size: int) -> int:
  """Returns the room that a subset of so many entries gets, a power of two."""
  return max(LEAST_CAPACITY, 1 << max(size - 1, 0).bit_length())


class Tensors(NamedTuple):
  """The leaves of the parameters' tree, in its order; hashable.

  Attributes:
    paths: of the leaves.
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
    types: path -> shape and dtype.
    tensors: the leaves.
    sizes: their numbers of components.
    size: of all of them.
  """

  def __init__(self, params: PyTree, fingerprint: str) -> None:
    """Notes shapes; allocates nothing.

    Args:
      params: the seed, unstacked float32 JAX arrays on one device.
      fingerprint: the seed's.

    Raises:
      UserError: the parameters are not float32, or a tensor has 2³² - 1
        components or more.
    """
    self.fingerprint = fingerprint
    self.types = extraction.types_of(params)
    leaves = jax.tree.leaves_with_path(params)
    self.tensors = Tensors(
      tuple(silos.path_of(path) for path, _ in leaves),
      tuple(leaf.shape for _, leaf in leaves),
    )
    self.sizes = self.tensors.sizes
    self.size = sum(self.sizes)
    if any(leaf.dtype != jnp.float32 for _, leaf in leaves):
      raise UserError('only seeds whose parameters are float32 can be served')
    if max(self.sizes) > silos.MOST:
      raise UserError('a tensor of the seed has 2³² - 1 components or more')

  def rooms(self, capacity: int, slack: int) -> Rooms:
    """Returns how many entries of each tensor one round has room for.

    A tensor's share of the capacity times the slack, and some standard
    deviations of what chance makes of it.
    """
    shares = [slack * capacity * size / self.size for size in self.sizes]
    return tuple(
      min(size, math.ceil(share + _DEVIATIONS * math.sqrt(share)) + _MORE_ROOM)
      for size, share in zip(self.sizes, shares, strict=True)
    )

  def check(self, subset: subset_lib.Subset) -> None:
    """Checks a subset, without touching the device.

    Raises:
      UserError: it is of another seed, has other tensors, contradicts itself,
        or has a value that is not finite.
    """
    extraction.check_tensors(
      subset.tensors, self.types, 'the subset', "the server's seed"
    )
    extraction.check_fingerprint(subset, self.fingerprint)
    extraction.check_entries(subset)
    for path, values in subset.values.items():
      if not np.isfinite(values).all():
        raise UserError(f'subset: a value of {path} is not finite')

  def place(self, subset: subset_lib.Subset, params: PyTree) -> Placed:
    """Puts a subset on the device, checked.

    Args:
      subset: what to place.
      params: the seed itself, into which nothing is written.

    Raises:
      UserError: see `check`.
    """
    self.check(subset)
    capacity = capacity_class(subset.size)
    positions = np.zeros(capacity, np.uint32)
    values = np.zeros(capacity, np.float32)
    starts = [0]
    for path in self.tensors.paths:
      where, new = extraction.entries(subset, path)
      here = slice(starts[-1], starts[-1] + len(where))
      positions[here], values[here] = where, new
      starts.append(here.stop)
    slack, rounds = self._rounds(capacity, np.diff(starts).tolist())
    leaves = jax.tree.leaves(params)
    on_device = jax.device_put(
      (positions, values, np.array(starts, np.int32)), leaves[0].sharding
    )
    arrays = Arrays(
      on_device[0], on_device[1], jnp.zeros_like(on_device[1]), on_device[2]
    )
    rooms = self.rooms(capacity, slack)
    for i in range(rounds):
      arrays = _read(leaves, arrays, i, rooms=rooms)
    return Placed(arrays, slack, rounds, subset.size)

  def _rounds(self, capacity: int, counts: Sequence[int]) -> tuple[int, int]:
    """Returns the slack of a subset, and the rounds that it takes then."""
    rounds = 0
    for slack in SLACKS:
      rooms = self.rooms(capacity, slack)
      rounds = int(np.max(-(-np.asarray(counts) // np.asarray(rooms))))
      if rounds <= 1:
        break
    return slack, max(rounds, 1)

  def write(self, params: PyTree, placed: Placed, *, tuned: bool) -> PyTree:
    """Returns the parameters with a subset's values, or with the seed's.

    Args:
      params: donated: their memory becomes the result's.
      placed: whose entries to write.
      tuned: the subset's values, else those of the seed.
    """
    leaves, tree = jax.tree.flatten(params)
    arrays = placed.arrays if tuned else _untuned(placed)
    rooms = self.rooms(placed.capacity, placed.slack)
    for i in range(placed.rounds):
      leaves = _write(leaves, [arrays], i, rooms=rooms)
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
    rooms = self.rooms(new.capacity, new.slack)
    # In one call: a call with so many tensors takes longer than it works.
    leaves = _write(leaves, [_untuned(old), new.arrays], 0, rooms=rooms)
    return jax.tree.unflatten(tree, leaves)


def _untuned(placed: Placed) -> Arrays:
  """Returns a subset's entries with the seed's values."""
  return placed.arrays._replace(values=placed.arrays.seeds)


def empty(layout: Layout, capacity: int) -> Placed:
  """Returns a subset of a class without entries, on the default device."""
  vectors = (
    np.zeros(capacity, np.uint32),
    np.zeros(capacity, np.float32),
    np.zeros(capacity, np.float32),
    np.zeros(len(layout.sizes) + 1, np.int32),
  )
  on_device = jax.device_put(vectors, jax.devices()[0])
  return Placed(Arrays(*on_device), slack=1, rounds=1, size=0)


class _Part(NamedTuple):
  """What a tensor has of a round: a slice of the vectors, and what is its own.

  Near the vectors' end the slice begins before what is the tensor's own.
  """

  begin: Array
  length: int
  own: Array

  def of(self, vector: Array) -> Array:
    return jax.lax.dynamic_slice_in_dim(vector, self.begin, self.length)


def _part(arrays: Arrays, i: int, room: int, round_: Array | int) -> _Part:
  capacity = len(arrays.positions)
  begin = arrays.starts[i] + round_ * room
  end = jnp.minimum(arrays.starts[i + 1], begin + room)
  length = min(room, capacity)
  first = jnp.minimum(begin, capacity - length)
  here = first + jnp.arange(length, dtype=jnp.int32)
  return _Part(first, length, (begin <= here) & (here < end))


@functools.partial(jax.jit, static_argnames='rooms', donate_argnums=0)
def _write(
  leaves: list[Array], in_turn: list[Arrays], round_: Array, rooms: Rooms
) -> list[Array]:
  """Returns the tensors with the values of a round of some subsets in turn."""
  changed = []
  for i, (leaf, room) in enumerate(zip(leaves, rooms, strict=True)):
    tensor = leaf.reshape(-1)
    for arrays in in_turn:
      part = _part(arrays, i, room, round_)
      # Beyond the tensor's end nothing is written.
      where = jnp.where(part.own, part.of(arrays.positions), leaf.size)
      tensor = tensor.at[where].set(part.of(arrays.values), mode='drop')
    changed.append(tensor.reshape(leaf.shape))
  return changed


@functools.partial(jax.jit, static_argnames='rooms')
def _read(
  leaves: list[Array], arrays: Arrays, round_: Array, rooms: Rooms
) -> Arrays:
  """Returns the arrays with the tensors' values of a round as `seeds`."""
  seeds = arrays.seeds
  for i, (leaf, room) in enumerate(zip(leaves, rooms, strict=True)):
    part = _part(arrays, i, room, round_)
    found = leaf.reshape(-1).at[part.of(arrays.positions)].get(mode='clip')
    found = jnp.where(part.own, found, part.of(seeds))
    seeds = jax.lax.dynamic_update_slice_in_dim(seeds, found, part.begin, 0)
  return arrays._replace(seeds=seeds)


class Slots(NamedTuple):
  """Where rooms lie one after the other; it hangs on the rooms alone.

  Attributes:
    tensor: int32 [slots], whose room a slot is in.
    place: int32 [slots], which slot of its room it is.
  """

  tensor: Array
  place: Array


def slots_of(rooms: Rooms) -> Slots:
  """Returns the slots of some rooms."""
  tensor = np.repeat(np.arange(len(rooms), dtype=np.int32), rooms)
  begins = np.cumsum([0, *rooms[:-1]])
  place = np.arange(len(tensor)) - begins[tensor]
  return Slots(jnp.asarray(tensor), jnp.asarray(place.astype(np.int32)))


class Spread(NamedTuple):
  """A subset of one round, each entry in a slot: [slots] all.

  Attributes:
    positions: uint32, in the flattened tensors.
    values: float32, the subset's.
    seeds: float32, the seed's.
    own: whether there is an entry; else the others mean nothing.
  """

  positions: Array
  values: Array
  seeds: Array
  own: Array


def spread(arrays: Arrays, slots: Slots) -> Spread:
  """Gives each entry of a subset its slot; there has to be room for all."""
  entry = arrays.starts[slots.tensor] + slots.place
  positions, values, seeds = (
    vector.at[entry].get(mode='clip') for vector in arrays[:3]
  )
  own = entry < arrays.starts[slots.tensor + 1]
  return Spread(positions, values, seeds, own)
