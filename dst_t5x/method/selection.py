"""Chooses the components of highest score in every silo, exactly."""

import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from dst_t5x.method import counting
from dst_t5x.method import distance_bits
from dst_t5x.method import silos
from dst_t5x.method import thresholds

PyTree = Any


def choose(
  layout: silos.Layout,
  score: distance_bits.Compute,
  x: PyTree,
  y: PyTree,
  budgets: Any,
  numbers: jax.Array | None = None,
) -> PyTree:
  """Returns the bool masks of the components with the highest scores.

  Among equal scores the earlier position comes first. A score of zero is never
  chosen, so a silo can have fewer components than its budget.

  Args:
    layout: the silos.
    score: the score.
    x: the score's first tensors, a tree like the parameters.
    y: its second tensors.
    budgets: [silos], how many components to choose; or uint32 [silos, 2], see
      `step.halves`.
    numbers: uint32 [slices], the score's number of each slice; zeros if None.
  """
  x, y = lax.optimization_barrier((x, y))
  leaves, structure = jax.tree.flatten(x)
  if numbers is None:
    n = sum(len(leaf.silos) for leaf in layout.leaves)
    numbers = jnp.zeros(n, jnp.uint32)
  tree = distance_bits.Tree(layout, score, leaves, jax.tree.leaves(y), numbers)
  unknown = jnp.zeros(len(layout.names), jnp.uint32)
  cut, _ = thresholds.find(
    functools.partial(counting.count, tree),
    budgets,
    layout.sizes,
    guess=unknown,
    spread=jnp.ones(unknown.shape, jnp.float32),
  )
  return jax.tree.unflatten(structure, distance_bits.kept(tree, cut))
