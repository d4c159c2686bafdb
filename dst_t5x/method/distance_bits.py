"""Keys: distances of all components of a tree, as integers that are compared.

A key is a uint32, the bit pattern of a non-negative float32, which sorts as the
float does. Keys are computed wherever they are needed and never stored.

XLA:CPU compiles a kernel once for all tensors of a shape, as long as nothing in
its code tells them apart. So what differs between them is made to be data: a
table with a row for each slice, of which each tensor takes its own.
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

# θ′, θ⁰, positions in the slice, a number for each slice -> keys. All have as
# many axes as the tensor, and all but θ are uint32. It has to be the same
# object for all tensors, or JAX traces it for each of them.
Compute = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def random(
  new: jax.Array, seed: jax.Array, position: jax.Array, salt: jax.Array
) -> jax.Array:
  """Computes the keys of the random-mask baseline; see `Compute`."""
  del new, seed
  return distances.random_scores(position, salt)


@functools.cache
def measured(distance: str, is_normalized: bool) -> Compute:
  """Returns what computes keys from a distance.

  Args:
    distance: a name in `distances.DISTANCES`.
    is_normalized: whether the slices' numbers are the bit patterns of what
      distances are divided by.
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
  """Returns uint32 [slices], numbers that tell slices and runs apart."""
  names = [
    f'{random_seed} {path}'
    for leaf, shape in zip(layout.leaves, shapes, strict=True)
    for path in tree_paths.slice_paths(leaf.path, shape)[1]
  ]
  return jnp.array([zlib.crc32(name.encode()) for name in names], jnp.uint32)


class Tree(NamedTuple):
  """Parameters, and how to compute their keys.

  Attributes:
    layout: the silos.
    compute: what computes the keys of a tensor.
    new: θ′, the tensors of the layout's leaves.
    seed: θ⁰, likewise.
    numbers: uint32 [slices], of all slices of all tensors one after the other:
      what else their keys depend on.
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
  """The slices of all tensors, one after the other.

  Attributes:
    layout: to which silos they belong.
    shapes: of the tensors.
  """

  layout: silos.Layout
  shapes: tuple[tuple[int, ...], ...]

  @functools.cached_property
  def of_leaf(self) -> list[range]:
    """Which slices are those of each leaf."""
    counts = [len(leaf.silos) for leaf in self.layout.leaves]
    ends = np.cumsum(counts).tolist()
    return [range(end - n, end) for n, end in zip(counts, ends, strict=True)]

  @functools.cached_property
  def silo(self) -> np.ndarray:
    """[slices] The index of each slice's silo."""
    return np.array([i for leaf in self.layout.leaves for i in leaf.silos])

  @functools.cached_property
  def strides(self) -> list[tuple[int, ...]]:
    """For each leaf, what a step along an axis adds to the position."""
    strides = []
    for leaf, shape in zip(self.layout.leaves, self.shapes, strict=True):
      steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
      strides.append(tuple([0] * leaf.stacked + steps[leaf.stacked :]))
    return strides

  def positions(self, before: jax.Array) -> jax.Array:
    """Returns uint64 [silos, …] positions as uint32 [slices, …] in slices."""
    offset = np.array(
      [offset for leaf in self.layout.leaves for offset in leaf.offsets],
      np.uint64,
    ).reshape(-1, *[1] * (before.ndim - 1))
    before = jnp.maximum(before[self.silo], offset) - offset
    return jnp.minimum(before, np.uint64(silos.MOST)).astype(jnp.uint32)


def indices(which: Sequence[int], size: int) -> np.ndarray:
  """Returns the indices `which` of rows, for XLA to take as data.

  They end with one that is not wanted if there is only one: XLA would make
  that a part of its code.
  """
  decoy = [(which[0] + 1) % size] if len(set(which)) == 1 else []
  return np.array([*which, *decoy], np.uint32)


def rows(table: jax.Array, which: Sequence[int]) -> jax.Array:
  """Returns rows of a table, or components of a vector."""
  return table[indices(which, len(table))][: len(which)]


def column(values: jax.Array, ndim: int) -> jax.Array:
  """Returns [slices] in a shape that goes with a tensor of `ndim` axes."""
  if len(values) == 1:
    return values.reshape(())
  return values.reshape(-1, *[1] * (ndim - 1))


def positions(
  shape: tuple[int, ...],
  strides: Sequence[int],
  start: jax.Array | None = None,
) -> jax.Array:
  """Returns where in its slice each component is.

  Args:
    shape: of a tensor, or of a part of it.
    strides: see `Slices`.
    start: int32 [axes], where along each axis the part begins.

  Returns:
    uint32 [*shape].
  """
  position = jnp.zeros(shape, jnp.uint32)
  for axis, stride in enumerate(strides):
    along = lax.broadcasted_iota(jnp.uint32, shape, axis)
    if start is not None:
      along = along + start[axis].astype(jnp.uint32)
    position = position + along * jnp.uint32(stride)
  return position


def of_tensors(tree: Tree) -> list[jax.Array]:
  """Returns the keys of all tensors, uint32 of their shapes."""
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
  """Returns bool, of each tensor's shape: which components stay free."""
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
  """Returns what a tensor keeps; the table is uint32 [slices, 3]."""
  # Nothing but elementwise work on the tensor: a reshape in between, and XLA
  # would not write the result in the tensor's place.
  number, threshold, before = (column(x, new.ndim) for x in table.T)
  position = positions(new.shape, strides)
  key = compute(new, seed, position, number)
  return (key > threshold) | ((key == threshold) & (position < before))
