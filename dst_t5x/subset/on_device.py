"""Subsets put into parameters where they are, on the devices, and taken out.

    patch = place(subset, params, fingerprint, capacity)
    params, undo = apply_in_place(params, patch)
    params = revert(params, undo)

Patches of one capacity have one shape, so that what is compiled once serves all
of them. Parameters are donated and changed in place, and a sharded tensor stays
where its shards are.
"""

from collections.abc import Iterator, Sequence
import functools
import math
from typing import Any, NamedTuple

import jax
from jax import sharding as jax_sharding
import jax.numpy as jnp
import numpy as np

from dst_t5x import sharding_types
from dst_t5x import silos
from dst_t5x.errors import UserError
from dst_t5x.subset import extraction

PyTree = Any
ByType = dict[str, Any]
Entries = tuple[np.ndarray, np.ndarray]
Rooms = tuple[int, ...]
Shardings = tuple[jax_sharding.Sharding, ...]

# A tensor has room for this many times its share of the capacity, and for a
# few components more; what finds no room waits for another round.
_SLACK = 2
_LEAST_ROOM = 8


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


def place(
  subset: extraction.Subset,
  params: PyTree,
  fingerprint: str,
  capacity: int | None = None,
) -> Patch:
  """Puts a subset on the devices of some parameters.

  Args:
    subset: what to place.
    params: tree of JAX arrays, stacked or not, or of `jax.ShapeDtypeStruct`
      with shardings.
    fingerprint: of the seed that is on the devices.
    capacity: how many components to have room for: the size of the largest of
      the subsets that are to share a program; by default the next power of
      two. Room is spread over the tensors by their sizes. A subset that needs
      more of it, in all or in one tensor, takes more rounds.

  Raises:
    UserError: the seed is another one or has other tensors, the subset
      contradicts itself, or a tensor has 2³² - 1 components or more.
  """
  extraction.check_tensors(
    extraction.types_of(params), subset.tensors, 'the model', 'the subset'
  )
  extraction.check_fingerprint(subset, fingerprint)
  capacity = capacity or 1 << max(subset.size - 1, 0).bit_length()
  leaves = jax.tree.leaves(params)
  rooms = _rooms([math.prod(leaf.shape) for leaf in leaves], capacity)
  entries = [
    _entries(subset, silos.path_of(key_path), leaf.shape)
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params)
  ]
  needed = max(
    -(-len(positions) // max(room, 1))
    for (positions, _), room in zip(entries, rooms, strict=True)
  )
  rounds = [_round(i, entries, leaves, rooms) for i in range(max(needed, 1))]
  where = _replicated(_shardings(leaves))
  return Patch(tuple(jax.device_put(rounds, where)), rooms)


def _rooms(sizes: Sequence[int], capacity: int) -> Rooms:
  """Returns how many components of each tensor there is room for."""
  if max(sizes) > silos.MOST:
    raise UserError('subset: a tensor has 2³² - 1 components or more')
  n = max(sum(sizes), 1)
  return tuple(
    min(size, -(-_SLACK * capacity * size // n) + _LEAST_ROOM) for size in sizes
  )


def _entries(
  subset: extraction.Subset, path: str, shape: tuple[int, ...]
) -> Entries:
  """Returns positions and values of a leaf, of all layers if it is stacked."""
  stacked, paths = silos.slice_paths(path, shape)
  layer_size = math.prod(shape[int(stacked) :])
  positions, values = [], []
  for layer, of_layer in enumerate(paths):
    if of_layer in subset.positions:
      extraction.check_entries(subset, of_layer)
      positions.append(subset.positions[of_layer] + layer * layer_size)
      values.append(subset.values[of_layer])
  if not positions:
    return np.zeros(0, np.int64), np.zeros(0, np.float32)
  return np.concatenate(positions), np.concatenate(values)


def _slots(leaves: Sequence[Any], rooms: Rooms) -> Iterator[tuple[str, slice]]:
  """Yields, for each tensor, its dtype and where in a round it has room."""
  ends: dict[str, int] = {}
  for leaf, room in zip(leaves, rooms, strict=True):
    dtype = np.dtype(leaf.dtype).name
    start = ends.get(dtype, 0)
    ends[dtype] = start + room
    yield dtype, slice(start, start + room)


def _round(
  number: int, entries: Sequence[Entries], leaves: Sequence[Any], rooms: Rooms
) -> Round:
  """Returns those of the entries that a round has room for, on the host."""
  positions: dict[str, list[np.ndarray]] = {}
  values: dict[str, list[np.ndarray]] = {}
  for (where, what), leaf, room in zip(entries, leaves, rooms, strict=True):
    dtype = np.dtype(leaf.dtype)
    part = slice(number * room, (number + 1) * room)
    of_leaf = np.full(room, math.prod(leaf.shape), np.uint32)
    of_leaf[: len(where[part])] = where[part]
    positions.setdefault(dtype.name, []).append(of_leaf)
    new = np.zeros(room, dtype)
    new[: len(what[part])] = what[part]
    values.setdefault(dtype.name, []).append(new)
  return Round(
    {dtype: np.concatenate(parts) for dtype, parts in positions.items()},
    {dtype: np.concatenate(parts) for dtype, parts in values.items()},
  )


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
    params: tree of JAX arrays, like the one that `place` was told of. They are
      donated: their memory becomes the result's.
    patch: what `place` returned.

  Returns:
    The tuned parameters, and for `revert` what was there before. Of several
    patches that share components, the last one has to be reverted first.
  """
  leaves, tree = jax.tree.flatten(params)
  take, put = _compiled(_shardings(leaves), patch.rooms)
  before = []
  for positions, values in patch.rounds:
    # Apart: a program that reads and writes a tensor would copy it.
    before.append(Round(positions, take(leaves, positions)))
    leaves = put(leaves, positions, values)
  return jax.tree.unflatten(tree, leaves), patch._replace(rounds=tuple(before))


def revert(params: PyTree, undo: Patch) -> PyTree:
  """Returns the parameters as they were before `apply_in_place`, bit for bit.

  Args:
    params: what it returned; donated.
    undo: what it returned beside them.
  """
  leaves, tree = jax.tree.flatten(params)
  _, put = _compiled(_shardings(leaves), undo.rooms)
  for positions, values in undo.rounds:
    leaves = put(leaves, positions, values)
  return jax.tree.unflatten(tree, leaves)


@functools.lru_cache(maxsize=64)
def _compiled(shardings: Shardings, rooms: Rooms) -> tuple[Any, Any]:
  """Returns `_take` and `_put` for tensors that are where they are."""
  there, everywhere = list(shardings), _replicated(shardings)

  def take(leaves: list[jax.Array], positions: ByType) -> ByType:
    hidden = sharding_types.hide(functools.partial(_take, rooms=rooms))
    return hidden(leaves, positions)

  def put(
    leaves: list[jax.Array], positions: ByType, values: ByType
  ) -> list[jax.Array]:
    hidden = sharding_types.hide(functools.partial(_put, rooms=rooms), leaves)
    return hidden(leaves, positions, values)

  return (
    jax.jit(take, in_shardings=(there, everywhere), out_shardings=everywhere),
    jax.jit(
      put,
      in_shardings=(there, everywhere, everywhere),
      out_shardings=there,
      donate_argnums=0,
    ),
  )


def _take(
  leaves: list[jax.Array], positions: ByType, rooms: Rooms
) -> dict[str, jax.Array]:
  """Returns the values at some positions, anything where there are none."""
  taken: dict[str, list[jax.Array]] = {}
  for leaf, (dtype, slot) in zip(leaves, _slots(leaves, rooms), strict=True):
    leaf = jnp.atleast_1d(leaf)
    indices = _indices(positions[dtype][slot], leaf.shape)
    taken.setdefault(dtype, []).append(leaf.at[indices].get(mode='clip'))
  return {dtype: jnp.concatenate(parts) for dtype, parts in taken.items()}


def _put(
  leaves: list[jax.Array], positions: ByType, values: ByType, rooms: Rooms
) -> list[jax.Array]:
  """Returns the tensors with other values at some positions."""
  changed = []
  for leaf, (dtype, slot) in zip(leaves, _slots(leaves, rooms), strict=True):
    vector = jnp.atleast_1d(leaf)
    indices = _indices(positions[dtype][slot], vector.shape)
    vector = vector.at[indices].set(values[dtype][slot], mode='drop')
    changed.append(vector.reshape(leaf.shape))
  return changed


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
