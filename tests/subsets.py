"""Small models and subsets of them, for the tests of `dst_t5x.subset`."""

import dataclasses

import jax
import numpy as np
import reference

from dst_t5x import subsets
from dst_t5x.subsets import fingerprint


def seed_tree(dtype=np.float32):
  """Returns a model with layers, vectors, a scalar, three axes."""
  r = np.random.default_rng(0)

  def tensor(*shape):
    return r.standard_normal(shape).astype(dtype)

  layer = lambda: {'mlp': {'wi': tensor(4, 6)}, 'norm': tensor(5)}  # noqa: E731
  return {
    'encoder': {f'layers_{i}': layer() for i in range(3)},
    'logits': tensor(2, 3, 4),
    'scale': tensor(),
    'untouched': tensor(7),
  }


def tuned_tree(seed):
  """Returns a copy with new values, and odd ones; changes a bit of `seed`."""
  params = jax.tree.map(np.copy, seed)
  layers = params['encoder']
  layers['layers_1']['mlp']['wi'][0, 0] = 0.0
  seed['encoder']['layers_1']['mlp']['wi'][0, 0] = -0.0
  # The smallest denormal.
  reference.bits(layers['layers_1']['mlp']['wi'])[3, 5] = 1
  layers['layers_2']['norm'][4] = np.finfo(np.float16).max
  params['logits'][1] += 1
  params['scale'][...] = 3
  return params


def random_subset(seed, share, random, clustered=False):
  """Returns a subset of a share of each tensor, and the tuned parameters.

  Clustered, it is in as few rows as can be, whole.
  """
  tuned = jax.tree.map(np.copy, seed)
  for leaf in jax.tree.leaves(tuned):
    flat = leaf.reshape(-1)
    count = round(share * flat.size)
    if clustered:
      start = random.integers(flat.size - count + 1)
      chosen = slice(start, start + count)
    else:
      chosen = random.choice(flat.size, count, replace=False)
    flat[chosen] += flat.dtype.type(1)
  return subsets.extract(tuned, seed, fingerprint.fingerprint(seed)), tuned


def one(positions, values=None, path='logits', tensors=None):
  """Returns a subset of one tensor, which may contradict itself."""
  if values is None:
    values = np.zeros(len(positions), np.float32)
  seed = seed_tree()
  good = subsets.extract(seed, seed)
  return dataclasses.replace(
    good,
    tensors=good.tensors if tensors is None else tensors,
    positions={path: np.int64(positions)},
    values={path: values},
    fingerprint='a' * 64,
  )


def assert_same(actual, expected):
  """The same trees, bit for bit."""
  actual, expected = reference.flatten(actual), reference.flatten(expected)
  assert actual.keys() == expected.keys()
  for path, tensor in actual.items():
    tensor, other = np.asarray(tensor), np.asarray(expected[path])
    assert (tensor.shape, tensor.dtype) == (other.shape, other.dtype)
    assert tensor.tobytes() == other.tobytes(), path


def assert_equal(first, second):
  """The same subsets, bit for bit."""
  assert first.tensors == second.tensors
  for a, b in (
    (first.positions, second.positions),
    (first.values, second.values),
  ):
    assert a.keys() == b.keys()
    for path in a:
      assert a[path].dtype == b[path].dtype
      assert a[path].tobytes() == b[path].tobytes()
