"""Normalizations: alternatives to siloing (paper, App. B, Table 3).

One threshold for the whole model favours modules whose distances are large. A
normalization makes them comparable: each distance is divided by a number that
belongs to the component's group, a module or a module of a layer.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from dst_t5x.method import silos

PyTree = Any
Scale = Callable[[silos.Layout, PyTree], jax.Array]


def size(groups: silos.Layout, seed: PyTree) -> jax.Array:
  """Returns float32 [groups]: each group's number of parameters."""
  del seed
  return jnp.asarray(groups.sizes, jnp.float32)


def mean(groups: silos.Layout, seed: PyTree) -> jax.Array:
  """Returns float32 [groups]: the mean of |θ⁰| in each group.

  Of a group whose seeds are all zero, 1, so that its distances stay as they
  are. Magnitudes are added up as integers, in units of 2⁻³¹ of a power of two
  above the largest: on any number of devices the mean has the same bits.
  """
  magnitudes = [
    jnp.abs(tensor.astype(jnp.float32)) for tensor in jax.tree.leaves(seed)
  ]
  largest = jnp.zeros(len(groups.names), jnp.float32)
  for leaf, x in zip(groups.leaves, magnitudes, strict=True):
    axes = tuple(range(int(leaf.stacked), x.ndim))
    largest = largest.at[np.array(leaf.silos)].max(jnp.max(x, axis=axes))
  _, exponents = jnp.frexp(largest)
  with jax.enable_x64(True):
    sums = jnp.zeros(len(groups.names), jnp.uint64)
    for leaf, x in zip(groups.leaves, magnitudes, strict=True):
      axes = tuple(range(int(leaf.stacked), x.ndim))
      shift = 31 - exponents[np.array(leaf.silos)].reshape(-1, *[1] * len(axes))
      units = jnp.ldexp(x, shift if leaf.stacked else shift[0])
      units = units.astype(jnp.uint32).astype(jnp.uint64)
      sums = sums.at[np.array(leaf.silos)].add(jnp.sum(units, axis=axes))
    means = sums.astype(jnp.float64) / np.array(groups.sizes, np.float64)
    means = jnp.ldexp(means, exponents - 31).astype(jnp.float32)
  return jnp.where(means > 0, means, 1.0)


NORMALIZATIONS: Mapping[str, Scale] = {'size': size, 'mean': mean}


def bits_of_slices(groups: silos.Layout, scales: Any) -> jax.Array:
  """Returns uint32 [slices], the bits of what distances are divided by.

  Args:
    groups: whose sizes or means they are.
    scales: float32 [groups].
  """
  group = np.array([i for leaf in groups.leaves for i in leaf.silos])
  return lax.bitcast_convert_type(jnp.asarray(scales)[group], jnp.uint32)
