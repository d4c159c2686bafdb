"""Finds the set bits of a mask by counting, without sorting.

A mask is packed into words of 32 bits. The nth set bit lies in the first word
at which the running count exceeds n; within the word, it is found by halving.
"""

import jax
from jax import lax
import jax.numpy as jnp


def words(mask: jax.Array) -> jax.Array:
  """Returns a mask as words, uint32 [..., words]; the lowest bit comes first.

  Args:
    mask: bool [..., width].
  """
  width = mask.shape[-1]
  padding = [(0, 0)] * (mask.ndim - 1) + [(0, -width % 32)]
  bits = jnp.pad(mask, padding).reshape(*mask.shape[:-1], -1, 32)
  shifted = bits.astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32)
  return jnp.sum(shifted, axis=-1, dtype=jnp.uint32)


def ends(packed: jax.Array) -> jax.Array:
  """Returns how many bits are set up to each word, included; int32 [words]."""
  return jnp.cumsum(lax.population_count(packed).astype(jnp.int32))


def find(
  packed: jax.Array, running: jax.Array, nth: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the word of each wanted set bit, and the bit's place in the word.

  Args:
    packed: uint32 [words].
    running: what `ends` returned for them.
    nth: int32 [wanted], which of the set bits to find, from 0. The results for
      numbers beyond the last set bit are not defined.

  Returns:
    The index of the word, int32 [wanted], and the bit, uint32 [wanted].
  """
  word = jnp.searchsorted(running, nth, side='right')
  word = jnp.minimum(word, len(packed) - 1)
  own = lax.population_count(packed[word]).astype(jnp.int32)
  rank = nth - (running[word] - own)
  return word, _nth_bit(packed[word], rank.astype(jnp.uint32))


def _nth_bit(words: jax.Array, nth: jax.Array) -> jax.Array:
  """Returns the position of the nth set bit of each word, uint32."""
  position = jnp.zeros_like(words)
  for width in (16, 8, 4, 2, 1):
    low = words & jnp.uint32((1 << width) - 1)
    below = lax.population_count(low)
    is_above = nth >= below
    nth = jnp.where(is_above, nth - below, nth)
    words = jnp.where(is_above, words >> width, low)
    position = position + jnp.where(is_above, jnp.uint32(width), 0)
  return position
