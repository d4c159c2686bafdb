"""Distances between updated and seed parameters (paper, Table 1).

Each distance is applied component by component and is a non-negative float32.
Larger means farther from the seed, so more worth keeping.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

Distance = Callable[[jax.Array, jax.Array], jax.Array]


def absolute(new: jax.Array, seed: jax.Array) -> jax.Array:
  """Returns |θ′ − θ⁰| in float32, of the shape of `new` (Table 1)."""
  return jnp.abs(new.astype(jnp.float32) - seed.astype(jnp.float32))


def relative(new: jax.Array, seed: jax.Array) -> jax.Array:
  """Returns |θ′ − θ⁰| / |θ⁰| in float32 (Table 1; inferred, App. A).

  Favours components whose seed is small. Where the seed is zero, a component
  that moved is infinitely far from it, and one that did not has distance zero.
  """
  seed = seed.astype(jnp.float32)
  moved = new.astype(jnp.float32) - seed
  return jnp.where(moved == 0, 0.0, jnp.abs(moved / seed))


def inverse_relative(new: jax.Array, seed: jax.Array) -> jax.Array:
  """Returns |θ′ − θ⁰| · |θ⁰| in float32 (Eq. 5; inferred, Section 2).

  "Biases towards both large differences and seed parameter magnitudes". A
  component whose seed is zero has distance zero and is never free.
  """
  seed = seed.astype(jnp.float32)
  # `abs` comes last, so that a NaN's sign cannot hide it from the search.
  return jnp.abs((new.astype(jnp.float32) - seed) * seed)


DISTANCES: Mapping[str, Distance] = {
  'absolute': absolute,
  'relative': relative,
  'inverse_relative': inverse_relative,
}


def random_scores(positions: jax.Array, keys: jax.Array) -> jax.Array:
  """Returns a fixed pseudo-random score for each position.

  The random-mask baseline (App. A, footnote 5): "randomly selects the free
  parameters once at the start of fine-tuning". The score depends on nothing
  but position and key, so the mask need not be stored: it comes out the same
  in each step. The mixing is the finalizer of MurmurHash3, a bijection on 32
  bits, so that no two positions of a silo tie before the lowest bit is cut.

  Args:
    positions: uint32, any shape: where the component is in its silo.
    keys: uint32, a shape that broadcasts to that of `positions`: numbers that
      tell one silo and one run from another.

  Returns:
    uint32 of the shape of `positions`, from 1 to 2³¹ − 1, ordered as integers.
  """
  x = positions ^ keys
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return ((x ^ (x >> 16)) >> 1) | jnp.uint32(1)
