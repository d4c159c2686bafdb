"""Counts over a tree of parameters, for the search for thresholds.

One call of `count` is one pass over the parameters: it reads each tensor once,
computes its keys on the way, and stores none.
"""

import collections
from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from dst_t5x import silos
from dst_t5x import thresholds


def positions(leaf: silos.Leaf, shape: tuple[int, ...]) -> jax.Array:
  """Returns uint32 [*shape]: where each component is in its slice."""
  position = jnp.zeros(shape, jnp.uint32)
  stride = 1
  for axis in range(len(shape) - 1, int(leaf.stacked) - 1, -1):
    along = lax.broadcasted_iota(jnp.uint32, shape, axis)
    position = position + along * jnp.uint32(stride)
    stride *= shape[axis]
  return position


def kept(leaf: silos.Leaf, keys: jax.Array, cut: thresholds.Cut) -> jax.Array:
  """Returns bool, of the tensor's shape: which components stay free.

  Args:
    leaf: where the tensor's components belong.
    keys: uint32, of the tensor's shape.
    cut: of all silos.
  """
  # Nothing but elementwise work on the tensor: a reshape in between, and XLA
  # would not write the result in the tensor's place.
  threshold, before = (rows(x, leaf.silos) for x in cut)
  offsets = jnp.asarray(leaf.offsets, jnp.uint32)
  before = jnp.where(before > offsets, before - offsets, 0)
  threshold, before = (columns(x, keys.ndim) for x in (threshold, before))
  early = positions(leaf, keys.shape) < before
  return (keys > threshold) | ((keys == threshold) & early)


def columns(values: jax.Array, ndim: int) -> jax.Array:
  """Returns [slices] with `ndim` axes, to go with a tensor of so many."""
  return values.reshape((len(values), *[1] * (ndim - 1))[:ndim])


def rows(values: jax.Array, which: Sequence[int]) -> jax.Array:
  """Returns the rows of some silos; a single one without a gather."""
  if len(which) == 1:
    return lax.slice_in_dim(values, which[0], which[0] + 1)
  return values[jnp.asarray(which)]


def count(
  layout: silos.Layout,
  keys: Callable[[int], jax.Array],
  query: thresholds.Query,
) -> jax.Array:
  """Answers a query of the search with one pass over the parameters.

  Args:
    layout: the silos.
    keys: index of a leaf -> its keys, uint32, of the tensor's shape.
    query: what to count.

  Returns:
    uint32 [silos, candidates]; rows of inactive silos may be too low.
  """
  leaves_of = collections.defaultdict(list)
  for i, leaf in enumerate(layout.leaves):
    leaves_of[leaf.silos].append(i)
  parts: dict[int, list[jax.Array]] = collections.defaultdict(list)
  for of_silos, leaves in leaves_of.items():

    def counted(
      here: thresholds.Query, leaves: list[int] = leaves
    ) -> jax.Array:
      counts = [_count_leaf(layout.leaves[i], keys(i), here) for i in leaves]
      return functools.reduce(jnp.add, counts)

    def skipped(here: thresholds.Query) -> jax.Array:
      return jnp.zeros_like(here.candidates)

    # The branch skips finished silos. It also keeps XLA from computing the
    # distances once, outside of the loop, and storing them.
    here = thresholds.Query(*(rows(x, of_silos) for x in query))
    counts = lax.cond(jnp.any(here.active), counted, skipped, here)
    for slice_index, silo in enumerate(of_silos):
      parts[silo].append(counts[slice_index])
  return jnp.stack([sum(parts[silo]) for silo in range(len(layout.names))])


def _count_leaf(
  leaf: silos.Leaf, keys: jax.Array, query: thresholds.Query
) -> jax.Array:
  """Returns uint32 [slices, candidates]: one tensor's part of the counts."""
  tie = columns(query.tie, keys.ndim)
  offsets = columns(jnp.asarray(leaf.offsets, jnp.uint32), keys.ndim)
  from_first = thresholds.FIRST - offsets - positions(leaf, keys.shape)
  early = jnp.where(keys == tie, from_first, 0)
  keys = jnp.where(tie == 0, keys, early)
  if not leaf.stacked:
    keys = keys[None]
  return _reach(keys, query.candidates)


def _reach(keys: jax.Array, candidates: jax.Array) -> jax.Array:
  """Counts the keys of each slice that reach each candidate in one pass.

  Args:
    keys: uint32 [slices, …].
    candidates: uint32 [slices, candidates].

  Returns:
    uint32 [slices, candidates].
  """
  keys = keys.reshape((*keys.shape, *([1] * (2 - keys.ndim))))
  columns = candidates.T.reshape(
    (candidates.shape[1], len(keys)) + (1,) * (keys.ndim - 1)
  )
  reached = [(keys >= column).astype(jnp.uint32) for column in columns]
  zeros = [jnp.uint32(0)] * len(reached)

  def add(a: Any, b: Any) -> Any:
    return [x + y for x, y in zip(a, b, strict=True)]

  # One reduction with several results reads the keys once. The last axis goes
  # first: XLA:CPU runs a reduction of everything on a single thread.
  rows = lax.reduce(reached, zeros, add, (keys.ndim - 1,))
  counts = lax.reduce(rows, zeros, add, tuple(range(1, keys.ndim - 1)))
  return jnp.stack(counts, axis=-1)
