"""Counts distances over a tree of parameters, for the search for thresholds.

One call of `count` is one pass over the parameters. It reads each tensor once
and computes its distances without storing them.
"""

import collections
from collections.abc import Sequence
import functools
import math
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from dst_t5x.method import distance_bits
from dst_t5x.method import sharded_sums
from dst_t5x.method import silos
from dst_t5x.method import thresholds

# How many tensors' counts are added up before one reduction.
_TOGETHER = 8


class _Group(NamedTuple):
  """Leaves with the same silos, which are counted or skipped together.

  Attributes:
    silos: [slices], the silos of each leaf's slices.
    leaves: indices of leaves, with fewer than 2³² components per slice in
      total.
  """

  silos: tuple[int, ...]
  leaves: list[int]


def _groups(slices: distance_bits.Slices) -> list[_Group]:
  groups = []
  open_groups: dict[tuple[int, ...], _Group] = {}
  room: dict[tuple[int, ...], int] = {}
  for i, leaf in enumerate(slices.layout.leaves):
    size = math.prod(slices.shapes[i][leaf.stacked :])
    if room.get(leaf.silos, -1) < size:
      open_groups[leaf.silos] = _Group(leaf.silos, [])
      room[leaf.silos] = silos.MOST
      groups.append(open_groups[leaf.silos])
    open_groups[leaf.silos].leaves.append(i)
    room[leaf.silos] -= size
  return groups


class _Operands(NamedTuple):
  """The arrays that counting needs besides the tensors.

  Attributes:
    table: uint32 [slices, 2 + candidates], number, tie and candidates of each
      slice. In a tie, a candidate is `NOTHING` minus a position in the slice.
    which: for each leaf, `distance_bits.indices` of its rows of the table.
    active: for each group, bool [], whether to count it.
    of_silo: uint32 [silos, most], the indices of each silo's slices among those
      of all groups, padded with the number of slices.
  """

  table: jax.Array
  which: list[np.ndarray]
  active: list[jax.Array]
  of_silo: np.ndarray


def count(tree: distance_bits.Tree, query: thresholds.Query) -> jax.Array:
  """Answers a query of the search with one pass over the parameters.

  Args:
    tree: the parameters.
    query: what to count.

  Returns:
    uint64 [silos, candidates]; rows of inactive silos can be too low.
  """
  slices = tree.slices
  groups = _groups(slices)
  with jax.enable_x64(True):
    table = _table(tree, query)
    operands = _Operands(
      table,
      which=[
        distance_bits.indices(which, len(table)) for which in slices.of_leaf
      ],
      active=[
        jnp.any(distance_bits.rows(query.active, g.silos)) for g in groups
      ],
      of_silo=_of_silo(groups, len(tree.layout.names)),
    )
    low, middle, high = sharded_sums.add_up(
      functools.partial(_digits, tree.compute, slices, groups),
      list(zip(tree.new, tree.seed, strict=True)),
      operands,
    )
    low, middle, high = (x.astype(jnp.uint64) for x in (low, middle, high))
    return low + (middle << 16) + (high << 32)


def _table(tree: distance_bits.Tree, query: thresholds.Query) -> jax.Array:
  """Returns `_Operands.table`."""
  sizes = jnp.asarray(tree.layout.sizes, jnp.uint64)[:, None]
  # Among tied components the earlier rank higher, as in the query.
  before = tree.slices.positions(sizes + 1 - query.candidates)
  reach = query.candidates[tree.slices.silo].astype(jnp.uint32)
  tie = query.tie[tree.slices.silo][:, None]
  candidates = jnp.where(tie > 0, thresholds.NOTHING - before, reach)
  return jnp.concatenate([tree.numbers[:, None], tie, candidates], axis=1)


def _of_silo(groups: Sequence[_Group], n: int) -> np.ndarray:
  """Returns `_Operands.of_silo` for `n` silos."""
  silo = np.array([silo for group in groups for silo in group.silos])
  sizes = np.bincount(silo, minlength=n)
  is_used = np.arange(sizes.max()) < sizes[:, None]
  result = np.full(is_used.shape, len(silo), np.uint32)
  result[is_used] = np.argsort(silo, kind='stable')
  return result


def _digits(
  compute: distance_bits.Compute,
  slices: distance_bits.Slices,
  groups: Sequence[_Group],
  tensors: Sequence[tuple[jax.Array, jax.Array]],
  parts: Sequence[sharded_sums.Part | None],
  operands: _Operands,
) -> list[jax.Array]:
  """Returns one device's counts as three digits of 16 bits, lowest first.

  Each digit is uint32 [silos, candidates]. The sum over up to 2¹⁶ devices does
  not overflow.
  """
  found = []
  for group, active in zip(groups, operands.active, strict=True):
    here = [part.counts for i in group.leaves if (part := parts[i])]
    shape = len(group.silos), operands.table.shape[1] - 2
    # The branch skips finished silos. It also prevents XLA from computing the
    # distances outside of the search's loop and storing them.
    found.append(
      lax.cond(
        active & functools.reduce(jnp.logical_or, here) if here else active,
        functools.partial(
          _count_group, compute, slices, group, tensors, parts, operands
        ),
        functools.partial(jnp.zeros, shape, jnp.uint32),
      )
    )
  of_slices = jnp.pad(jnp.concatenate(found), ((0, 1), (0, 0)))
  # A scatter does the same, but takes longer to compile.
  of_silos = of_slices[operands.of_silo]
  low = jnp.sum(of_silos & 0xFFFF, axis=1, dtype=jnp.uint32)
  high = jnp.sum(of_silos >> 16, axis=1, dtype=jnp.uint32) + (low >> 16)
  return [low & 0xFFFF, high & 0xFFFF, high >> 16]


def _count_group(
  compute: distance_bits.Compute,
  slices: distance_bits.Slices,
  group: _Group,
  tensors: Sequence[tuple[jax.Array, jax.Array]],
  parts: Sequence[sharded_sums.Part | None],
  operands: _Operands,
) -> jax.Array:
  """Returns uint32 [slices, candidates], the counts of a group."""
  of_rows: dict[int, list[list[jax.Array]]] = collections.defaultdict(list)
  for i in group.leaves:
    counts = _count_rows(
      compute,
      slices.strides[i],
      len(group.silos) if slices.layout.leaves[i].stacked else None,
      *tensors[i],
      parts[i],
      operands.table[operands.which[i]],
    )
    of_rows[counts[0].shape[1]].append(counts)
  totals = []
  for tensors_counts in of_rows.values():
    for i in range(0, len(tensors_counts), _TOGETHER):
      few = zip(*tensors_counts[i : i + _TOGETHER], strict=True)
      sums = _add_up([functools.reduce(jnp.add, x) for x in few], axis=1)
      totals.append(jnp.stack(sums, axis=1))
  return functools.reduce(jnp.add, totals)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _count_rows(
  compute: distance_bits.Compute,
  strides: tuple[int, ...],
  slices: int | None,
  new: jax.Array,
  seed: jax.Array,
  part: sharded_sums.Part | None,
  table: jax.Array,
) -> list[jax.Array]:
  """Counts the distances of each row of a tensor that reach each candidate.

  Args:
    compute: computes the bit patterns of distances.
    strides: see `distance_bits.Slices`.
    slices: how many slices the tensor has; None if it is not stacked.
    new: θ′, or a device's part of it.
    seed: θ⁰, or the same part of it.
    part: the device's part; None for the whole tensor.
    table: uint32 [slices, 2 + candidates], see `_Operands`.

  Returns:
    For each candidate, uint32 [slices, rows].
  """
  here = 1 if slices is None else len(new)
  start = None if part is None else part.start
  first = 0 if part is None or slices is None else part.start[0]
  table = lax.dynamic_slice_in_dim(table, first, here)
  number, tie, *candidates = (
    distance_bits.column(x, new.ndim) for x in table.T
  )
  position = distance_bits.positions(new.shape, strides, start)
  distance = compute(new, seed, position, number)
  rank = thresholds.NOTHING - 1 - position
  rank = lax.select(distance == tie, rank, jnp.zeros_like(distance))
  is_untied = jnp.broadcast_to(tie == 0, distance.shape)
  counted = lax.select(is_untied, distance, rank)
  reached = [(counted >= x).astype(jnp.uint32) for x in candidates]
  if new.ndim == int(slices is not None):  # One component per slice.
    reached = [x[..., None] for x in reached]
  counts = [x.reshape(here, -1) for x in _add_up(reached, reached[0].ndim - 1)]
  if part is None:
    return counts
  counts = [jnp.where(part.counts, x, 0) for x in counts]
  if slices is None:
    return counts
  whole = jnp.zeros((slices, counts[0].shape[1]), jnp.uint32)
  return [lax.dynamic_update_slice_in_dim(whole, x, first, 0) for x in counts]


def _add_up(values: Sequence[jax.Array], axis: int) -> list[jax.Array]:
  """Returns the sums of several arrays over an axis, in one pass."""
  # XLA:CPU runs a reduction on several threads only if it has several results
  # and a single axis.
  return lax.reduce(
    list(values),
    [jnp.uint32(0)] * len(values),
    lambda a, b: [x + y for x, y in zip(a, b, strict=True)],
    (axis,),
  )
