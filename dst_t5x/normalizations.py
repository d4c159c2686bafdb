"""Normalizations: alternatives to siloing (paper, App. B, Table 3).

One threshold for the whole model favours modules whose distances are large. A
normalization makes them comparable: each distance is divided by a number that
belongs to the component's group, a module or a module of a layer.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dst_t5x import silos

PyTree = Any
Scale = Callable[[silos.Layout, PyTree], jax.Array]


def size(groups: silos.Layout, seed: PyTree) -> jax.Array:
  """Returns float32 [groups]: each group's number of parameters."""
  del seed
  return jnp.asarray(groups.sizes, jnp.float32)


def mean(groups: silos.Layout, seed: PyTree) -> jax.Array:
  """Returns float32 [groups]: the mean of |θ⁰| in each group.

  Of a group whose seeds are all zero, 1, so that its distances stay as they
  are.
  """
  sums = jnp.zeros(len(groups.names), jnp.float32)
  for leaf, tensor in zip(groups.leaves, jax.tree.leaves(seed), strict=True):
    magnitudes = jnp.abs(tensor.astype(jnp.float32))
    per_slice = jnp.sum(magnitudes.reshape(len(leaf.silos), -1), axis=1)
    sums = sums.at[jnp.asarray(leaf.silos)].add(per_slice)
  means = sums / jnp.asarray(groups.sizes, jnp.float32)
  return jnp.where(means > 0, means, 1.0)


NORMALIZATIONS: Mapping[str, Scale] = {'size': size, 'mean': mean}
