"""The projection: exact budgets, the seed's bits, any tree, any start."""

import collections
import doctest
import functools
import textwrap

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import reference

from dst_t5x import method
from dst_t5x.core import errors
from dst_t5x.core import stacking
from dst_t5x.method import projection
from dst_t5x.method import silos

# Tensors of rank 0 to 3, of one component, in and out of layers.
_LAYER = {
  'attention': {'query': {'kernel': (8, 6)}, 'out': {'kernel': (6, 8)}},
  'mlp': {'wi': {'kernel': (2, 3, 4)}},
  'norm': {'scale': (5,)},
}
SHAPES = {
  'embedder': {'embedding': (37, 8)},
  'encoder': {f'layers_{i}': _LAYER for i in range(3)} | {'one': (1,)},
  'temperature': (),
}
EPSILONS = (1e-7, 1e-3, 0.03, 0.25, 1.0)


def make_tree(draw_tensor):
  """Returns a tree of tensors drawn by `draw_tensor(shape)`."""
  return jax.tree.map(
    draw_tensor, SHAPES, is_leaf=lambda x: isinstance(x, tuple)
  )


@functools.cache
def _jitted(epsilon, distance='inverse_relative', random_seed=0):
  method = projection.SubsetProjection(
    epsilon, distance, random_seed=random_seed
  )
  return method, jax.jit(method.apply)


def assert_same_bits(actual, expected):
  assert actual.keys() == expected.keys()
  for path, tensor in actual.items():
    assert tensor.dtype == expected[path].dtype
    np.testing.assert_array_equal(
      reference.bits(tensor), reference.bits(expected[path]), err_msg=path
    )


def free_of_silos(params, seed):
  """Returns silo -> number of components that differ from the seed in bits."""
  free = collections.Counter()
  new, old = reference.flatten(params), reference.flatten(seed)
  for silo, parts in reference.silos(seed).items():
    for path, _ in parts:
      differ = reference.bits(new[path]) != reference.bits(old[path])
      free[silo] += int(differ.sum())
  return free


def check(new, seed, epsilon, distance='inverse_relative', state=None):
  """Compares one step with the reference, then checks each guarantee."""
  method, apply = _jitted(epsilon, distance)
  params, state = apply(new, seed, state or method.init(seed))
  params = jax.device_get(params)
  flat = reference.flatten(params)
  assert_same_bits(flat, reference.project(new, seed, epsilon, distance))
  partition = reference.silos(seed)
  sizes = [sum(size for _, size in parts) for parts in partition.values()]
  budgets = reference.budgets(sizes, epsilon)
  assert sum(budgets) == round(epsilon * sum(sizes))
  free = free_of_silos(params, seed)
  flat_new, flat_seed = reference.flatten(new), reference.flatten(seed)
  for (silo, parts), budget in zip(partition.items(), budgets, strict=True):
    nonzero = 0
    for path, _ in parts:
      a, b, c = flat[path], flat_new[path], flat_seed[path]
      nonzero += np.count_nonzero(reference.distance(distance, b, c))
      a, b, c = reference.bits(a), reference.bits(b), reference.bits(c)
      assert ((a == b) | (a == c)).all()
    assert free[silo] == min(budget, nonzero)
  assert int(state.passes) <= 40
  return params, state


def _normal(r, dtype=np.float32):
  return make_tree(lambda shape: r.standard_normal(shape).astype(dtype))


@pytest.mark.parametrize('distance', ['absolute', 'relative'])
@pytest.mark.parametrize('epsilon', [0.03])
def test_other_distances(distance, epsilon):
  r = np.random.default_rng(0)
  for _ in range(3):
    check(_normal(r), _normal(r), epsilon, distance)


_VALUES = {
  'ties': [-2.0, -1.0, 0.0, 1.0, 2.0],
  'mostly zero': [0.0, 0.0, 0.0, -0.0, 0.0, 0.0, 0.5],
  'zeros of both signs': [0.0, -0.0],
  'denormal': [0.0, 1e-45, -1e-45, 5e-39, 1.2e-38, -1.2e-38, 1.0],
  'underflowing': [0.0, 1e-30, 1e-20, -1e-25, 2e-19, 1.0],
  'large': [1e30, -1e30, 3e38, 1.0, 2.0, 1e-30],
  'infinite': [np.inf, -np.inf, 1.0, 2.0, -3.0],
}


@settings(max_examples=40, deadline=None)
@given(
  seed=st.integers(0, 2**32 - 1),
  epsilon=st.sampled_from(EPSILONS),
  values=st.sampled_from([None, *_VALUES]),
  moved=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
)
def test_against_the_reference(seed, epsilon, values, moved):
  r = np.random.default_rng(seed)

  def tensor(shape):
    if values is None:
      return r.standard_normal(shape).astype(np.float32)
    # Infinity is no seed: its distance to itself is not a number.
    return np.asarray(r.choice(_VALUES[values], shape), np.float32)

  theta = make_tree(tensor)
  if values == 'infinite':
    theta = _normal(r)
  new = jax.tree.map(
    lambda s: np.where(r.random(s.shape) < moved, tensor(s.shape), s), theta
  )
  check(new, theta, epsilon)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), epsilon=st.sampled_from([0.03, 0.25]))
def test_bfloat16(seed, epsilon):
  r = np.random.default_rng(seed)
  theta = _normal(r, ml_dtypes.bfloat16)
  new = jax.tree.map(
    lambda s: (s + 0.01 * r.standard_normal(s.shape)).astype(s.dtype), theta
  )
  check(new, theta, epsilon)


@pytest.mark.parametrize('epsilon', [0.03, 0.25])
def test_many_steps_and_a_state_from_elsewhere(epsilon):
  r = np.random.default_rng(2)
  seed = params = _normal(r)
  method, apply = _jitted(epsilon)
  state, passes = None, []
  for step in range(12):
    size = 100.0 if step == 8 else 0.1
    new = jax.tree.map(
      lambda p, size=size: np.float32(p + size * r.standard_normal(p.shape)),
      params,
    )
    params, state = check(new, seed, epsilon, state=state)
    passes.append(int(state.passes))
    for threshold, drift in ((1, 0), (2**32 - 1, np.nan), (2**31, np.inf)):
      wrong = method.init(seed)._replace(
        thresholds=jnp.full_like(state.thresholds, threshold),
        drift=jnp.full_like(state.drift, drift),
      )
      again, _ = apply(new, seed, wrong)
      assert_same_bits(
        reference.flatten(jax.device_get(again)), reference.flatten(params)
      )


def test_without_jit():
  r = np.random.default_rng(3)
  seed, new = _normal(r), _normal(r)
  method, apply = _jitted(0.03)
  jitted = apply(new, seed, method.init(seed))
  plain = method.apply(
    *jax.tree.map(jnp.asarray, (new, seed)), method.init(seed)
  )
  for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(jitted), strict=True):
    np.testing.assert_array_equal(a, b)


def test_nan_is_the_farthest_whatever_its_sign():
  r = np.random.default_rng(4)
  seed = _normal(r)
  new = jax.tree.map(np.copy, _normal(r))
  kernel = new['encoder']['layers_1']['mlp']['wi']['kernel']
  kernel[1, 2, 3], kernel[0, 1, 2] = np.nan, -np.nan
  kernel[0, 0, 0] = np.inf
  method, apply = _jitted(0.25)
  params, _ = apply(new, seed, method.init(seed))
  kept = np.asarray(params['encoder']['layers_1']['mlp']['wi']['kernel'])
  for where in ((1, 2, 3), (0, 1, 2), (0, 0, 0)):
    assert kept[where].tobytes() == kernel[where].tobytes()
  assert np.isfinite(kept).sum() == kept.size - 3


@pytest.mark.parametrize('distance', ['inverse_relative', 'random'])
def test_stacked_layers_give_the_same_bits(distance):
  r = np.random.default_rng(5)
  values = [-1.0, -0.5, 0.5, 1.0]
  seed, new = (
    make_tree(lambda shape: np.asarray(r.choice(values, shape), np.float32))
    for _ in range(2)
  )
  method, apply = _jitted(0.25, distance)
  state = stacked_state = method.init(seed)
  stacked_seed = stacking.stack_layers(seed)
  for _ in range(2):
    params, state = apply(new, seed, state)
    stacked, stacked_state = apply(
      stacking.stack_layers(new), stacked_seed, stacked_state
    )
    unstacked = stacking.unstack_layers(jax.device_get(stacked))
    assert_same_bits(
      reference.flatten(unstacked), reference.flatten(jax.device_get(params))
    )
    for a, b in zip(state, stacked_state, strict=True):
      np.testing.assert_array_equal(a, b)


def test_random_subset_is_drawn_once():
  r = np.random.default_rng(6)
  seed = _normal(r)
  partition = reference.silos(seed)
  sizes = [sum(size for _, size in parts) for parts in partition.values()]
  budgets = dict(zip(partition, reference.budgets(sizes, 0.25), strict=True))
  masks = collections.defaultdict(list)
  for random_seed in (0, 1):
    method, apply = _jitted(0.25, 'random', random_seed)
    state = method.init(seed)
    for _ in range(3):
      new = _normal(r)
      params, state = apply(new, seed, state)
      params = jax.device_get(params)
      assert free_of_silos(params, seed) == budgets
      masks[random_seed].append(
        np.concatenate(
          [(a != b).reshape(-1) for a, b in _pairs(params, seed)]
        ).tolist()
      )
    # After the first step, found at once.
    assert int(state.passes) <= 1
  assert masks[0][0] == masks[0][1] == masks[0][2]
  assert masks[1][0] == masks[1][1]
  assert masks[0] != masks[1]


def _pairs(a, b):
  return zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)


def test_random_subset_is_uniform():
  seed = {'a': {'kernel': jnp.zeros((256, 256))}}
  masks = []
  for random_seed in range(2):
    method, apply = _jitted(0.1, 'random', random_seed)
    params, _ = apply(
      {'a': {'kernel': jnp.ones((256, 256))}}, seed, method.init(seed)
    )
    masks.append(np.asarray(params['a']['kernel']) > 0)
  k = round(0.1 * 2**16)
  assert [mask.sum() for mask in masks] == [k, k]
  # Rows, columns and the overlap of two draws, within five deviations.
  for axis in (0, 1):
    counts = np.array([mask.sum(axis) for mask in masks])
    assert np.abs(counts - 25.6).max() < 5 * np.sqrt(256 * 0.1 * 0.9)
  overlap = (masks[0] & masks[1]).sum()
  assert abs(overlap - 0.1 * k) < 5 * np.sqrt(0.1 * k)


@pytest.mark.parametrize('distance', ['absolute', 'random'])
def test_thresholds_are_reported_as_distances(distance):
  # So small that random scores at the threshold would be NaN as floats.
  method, apply = _jitted(2**-10, distance)
  r = np.random.default_rng(7)
  seed = {'a': {'kernel': jnp.zeros((256, 256))}}
  moved = r.normal(size=(256, 256)).astype(np.float32)
  _, state = apply({'a': {'kernel': moved}}, seed, method.init(seed))
  with np.errstate(all='raise'):
    threshold = method.scalars(seed, state)['threshold/a']
  if distance == 'random':
    assert threshold == pytest.approx(1 - 2**-10, abs=2**-11)
  else:
    assert (np.abs(moved) >= threshold).sum() == 64


def test_golden():
  # |θ′ − θ⁰| · |θ⁰| is 2, 0, 2, 3, 8 and 1.5, and half of the six are free:
  # 8 and 3, and the first of the two that tie at 2. θ⁰ = 0 is never free.
  seed = {'w': {'kernel': np.float32([[2, 0, -1], [0.5, 4, -1.5]])}}
  new = {'w': {'kernel': np.float32([[3, 9, 1], [6.5, 2, -2.5]])}}
  params, _ = check(new, seed, 0.5)
  assert params['w']['kernel'].tolist() == [[3, 0, -1], [6.5, 2, -1.5]]


@pytest.mark.parametrize(
  ('epsilon', 'typical', 'worst'), [(1e-4, 1, 8), (1e-2, 2, 10), (1e-1, 3, 12)]
)
def test_few_passes_once_warm(epsilon, typical, worst):
  shape = (1024, 1024)
  r = np.random.default_rng(7)
  seed = {'w': {'kernel': jnp.asarray(0.05 * r.standard_normal(shape), 'f4')}}
  mean = jnp.asarray(1e-3 * r.standard_normal(shape), jnp.float32)
  method = projection.SubsetProjection(epsilon)

  @jax.jit
  def step(params, state, key):
    noise = 5e-4 * jax.random.normal(key, shape)
    new = jax.tree.map(lambda p: p + mean + noise, params)
    return method.apply(new, seed, state)

  params, state, passes = seed, method.init(seed), []
  for i in range(24):
    params, state = step(params, state, jax.random.key(i))
    passes.append(int(state.passes))
  assert max(passes) <= worst
  assert np.median(passes[10:]) <= typical


def test_adafactor_never_learns_of_the_projection():
  optimizer = optax.adafactor(0.1, min_dim_size_to_factor=4, momentum=0.9)
  r = np.random.default_rng(8)
  seed = jax.tree.map(jnp.asarray, _normal(r))
  method = projection.SubsetProjection(0.03)

  def updated(params, gradients, state):
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

  @jax.jit
  def step(params, gradients, state, projection_state):
    params, state = updated(params, gradients, state)
    params, projection_state = method.apply(params, seed, projection_state)
    return params, state, projection_state

  params, state, projection_state = (
    seed,
    optimizer.init(seed),
    method.init(seed),
  )
  free = optimizer.init(seed)
  for _ in range(4):
    gradients = jax.tree.map(jnp.asarray, _normal(r))
    _, free = jax.jit(updated)(params, gradients, free)
    params, state, projection_state = step(
      params, gradients, state, projection_state
    )
    for a, b in _pairs(state, free):
      np.testing.assert_array_equal(a, b)
  assert sum(free_of_silos(*jax.device_get((params, seed))).values()) > 0


def test_no_projection_frees_everything():
  method = projection.NoProjection()
  new = {'w': jnp.ones(3)}
  assert method.apply(new, (), method.init(()))[0] is new
  assert not method.constrains


@pytest.mark.parametrize('epsilon', [0, -1e-3, 1.5, float('nan'), '0.1', None])
def test_epsilon_out_of_range(epsilon):
  with pytest.raises(errors.UserError, match=r'^EPSILON must be in \(0, 1\]'):
    projection.SubsetProjection(epsilon)


def test_unknown_names():
  with pytest.raises(errors.UserError, match="did you mean 'absolute'"):
    projection.SubsetProjection(0.1, 'absolut')
  with pytest.raises(errors.UserError, match="did you mean 'per_module_and_la"):
    projection.SubsetProjection(0.1, silos='per_module_layer').init({})


def test_the_example_in_the_docstring():
  for module in (method, silos):
    failed, tried = doctest.testmod(module)
    assert tried > 0
    assert failed == 0


def test_the_example_in_the_readme(repository):
  text = (repository / 'README.md').read_text()
  section = text.split('## The method in your own loop')[1].split('\n## ')[0]
  code = textwrap.dedent(
    ''.join(
      line
      for line in section.splitlines(keepends=True)
      if line.startswith('    ') or not line.strip()
    )
  )
  names = {}
  exec(code, names)
  params, seed = names['carry'][0], names['seed']
  assert (
    int(jnp.sum(params['dense']['kernel'] != seed['dense']['kernel'])) == 41
  )


@pytest.mark.parametrize('distance', ['inverse_relative', 'random'])
@pytest.mark.parametrize('stack', [False, True])
def test_no_memory_beside_the_parameters(distance, stack):
  layer = {'mlp': {'wi': {'kernel': jnp.zeros((256, 300))}}}
  seed = {'encoder': {f'layers_{i}': layer for i in range(3)}}
  if stack:
    seed = stacking.stack_layers(seed)
  method = projection.SubsetProjection(0.01, distance)
  # What training does with θ′: its memory becomes that of the result.
  apply = jax.jit(method.apply, donate_argnums=0)
  memory = apply.lower(seed, seed, method.init(seed)).compile()
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(seed))
  assert memory.memory_analysis().temp_size_in_bytes < 0.1 * size
