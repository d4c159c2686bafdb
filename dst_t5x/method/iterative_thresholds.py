"""The paper's approximate thresholds (App. C, Alg. 2), for comparison.

A fixed number of bisections refines the last step's threshold between a lower
and an upper bound. After a ramp-up, the subset's size is near the budget but
does not equal it. `thresholds` has the exact search.
"""

from collections.abc import Callable, Sequence

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from dst_t5x.method import thresholds

# The threshold before the first step. The paper does not give it.
_START = np.float32(1.0)
_SMALLEST = np.finfo(np.float32).tiny
_LARGEST = np.finfo(np.float32).max

# Bit patterns of thresholds [silos] -> number of larger distances [silos].
CountAbove = Callable[[jax.Array], jax.Array]


def find(
  count_above: CountAbove,
  quotas: Sequence[int],
  before: jax.Array,
  delta: float,
  iterations: int,
) -> tuple[thresholds.Cut, jax.Array]:
  """Refines the last step's thresholds (Alg. 2).

  The first bounds are τ/δ and τ·δ, and the midpoint is arithmetic. The values
  of δ and J are illegible in our copy of the paper.

  Args:
    count_above: maps bit patterns of thresholds, uint32 [silos], to the number
      of larger distances in each silo, uint64 [silos]. Takes one pass over the
      parameters (Eq. 8).
    quotas: [silos], ⌊ε·|S|⌋ of each silo.
    before: uint32 [silos], bit patterns of τᵗ⁻¹; 0 before the first step.
    delta: δ > 1, the largest factor by which a threshold moves in a step.
    iterations: J, the number of bisections.

  Returns:
    The cut, which keeps about ε·|S| components, and the number of passes.
  """
  wanted = np.array(quotas, np.uint64)
  tau = lax.bitcast_convert_type(before, jnp.float32)
  tau = jnp.where(before == 0, _START, tau)
  tau = jnp.clip(tau, _SMALLEST, _LARGEST)
  bounds = (
    jnp.maximum(tau / delta, _SMALLEST),
    jnp.minimum(tau * delta, _LARGEST),
  )

  def halve(
    _: int, bounds: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, jax.Array]:
    lower, upper = bounds
    middle = _middle(lower, upper)
    counts = count_above(lax.bitcast_convert_type(middle, jnp.uint32))
    with jax.enable_x64(True):
      too_many = counts > wanted
    return (
      jnp.where(too_many, middle, lower),
      jnp.where(too_many, upper, middle),
    )

  bounds = lax.fori_loop(0, iterations, halve, bounds)
  threshold = lax.bitcast_convert_type(_middle(*bounds), jnp.uint32)
  none_equal = jnp.zeros_like(threshold)
  return thresholds.Cut(threshold, none_equal), jnp.uint32(iterations)


def _middle(lower: jax.Array, upper: jax.Array) -> jax.Array:
  return lower + (upper - lower) / 2  # Their sum could overflow.
