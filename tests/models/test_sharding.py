"""Networks on a mesh of eight devices that divides rows and matrices."""

import commands
import pytest


@pytest.mark.slow
def test_a_mesh_computes_what_one_device_does():
  rows = commands.rows_on_eight_devices('compute_sharded.py')
  assert len(rows) == 5
  for row in rows:
    assert row['is_finite'], row
    assert row['wrong_id_is_nan'], row
    assert row['exchanges'], row
    assert row['loss'] < 1e-5, row
    assert row['gradients'] < 1e-4, row
    assert row['decodes_the_same'], row
