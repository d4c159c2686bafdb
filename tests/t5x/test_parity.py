"""Both engines compute the same, on one device and on eight."""

import json
import os
import pathlib
import subprocess
import sys

import engines
import numpy as np
import pytest

from dst_t5x import projection as projection_lib

_TESTS = pathlib.Path(__file__).resolve().parent.parent


@pytest.mark.parametrize('epsilon', [None, 0.01, 0.1])
def test_the_same_losses_and_subsets(toy_seed, epsilon):
  if epsilon is None:
    projection = projection_lib.NoProjection()
  else:
    projection = projection_lib.SubsetProjection(epsilon=epsilon)
  theirs = engines.t5x(projection, toy_seed)
  ours = engines.ours(projection, toy_seed)
  np.testing.assert_allclose(theirs.losses, ours.losses, rtol=1e-5)
  both, first, second = engines.shared(theirs, ours)
  assert first == second
  assert both > 0.999 * first
  assert len(set(ours.losses)) == engines.STEPS


def test_eight_devices_compute_the_same(toy_seed):
  paths = [_TESTS.parent, _TESTS, os.environ.get('PYTHONPATH', '')]
  done = subprocess.run(
    [sys.executable, _TESTS / 't5x' / 'engines.py', toy_seed],
    env=os.environ
    | {
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
      'PYTHONPATH': os.pathsep.join(map(str, paths)),
    },
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr
  one, eight = (json.loads(row) for row in done.stdout.splitlines())
  np.testing.assert_allclose(eight['losses'], one['losses'], rtol=1e-4)
  free = [
    {(path, i) for path, places in row['free'].items() for i in places}
    for row in (one, eight)
  ]
  assert len(free[0]) == len(free[1]) == 393
  assert len(free[0] & free[1]) >= 0.98 * 393
  specs = eight['specs']
  kernel = 'encoder/layers_0/mlp/wi_0/kernel'
  assert specs[f'state/seed/{kernel}'] == specs[f'target/{kernel}']
  assert 'model' in specs[f'state/seed/{kernel}']
  assert 'model' not in specs['state/projection/thresholds']
