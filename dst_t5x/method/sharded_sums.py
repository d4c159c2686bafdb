"""Sums over sharded tensors that send only sums between devices.

XLA decides what a reduction of a sharded tensor sends, and it may send rows of
the tensor. Here each device reduces its parts of all tensors, and one sum over
all devices joins the results.

Shardings are known only when XLA partitions the program, long after tracing.
`custom_partitioning` calls us then. Callers need not pass shardings, and a
program for one device is unchanged.
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
  """The part of a tensor that a device has.

  Attributes:
    start: int32 [axes], where the part begins along each axis.
    counts: bool [], whether this device counts the part. Exactly one of the
      devices that have the same part does.
  """

  start: jax.Array
  counts: jax.Array


# (tensors or parts of them, the parts, operands) -> tree of integers.
Reduce = Callable[[Sequence[PyTree], Sequence[Part | None], PyTree], PyTree]


def add_up(
  reduce: Reduce, tensors: Sequence[PyTree], operands: PyTree
) -> PyTree:
  """Returns the sum over devices of `reduce` of each device's parts.

  Args:
    reduce: reduces a device's parts. Its results for the parts that count must
      add up to its result for the whole tensors. It must not close over arrays.
    tensors: groups of arrays; arrays of a group have one shape and are sharded
      alike.
    operands: more arrays, replicated on each device.
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
  """Returns the finest sharding among a group's arrays."""

  def size_of_part(array: Any) -> int:
    return int(np.prod(array.sharding.shard_shape(array.shape)))

  return min(jax.tree.leaves(group), key=size_of_part).sharding


def _part(indices: Sequence[tuple[slice, ...]], device: jax.Array) -> Part:
  """Returns a device's part, where `indices` has the parts of all devices."""
  starts = [tuple(index.start or 0 for index in part) for part in indices]
  counts = [starts.index(start) == i for i, start in enumerate(starts)]
  shape = len(starts), len(starts[0])
  return Part(
    jnp.asarray(np.array(starts, np.int32).reshape(shape))[device],
    jnp.asarray(counts)[device],
  )
