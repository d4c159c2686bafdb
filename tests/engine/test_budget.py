"""Budgets of methods, counted before training."""

import math

import networks
import pytest

from dst_t5x.adapters import dora
from dst_t5x.adapters import lora
from dst_t5x.adapters import prompts
from dst_t5x.adapters import vera
from dst_t5x.core.errors import UserError
from dst_t5x.engine import budget
from dst_t5x.method import projection


def test_what_comes_nearest_to_a_fraction():
  network = networks.tiny(vocab_size=264)
  n = budget.rows(network)[0].budget.parameters
  many = range(1, 400)
  every = budget.rows(network, ranks=many, lengths=many, vera_ranks=many)
  for fraction in 0.003, 0.03, 0.2:
    near = {
      row.method: row.budget.fraction
      for row in budget.rows(network, fraction=fraction)
    }
    assert near['dst'] == near['random'] == round(fraction * n) / n
    for method in 'lora', 'dora', 'vera', 'prompt':
      best = min(
        abs(row.budget.fraction - fraction)
        for row in every
        if row.method == method
      )
      assert math.isclose(abs(near[method] - fraction), best, abs_tol=1e-12)


@pytest.mark.parametrize('scan_layers', [False, True])
def test_rows_are_what_an_adapter_trains(scan_layers):
  network = networks.tiny(scan_layers=scan_layers)
  counted = {
    (row.method, row.setting): row.budget.free for row in budget.rows(network)
  }
  for name, macro, adapter in (
    ('lora', 'LORA_RANK=4', lora.LoRA(rank=4)),
    ('dora', 'LORA_RANK=4', dora.DoRA(rank=4)),
    ('vera', 'LORA_RANK=256', vera.VeRA()),
    ('prompt', 'PROMPT_LENGTH=5', prompts.Prompt(length=5)),
  ):
    own = budget.own(network, projection.NoProjection(), adapter)
    assert own.budget.free == counted[name, macro]


@pytest.mark.parametrize('fraction', [0, -1, 2, '0.1', math.nan])
def test_no_fraction(fraction):
  with pytest.raises(UserError, match=r'FRACTION must be in \(0, 1\]; it is'):
    budget.rows(networks.tiny(vocab_size=264), fraction=fraction)
