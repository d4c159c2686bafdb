"""How many components each silo may free."""

from collections.abc import Sequence
from fractions import Fraction

from dst_t5x.core.errors import UserError


def check_epsilon(epsilon: float) -> Fraction:
  """Returns ε as the exact decimal that was written.

  Raises:
    UserError: ε is not in (0, 1].
  """
  if not isinstance(epsilon, (int, float)) or not 0 < epsilon <= 1:
    raise UserError(
      f'EPSILON must be in (0, 1], the share of parameters that are free; '
      f'it is {epsilon!r}'
    )
  # NumPy's floats say more than a number when asked for their `repr`.
  return Fraction(repr(float(epsilon)))


def largest_remainder(sizes: Sequence[int], epsilon: float) -> list[int]:
  """Splits the budget round(ε·n) over silos in proportion to their sizes.

  Each silo S gets ⌊ε·|S|⌋ (Eq. 2), and the silos with the largest remainders
  one more each, the earlier silo first among equals, until the budgets add up
  to round(ε·n) (Eq. 1). Computed in exact rational arithmetic.

  Args:
    sizes: number of components of each silo.
    epsilon: ε, the share of components that are free, in (0, 1].

  Returns:
    The number of free components of each silo.

  Raises:
    UserError: ε is not in (0, 1].
  """
  exact = check_epsilon(epsilon)
  quotas = [exact * size for size in sizes]
  budgets = [int(quota) for quota in quotas]
  missing = round(exact * sum(sizes)) - sum(budgets)
  by_remainder = sorted(range(len(sizes)), key=lambda i: budgets[i] - quotas[i])
  for i in by_remainder[:missing]:
    budgets[i] += 1
  return budgets
