"""θ as a list: where it differs from a seed in bfloat16, and its values there.

The list has 8 bytes for each component that differs. θ in float32 is made from
list and seed where it is needed, bit for bit: float32 holds each value of
bfloat16 exactly.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dst_t5x.method import entries as entries_lib
from dst_t5x.method import reports
from dst_t5x.method import silos

PyTree = Any


class Moved(NamedTuple):
  """The components of θ that differ from the seed.

  Attributes:
    entries: where they are. The counts are true even if there are more
      components than the list has room for.
    values: float32 [room], θ there.
  """

  entries: entries_lib.Entries
  values: jax.Array

  @property
  def room(self) -> int:
    """The most components that the list can have."""
    return len(self.values)

  @property
  def lost(self) -> jax.Array:
    """How many components had no room in the list, int32 []."""
    return jnp.maximum(jnp.sum(self.entries.counts) - self.room, 0)

  def restored(self, seed: PyTree) -> PyTree:
    """Returns θ, float32, if no component was lost.

    Args:
      seed: θ⁰, in bfloat16 or float32.
    """
    return _frame(seed, self.room).scatter(wide(seed), *self)


def listed(params: PyTree, seed: PyTree, room: int) -> Moved:
  """Returns the list of the components that differ from the seed.

  Args:
    params: θ, float32.
    seed: θ⁰, in bfloat16 or float32.
    room: the most components that the list can have.
  """
  frame = _frame(params, room)
  entries = frame.of_masks(jax.tree.map(reports.differs, params, seed))
  return Moved(entries, frame.gather(params, entries))


def wide(tree: PyTree) -> PyTree:
  """Returns the tree in float32; what is float32 as it is."""
  return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _frame(params: PyTree, room: int) -> entries_lib.Frame:
  """Returns the frame of a list over all tensors together."""
  layout = silos.make_layout(params, 'none')
  return entries_lib.frame(layout, params, [room])
