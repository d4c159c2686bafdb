"""The paper's approximate thresholds (App. C, Alg. 2), to compare with.

The threshold of the step before is refined by a fixed number of bisections
between a lower and an upper bound around it. Budgets are met only nearly, and
only after a ramp-up; `thresholds` has the exact ones.
"""

from collections.abc import Callable, Sequence

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from dst_t5x.method import thresholds

# The threshold before the first step, which the paper does not tell.
_START = np.float32(1.0)
_SMALLEST = np.finfo(np.float32).tiny
_LARGEST = np.finfo(np.float32).max

# Which silos, bit patterns of thresholds [silos] -> counts of larger keys.
CountAbove = Callable[[jax.Array], jax.Array]


def find(
  count_above: CountAbove,
  quotas: Sequence[int],
  before: jax.Array,
  delta: float,
  iterations: int,
) -> tuple[thresholds.Cut, jax.Array]:
  """Refines the last step's thresholds (Alg. 2).

  The bounds are τ/δ and τ·δ, and the midpoint is the arithmetic one. The
  numbers of δ and J are not readable in the paper's text that we have.

  Args:
    count_above: uint32 [silos] of float32 bit patterns -> how many keys of
      each silo are larger, uint64, with one pass over the parameters (Eq. 8).
    quotas: ⌊ε·|S|⌋ of each silo: more keys than that are too many.
    before: uint32 [silos], bit patterns of τᵗ⁻¹; 0 before the first step.
    delta: δ > 1, how far a threshold may move in a step, as a factor.
    iterations: J, how often the bounds are halved.

  Returns:
    The cut, which keeps about ε·|S| keys, and the number of passes.
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
  return lower + (upper - lower) / 2  # Their sum might be infinite.
