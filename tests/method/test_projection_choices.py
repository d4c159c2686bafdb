"""The projection's options: silos, exclusions, normalizations, churn."""

import functools
import re
import typing

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import ml_dtypes
import numpy as np
import pytest
import reference
from test_projection import assert_same_bits
from test_projection import make_tree

from dst_t5x.core import errors
from dst_t5x.core import stacking
from dst_t5x.method import projection
from dst_t5x.method import reports

DISTANCES = ('absolute', 'relative', 'inverse_relative')


@functools.cache
def _jitted(**choices):
  method = projection.SubsetProjection(**choices)
  return method, jax.jit(method.init), jax.jit(method.apply)


def _tree(seed, values=None, dtype=np.float32):
  r = np.random.default_rng(seed)
  if values is None:
    return make_tree(lambda shape: r.standard_normal(shape).astype(dtype))
  return make_tree(lambda shape: np.asarray(r.choice(values, shape), dtype))


def _step(new, seed, **choices):
  method, init, apply = _jitted(**choices)
  params, state = apply(new, seed, init(seed))
  return method, reference.flatten(jax.device_get(params)), state


def _free(flat, seed):
  """Returns path -> number of components that differ in their bits."""
  return {
    path: int((reference.bits(flat[path]) != reference.bits(tensor)).sum())
    for path, tensor in reference.flatten(seed).items()
  }


_TIES = [-2.0, -1.0, -0.0, 0.0, 1.0, 2.0]


# Each costs its compilation: not all combinations, but every choice.
_CHOICES = (
  {'silos': 'none', 'distance': 'absolute', 'epsilon': 0.03},
  {'silos': 'none', 'distance': 'relative', 'epsilon': 1e-3},
  {'silos': 'per_module', 'distance': 'relative', 'epsilon': 0.25},
  {'silos': 'per_tensor', 'distance': 'inverse_relative', 'epsilon': 0.25},
  {'silos': 'per_tensor', 'distance': 'absolute', 'epsilon': 1.0},
)
_SORTED = (
  {'silos': 'none', 'distance': 'absolute', 'epsilon': 0.25},
  {'silos': 'per_module', 'distance': 'relative', 'epsilon': 0.03},
)


@settings(max_examples=40, deadline=None)
@given(
  random_seed=st.integers(0, 2**32 - 1),
  choices=st.sampled_from(
    [*_CHOICES, *({**c, 'threshold': 'sort'} for c in _SORTED)]
  ),
  values=st.sampled_from([None, _TIES, [0.0, -0.0], [1e-40, 0.0, 1.0]]),
)
def test_silos_distances_and_thresholds(random_seed, choices, values):
  seed, new = _tree(random_seed, values), _tree(random_seed + 1, values)
  _, params, _ = _step(new, seed, **choices)
  expected = reference.project(
    new, seed, choices['epsilon'], choices['distance'], choices['silos']
  )
  assert_same_bits(params, expected)


@settings(max_examples=12, deadline=None)
@given(
  random_seed=st.integers(0, 2**32 - 1),
  choices=st.sampled_from(
    [
      ('size', 'per_module', 'absolute', np.float32),
      ('size', 'per_module_and_layer', 'inverse_relative', ml_dtypes.bfloat16),
      ('mean', 'per_module', 'inverse_relative', ml_dtypes.bfloat16),
      ('mean', 'per_module_and_layer', 'absolute', np.float32),
    ]
  ),
)
def test_normalizations(random_seed, choices):
  name, over, distance, dtype = choices
  # Quarters: sums of them have no rounding, in whatever order.
  values = np.arange(-40, 40) / 4
  seed, new = (_tree(random_seed + i, values, dtype) for i in range(2))
  _, params, _ = _step(
    new,
    seed,
    epsilon=0.03,
    distance=distance,
    silos='none',
    normalization=name,
    normalize_over=over,
  )
  expected = reference.project(
    new, seed, 0.03, distance, 'none', scale=reference.scales(seed, name, over)
  )
  assert_same_bits(params, expected)


@pytest.mark.parametrize(
  ('kind', 'exclude'),
  [
    ('none', 'embedder/.*'),
    ('per_module', 'encoder/layers_1/.*'),
    ('per_module_and_layer', '.*/(norm/scale|one)'),
  ],
)
def test_exclusions(kind, exclude):
  seed, new = _tree(0), _tree(1)
  method, params, _ = _step(
    new, seed, epsilon=0.25, silos=kind, exclude=(exclude,)
  )
  expected = reference.project(new, seed, 0.25, kind=kind, exclude=exclude)
  assert_same_bits(params, expected)
  free = _free(params, seed)
  frozen = [path for path in free if re.fullmatch(exclude, path)]
  assert frozen
  assert sum(free[path] for path in frozen) == 0
  # The budget is a share of the rest.
  layout = method.layout(seed)
  rest = [x.size for p, x in reference.flatten(seed).items() if p not in frozen]
  assert layout.included == sum(rest) < layout.size
  assert sum(free.values()) == round(0.25 * sum(rest))


def test_stacked_layers_give_the_same_bits():
  seed, new = _tree(2, _TIES), _tree(3, _TIES)
  choices = (
    {'silos': 'none', 'normalization': 'size'},
    {'silos': 'per_module'},
    {'silos': 'per_tensor', 'threshold': 'sort'},
    {'exclude': ('encoder/layers_1/.*',)},
    {'churn': False},
    {'distance': 'random'},
  )
  for choice in choices:
    _, params, _ = _step(new, seed, epsilon=0.2, **choice)
    _, init, apply = _jitted(epsilon=0.2, **choice)
    stacked = stacking.stack_layers(seed)
    other, _ = apply(stacking.stack_layers(new), stacked, init(stacked))
    other = stacking.unstack_layers(jax.device_get(other))
    assert_same_bits(reference.flatten(other), params)


@pytest.mark.parametrize('distance', ['inverse_relative', 'random'])
def test_without_churn_the_first_subset_stays(distance):
  seed = _tree(4)
  choices = {'epsilon': 0.25, 'distance': distance}
  _, init, apply = _jitted(**choices, churn=False)
  state = init(seed)
  for step in range(3):
    new = _tree(5 + step)
    params, state = apply(new, seed, state)
    params = reference.flatten(jax.device_get(params))
    if step == 0:
      _, expected, _ = _step(new, seed, **choices)
      first = {
        path: reference.bits(x) != reference.bits(params[path])
        for path, x in reference.flatten(seed).items()
      }
    else:
      assert int(state.passes) == 0
      expected = {
        path: np.where(first[path], a, b)
        for (path, a), b in zip(
          reference.flatten(new).items(),
          reference.flatten(seed).values(),
          strict=True,
        )
      }
    assert_same_bits(params, expected)


@pytest.mark.parametrize('idle', [1, 3])
def test_without_churn_a_step_that_moves_nothing_chooses_nothing(idle):
  """Such as the first step of a warm-up, whose learning rate is 0."""
  seed, new = _tree(4), _tree(5)
  choices = {'epsilon': 0.25, 'churn': False}
  _, init, apply = _jitted(**choices)
  state = init(seed)
  for _ in range(idle):
    params, state = apply(seed, seed, state)
    assert sum(_free(reference.flatten(params), seed).values()) == 0
  params, state = apply(new, seed, state)
  _, expected, _ = _step(new, seed, **choices)
  assert_same_bits(reference.flatten(jax.device_get(params)), expected)
  # From now on it stays, also over a step that moves nothing.
  _, state = apply(seed, seed, state)
  again, state = apply(new, seed, state)
  assert int(state.passes) == 0
  assert_same_bits(reference.flatten(jax.device_get(again)), expected)


def test_rules_of_ones_own():
  rules = [
    (r'.*/layers_(\d)/attention/.*', r'attention \1'),
    (r'.*(norm|one).*', 'small'),
    (r'.*', 'all else'),
  ]
  seed, new = _tree(6), _tree(7)
  method, params, _ = _step(
    new, seed, epsilon=0.1, silos=tuple(rules), distance='absolute'
  )
  layout = method.layout(seed)
  assert layout.names == (
    'all else', 'attention 0', 'attention 1', 'attention 2', 'small'
  )  # fmt: skip
  assert layout.sizes == (37 * 8 + 3 * 24 + 1, 96, 96, 96, 3 * 5 + 1)
  budgets = dict(zip(layout.names, layout.budgets(0.1), strict=True))
  free = _free(params, seed)
  small = {p: k for p, k in free.items() if 'norm' in p or 'one' in p}
  assert sum(small.values()) == budgets['small']
  assert (
    sum(free[p] for p in free if '_2/attention' in p)
    == (budgets['attention 2'])
  )
  assert sum(free.values()) == sum(budgets.values()) == round(0.1 * layout.size)


def test_iterative_thresholds_follow_algorithm_2():
  # By hand, in NumPy: the threshold before is 1, δ is 4 and J is 3.
  r = np.random.default_rng(8)
  seed = {'w': {'kernel': np.float32(r.standard_normal((40, 30)))}}
  new = {'w': {'kernel': np.float32(r.standard_normal((40, 30)))}}
  _, init, apply = _jitted(
    epsilon=0.1,
    distance='absolute',
    threshold='iterative',
    delta=4.0,
    iterations=3,
  )
  distances = np.abs(new['w']['kernel'] - seed['w']['kernel'])
  state, tau = init(seed), np.float32(1)
  for _ in range(12):
    lower, upper = tau / np.float32(4), tau * np.float32(4)
    for _ in range(3):
      middle = lower + (upper - lower) / np.float32(2)
      if np.mean(distances > middle) > 0.1:
        lower = middle
      else:
        upper = middle
    tau = lower + (upper - lower) / np.float32(2)
    params, state = apply(new, seed, state)
    found = np.asarray(state.thresholds).view(np.float32)
    np.testing.assert_array_equal(found, [tau])
    kept = np.asarray(params['w']['kernel']) != seed['w']['kernel']
    np.testing.assert_array_equal(kept, distances > tau)


def test_iterative_thresholds_come_near():
  r = np.random.default_rng(9)
  shape = (300, 200)
  seed = {'w': {'kernel': np.float32(r.standard_normal(shape))}}
  _, init, apply = _jitted(epsilon=0.01, threshold='iterative')
  state, drift = init(seed), np.float32(0.01 * r.standard_normal(shape))
  for _ in range(40):
    noise = np.float32(0.002 * r.standard_normal(shape))
    new = {'w': {'kernel': seed['w']['kernel'] + drift + noise}}
    params, state = apply(new, seed, state)
  kept = np.asarray(params['w']['kernel']) != seed['w']['kernel']
  assert abs(kept.sum() - 600) < 0.05 * 600
  assert int(state.passes) == 10


@pytest.mark.parametrize(
  ('choices', 'dtype', 'stack'),
  [
    ({}, np.float32, True),
    ({'silos': 'none', 'threshold': 'sort'}, ml_dtypes.bfloat16, False),
    ({'distance': 'random', 'churn': False}, np.float32, False),
    ({'exclude': ('embedder/.*',), 'epsilon': 0.9}, np.float32, False),
    ({'epsilon': 1e-7}, ml_dtypes.bfloat16, True),
  ],
)
def test_the_seed_can_be_rebuilt_from_the_subset(choices, dtype, stack):
  choices = {'epsilon': 0.2} | choices
  seed = _tree(10, dtype=dtype)
  if stack:
    seed = stacking.stack_layers(seed)
  _, init, apply = _jitted(**choices)
  method, init_sparse, apply_sparse = _jitted(**choices, keep_seed=False)
  rebuild, norm = jax.jit(method.seed), jax.jit(method.norm_of_free)
  state, sparse = init(seed), init_sparse(seed)
  params = seed
  for step in range(4):
    rebuilt = rebuild(params, (), sparse)
    assert_same_bits(
      reference.flatten(jax.device_get(rebuilt)), reference.flatten(seed)
    )
    moves = _tree(11 + step, _TIES, dtype)
    if stack:
      moves = stacking.stack_layers(moves)
    new = jax.tree.map(lambda a, b: (a + b).astype(a.dtype), params, moves)
    new = jax.device_get(new)
    params, state = apply(new, seed, state)
    other, sparse = apply_sparse(new, rebuilt, sparse)
    assert_same_bits(
      reference.flatten(jax.device_get(other)),
      reference.flatten(jax.device_get(params)),
    )
    expected = reports.norm_of_free(new, params, seed)
    found = norm(new, params, (), sparse)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# Twelve components of which three are free. By hand:
#   seed      1  -2   4   0 | 0.5  8  -1   2 | 1  1  1  1
#   new       3  -3   5   6 | 3.5  9  -1   6 | 2  1  1  4
#   moved     2   1   1   6 | 3    1   0   4 | 1  0  0  3
_SEED = {
  'encoder': {
    'layers_0': {'mlp': {'kernel': np.float32([1, -2, 4, 0])}},
    'layers_1': {'mlp': {'kernel': np.float32([0.5, 8, -1, 2])}},
  },
  'head': {'kernel': np.float32([1, 1, 1, 1])},
}
_NEW = {
  'encoder': {
    'layers_0': {'mlp': {'kernel': np.float32([3, -3, 5, 6])}},
    'layers_1': {'mlp': {'kernel': np.float32([3.5, 9, -1, 6])}},
  },
  'head': {'kernel': np.float32([2, 1, 1, 4])},
}


@pytest.mark.parametrize(
  ('choices', 'free'),
  [
    # absolute: 2 1 1 6 | 3 1 0 4 | 1 0 0 3: the largest are 6, 4, and 3, the
    # first of two.
    ({'distance': 'absolute', 'silos': 'none'}, {3, 4, 7}),
    # relative: 2 .5 .25 inf | 6 .125 0 2 | 1 0 0 3.
    ({'distance': 'relative', 'silos': 'none'}, {3, 4, 11}),
    # inverse relative: 2 2 4 0 | 1.5 8 0 8 | 1 0 0 3.
    ({'silos': 'none'}, {2, 5, 7}),
    # per module: two of eight, one of four.
    ({'silos': 'per_module'}, {5, 7, 11}),
    ({'silos': 'per_module_and_layer'}, {2, 5, 11}),
    ({'silos': 'per_tensor'}, {2, 5, 11}),
    # by size over modules, 8 and 4: .25 .25 .5 0 | .19 1 0 1 | .25 0 0 .75.
    (
      {
        'silos': 'none',
        'normalization': 'size',
        'normalize_over': 'per_module',
      },
      {5, 7, 11},
    ),
    # by the mean seed of modules of layers, 1.75, 2.875 and 1:
    # 1.1 1.1 2.3 0 | .52 2.8 0 2.8 | 1 0 0 3.
    ({'silos': 'none', 'normalization': 'mean'}, {5, 7, 11}),
    # by that over modules, 18.5 / 8 and 1: 8 is 3.46, and the tie goes on.
    (
      {
        'silos': 'none',
        'normalization': 'mean',
        'normalize_over': 'per_module',
        'distance': 'absolute',
      },
      # .86 .43 .43 2.6 | 1.3 .43 0 1.7 | 1 0 0 3.
      {3, 7, 11},
    ),
    # Two of the eight that are left: 3 is one of four, 4 is another's.
    ({'silos': 'none', 'exclude': ('head/.*',)}, {5, 7}),
    ({'silos': 'none', 'threshold': 'sort'}, {2, 5, 7}),
  ],
)
def test_golden(choices, free):
  _, params, _ = _step(_NEW, _SEED, epsilon=0.25, **choices)
  flat_new = np.concatenate([x.ravel() for x in jax.tree.leaves(_NEW)])
  flat_seed = np.concatenate([x.ravel() for x in jax.tree.leaves(_SEED)])
  expected = [
    flat_new[i] if i in free else flat_seed[i] for i in range(len(flat_seed))
  ]
  assert np.concatenate(list(params.values())).tolist() == expected


def test_zeros_of_both_signs_are_the_same_place():
  # −0.0 is other bits than 0.0, and no distance away: it is never free, and
  # the seed's bits come back.
  seed = {'w': {'kernel': np.float32([0.0, -0.0, 1.0, 0.0])}}
  new = {'w': {'kernel': np.float32([-0.0, 0.0, 1.0, -0.0])}}
  for distance in DISTANCES:
    _, params, _ = _step(new, seed, epsilon=1.0, distance=distance)
    assert_same_bits(params, reference.flatten(seed))


def test_a_silo_of_nothing():
  seed = {'a': {'kernel': np.zeros((0, 3), np.float32)}}
  seed |= {'b': {'kernel': np.ones((3,), np.float32)}}
  new = jax.tree.map(lambda x: x + 1, seed)
  for threshold in typing.get_args(projection.Threshold):
    _, params, _ = _step(new, seed, epsilon=1.0, threshold=threshold)
    assert params['a/kernel'].shape == (0, 3)
    if threshold != 'iterative':
      assert params['b/kernel'].tolist() == [2, 2, 2]


def test_the_table_of_budgets():
  method = projection.SubsetProjection(0.25, exclude=['head/.*'])
  lines = method.layout(_SEED).table(0.25).splitlines()
  assert [line.split() for line in lines] == [
    ['silo', 'parameters', 'budget'],
    ['encoder/layers_0/mlp', '4', '1'],
    ['encoder/layers_1/mlp', '4', '1'],
    ['(excluded)', '4', '0'],
    ['sum', '12', '2'],
  ]
  assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize(
  ('choices', 'message'),
  [
    ({'silos': 'per_modul'}, "did you mean 'per_module'"),
    ({'silos': [('(', 'a')]}, "'\\(' is no regular expression"),
    ({'silos': [('.*', r'\3')]}, r"name of a silo '\\\\3': invalid group"),
    ({'silos': ['.*']}, r"SILOS must be one of .* it is \['\.\*'\]"),
    ({'silos': [('encoder/.*', 'a')]}, "no rule names the silo of 'head/ke"),
    ({'exclude': ['heads/.*']}, "no parameter has a path like 'heads/"),
    ({'exclude': ['.*']}, 'nothing is left to be tuned'),
    ({'exclude': '.*'}, 'EXCLUDE must be a list'),
    ({'normalization': 'sized'}, "did you mean 'size'"),
    ({'normalization': 'size', 'distance': 'random'}, 'is not normalized'),
    ({'threshold': 'exactly'}, "did you mean 'exact'"),
    ({'keep_seed': False, 'threshold': 'iterative'}, 'keep_seed=False needs'),
    ({'delta': 1.0}, 'DELTA must be above 1'),
    ({'iterations': 0}, 'ITERATIONS must be a positive whole number'),
  ],
)
def test_mistakes(choices, message):
  with pytest.raises(errors.UserError, match=message):
    projection.SubsetProjection(0.1, **choices).init(_SEED)


def test_too_many_to_sort():
  large = {'a': {'b': jax.ShapeDtypeStruct((2**16, 2**15), np.float32)}}
  method = projection.SubsetProjection(0.1, threshold='sort')
  state = jax.eval_shape(projection.SubsetProjection(0.1).init, large)
  with pytest.raises(errors.UserError, match='too many to be sorted'):
    jax.eval_shape(method.apply, large, large, state)
