"""Compares lists of components and joins them, without masks.

A key is a number that identifies a component. Keys sort like the entries of a
list, so that sorting and binary search on them replace work on masks of the
parameters' size.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from dst_t5x.method.entries import Entries
from dst_t5x.method.entries import Frame

PyTree = Any


def _ends(frame: Frame) -> np.ndarray:
  """Returns, for each entry, the key of an unused one, uint64 [room]."""
  ends = np.cumsum(frame.slices.layout.sizes).astype(np.uint64)
  return 2 * ends[frame.silo_of_entry]


def _firsts(frame: Frame) -> np.ndarray:
  """Returns the first component's number of each slice, in list order."""
  layout = frame.slices.layout
  first = np.cumsum([0, *layout.sizes]).astype(np.uint64)
  offsets = np.array(
    [offset for leaf in layout.leaves for offset in leaf.offsets], np.uint64
  )
  return (first[frame.slices.silo] + offsets)[frame.order]


def keys(frame: Frame, entries: Entries) -> jax.Array:
  """Returns ascending keys that identify entries, uint64 [room].

  A key is odd if the entry is used. The even key of an unused entry is above
  all of its silo. Call this under `jax.enable_x64`.
  """
  starts = entries.starts[frame.order]
  place = jnp.arange(frame.room, dtype=jnp.int32)
  which = jnp.searchsorted(starts, place, side='right') - 1
  components = jnp.asarray(_firsts(frame))[which]
  components = components + entries.positions.astype(jnp.uint64)
  return jnp.where(
    frame.is_used(entries), 2 * components + 1, jnp.asarray(_ends(frame))
  )


def match(
  frame: Frame, wanted: Entries, among: Entries
) -> tuple[jax.Array, jax.Array]:
  """Looks up the entries of one list in another.

  Args:
    frame: the frame of both lists.
    wanted: the entries to look up.
    among: the list to look in.

  Returns:
    int32 [room], where each wanted entry is in the other list, and bool
    [room], whether it is there at all.
  """
  with jax.enable_x64(True):
    old, new = keys(frame, among), keys(frame, wanted)
    index = jnp.minimum(jnp.searchsorted(old, new), frame.room - 1)
    is_there = (old[index] == new) & frame.is_used(wanted)
    return index.astype(jnp.int32), is_there


def carried(
  frame: Frame, tree: PyTree, before: Entries, after: Entries
) -> PyTree:
  """Moves an optimizer's state from one list to another.

  Args:
    frame: the frame of both lists.
    tree: the optimizer's state for the vectors of `Frame.split`.
    before: the list that the state belongs to.
    after: the next list.

  Returns:
    The state for the next list; zero for entries that the first list has not.
  """
  index, is_same = match(frame, after, before)
  stretches = frame.stretches

  def move(path: Any, leaf: jax.Array) -> jax.Array:
    names = {getattr(key, 'key', None) for key in path}
    for name in stretches.keys() & names:
      start, n = stretches[name]
      if leaf.shape == (n,):
        moved = leaf[jnp.clip(index[start : start + n] - start, 0, n - 1)]
        return jnp.where(is_same[start : start + n], moved, 0)
    return leaf

  return jax.tree_util.tree_map_with_path(move, tree)


def joined(
  frame: Frame,
  one: Entries,
  of_one: jax.Array,
  other: Entries,
  of_other: jax.Array,
) -> Entries:
  """Returns the list of some entries of one list and some of another.

  Args:
    frame: the frame of all three lists.
    one: a list.
    of_one: bool [room], which of its entries to take.
    other: another list.
    of_other: bool [room], which of its entries to take. No component may be
      taken from both lists, and no silo more often than it has room.
  """
  with jax.enable_x64(True):
    end = jnp.asarray(_ends(frame))
    both = lax.sort(
      jnp.concatenate(
        [
          jnp.where(of_one & frame.is_used(one), keys(frame, one), end),
          jnp.where(of_other & frame.is_used(other), keys(frame, other), end),
        ]
      )
    )
    # A silo has twice its room there, and what is used comes first.
    borders = frame.borders[:-1][frame.silo_of_entry]
    chosen = both[(np.arange(frame.room) + borders).astype(np.int32)]
    is_used = (chosen & 1).astype(bool)
    firsts = jnp.asarray(_firsts(frame))
    which = jnp.searchsorted(firsts, chosen >> 1, side='right') - 1
    positions = jnp.where(is_used, (chosen >> 1) - firsts[which], 0)
    return _of_slices(
      frame,
      positions.astype(jnp.uint32),
      jnp.zeros(len(frame.order), jnp.int32).at[which].add(is_used),
    )


def _of_slices(
  frame: Frame, positions: jax.Array, counts: jax.Array
) -> Entries:
  """Returns a list from its positions and the counts in list order."""
  silo = frame.slices.silo[frame.order]
  before = jnp.cumsum(counts, dtype=jnp.int32) - counts
  first_of_silo = np.searchsorted(silo, silo)
  starts = frame.borders[silo].astype(np.int32) + before - before[first_of_silo]
  back = np.argsort(frame.order)
  return Entries(positions, starts[back].astype(jnp.int32), counts[back])


def ranks(frame: Frame, score: jax.Array, is_ranked: jax.Array) -> jax.Array:
  """Ranks the entries of a list in their silos, int32 [room].

  The lowest score comes first, and the earlier entry among equal scores.
  Entries that are not ranked come after all others.

  Args:
    frame: the list's frame.
    score: uint32 [room], less than 2³² − 1.
    is_ranked: bool [room].
  """
  silo = jnp.asarray(frame.silo_of_entry)
  place = jnp.arange(frame.room, dtype=jnp.int32)
  order = lax.sort(
    (silo, jnp.where(is_ranked, score, jnp.uint32(0xFFFFFFFF)), place),
    num_keys=2,
    is_stable=True,
  )[2]
  nth = place - jnp.asarray(frame.borders, jnp.int32)[silo]
  return jnp.zeros_like(place).at[order].set(nth, unique_indices=True)
