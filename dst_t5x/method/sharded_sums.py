"""Sums over tensors that lie on many devices, added up where they lie.

What a reduction of a sharded tensor sends between devices is up to XLA, and it
may be rows of the tensor. Here each device reduces what it has of all tensors,
and one sum over all devices joins the results.

How tensors are sharded is known only when XLA divides the program among the
devices, long after it was traced; `custom_partitioning` lets us have a say
then. So nobody has to tell, and a program for one device stays as it is.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from jax.sharding import Sharding
import numpy as np

PyTree = Any

_AXIS = 'device'  # All devices in a row.


class Part(NamedTuple):
  """Which part of a tensor a device has.

  Attributes:
    start: int32 [axes], where along each axis the part begins.
    counts: bool [], whether it is this device that counts the part; others may
      have the same.
  """

  start: jax.Array
  counts: jax.Array


# Tensors or parts of them, which parts these are, operands -> tree of integers.
Reduce = Callable[[Sequence[PyTree], Sequence[Part | None], PyTree], PyTree]


def add_up(
  reduce: Reduce, tensors: Sequence[PyTree], operands: PyTree
) -> PyTree:
  """Returns the sum over devices of what each makes of its parts.

  Args:
    reduce: what a device does. The results for all parts that count have to
      add up to that for the whole tensors. It may close over no array.
    tensors: groups of arrays of one shape, which are divided alike.
    operands: more arrays; each device gets them whole.
  """

  def whole(tensors: Sequence[PyTree], operands: PyTree) -> PyTree:
    parts = [None] * len(tensors)
    return reduce(tensors, parts, operands)

  def partition(_: Any, arguments: PyTree, result: PyTree) -> Any:
    tensors, operands = arguments
    shardings = [_sharding(group) for group in tensors]
    maps = [
      sharding.devices_indices_map(_first(group).shape)
      for sharding, group in zip(shardings, tensors, strict=True)
    ]
    mesh = Mesh(np.array(list(maps[0])), (_AXIS,))
    is_divided = any(not sharding.is_fully_replicated for sharding in shardings)

    def local(tensors: Sequence[PyTree], operands: PyTree) -> PyTree:
      device = lax.axis_index(_AXIS)
      parts = [_part(list(indices.values()), device) for indices in maps]
      return lax.psum(reduce(tensors, parts, operands), _AXIS)

    everywhere = NamedSharding(mesh, PartitionSpec())
    return (
      mesh,
      local if is_divided else whole,
      jax.tree.map(lambda _: everywhere, result),
      (
        [
          jax.tree.map(lambda _, s=sharding: s, group)
          for sharding, group in zip(shardings, tensors, strict=True)
        ],
        jax.tree.map(lambda _: everywhere, operands),
      ),
    )

  partitioned = custom_partitioning(whole)
  partitioned.def_partition(partition)
  return partitioned(list(tensors), operands)


def _first(group: PyTree) -> Any:
  return jax.tree.leaves(group)[0]


def _sharding(group: PyTree) -> Sharding:
  """Returns how to divide arrays of one shape: as the one in most parts is."""

  def size_of_part(array: Any) -> int:
    return int(np.prod(array.sharding.shard_shape(array.shape)))

  return min(jax.tree.leaves(group), key=size_of_part).sharding


def _part(indices: Sequence[tuple[slice, ...]], device: jax.Array) -> Part:
  """Returns the part of one of the devices that have the parts `indices`."""
  starts = [tuple(index.start or 0 for index in part) for part in indices]
  counts = [starts.index(start) == i for i, start in enumerate(starts)]
  shape = len(starts), len(starts[0])
  return Part(
    jnp.asarray(np.array(starts, np.int32).reshape(shape))[device],
    jnp.asarray(counts)[device],
  )
