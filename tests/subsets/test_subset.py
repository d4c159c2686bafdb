"""What a subset is: taken from parameters, applied to a seed, compared."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import subsets

from dst_t5x import subsets as subset
from dst_t5x.core import errors
from dst_t5x.core import stacking
from dst_t5x.subsets import fingerprint

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('stack_seed', [False, True])
@pytest.mark.parametrize('stack_params', [False, True])
def test_there_and_back(dtype, stack_seed, stack_params):
  seed = subsets.seed_tree(dtype)
  params = subsets.tuned_tree(seed)
  # The library compares bits, whatever they mean.
  params['encoder']['layers_1']['mlp']['wi'][1, 1] = np.nan
  before = jax.tree.map(np.copy, seed)
  forms = [lambda tree: tree, stacking.stack_layers]
  tuned = jax.tree.map(jnp.asarray, forms[stack_params](params))
  found = subset.extract(tuned, forms[stack_seed](seed))
  assert found.size == 3 + 1 + 12 + 1
  assert sorted(found.positions) == [
    'encoder/layers_1/mlp/wi',
    'encoder/layers_2/norm',
    'logits',
    'scale',
  ]
  assert found.positions['encoder/layers_1/mlp/wi'].tolist() == [0, 7, 23]
  subsets.assert_same(subset.apply(found, seed), params)
  stacked = subset.apply(found, stacking.stack_layers(seed))
  subsets.assert_same(stacked, stacking.stack_layers(params))
  subsets.assert_same(seed, before)
  again = subset.extract(subset.apply(found, seed), seed)
  subsets.assert_equal(again, found)


def test_the_empty_subset():
  seed = subsets.seed_tree()
  nothing = subset.extract(seed, seed)
  assert nothing.size == 0
  applied = subset.apply(nothing, seed)
  for a, b in zip(jax.tree.leaves(applied), jax.tree.leaves(seed), strict=True):
    assert a is b


def _refused(function, *arguments):
  with pytest.raises(errors.UserError) as error:
    function(*arguments)
  assert '\n' not in str(error.value)
  return str(error.value)


@pytest.mark.parametrize(
  ('bad', 'message'),
  [
    (subsets.one([0], np.zeros(1, np.float16)), 'logits are float16, the tens'),
    (subsets.one([5, 24]), 'outside of the tensor, which has 24 components'),
    (subsets.one([-1, 3]), 'a position of logits is outside of the tensor'),
    (subsets.one([3, 3]), 'the positions of logits are not ascending'),
    (subsets.one([4, 3]), 'the positions of logits are not ascending'),
    (subsets.one([3, 4], np.zeros(1, np.float32)), 'logits has not one value'),
  ],
)
def test_a_subset_that_contradicts_itself(bad, message):
  seed = subsets.seed_tree()
  before = jax.tree.map(np.copy, seed)
  bad = dataclasses.replace(bad, fingerprint=None)
  assert message in _refused(subset.apply, bad, seed)
  subsets.assert_same(seed, before)


def test_a_seed_of_another_network():
  params, seed = subsets.seed_tree(), subsets.seed_tree()
  good = subset.extract(params, seed)
  seed['logits'] = seed['logits'].reshape(4, 6)
  assert _refused(subset.extract, params, seed) == (
    'subset: logits is float32[2, 3, 4] in the tuned model, float32[4, 6] in '
    'the seed'
  )
  assert _refused(subset.apply, good, seed) == (
    'subset: logits is float32[4, 6] in the seed, float32[2, 3, 4] in the '
    'subset'
  )
  seed['logit'] = seed.pop('logits').reshape(2, 3, 4)
  assert _refused(subset.apply, good, seed) == (
    'subset: the subset has a tensor logits, the seed has none; did you mean '
    "'logit'?"
  )
  del seed['logit']
  assert 'the tuned model has a tensor logits, the seed has none' in _refused(
    subset.extract, params, seed
  )
  del params['logits']
  params['scale'] = params['scale'].astype(np.float16)
  assert 'float16[] in the tuned model, float32[] in' in _refused(
    subset.extract, params, seed
  )


def test_another_seed_is_refused_by_its_fingerprint():
  seed = subsets.seed_tree()
  params = subsets.tuned_tree(seed)
  identity = fingerprint.fingerprint(seed)
  found = subset.extract(params, seed, identity)
  subsets.assert_same(subset.apply(found, seed), params)
  subsets.assert_same(subset.apply(found, seed, identity), params)
  subsets.assert_same(
    subset.apply(found, stacking.stack_layers(seed)),
    stacking.stack_layers(params),
  )
  other = jax.tree.map(np.copy, seed)
  other['untouched'][3] = np.nextafter(other['untouched'][3], np.float32(9))
  assert _refused(subset.apply, found, other) == (
    f'subset: it belongs to the seed with fingerprint {identity[:12]}…; this '
    f'one has {fingerprint.fingerprint(other)[:12]}…'
  )
  assert 'it belongs to' in _refused(subset.apply, found, seed, 'f' * 64)


def test_what_leads_from_one_subset_to_another():
  seed = {'a': np.zeros(9, np.float32), 'b': np.zeros(3, np.float32)}
  first = subset.extract({'a': np.float32([1, 2, 3, 0, 0, 0, 0, 0, 0]),
                          'b': np.float32([0, 0, 7])}, seed)  # fmt: skip
  second = subset.extract({'a': np.float32([0, 2, 4, 5, 0, 0, 0, 0, 0]),
                           'b': np.float32([0, 0, 7])}, seed)  # fmt: skip
  found = subset.diff(first, second)
  content = [
    ({p: a.tolist() for p, a in s.positions.items()},
     {p: a.tolist() for p, a in s.values.items()})
    for s in found
  ]  # fmt: skip
  assert content == [
    ({'a': [0]}, {'a': [1]}),
    ({'a': [3]}, {'a': [5]}),
    ({'a': [2]}, {'a': [4]}),
  ]
  same = subset.diff(first, first)
  assert [s.size for s in same] == [0, 0, 0]
  other = dataclasses.replace(second, fingerprint='f' * 64)
  known = dataclasses.replace(first, fingerprint='e' * 64)
  assert 'different seeds, with fingerprints eeee' in _refused(
    subset.diff, known, other
  )
