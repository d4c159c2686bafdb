"""Budgets of methods, counted before training."""

import math

import networks
import pytest

from dst_t5x.core.errors import UserError
from dst_t5x.engine import budget


def test_what_comes_nearest_to_a_fraction():
  network = networks.tiny(vocab_size=264)
  n = budget.rows(network)[0].budget.parameters
  every = budget.rows(network, ranks=range(1, 400), lengths=range(1, 400))
  for fraction in 0.003, 0.03, 0.2:
    near = {
      row.method: row.budget.fraction
      for row in budget.rows(network, fraction=fraction)
    }
    assert near['dst'] == near['random'] == round(fraction * n) / n
    for method in 'lora', 'prompt':
      best = min(
        abs(row.budget.fraction - fraction)
        for row in every
        if row.method == method
      )
      assert math.isclose(abs(near[method] - fraction), best, abs_tol=1e-12)


@pytest.mark.parametrize('fraction', [0, -1, 2, '0.1', math.nan])
def test_no_fraction(fraction):
  with pytest.raises(UserError, match=r'FRACTION must be in \(0, 1\]; it is'):
    budget.rows(networks.tiny(vocab_size=264), fraction=fraction)
