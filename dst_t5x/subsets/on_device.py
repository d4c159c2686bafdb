"""Subsets put into parameters where they are, on the devices, and taken out.

    slots = Slots(params, fingerprint, capacity)  # Once.
    patch = slots.place(subset)  # For each subset once.
    params, undo = apply_in_place(params, patch)
    params = revert(params, undo)

Patches from the same slots have the same shape, so that what is compiled once
serves all of them. Parameters are donated and changed in place, and a sharded
tensor stays where its shards are.
"""

from collections.abc import Iterator, Mapping, Sequence
import functools
import math
from typing import Any, NamedTuple

import jax
from jax import sharding as jax_sharding
import jax.numpy as jnp
import numpy as np

from dst_t5x.core.errors import UserError, check_positive
from dst_t5x.method import sharding_types
from dst_t5x.method import silos
from dst_t5x.subsets import extraction

PyTree = Any
ByType = dict[str, Any]
Rooms = tuple[int, ...]
Shardings = tuple[jax_sharding.Sharding, ...]

# A tensor has room for its share of the capacity, some standard deviations of
# what chance makes of it, and a few more; the rest waits for another round.
_DEVIATIONS = 4
_MORE_ROOM = 4


class Round(NamedTuple):
  """Components and their values, tensor after tensor of each dtype.

  Attributes:
    positions: name of the dtype -> uint32 [room], in their flattened tensors;
      the tensor's size where there is nothing.
    values: name of the dtype -> [room].
  """

  positions: ByType
  values: ByType


class Patch(NamedTuple):
  """What to put into parameters, on their devices.

  Attributes:
    rounds: one, if the components are spread like the parameters.
    rooms: how many components of each tensor a round has room for.
  """

  rounds: tuple[Round, ...]
  rooms: Rooms


class _Slot(NamedTuple):
  """Where a tensor of the subset goes: into a leaf, which may be stacked.

  Attributes:
    leaf: number of the leaf.
    dtype: its name.
    start: where in a round of this dtype the leaf's room begins.
    room: of the leaf.
    offset: position in the leaf of the tensor's first component.
  """

  leaf: int
  dtype: str
  start: int
  room: int
  offset: int


class Slots:
  """Room for subsets beside parameters on the devices."""

  def __init__(self, params: PyTree, fingerprint: str, capacity: int) -> None:
    """Spreads the room over the tensors by their sizes.

    Args:
      params: tree of JAX arrays, stacked or not, or of `jax.ShapeDtypeStruct`
        with shardings.
      fingerprint: of the seed that they are.
      capacity: the size of the largest subset. One that needs more room, in
        all or in one tensor, takes more rounds.

    Raises:
      UserError: the parameters are not on devices, or a tensor has 2³² - 1
        components or more.
    """
    check_positive('capacity', capacity)
    leaves = jax.tree.leaves(params)
    sizes = [math.prod(leaf.shape) for leaf in leaves]
    self._fingerprint = fingerprint
    self._types = extraction.types_of(params)
    self._everywhere = _replicated(_shardings(leaves))
    self._rooms = _rooms(sizes, capacity)
    self._slots: dict[str, _Slot] = {}
    nothing: dict[str, list[np.ndarray]] = {}
    places = _places(leaves, self._rooms)
    for i, (key_path, leaf) in enumerate(jax.tree.leaves_with_path(params)):
      dtype, place = next(places)
      vacant = np.full(self._rooms[i], sizes[i], np.uint32)
      nothing.setdefault(dtype, []).append(vacant)
      _, paths = tree_paths.slice_paths(
        tree_paths.path_of(key_path), leaf.shape
      )
      for layer, path in enumerate(paths):
        offset = layer * (sizes[i] // len(paths))
        self._slots[path] = _Slot(i, dtype, place.start, self._rooms[i], offset)
    self._nothing = {d: np.concatenate(parts) for d, parts in nothing.items()}

  def place(self, subset: extraction.Subset) -> Patch:
    """Puts a subset on the devices.

    Raises:
      UserError: it is of another seed, has other tensors, or contradicts
        itself.
    """
    extraction.check_tensors(
      self._types, subset.tensors, 'the model', 'the subset'
    )
    extraction.check_fingerprint(subset, self._fingerprint)
    extraction.check_entries(subset)
    # How many entries of the same leaf come before a tensor's.
    filled: dict[int, int] = {}
    before: dict[str, int] = {}
    for path, positions in subset.positions.items():
      leaf = self._slots[path].leaf
      before[path] = filled.get(leaf, 0)
      filled[leaf] = before[path] + len(positions)
    needed = [-(-count // self._rooms[leaf]) for leaf, count in filled.items()]
    number = max([1, *needed])
    arrays = {
      dtype: self._fill(subset, before, number, dtype)
      for dtype in self._nothing
    }
    rounds = [
      Round(
        {dtype: positions[i] for dtype, (positions, _) in arrays.items()},
        {dtype: values[i] for dtype, (_, values) in arrays.items()},
      )
      for i in range(number)
    ]
    return Patch(tuple(jax.device_put(rounds, self._everywhere)), self._rooms)

  def _fill(
    self,
    subset: extraction.Subset,
    before: Mapping[str, int],
    rounds: int,
    dtype: str,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns all rounds of a dtype, on the host.

    Args:
      subset: what to place.
      before: path -> how many entries of the same leaf come before.
      rounds: how many rounds.
      dtype: name of the dtype.

    Returns:
      Positions uint32 [rounds, room], values [rounds, room].
    """
    positions = np.tile(self._nothing[dtype], (rounds, 1))
    values = np.zeros(positions.shape, np.dtype(dtype))
    paths = [path for path in before if self._slots[path].dtype == dtype]
    if not paths:
      return positions, values
    slots = [self._slots[path] for path in paths]
    counts = np.array([len(subset.positions[path]) for path in paths])
    starts = np.repeat([slot.start for slot in slots], counts)
    rooms = np.repeat([slot.room for slot in slots], counts)
    offsets = np.repeat([slot.offset for slot in slots], counts)
    # Entry i of a leaf goes to round i // room.
    begins = np.repeat(counts.cumsum() - counts, counts)
    i = np.arange(len(begins)) - begins
    i += np.repeat([before[path] for path in paths], counts)
    where = i // rooms, starts + i % rooms
    found = np.concatenate([subset.positions[path] for path in paths])
    positions[where] = found + offsets
    values[where] = np.concatenate([subset.values[path] for path in paths])
    return positions, values


def _rooms(sizes: Sequence[int], capacity: int) -> Rooms:
  """Returns how many components of each tensor there is room for."""
  if max(sizes) > silos.MOST:
    raise UserError('subset: a tensor has 2³² - 1 components or more')
  shares = [capacity * size / max(sum(sizes), 1) for size in sizes]
  return tuple(
    min(size, math.ceil(share + _DEVIATIONS * math.sqrt(share)) + _MORE_ROOM)
    for size, share in zip(sizes, shares, strict=True)
  )


def _places(leaves: Sequence[Any], rooms: Rooms) -> Iterator[tuple[str, slice]]:
  """Yields, for each tensor, its dtype and where in a round it has room."""
  ends: dict[str, int] = {}
  for leaf, room in zip(leaves, rooms, strict=True):
    dtype = np.dtype(leaf.dtype).name
    start = ends.get(dtype, 0)
    ends[dtype] = start + room
    yield dtype, slice(start, start + room)


def _shardings(leaves: Sequence[Any]) -> Shardings:
  """Returns where each tensor is; raises UserError if on no device."""
  shardings = [getattr(leaf, 'sharding', None) for leaf in leaves]
  if None in shardings:
    raise UserError(
      'subset: these parameters are not on the devices; use `subset.apply`, or '
      'move them with `jax.device_put`'
    )
  return tuple(sharding for sharding in shardings if sharding is not None)


def _replicated(shardings: Shardings) -> jax_sharding.Sharding:
  """Returns the sharding of what all devices of the parameters have whole."""
  first = shardings[0]
  if isinstance(first, jax_sharding.NamedSharding):
    return jax_sharding.NamedSharding(first.mesh, jax_sharding.PartitionSpec())
  return first


def apply_in_place(params: PyTree, patch: Patch) -> tuple[PyTree, Patch]:
  """Puts a patch into parameters; use the returned ones, not `params`.

  Args:
    params: tree of JAX arrays, like those of the slots. They are donated: their
      memory becomes the result's.
    patch: what `Slots.place` returned.

  Returns:
    The tuned parameters, and for `revert` what was there before. Of several
    patches that share components, the last one has to be reverted first.
  """
  leaves, tree = jax.tree.flatten(params)
  exchange = _compiled(_shardings(leaves), patch.rooms)
  before = []
  for positions, values in patch.rounds:
    leaves, old = exchange(leaves, positions, values)
    before.append(Round(positions, old))
  return jax.tree.unflatten(tree, leaves), patch._replace(rounds=tuple(before))


def revert(params: PyTree, undo: Patch) -> PyTree:
  """Returns the parameters as they were before `apply_in_place`, bit for bit.

  Args:
    params: what it returned; donated.
    undo: what it returned beside them.
  """
  params, _ = apply_in_place(params, undo)
  return params


@functools.lru_cache(maxsize=64)
def _compiled(shardings: Shardings, rooms: Rooms) -> Any:
  """Returns `_exchange` for tensors that are where they are."""
  there, everywhere = list(shardings), _replicated(shardings)

  def exchange(
    leaves: list[jax.Array], positions: ByType, values: ByType
  ) -> tuple[list[jax.Array], ByType]:
    types = leaves, values
    hidden = sharding_types.hide(
      functools.partial(_exchange, rooms=rooms), types
    )
    return hidden(leaves, positions, values)

  return jax.jit(
    exchange,
    in_shardings=(there, everywhere, everywhere),
    out_shardings=(there, everywhere),
    donate_argnums=0,
  )


def _exchange(
  leaves: list[jax.Array], positions: ByType, values: ByType, rooms: Rooms
) -> tuple[list[jax.Array], ByType]:
  """Returns the tensors with other values, and the values that they had."""
  changed: list[jax.Array] = []
  taken: dict[str, list[jax.Array]] = {}
  for leaf, (dtype, place) in zip(leaves, _places(leaves, rooms), strict=True):
    tensor, where = jnp.atleast_1d(leaf), positions[dtype][place]
    indices = _indices(where, tensor.shape)
    old = tensor.at[indices].get(mode='clip')
    # What is written where nothing is makes no difference, but it makes writing
    # wait for reading: otherwise XLA would read from a copy of the tensor.
    new = jnp.where(where == leaf.size, old, values[dtype][place])
    tensor = tensor.at[indices].set(new, mode='drop')
    changed.append(tensor.reshape(leaf.shape))
    taken.setdefault(dtype, []).append(old)
  return changed, {d: jnp.concatenate(parts) for d, parts in taken.items()}


def _indices(
  positions: jax.Array, shape: tuple[int, ...]
) -> tuple[jax.Array, ...]:
  """Returns the index along each axis, int32 [room].

  Not into the flattened tensor: flattening a sharded one would gather it. The
  tensor's size becomes an index beyond the first axis.
  """
  indices = []
  for size in reversed(shape[1:]):
    # Of a tensor of no component there is no position either.
    indices.append(positions % max(size, 1))
    positions = positions // max(size, 1)
  return tuple(i.astype(jnp.int32) for i in (positions, *reversed(indices)))
