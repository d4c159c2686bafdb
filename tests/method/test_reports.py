"""Reports of the subset: size and churn by silo, and norms over it."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference

from dst_t5x.core import stacking
from dst_t5x.method import reports
from dst_t5x.method import silos


def _tree(r, values=(0.0, 1.0, 2.0), dtype=np.float32):
  def tensor(*shape):
    return np.asarray(r.choice(values, shape), dtype)

  return {
    'embedder': tensor(19, 5),
    'encoder': {
      f'layers_{i}': {'mlp': {'wi': tensor(4, 11)}, 'gain': tensor()}
      | {'norm': {'scale': tensor(3)}}
      for i in range(3)
    },
    'one': tensor(1),
    'temperature': tensor(),
  }


def _free(params, seed):
  """Returns path -> bool, which components are free."""
  new, old = reference.flatten(params), reference.flatten(seed)
  return {p: reference.bits(new[p]) != reference.bits(old[p]) for p in new}


@pytest.mark.parametrize('stacked', [False, True])
@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_subset_report(stacked, dtype):
  r = np.random.default_rng(0)
  seed, first, second = (_tree(r, dtype=dtype) for _ in range(3))
  # Bits count, not values.
  seed['embedder'][0, 0] = 0.0
  first['embedder'][0, 0] = second['embedder'][0, 0] = -0.0
  seed['embedder'][1, 0] = second['embedder'][1, 0] = np.nan
  was, is_ = _free(first, seed), _free(second, seed)
  expected = {'free': [], 'new': []}
  for parts in reference.silos(seed).values():
    paths = [path for path, _ in parts]
    expected['free'].append(sum(is_[p].sum() for p in paths))
    expected['new'].append(sum((is_[p] & ~was[p]).sum() for p in paths))
  if stacked:
    seed, first, second = map(stacking.stack_layers, (seed, first, second))
  layout = silos.make_layout(seed, 'per_module_and_layer')
  before = jax.jit(reports.pack_free)(first, seed)
  report = jax.jit(lambda *trees: reports.subset_report(layout, *trees))
  counts, now = report(second, seed, before)
  assert sum(expected['new']) > 0
  for name, numbers in expected.items():
    np.testing.assert_array_equal(counts[name], numbers, err_msg=name)
  for a, b in zip(
    jax.tree.leaves(now),
    jax.tree.leaves(reports.pack_free(second, seed)),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)
  # Eight to a byte where it matters.
  assert before['embedder'].shape == (19, 1)


def test_norm_of_free():
  r = np.random.default_rng(1)
  seed, params, gradients = (_tree(r) for _ in range(3))
  free = np.concatenate([x.reshape(-1) for x in _free(params, seed).values()])
  flat = np.concatenate(
    [x.reshape(-1) for x in reference.flatten(gradients).values()]
  )
  norm = jax.jit(reports.norm_of_free)
  np.testing.assert_allclose(
    norm(gradients, params, seed), np.linalg.norm(flat[free]), rtol=1e-6
  )
  np.testing.assert_allclose(
    norm(gradients, params, ()), np.linalg.norm(flat), rtol=1e-6
  )


def test_norm_of_nothing():
  seed = {'w': jnp.ones(3)}
  assert reports.norm_of_free({'w': jnp.full(3, jnp.nan)}, seed, seed) == 0
