"""How the networks' arrays are divided among the devices of a mesh.

Arrays have logical names of axes; `engine.partitioning` says which axes of the
mesh divide these. Some axes of the mesh divide both the rows of a batch and the
matrices (ZeRO-3). There, devices that have different rows share the matrices,
and exchange parts of them, or parts of the rows, when they compute.
"""

from collections.abc import Sequence

from flax.linen import partitioning
import jax
from jax import lax
from jax.sharding import PartitionSpec

Array = jax.Array
# Axes of the mesh that divide an axis of an array.
_Axes = tuple[str, ...]


def constrain(x: Array, *axes: str | None) -> Array:
  """Returns `x` with the sharding of these logical names of axes."""
  return partitioning.with_sharding_constraint(x, axes)


def gather(matrix: Array, *axes: str | None) -> Array:
  """Returns a matrix that devices with different rows have in common.

  Devices that share a matrix gather it, in its type. Without it, XLA may
  gather it in another type, or send the activations instead.

  Args:
    matrix: as the mesh divides it.
    *axes: its logical names of axes.
  """
  shared = _shared('embed')
  if not shared:
    return matrix
  divided = [_divides(name) for name in axes]
  # As it is, first: otherwise what came before it, in another type, would be
  # gathered.
  matrix = _divide(matrix, divided)
  return _divide(matrix, [_without(axes, shared) for axes in divided])


def whole_rows(x: Array) -> Array:
  """Returns `x` `[batch, …]`, divided by nothing but the axes of the batch.

  Where other axes of the mesh divide the network, XLA may divide `x`, too, and
  send parts of it again and again.
  """
  mesh = jax.sharding.get_abstract_mesh()
  rows = _divides('batch')
  if mesh.empty or mesh.size == _size(rows):
    return x
  return lax.with_sharding_constraint(x, PartitionSpec(rows or None))


def exchanges(features: int, rows: int) -> _Axes:
  """Returns the axes of the mesh that divide both rows and columns of a table.

  Args:
    features: the number of columns.
    rows: the number of rows of the batch.

  Returns:
    No axes if the table or the batch is not divided evenly.
  """
  shared = _shared('embed')
  if features % _size(shared) or rows % _size(_divides('batch')):
    return ()
  return shared


def with_rows_of_all(x: Array, shared: _Axes) -> Array:
  """Returns `x` `[batch, …]` with the rows of devices that differ in `shared`.

  All of them get all of these rows.
  """
  rows = _without(_divides('batch'), shared) or None
  return lax.with_sharding_constraint(x, PartitionSpec(rows))


def with_columns(x: Array, shared: _Axes) -> Array:
  """Returns `x` `[batch, …, features]`, columns divided by `shared`."""
  rows = _without(_divides('batch'), shared) or None
  between = (None,) * (x.ndim - 2)
  return lax.with_sharding_constraint(x, PartitionSpec(rows, *between, shared))


def _shared(name: str) -> _Axes:
  """Returns the axes that divide rows and a logical axis of matrices."""
  rows = _divides('batch')
  return tuple(axis for axis in _divides(name) if axis in rows)


def _divides(name: str | None) -> _Axes:
  """Returns the axes of the current mesh that divide a logical axis."""
  mesh = jax.sharding.get_abstract_mesh()
  spec = partitioning.logical_to_mesh_axes((name,)) or (None,)
  axes = (spec[0],) if isinstance(spec[0], str) else spec[0] or ()
  return tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1)


def _divide(x: Array, divided: Sequence[_Axes]) -> Array:
  """Returns `x`, each of whose axes is divided by these, or is whole.

  It is whole if it cannot be divided evenly; see `Partitioner.parameters`.
  """
  spec = (
    axes if axes and size % _size(axes) == 0 else None
    for axes, size in zip(divided, x.shape, strict=True)
  )
  return lax.with_sharding_constraint(x, PartitionSpec(*spec))


def _without(axes: _Axes, others: _Axes) -> _Axes:
  return tuple(axis for axis in axes if axis not in others)


def _size(axes: _Axes) -> int:
  shape = jax.sharding.get_abstract_mesh().shape
  size = 1
  for axis in axes:
    size *= shape[axis]
  return size
