"""How many components each silo may free."""

from collections.abc import Sequence
from fractions import Fraction

from dst_t5x.core.errors import UserError


def check_epsilon(epsilon: float) -> Fraction:
  """Returns ε as an exact fraction of its shortest decimal form.

  Raises:
    UserError: ε is not in (0, 1].
  """
  if not isinstance(epsilon, (int, float)) or not 0 < epsilon <= 1:
    raise UserError(
      f'EPSILON must be in (0, 1], the share of parameters that are free; '
      f'it is {epsilon!r}'
    )
  # The `repr` of a NumPy float is not a number: `np.float64(0.1)`.
  return Fraction(repr(float(epsilon)))


def largest_remainder(sizes: Sequence[int], epsilon: float) -> list[int]:
  """Splits the budget round(ε·n) over silos in proportion to their sizes.

  Each silo S gets ⌊ε·|S|⌋ (Eq. 2). The silos with the largest remainders then
  get one more each, until the budgets add up to round(ε·n) (Eq. 1). Among equal
  remainders the earlier silo comes first. The arithmetic is exact.

  Args:
    sizes: [silos], number of components of each silo.
    epsilon: ε, the share of components that are free, in (0, 1].

  Returns:
    [silos], the number of free components of each silo.

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
