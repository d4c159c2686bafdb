"""The projection of parameters that lie on many devices."""

import os
import subprocess
import sys

import pytest

_SHARDED = """
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from dst_t5x import projection

assert len(jax.devices()) == 8
mesh = jax.make_mesh((4, 2), ('data', 'model'))
specs = {
  'embedder': {'embedding': ((64, 16), ('model', 'data'))},
  'decoder': {
    'layers_0': {
      'mlp': {'wi': ((16, 32), (None, 'model')), 'wo': ((32, 16), ('model',))},
      'norm': {'scale': ((16,), ())},
    },
    'layers': {'mlp': {'wi': ((4, 16, 32), ('data', None, 'model'))}},
    'logits': {
      'kernel': ((16, 64), ('data', 'model')), 'bias': ((64,), ('data',))},
  },
}
# `layers_0` would be layer 0 of the stack.
specs['encoder'] = {'layers_0': specs['decoder'].pop('layers_0')}
leaf = lambda x: isinstance(x, tuple)
r = np.random.default_rng(0)
for values, epsilon, distance in (
  (None, 0.03, 'inverse_relative'),
  ([-1.0, 0.5, 1.0], 0.2, 'inverse_relative'),
  (None, 0.1, 'random'),
):
  def tensor(spec):
    shape, _ = spec
    x = r.standard_normal(shape) if values is None else r.choice(values, shape)
    return x.astype(np.float32)
  seed, new = (jax.tree.map(tensor, specs, is_leaf=leaf) for _ in range(2))
  method = projection.SubsetProjection(epsilon, distance)
  shardings = jax.tree.map(
    lambda s: NamedSharding(mesh, PartitionSpec(*s[1])), specs, is_leaf=leaf)
  state = method.init(seed)
  one = jax.jit(method.apply)(new, seed, state)
  many = jax.jit(method.apply)(
    jax.device_put(new, shardings), jax.device_put(seed, shardings), state)
  spread = [len(x.sharding.device_set) for x in jax.tree.leaves(many[0])]
  assert spread == [8] * len(spread), spread
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
  changed = sum(int((np.asarray(a) != b).sum()) for a, b in zip(
    jax.tree.leaves(many[0]), jax.tree.leaves(seed), strict=True))
  print('equal', changed, sum(x.size for x in jax.tree.leaves(seed)))
"""


@pytest.mark.slow
def test_on_many_devices(repository):
  environment = os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '--xla_force_host_platform_device_count=8',
  }
  done = subprocess.run(
    [sys.executable, '-c', _SHARDED],
    cwd=repository,
    env=environment,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr
  lines = done.stdout.splitlines()
  assert len(lines) == 3
  for line, epsilon in zip(lines, (0.03, 0.2, 0.1), strict=True):
    word, free, size = line.split()
    assert word == 'equal'
    if epsilon != 0.2:
      assert int(free) == round(epsilon * int(size))
