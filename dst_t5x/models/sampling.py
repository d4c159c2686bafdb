"""Random choice of tokens: temperature, then top-k, then top-p.

Filters and their order are those of Hugging Face's `generate`. All settings are
arrays over the examples, so that examples with different settings share a batch
and a compiled program.
"""

from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Numbers = jax.Array | np.ndarray

# A `top_k` of all tokens.
ALL = 2**31 - 1


class Draws(NamedTuple):
  """How the tokens of each example are drawn; each field is `[batch]`.

  The random numbers of an example depend on its `random_seeds` and `numbers`
  only, not on its place in a batch or on the other examples.

  Attributes:
    random_seeds: int32.
    numbers: int32, of the example in its file, split or request.
    temperatures: float32, above 0; logits are divided by it.
    top_k: int32, how many of the most probable tokens are kept, at least 1;
      `ALL` for all.
    top_p: float32, above 0: the most probable tokens that together have this
      probability are kept; 1 for all.
  """

  random_seeds: Numbers
  numbers: Numbers
  temperatures: Numbers
  top_k: Numbers
  top_p: Numbers


def keys(draws: Draws) -> Array:
  """Returns a PRNG key of each example, `[batch]`."""
  return jax.vmap(
    lambda seed, number: jax.random.fold_in(jax.random.key(seed), number)
  )(draws.random_seeds, draws.numbers)


def draw(logits: Array, draws: Draws, keys: Array, step: Array) -> Array:
  """Returns a token of each example, int32 `[batch]`.

  Args:
    logits: float32 `[batch, vocab]`.
    draws: the settings.
    keys: those of `keys`.
    step: number of the token in its continuation, int32 scalar or `[batch]`.
  """
  # The largest becomes 0: whatever the temperature, it is finite.
  logits = logits - jnp.max(logits, axis=-1, keepdims=True)
  scaled = logits / draws.temperatures[:, None]
  filters = (draws.top_k < logits.shape[-1]) | (draws.top_p < 1)
  # Without filters nothing has to be sorted.
  scaled = lax.cond(
    jnp.any(filters),
    lambda x: jnp.where(kept(x, draws.top_k, draws.top_p), x, -jnp.inf),
    lambda x: x,
    scaled,
  )

  def of_example(key: Array, row: Array, step: Array) -> Array:
    return jax.random.categorical(jax.random.fold_in(key, step), row)

  steps = jnp.broadcast_to(step, keys.shape)
  return jax.vmap(of_example)(keys, scaled, steps).astype(jnp.int32)


def kept(logits: Array, top_k: Numbers, top_p: Numbers) -> Array:
  """Returns bool `[batch, vocab]`: which tokens may be drawn.

  Top-k: the k most probable tokens. Top-p (Holtzman et al. 2020, "The Curious
  Case of Neural Text Degeneration", Section 3.1): of these, the fewest that
  together have probability p. Tokens as probable as the last one are kept, too.

  Args:
    logits: `[batch, vocab]`.
    top_k: int32 `[batch]`.
    top_p: float32 `[batch]`.
  """
  ordered = -jnp.sort(-logits, axis=-1)
  last = jnp.minimum(top_k, logits.shape[-1]) - 1
  least = jnp.take_along_axis(ordered, last[:, None], axis=-1)
  is_in = ordered >= least
  probabilities = jax.nn.softmax(jnp.where(is_in, ordered, -jnp.inf))
  before = jnp.cumsum(probabilities, axis=-1) - probabilities
  top_p = top_p[:, None]
  is_in &= (before < top_p) | (top_p >= 1)
  last = jnp.sum(is_in, axis=-1, keepdims=True) - 1
  return logits >= jnp.take_along_axis(ordered, last, axis=-1)
