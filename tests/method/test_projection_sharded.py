"""The projection of sharded parameters."""

import commands
import pytest

from dst_t5x.method import thresholds


@pytest.fixture(scope='module')
def rows():
  """Name of a setting -> the result of `project_sharded.py`."""
  found = commands.rows_on_eight_devices('project_sharded.py')
  assert len(found) == 6
  return {row['name']: row for row in found}


@pytest.mark.slow
def test_the_same_bits_as_on_one_device(rows):
  assert all(row['is_equal'] for row in rows.values())
  assert rows['random']['free'] == round(0.1 * rows['random']['size'])
  assert rows['normalized']['free'] == round(0.2 * rows['normalized']['size'])


@pytest.mark.slow
@pytest.mark.parametrize(
  'name', ['ties', 'one silo', 'random', 'normalized', 'iterative']
)
def test_one_small_sum_is_all_that_is_sent(rows, name):
  # In a counting pass: three digits for each silo and candidate.
  row = rows[name]
  [(operation, types, size)] = row['sent']
  assert (operation, types) == ('all-reduce', 'u32')
  candidates = 2 if name == 'iterative' else thresholds.CANDIDATES
  assert size == 3 * row['silos'] * candidates


@pytest.mark.slow
def test_without_churn_no_parameters_are_sent(rows):
  # Masks of a few components may be, where devices do not hold whole bytes.
  assert {types for _, types, _ in rows['no churn']['sent']} <= {'u8', 'u32'}
