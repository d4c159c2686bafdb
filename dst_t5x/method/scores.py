"""Scores of components, as bit patterns; the highest are chosen.

Each score is a `distance_bits.Compute`: a function of two tensors, of the
component's position and of a number for each slice. Which tensors these are is
said by the method that uses the score.
"""

import jax
from jax import lax
import jax.numpy as jnp

INFINITY = 0x7F800000  # The bit pattern of float32's infinity.


def bits(x: jax.Array) -> jax.Array:
  """Returns the bit patterns of |x|, which sort like |x|."""
  return lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.uint32)


def largest(
  x: jax.Array, y: jax.Array, position: jax.Array, number: jax.Array
) -> jax.Array:
  """Scores |x|."""
  del y, position, number
  return bits(x)


def smallest(
  x: jax.Array, y: jax.Array, position: jax.Array, number: jax.Array
) -> jax.Array:
  """Scores −|x|; a zero has the highest score."""
  del y, position, number
  return jnp.uint32(INFINITY) - bits(x)


def product(
  x: jax.Array, y: jax.Array, position: jax.Array, number: jax.Array
) -> jax.Array:
  """Scores |x · y|."""
  del position, number
  return bits(x.astype(jnp.float32) * y.astype(jnp.float32))


def difference(
  x: jax.Array, y: jax.Array, position: jax.Array, number: jax.Array
) -> jax.Array:
  """Scores |x − y|."""
  del position, number
  return bits(x.astype(jnp.float32) - y.astype(jnp.float32))
