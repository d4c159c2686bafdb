"""A subset as a list of components, on the devices.

A method whose subset rarely changes works on the list instead of on the whole
parameters: it gathers the gradients and values of the listed components, lets
the optimizer update these vectors, and scatters the result. The optimizer's
state is then as small as the list.

The list is ordered by silo, and within a silo by position. A silo's stretch of
the list has a fixed length, its room. Entries that are not used are at the end
of the stretch.
"""

from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from dst_t5x.method import distance_bits
from dst_t5x.method import pieces
from dst_t5x.method import set_bits
from dst_t5x.method import sharding_types
from dst_t5x.method import silos

PyTree = Any


class Entries(NamedTuple):
  """The listed components.

  Attributes:
    positions: uint32 [room], each component's position in its slice.
    starts: int32 [slices], where each slice's entries begin in the list.
    counts: int32 [slices], how many entries each slice has.
  """

  positions: jax.Array
  starts: jax.Array
  counts: jax.Array


class _Rows(NamedTuple):
  """A slice's rows of packed words; a row is the tensor's last axis.

  Attributes:
    first: the index of the slice's first word among those of all slices.
    per_row: words for each row.
    width: components of each row.
  """

  first: int
  per_row: int
  width: int


class _Place(NamedTuple):
  """A slice that can have entries.

  Attributes:
    number: the slice's number among all.
    tensor: the number of its tensor.
    layer: its layer, int32 [], if the tensor is stacked.
    most: the most entries that it can have.
  """

  number: int
  tensor: int
  layer: Any
  most: int


@dataclasses.dataclass(frozen=True)
class Frame:
  """What is fixed about the lists of a method: the silos and their rooms.

  Attributes:
    slices: the slices of all tensors, and their silos.
    rooms: [silos], the most entries of each silo.
  """

  slices: distance_bits.Slices
  rooms: tuple[int, ...]

  @functools.cached_property
  def room(self) -> int:
    """The length of the list."""
    return sum(self.rooms)

  @functools.cached_property
  def borders(self) -> np.ndarray:
    """Where each silo's stretch begins, and the list's length; [silos + 1]."""
    return np.cumsum([0, *self.rooms])

  @functools.cached_property
  def silo_of_entry(self) -> np.ndarray:
    """The silo of each entry of a list, [room]."""
    return np.repeat(np.arange(len(self.rooms), dtype=np.int32), self.rooms)

  @functools.cached_property
  def order(self) -> np.ndarray:
    """The slices in the order of the list, [slices]."""
    leaves = self.slices.layout.leaves
    offsets = np.array([i for leaf in leaves for i in leaf.offsets])
    return np.lexsort((offsets, self.slices.silo))

  @functools.cached_property
  def _rows(self) -> list[_Rows]:
    """The rows of each slice, in the order of the list."""
    shapes = [
      shape[int(leaf.stacked) :]
      for leaf, shape in zip(
        self.slices.layout.leaves, self.slices.shapes, strict=True
      )
      for _ in leaf.silos
    ]
    rows, first = [], 0
    for i in self.order:
      width = shapes[i][-1] if shapes[i] else 1
      per_row = -(-width // 32)
      rows.append(_Rows(first, per_row, width))
      first += math.prod(shapes[i][:-1]) * per_row
    return rows

  def empty(self) -> Entries:
    """Returns a list without entries."""
    n = len(self.slices.silo)
    return Entries(
      positions=jnp.zeros(self.room, jnp.uint32),
      starts=jnp.asarray(self.borders[self.slices.silo], jnp.int32),
      counts=jnp.zeros(n, jnp.int32),
    )

  def of_masks(self, masks: PyTree) -> Entries:
    """Returns the list of the components that masks select.

    Args:
      masks: a tree of bool, like the parameters. No silo may have more set
        components than its room.
    """
    return sharding_types.hide(self._of_masks)(masks)

  def _of_masks(self, masks: PyTree) -> Entries:
    packed = self._packed(jax.tree.leaves(masks))
    running = set_bits.ends(packed)
    rows = self._rows
    firsts = np.array([row.first for row in rows])
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), running])
    of_slice = before[firsts]  # Set bits before each slice, in list order.
    silo = self.slices.silo[self.order]
    first_of_silo = np.searchsorted(silo, np.arange(len(self.rooms)))
    # Set bits before each silo; one past the end for silos without slices.
    of_silo = jnp.append(of_slice, before[-1])[first_of_silo]
    nth = np.arange(self.room) - np.repeat(self.borders[:-1], self.rooms)
    word, bit = set_bits.find(
      packed,
      running,
      jnp.asarray(nth, jnp.int32) + self._of_entries(of_silo),
    )
    which = jnp.searchsorted(jnp.asarray(firsts), word, side='right') - 1
    per_row, width = (
      jnp.asarray(np.array([getattr(row, name) for row in rows], np.uint32))
      for name in ('per_row', 'width')
    )
    in_slice = (word - jnp.asarray(firsts)[which]).astype(jnp.uint32)
    row, column = in_slice // per_row[which], in_slice % per_row[which]
    starts = self.borders[silo] + of_slice - of_silo[silo]
    counts = jnp.diff(jnp.append(of_slice, before[-1]))
    back = np.argsort(self.order)
    return Entries(
      positions=row * width[which] + 32 * column + bit,
      starts=starts[back].astype(jnp.int32),
      counts=counts[back],
    )

  def _packed(self, masks: Sequence[jax.Array]) -> jax.Array:
    """Returns the words of all slices in the order of the list, uint32."""
    flat: list[jax.Array] = []
    for leaf, mask in zip(self.slices.layout.leaves, masks, strict=True):
      mask = mask if mask.ndim > int(leaf.stacked) else mask[..., None]
      packed = _replicated(set_bits.words(mask))
      flat += list(packed.reshape(len(leaf.silos), -1))
    return jnp.concatenate([flat[i] for i in self.order])

  def masks(self, entries: Entries, like: PyTree) -> PyTree:
    """Returns the tree of bool masks of the listed components."""
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, bool), like)
    return self.scatter(nothing, entries, jnp.ones(self.room, bool))

  def is_used(self, entries: Entries) -> jax.Array:
    """Returns which entries of the list are used, bool [room]."""
    of_silo = self.counts_of_silos(entries)
    nth = np.arange(self.room) - np.repeat(self.borders[:-1], self.rooms)
    return jnp.asarray(nth, jnp.int32) < self._of_entries(of_silo)

  def _of_entries(self, of_silo: jax.Array) -> jax.Array:
    """Returns for each entry of a list the number of its silo, [room]."""
    if len(self.rooms) == 1:  # XLA would evaluate `repeat` as it compiles.
      return jnp.broadcast_to(of_silo, self.room)
    rooms = np.array(self.rooms)
    return jnp.repeat(of_silo, rooms, total_repeat_length=self.room)

  def counts_of_silos(self, entries: Entries) -> jax.Array:
    """Returns how many entries each silo has, int32 [silos]."""
    nothing = jnp.zeros(len(self.rooms), jnp.int32)
    return nothing.at[self.slices.silo].add(entries.counts)

  def gather(self, tree: PyTree, entries: Entries) -> jax.Array:
    """Returns the listed components of a tree, float32 [room]; 0 if unused."""
    return sharding_types.hide(self._gather)(tree, entries)

  def _gather(self, tree: PyTree, entries: Entries) -> jax.Array:
    gathered = jnp.zeros(self._padded, jnp.float32)
    padded = self._pad(entries.positions)
    leaves = jax.tree.leaves(tree)
    for place, stretch in zip(
      self._places, self._stretches_of(entries), strict=True
    ):
      gathered = pieces.gather(
        place.most,
        leaves[place.tensor],
        place.layer,
        *stretch,
        padded,
        gathered,
      )
    return gathered[: self.room]

  def scatter(
    self, tree: PyTree, entries: Entries, values: jax.Array
  ) -> PyTree:
    """Returns a tree with the listed components replaced.

    Args:
      tree: a tree like the parameters.
      entries: the list.
      values: [room], the new values; those of unused entries are ignored.
    """
    scatter = sharding_types.hide(self._scatter, results=tree)
    return scatter(tree, entries, values)

  def _scatter(
    self, tree: PyTree, entries: Entries, values: jax.Array
  ) -> PyTree:
    leaves = jax.tree.leaves(tree)
    positions, values = self._pad(entries.positions), self._pad(values)
    for place, stretch in zip(
      self._places, self._stretches_of(entries), strict=True
    ):
      leaves[place.tensor] = pieces.scatter(
        place.most,
        leaves[place.tensor],
        place.layer,
        *stretch,
        positions,
        values,
      )
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)

  def _stretches_of(
    self, entries: Entries
  ) -> list[tuple[jax.Array, jax.Array]]:
    """Returns where each place's entries begin, and their number; int32 []."""
    # XLA:CPU would compile an index into the code of each place, and could not
    # share the code among tensors of a shape.
    return lax.optimization_barrier(
      [
        (entries.starts[place.number], entries.counts[place.number])
        for place in self._places
      ]
    )

  @functools.cached_property
  def _places(self) -> list[_Place]:
    """The slices that can have entries."""
    found, number = [], 0
    for n, leaf in enumerate(self.slices.layout.leaves):
      size = math.prod(self.slices.shapes[n][int(leaf.stacked) :])
      for layer, silo in enumerate(leaf.silos):
        most = min(self.rooms[silo], size)
        if most:
          which = np.int32(layer) if leaf.stacked else None
          found.append(_Place(number, n, which, most))
        number += 1
    return found

  @property
  def _padded(self) -> int:
    return self.room + min(pieces.MOST, self.room)

  def _pad(self, values: jax.Array) -> jax.Array:
    """Returns a list with room for a whole piece after the last entry."""
    return jnp.pad(values, (0, self._padded - self.room))

  def split(self, values: jax.Array) -> dict[str, jax.Array]:
    """Returns name of a silo's stretch -> its values, [room of the silo].

    The names are numbers. A silo's own name could look like that of a stacked
    tensor, which optimizers treat differently.
    """
    return {
      name: values[start : start + n]
      for name, (start, n) in self.stretches.items()
    }

  @property
  def stretches(self) -> dict[str, tuple[int, int]]:
    """Name of each silo's stretch -> where it begins, and its length."""
    starts = self.borders.tolist()
    return {f's{i:05}': (starts[i], n) for i, n in enumerate(self.rooms) if n}

  def join(self, vectors: dict[str, jax.Array]) -> jax.Array:
    """Inverts `split`."""
    return jnp.concatenate([vectors[name] for name in sorted(vectors)])


def frame(layout: silos.Layout, params: PyTree, rooms: Sequence[int]) -> Frame:
  """Returns the frame of lists for these parameters, or their shapes."""
  shapes = tuple(tuple(leaf.shape) for leaf in jax.tree.leaves(params))
  return Frame(distance_bits.Slices(layout, shapes), tuple(rooms))


def _replicated(x: jax.Array) -> jax.Array:
  """Returns the array with a copy on every device."""
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return lax.with_sharding_constraint(x, PartitionSpec())
