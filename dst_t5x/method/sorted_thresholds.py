"""Exact thresholds by sorting: slow, simple, and what others are checked by.

What a first implementation does (App. C), and the slow bar of Fig. 5. Memory
for a silo's keys, twice, and no silo of 2³¹ components or more.
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
  keys: Sequence[jax.Array],
  budgets: Sequence[int],
) -> thresholds.Cut:
  """Returns the cut of every silo.

  Args:
    layout: the silos.
    keys: of each leaf, uint32, of the tensor's shape.
    budgets: [silos], how many keys to keep.

  Raises:
    UserError: a silo is too large to be sorted.
  """
  slices: list[list[tuple[int, jax.Array]]] = [[] for _ in layout.names]
  for i, leaf in enumerate(layout.leaves):
    of_slices = keys[i].reshape(len(leaf.silos), -1)
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


def _cut(keys: jax.Array, budget: int) -> tuple[jax.Array, jax.Array]:
  """Returns the threshold of [n] keys, and how far ties at it are kept."""
  if budget == 0:
    return jnp.asarray(thresholds.NOTHING), jnp.uint32(0)
  threshold = jnp.sort(keys)[len(keys) - budget]
  tied = keys == threshold
  wanted = budget - jnp.sum(keys > threshold, dtype=jnp.int32)

  def position_of_last() -> jax.Array:
    position = jnp.arange(len(keys), dtype=jnp.uint32)
    positions = jnp.sort(jnp.where(tied, position, thresholds.NOTHING))
    return positions[wanted - 1] + 1

  before = lax.cond(
    jnp.sum(tied, dtype=jnp.int32) == wanted,
    lambda: jnp.asarray(thresholds.NOTHING),
    position_of_last,
  )
  # Zero means "did not move" and is never kept.
  return threshold, jnp.where(threshold == 0, jnp.uint32(0), before)
