"""Both engines give the same results, on one device and on eight."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import engines
import jax
import numpy as np
import pytest
import tiny_t5

from dst_t5x.checkpoints import t5x_checkpoint
from dst_t5x.method import projection as projection_lib
from dst_t5x.models.t5 import network as network_lib

_TESTS = pathlib.Path(__file__).resolve().parent.parent


def _check_the_same(seed, epsilon, rtol=1e-5):
  if epsilon is None:
    projection = projection_lib.NoProjection()
  else:
    projection = projection_lib.SubsetProjection(epsilon=epsilon)
  theirs = engines.t5x(projection, seed)
  ours = engines.ours(projection, seed)
  np.testing.assert_allclose(theirs.losses, ours.losses, rtol=rtol)
  assert len(set(ours.losses)) == engines.STEPS
  both, *counts = engines.shared(theirs, ours)
  assert both > 0.999 * max(counts)
  return counts


@pytest.mark.parametrize('epsilon', [None, 0.01, 0.1])
def test_the_same_losses_and_subsets(toy_seed, epsilon):
  first, second = _check_the_same(toy_seed, epsilon)
  assert first == second


@pytest.mark.slow  # Minutes, and 8 GB.
@pytest.mark.parametrize('epsilon', [None, 1e-4, 1e-2])
def test_the_same_of_t5_small(tmp_path, monkeypatch, epsilon):
  config = dataclasses.replace(tiny_t5.SMALL, dropout_rate=0.0)
  monkeypatch.setattr(engines, 'CONFIG', config)
  monkeypatch.setattr(engines, 'LENGTHS', {'inputs': 64, 'targets': 32})
  network = network_lib.Transformer(config)
  tokens = np.ones([1, 8], np.int32)
  keys = jax.random.key(0)
  params = network.init(keys, tokens, tokens, tokens)['params']
  seed = t5x_checkpoint.save(tmp_path, jax.device_get(params), 1_000_000)
  del params
  # A parameter more or less in the subset is seen in the loss.
  rtol = 1e-4 if epsilon else 1e-5
  first, second = _check_the_same(str(seed), epsilon, rtol)
  # Of full fine-tuning, which counts what has moved at all, a few differ.
  assert first == second or epsilon is None


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
