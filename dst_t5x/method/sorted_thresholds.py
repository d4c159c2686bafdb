"""Exact thresholds by sorting: slow, simple, and the reference in tests.

This is the obvious implementation (App. C), and the slow bar of Fig. 5. It
needs memory for two copies of a silo's distances. A silo must have fewer than
2³¹ components.
"""

from collections.abc import Sequence

import jax
from jax import lax
import jax.numpy as jnp

from dst_t5x.core.errors import UserError
from dst_t5x.method import silos
from dst_t5x.method import thresholds


def find(
  layout: silos.Layout,
  distances: Sequence[jax.Array],
  budgets: Sequence[int],
) -> thresholds.Cut:
  """Returns the cut of every silo.

  Args:
    layout: the silos.
    distances: for each leaf, bit patterns of distances, uint32 of its shape.
    budgets: [silos], how many components to keep.

  Raises:
    UserError: a silo is too large to be sorted.
  """
  slices: list[list[tuple[int, jax.Array]]] = [[] for _ in layout.names]
  for i, leaf in enumerate(layout.leaves):
    of_slices = distances[i].reshape(len(leaf.silos), -1)
    for j, (silo, offset) in enumerate(
      zip(leaf.silos, leaf.offsets, strict=True)
    ):
      slices[silo].append((offset, of_slices[j]))
  cuts = []
  for name, size, budget, parts in zip(
    layout.names, layout.sizes, budgets, slices, strict=True
  ):
    if size >= 2**31:
      raise UserError(
        f'silo {name!r} has {size} components: too many to be sorted; use '
        "smaller silos, or the threshold 'exact'"
      )
    parts = sorted(parts, key=lambda part: part[0])
    cuts.append(_cut(jnp.concatenate([part for _, part in parts]), budget))
  return thresholds.Cut(*(jnp.stack(x) for x in zip(*cuts, strict=True)))


def _cut(distances: jax.Array, budget: int) -> tuple[jax.Array, jax.Array]:
  """Returns the cut of [n] distances; see `thresholds.Cut`."""
  if budget == 0:
    return jnp.asarray(thresholds.NOTHING), jnp.uint32(0)
  threshold = jnp.sort(distances)[len(distances) - budget]
  tied = distances == threshold
  wanted = budget - jnp.sum(distances > threshold, dtype=jnp.int32)

  def position_of_last() -> jax.Array:
    position = jnp.arange(len(distances), dtype=jnp.uint32)
    positions = jnp.sort(jnp.where(tied, position, thresholds.NOTHING))
    return positions[wanted - 1] + 1

  before = lax.cond(
    jnp.sum(tied, dtype=jnp.int32) == wanted,
    lambda: jnp.asarray(thresholds.NOTHING),
    position_of_last,
  )
  # Distance zero means "did not move": never kept.
  return threshold, jnp.where(threshold == 0, jnp.uint32(0), before)
