"""Reads and writes of a subset's entries in parameters on the devices.

Compiled for tensors of some shardings, and for some rooms: how many entries of
each tensor one round has room for. See `on_device`.
"""

import functools
from typing import Any, NamedTuple

import jax
from jax import sharding as jax_sharding
import jax.numpy as jnp

from dst_t5x.method import sharding_types

Array = jax.Array
Rooms = tuple[int, ...]
Shardings = tuple[jax_sharding.Sharding, ...]


class Arrays(NamedTuple):
  """A subset's entries on the devices.

  Attributes:
    positions: uint32 [capacity], in the flattened tensors, tensor by tensor.
    values: uint32 [capacity], the bits of the subset's values.
    seeds: uint32 [capacity], the bits of the seed's values.
    starts: int32 [tensors + 1], where each tensor's entries begin, and the end.
  """

  positions: Array
  values: Array
  seeds: Array
  starts: Array


def replicated(shardings: Shardings) -> jax_sharding.Sharding:
  """Returns the sharding of what all devices of the parameters have whole."""
  first = shardings[0]
  if isinstance(first, jax_sharding.NamedSharding):
    return jax_sharding.NamedSharding(first.mesh, jax_sharding.PartitionSpec())
  return first


class Programs(NamedTuple):
  """Compiled functions for tensors of some shardings and rooms.

  Attributes:
    write: tensors, arrays in turn, round -> the tensors, whose memory it takes.
    read: tensors, arrays, round -> the arrays with the tensors' values.
  """

  write: Any
  read: Any


@functools.lru_cache(maxsize=256)
def programs(shardings: Shardings, rooms: Rooms) -> Programs:
  """Returns the functions; equal arguments share what is compiled."""
  there, everywhere = list(shardings), replicated(shardings)
  views = tuple(_View(s.is_fully_replicated) for s in shardings)

  def write(
    leaves: list[Array], in_turn: list[Arrays], round_: Array
  ) -> list[Array]:
    function = functools.partial(_written, rooms=rooms, views=views)
    return sharding_types.hide(function, leaves)(leaves, in_turn, round_)

  def read(leaves: list[Array], arrays: Arrays, round_: Array) -> Arrays:
    function = functools.partial(_with_seeds, rooms=rooms, views=views)
    return sharding_types.hide(function, arrays)(leaves, arrays, round_)

  inputs = there, everywhere, everywhere
  return Programs(
    jax.jit(write, in_shardings=inputs, out_shardings=there, donate_argnums=0),
    jax.jit(read, in_shardings=inputs, out_shardings=everywhere),
  )


class _View(NamedTuple):
  """How the components of a tensor are reached by their positions.

  Attributes:
    is_flat: through the flattened tensor, which is faster; but flattening a
      sharded tensor would gather it.
  """

  is_flat: bool

  def of(self, leaf: Array) -> Array:
    """Returns what is indexed."""
    return leaf.reshape(-1) if self.is_flat else jnp.atleast_1d(leaf)

  def indices(self, positions: Array, view: Array) -> tuple[Array, ...]:
    """Returns the index along each axis, [room].

    The tensor's size becomes an index beyond the first axis.
    """
    if self.is_flat:
      return (positions,)
    indices = []
    for size in reversed(view.shape[1:]):
      # Of a tensor of no component there is no position either.
      indices.append(positions % max(size, 1))
      positions = positions // max(size, 1)
    return tuple(i.astype(jnp.int32) for i in (positions, *reversed(indices)))


class _Part(NamedTuple):
  """What a tensor has of a round: a slice of the vectors, and what is its own.

  Near the vectors' end the slice begins before what is the tensor's own.
  """

  begin: Array
  length: int
  own: Array

  def of(self, vector: Array) -> Array:
    return jax.lax.dynamic_slice_in_dim(vector, self.begin, self.length)


def _part(arrays: Arrays, i: int, room: int, round_: Array) -> _Part:
  capacity = len(arrays.positions)
  begin = arrays.starts[i] + round_ * room
  end = jnp.minimum(arrays.starts[i + 1], begin + room)
  length = min(room, capacity)
  first = jnp.minimum(begin, capacity - length)
  here = first + jnp.arange(length, dtype=jnp.int32)
  return _Part(first, length, (begin <= here) & (here < end))


def _unsigned(dtype: Any) -> Any:
  return jnp.dtype(f'uint{8 * jnp.dtype(dtype).itemsize}')


def _written(
  leaves: list[Array],
  in_turn: list[Arrays],
  round_: Array,
  rooms: Rooms,
  views: tuple[_View, ...],
) -> list[Array]:
  changed = []
  each = zip(leaves, rooms, views, strict=True)
  for i, (leaf, room, view) in enumerate(each):
    tensor = view.of(leaf)
    for arrays in in_turn:
      part = _part(arrays, i, room, round_)
      # Beyond the tensor's end nothing is written.
      positions = part.of(arrays.positions)
      where = jnp.where(part.own, positions, jnp.uint32(leaf.size))
      bits = part.of(arrays.values).astype(_unsigned(leaf.dtype))
      values = jax.lax.bitcast_convert_type(bits, leaf.dtype)
      indices = view.indices(where, tensor)
      tensor = tensor.at[indices].set(values, mode='drop')
    changed.append(tensor.reshape(leaf.shape))
  return changed


def _with_seeds(
  leaves: list[Array],
  arrays: Arrays,
  round_: Array,
  rooms: Rooms,
  views: tuple[_View, ...],
) -> Arrays:
  seeds = arrays.seeds
  each = zip(leaves, rooms, views, strict=True)
  for i, (leaf, room, view) in enumerate(each):
    part = _part(arrays, i, room, round_)
    tensor = view.of(leaf)
    indices = view.indices(part.of(arrays.positions), tensor)
    found = tensor.at[indices].get(mode='clip')
    bits = jax.lax.bitcast_convert_type(found, _unsigned(leaf.dtype))
    own = jnp.where(part.own, bits.astype(jnp.uint32), part.of(seeds))
    seeds = jax.lax.dynamic_update_slice_in_dim(seeds, own, part.begin, 0)
  return arrays._replace(seeds=seeds)
