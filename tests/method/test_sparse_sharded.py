"""Sparse methods on sharded parameters."""

import commands
import pytest


@pytest.fixture(scope='module')
def rows():
  """Name of a method -> the result of `tune_sharded.py`."""
  found = commands.rows_on_eight_devices('tune_sharded.py', timeout=1500)
  assert len(found) == 10
  return {row['name']: row for row in found}


@pytest.mark.slow
def test_the_same_bits_as_on_one_device(rows):
  for name, row in rows.items():
    assert row['is_equal'], name
    assert row['free'] > 0, name
    if name not in ('gasdu', 'nano_adam', 'lift'):
      assert row['free'] <= row['room'], name


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'lists'), [('shira_random', 2), ('shira_snip', 2), ('pafi', 15)]
)
def test_a_step_of_a_fixed_list_sends_lists_only(rows, name, lists):
  # In one silo, each of the 15 slices could have the whole list.
  row = rows[name]
  assert row['sent']
  for operation, types, size in row['sent']:
    assert (operation, types) == ('all-reduce', 'f32')
    assert size <= lists * row['room']


@pytest.mark.slow
def test_a_choice_sends_bits_and_no_parameters(rows):
  row = rows['gasdu']
  words = row['size'] // 8  # Rows are padded to whole words.
  for _, types, size in row['sent']:
    assert types != 'f32' or size <= 2 * row['room']
    assert size <= max(words, 2 * row['room'])
