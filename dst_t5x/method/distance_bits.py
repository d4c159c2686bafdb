"""Distances of all components of a tree, as bit patterns.

A bit pattern is a uint32 that sorts like the non-negative float32 that it
encodes. Distances are recomputed wherever they are needed, and never stored.

XLA:CPU compiles one kernel for all tensors of a shape if the kernels' code is
identical. What differs between tensors is therefore passed as data: a table
with a row for each slice, from which each tensor takes its rows.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import NamedTuple
import zlib

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from dst_t5x.core import tree_paths
from dst_t5x.method import distances
from dst_t5x.method import silos
from dst_t5x.method import thresholds

# (θ′, θ⁰, positions in the slice, a number for each slice) -> bit patterns. All
# have as many axes as the tensor, and all but θ′ and θ⁰ are uint32. All tensors
# must share one function object, because JAX traces each object once.
Compute = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def random(
  new: jax.Array, seed: jax.Array, position: jax.Array, salt: jax.Array
) -> jax.Array:
  """Returns the scores of the random-mask baseline; see `Compute`."""
  del new, seed
  return distances.random_scores(position, salt)


@functools.cache
def measured(distance: str, is_normalized: bool) -> Compute:
  """Returns the function that computes a distance's bit patterns.

  Args:
    distance: a name in `distances.DISTANCES`.
    is_normalized: whether to divide by the slices' numbers, which are then bit
      patterns of float32.
  """

  def compute(
    new: jax.Array, seed: jax.Array, position: jax.Array, number: jax.Array
  ) -> jax.Array:
    del position
    result = distances.DISTANCES[distance](new, seed)
    if is_normalized:
      result = result / lax.bitcast_convert_type(number, jnp.float32)
    return lax.bitcast_convert_type(result, jnp.uint32)

  return compute


def salts(
  layout: silos.Layout, shapes: Sequence[tuple[int, ...]], random_seed: int
) -> jax.Array:
  """Returns hashes of slices' paths and the random seed, uint32 [slices]."""
  names = [
    f'{random_seed} {path}'
    for leaf, shape in zip(layout.leaves, shapes, strict=True)
    for path in tree_paths.slice_paths(leaf.path, shape)[1]
  ]
  return jnp.array([zlib.crc32(name.encode()) for name in names], jnp.uint32)


class Tree(NamedTuple):
  """Parameters, and how to compute their distances.

  Attributes:
    layout: the silos.
    compute: computes the bit patterns of a tensor's distances.
    new: θ′, one tensor for each leaf of the layout.
    seed: θ⁰, one tensor for each leaf of the layout.
    numbers: uint32 [slices], the number that `compute` gets for each slice, for
      the slices of all tensors in order.
  """

  layout: silos.Layout
  compute: Compute
  new: Sequence[jax.Array]
  seed: Sequence[jax.Array]
  numbers: jax.Array

  @property
  def slices(self) -> 'Slices':
    """The slices of all tensors."""
    return Slices(self.layout, tuple(tensor.shape for tensor in self.new))


@dataclasses.dataclass(frozen=True)
class Slices:
  """The slices of all tensors, in order.

  Attributes:
    layout: the silos that the slices belong to.
    shapes: the tensors' shapes.
  """

  layout: silos.Layout
  shapes: tuple[tuple[int, ...], ...]

  @functools.cached_property
  def of_leaf(self) -> list[range]:
    """The indices of each leaf's slices."""
    counts = [len(leaf.silos) for leaf in self.layout.leaves]
    ends = np.cumsum(counts).tolist()
    return [range(end - n, end) for n, end in zip(counts, ends, strict=True)]

  @functools.cached_property
  def silo(self) -> np.ndarray:
    """The index of each slice's silo, [slices]."""
    silos_of = [i for leaf in self.layout.leaves for i in leaf.silos]
    return np.array(silos_of, np.int32)

  @functools.cached_property
  def strides(self) -> list[tuple[int, ...]]:
    """For each leaf, how much one step along each axis adds to the position."""
    strides = []
    for leaf, shape in zip(self.layout.leaves, self.shapes, strict=True):
      steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
      strides.append(tuple([0] * leaf.stacked + steps[leaf.stacked :]))
    return strides

  def positions(self, before: jax.Array) -> jax.Array:
    """Converts positions in silos to positions in slices.

    Args:
      before: uint64 [silos, …].

    Returns:
      uint32 [slices, …], clipped to the range from 0 to `silos.MOST`.
    """
    offset = np.array(
      [offset for leaf in self.layout.leaves for offset in leaf.offsets],
      np.uint64,
    ).reshape(-1, *[1] * (before.ndim - 1))
    before = jnp.maximum(before[self.silo], offset) - offset
    return jnp.minimum(before, np.uint64(silos.MOST)).astype(jnp.uint32)


def indices(which: Sequence[int], size: int) -> np.ndarray:
  """Returns row indices as an array that XLA treats as data.

  A single index gets a second, unused one appended. XLA would otherwise compile
  it into the code.
  """
  decoy = [(which[0] + 1) % size] if len(set(which)) == 1 else []
  return np.array([*which, *decoy], np.uint32)


def rows(table: jax.Array, which: Sequence[int]) -> jax.Array:
  """Returns the rows `which` of a table, or components of a vector."""
  return table[indices(which, len(table))][: len(which)]


def column(values: jax.Array, ndim: int) -> jax.Array:
  """Returns values [slices] so that they broadcast to `ndim` axes."""
  if len(values) == 1:
    return values.reshape(())
  return values.reshape(-1, *[1] * (ndim - 1))


def positions(
  shape: tuple[int, ...],
  strides: Sequence[int],
  start: jax.Array | None = None,
) -> jax.Array:
  """Returns each component's position in its slice, uint32 [*shape].

  Args:
    shape: the shape of a tensor, or of a part of it.
    strides: see `Slices`.
    start: int32 [axes], where the part begins along each axis; None for the
      whole tensor.
  """
  position = jnp.zeros(shape, jnp.uint32)
  for axis, stride in enumerate(strides):
    along = lax.broadcasted_iota(jnp.uint32, shape, axis)
    if start is not None:
      along = along + start[axis].astype(jnp.uint32)
    position = position + along * jnp.uint32(stride)
  return position


def of_tensors(tree: Tree) -> list[jax.Array]:
  """Returns the bit patterns of distances, a uint32 array for each tensor."""
  return [
    tree.compute(
      new,
      seed,
      positions(new.shape, strides),
      column(rows(tree.numbers, which), new.ndim),
    )
    for new, seed, strides, which in zip(
      tree.new,
      tree.seed,
      tree.slices.strides,
      tree.slices.of_leaf,
      strict=True,
    )
  ]


def kept(tree: Tree, cut: thresholds.Cut) -> list[jax.Array]:
  """Returns which components stay free, one bool array for each tensor."""
  slices = tree.slices
  with jax.enable_x64(True):
    before = slices.positions(cut.before.astype(jnp.uint64))
    threshold = cut.threshold[slices.silo]
    table = jnp.stack([tree.numbers, threshold, before], axis=1)
  return [
    _kept(tree.compute, strides, new, seed, rows(table, which))
    for new, seed, strides, which in zip(
      tree.new, tree.seed, slices.strides, slices.of_leaf, strict=True
    )
  ]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _kept(
  compute: Compute,
  strides: tuple[int, ...],
  new: jax.Array,
  seed: jax.Array,
  table: jax.Array,
) -> jax.Array:
  """Returns the mask of a tensor's free components, bool.

  The columns of the table, uint32 [slices, 3], are number, threshold and the
  position before which ties are kept.
  """
  # All work on the tensor is elementwise. After a reshape, XLA would not write
  # the result in place.
  number, threshold, before = (column(x, new.ndim) for x in table.T)
  position = positions(new.shape, strides)
  distance = compute(new, seed, position, number)
  return (distance > threshold) | (
    (distance == threshold) & (position < before)
  )
