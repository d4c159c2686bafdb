"""Budgets: exact shares of ε, split over silos without loss."""

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st
import numpy as np
import pytest
import reference

from dst_t5x.core import errors
from dst_t5x.method import budgets

epsilons = st.one_of(
  st.integers(1, 10**7).map(lambda i: i / 10**7),
  st.floats(1e-7, 1, exclude_min=False),
)
sizes_strategy = st.lists(st.integers(0, 10**11), min_size=1, max_size=90)


@given(sizes=sizes_strategy, epsilon=epsilons)
def test_largest_remainder(sizes, epsilon):
  result = budgets.largest_remainder(sizes, epsilon)
  assert result == reference.budgets(sizes, epsilon)
  # In exact numbers: ε·n of a large n is no float.
  assert sum(result) == round(Fraction(str(epsilon)) * sum(sizes))
  for budget, size in zip(result, sizes, strict=True):
    assert abs(budget - Fraction(str(epsilon)) * size) < 1
    assert 0 <= budget <= size


def test_golden():
  # Shares 2.5, 2.5, 1.2, 0.3 and 3.5 of ten: floors 2, 2, 1, 0, 3, and the two
  # that are left go to the first two of the largest remainders.
  assert budgets.largest_remainder([25, 25, 12, 3, 35], 0.1) == [3, 3, 1, 0, 3]
  # Fewer than one in all.
  assert budgets.largest_remainder([3, 1], 0.1) == [0, 0]
  assert budgets.largest_remainder([3, 2], 0.15) == [1, 0]


def test_everything():
  assert budgets.largest_remainder([7, 0, 10**10], 1) == [7, 0, 10**10]
  assert budgets.largest_remainder([7, 5], 1.0) == [7, 5]


def test_no_binary_fractions():
  # The float 0.1 is above a tenth: of 10¹⁷ and 5, ε·n would be rounded up.
  assert sum(budgets.largest_remainder([10**17 + 5], 0.1)) == 10**16
  assert budgets.largest_remainder([1000], np.float64(0.1)) == [100]


@pytest.mark.parametrize(
  'epsilon', [0, 0.0, -0.1, 1.0000001, float('nan'), float('inf'), '1', None]
)
def test_out_of_range(epsilon):
  with pytest.raises(errors.UserError) as error:
    budgets.largest_remainder([10], epsilon)
  assert str(error.value) == (
    'EPSILON must be in (0, 1], the share of parameters that are free; it is '
    f'{epsilon!r}'
  )
