"""Normalizations: alternatives to siloing (paper, App. B, Table 3).

A single threshold for the whole model favours modules with large distances. A
normalization makes distances comparable: it divides each by the scale of the
component's group. A group is a module, or a module of one layer.
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
  """Returns the number of parameters of each group, float32 [groups]."""
  del seed
  return jnp.asarray(groups.sizes, jnp.float32)


def mean(groups: silos.Layout, seed: PyTree) -> jax.Array:
  """Returns the mean of |θ⁰| in each group, float32 [groups].

  A group whose seed is all zeros gets 1, which leaves its distances unchanged.
  Magnitudes are added as integers, so the mean has the same bits on any number
  of devices. The unit is 2⁻³¹ of a power of two above the largest magnitude.
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
      units = _times_power_of_two(x, shift if leaf.stacked else shift[0])
      units = units.astype(jnp.uint32).astype(jnp.uint64)
      sums = sums.at[np.array(leaf.silos)].add(jnp.sum(units, axis=axes))
    means = sums.astype(jnp.float64) / np.array(groups.sizes, np.float64)
    means = _times_power_of_two(means, exponents - 31).astype(jnp.float32)
  return jnp.where(means > 0, means, 1.0)


def _times_power_of_two(x: jax.Array, exponents: jax.Array) -> jax.Array:
  """Returns x · 2^exponents, exactly where the result is a normal number.

  Two factors, as one of 2¹⁸⁰ is no float32. (JAX 0.12 expands `ldexp` when it
  lowers the program, outside `enable_x64`, and then mixes its types.)

  Args:
    x: float32 or float64.
    exponents: int32, between -252 and 254 for float32; broadcasts with x.
  """
  half = exponents // 2
  return (
    x * _power_of_two(half, x.dtype) * _power_of_two(exponents - half, x.dtype)
  )


def _power_of_two(exponents: jax.Array, dtype: Any) -> jax.Array:
  """Returns 2^exponents by its bits; exact for a normal number's exponent."""
  information = jnp.finfo(dtype)
  unsigned = jnp.uint32 if information.bits == 32 else jnp.uint64
  biased = (exponents + (information.maxexp - 1)).astype(unsigned)
  return lax.bitcast_convert_type(biased << information.nmant, dtype)


NORMALIZATIONS: Mapping[str, Scale] = {'size': size, 'mean': mean}


def bits_of_slices(groups: silos.Layout, scales: Any) -> jax.Array:
  """Returns the bit pattern of each slice's scale, uint32 [slices].

  Args:
    groups: the groups that the scales belong to.
    scales: float32 [groups], the divisors of distances.
  """
  group = np.array([i for leaf in groups.leaves for i in leaf.silos])
  return lax.bitcast_convert_type(jnp.asarray(scales)[group], jnp.uint32)
