"""Distances between updated and seed parameters (paper, Table 1).

A distance works component by component and returns a non-negative float32. The
components with the largest distances are kept.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

Distance = Callable[[jax.Array, jax.Array], jax.Array]


def absolute(new: jax.Array, seed: jax.Array) -> jax.Array:
  """Returns |θ′ − θ⁰|, float32 of the shape of `new` (Table 1)."""
  return jnp.abs(new.astype(jnp.float32) - seed.astype(jnp.float32))


def relative(new: jax.Array, seed: jax.Array) -> jax.Array:
  """Returns |θ′ − θ⁰| / |θ⁰|, float32 (Table 1; inferred from App. A).

  Favours components whose seed is small. Where the seed is zero, the distance
  is infinite if the component moved, and zero otherwise.
  """
  seed = seed.astype(jnp.float32)
  moved = new.astype(jnp.float32) - seed
  return jnp.where(moved == 0, 0.0, jnp.abs(moved / seed))


def inverse_relative(new: jax.Array, seed: jax.Array) -> jax.Array:
  """Returns |θ′ − θ⁰| · |θ⁰|, float32 (Eq. 5; inferred from Section 2).

  "Biases towards both large differences and seed parameter magnitudes". A
  component whose seed is zero has distance zero and is never free.
  """
  seed = seed.astype(jnp.float32)
  # `abs` comes last: it clears the sign of a NaN, which then sorts highest.
  return jnp.abs((new.astype(jnp.float32) - seed) * seed)


DISTANCES: Mapping[str, Distance] = {
  'absolute': absolute,
  'relative': relative,
  'inverse_relative': inverse_relative,
}


def random_scores(positions: jax.Array, salts: jax.Array) -> jax.Array:
  """Returns a fixed pseudo-random score for each position.

  This is the random-mask baseline (App. A, footnote 5): "randomly selects the
  free parameters once at the start of fine-tuning". The score depends only on
  position and salt, so each step recomputes the same mask, and none is stored.
  The mixing is the finalizer of MurmurHash3, a bijection on 32 bits. Ties occur
  only because the lowest bit is dropped.

  Args:
    positions: uint32, any shape: where the component is in its slice.
    salts: uint32, broadcastable to `positions`: different for each slice and
      each random seed.

  Returns:
    uint32 of the shape of `positions`, from 1 to 2³¹ − 1.
  """
  x = positions ^ salts
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return ((x ^ (x >> 16)) >> 1) | jnp.uint32(1)
